package cli

import (
	"os"
	"strings"
	"unicode/utf8"

	"github.com/egress-router/egress-router/internal/config"
)

// TerminationLog is where a container says why it ended (Kubernetes
// documentation, "Customizing the termination message"; it is the default of
// terminationMessagePath). The kubelet makes the file, which any user of the
// container may write, anew for each start, and shows what it holds as the
// container's message.
const TerminationLog = "/dev/termination-log"

// maxTermination is how much the kubelet reads of it, in bytes
// (MaxContainerTerminationMessageLength in pkg/kubelet/container/runtime.go).
const maxTermination = 4096

// endsContainer reports whether an error of a command is why a container ended.
// It is not where the command is one that others call, in a container that goes
// on (health), or that touches nothing (plan, unit-test); and being told to stop
// is no fault of the pod.
func endsContainer(c command, p Process, err error) bool {
	return c.mode != nil && c.mode(p) != string(config.UnitTest) && !stopped(err)
}

// leave writes why the program ends to a file. Outside of Kubernetes there is
// none, and none is made; what stands there and is no file is left alone. What
// goes wrong is not said: the text is on stderr already.
func leave(file, text string) {
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

// lastLines returns the end of a text as the kubelet can take it: whole lines,
// or the end of the last one if that alone is too long, and in UTF-8 throughout,
// as a string of the Kubernetes API is.
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
