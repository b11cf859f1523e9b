package cli

import (
	"os"
	"strings"
	"unicode/utf8"

	"github.com/egress-router/egress-router/internal/config"
)

// TerminationLog is the file for a container's last error (Kubernetes documentation,
// "Customizing the termination message"; it is the default of
// terminationMessagePath). The kubelet creates it for each start, writable for any
// user of the container, and displays its content as the container's message.
const TerminationLog = "/dev/termination-log"

// maxTermination is the number of bytes that the kubelet reads of it
// (MaxContainerTerminationMessageLength in pkg/kubelet/container/runtime.go).
const maxTermination = 4096

// endsContainer reports whether an error of a command ends a container. It does not
// for a command that others call in a running container (health), or that changes
// nothing (plan, unit-test); and an interruption is not the pod's failure.
func endsContainer(c command, p Process, err error) bool {
	return c.mode != nil && c.mode(p) != string(config.UnitTest) && !stopped(err)
}

// writeTermination writes text to a regular file, if it exists. Outside of Kubernetes
// it does not, and is not created. Errors are ignored, since stderr has the text.
func writeTermination(file, text string) {
	if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
		return
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.WriteString(lastLines(text, maxTermination))
}

// lastLines returns the end of a text that the kubelet accepts: whole lines, or the
// end of the last line if it alone is too long, and valid UTF-8 throughout, as a
// string of the Kubernetes API must be.
func lastLines(text string, limit int) string {
	text = strings.ToValidUTF8(text, string(utf8.RuneError))
	cut := len(text) - limit
	if cut <= 0 {
		return text
	}
	if i := strings.IndexByte(text[cut-1:], '\n'); i >= 0 && cut+i < len(text) {
		return text[cut+i:]
	}
	for !utf8.RuneStart(text[cut]) {
		cut++
	}
	return text[cut:]
}
