package nstest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// inner is the environment variable of a test binary that a test of this file starts. Its
// value is the task of that binary.
const inner = "NSTEST_TEST_INNER"

func TestMain(m *testing.M) { nstest.Main(m) }

func TestFreshNamespaces(t *testing.T) {
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp == 0 {
		t.Errorf("links: %v, want only lo, up", links)
	}
	if os.Geteuid() != 0 {
		t.Errorf("effective user is %d, want 0", os.Geteuid())
	}
	entries, err := os.ReadDir("/run")
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 0 {
		t.Errorf("/run contains %v, want no entries", entries)
	}
	if err := os.WriteFile("/run/xtables.lock", nil, 0o600); err != nil {
		t.Error(err)
	}
	os.Remove("/run/xtables.lock")

	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(" shared:")) {
		t.Errorf("some mounts are shared:\n%s", mounts)
	}
}

// TestInner performs the task of the inner binary.
func TestInner(t *testing.T) {
	switch os.Getenv(inner) {
	case "":
		return // the outer binary
	case "fail":
		fmt.Fprintln(os.Stderr, "on stderr")
		t.Error("failing as asked")
	case "exit":
		os.Exit(7)
	case "kill":
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	case "stdin":
		text, err := io.ReadAll(os.Stdin)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(os.Stdout, "read %q\n", text)
	}
}

// innerCommand returns this binary as a first process, without the marker.
func innerCommand(t *testing.T, task, test string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.v", "-test.run=^"+test+"$")
	// With go test -cover, a binary without GOCOVERDIR prints a warning on stderr.
	cmd.Env = []string{inner + "=" + task, "GOCOVERDIR=" + t.TempDir()}
	return cmd
}

func exitCode(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit == nil {
		return 0
	}
	return exit.ExitCode()
}

func TestArgumentsStreamsAndExitCodePassed(t *testing.T) {
	if os.Getenv(inner) != "" {
		return
	}
	for _, test := range []struct {
		task           string
		code           int
		stdout, stderr string
	}{
		{task: "pass", code: 0, stdout: "--- PASS: TestInner"},
		{task: "stdin", code: 0, stdout: `read "some text"`},
		{task: "fail", code: 1, stdout: "failing as asked", stderr: "on stderr\n"},
		{task: "exit", code: 7},
		{task: "kill", code: 1, stderr: "nstest: running the tests: signal: killed\n"},
	} {
		t.Run(test.task, func(t *testing.T) {
			cmd := innerCommand(t, test.task, "TestInner")
			var stdout, stderr bytes.Buffer
			cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("some text"), &stdout, &stderr
			if code := exitCode(t, cmd.Run()); code != test.code {
				t.Errorf("exit code = %d, want %d", code, test.code)
			}
			if !strings.Contains(stdout.String(), test.stdout) {
				t.Errorf("stdout = %q, want %q in it", &stdout, test.stdout)
			}
			if stderr.String() != test.stderr {
				t.Errorf("stderr = %q, want %q", &stderr, test.stderr)
			}
		})
	}
}

// rootOfMachine reports whether user ids other than 0 exist. If not, an ordinary user
// started the tests, and every test shows that root is not needed.
func rootOfMachine(t *testing.T) bool {
	t.Helper()
	uids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(uids)), " ") == "0 0 4294967295"
}

// asNobody makes cmd a process of an ordinary user. It copies the binary into a directory
// that this user can read.
func asNobody(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	text, err := os.ReadFile(cmd.Path)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/run", "nstest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd.Path, cmd.Dir = filepath.Join(dir, "test"), dir
	if err := os.WriteFile(cmd.Path, text, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

func TestWithoutRoot(t *testing.T) {
	if os.Getenv(inner) != "" || !rootOfMachine(t) {
		return
	}
	cmd := innerCommand(t, "pass", "TestFreshNamespaces")
	asNobody(t, cmd)
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestFreshNamespaces")) {
		t.Errorf("tests of an ordinary user: %v\n%s", err, out)
	}
}

// A limit of zero network namespaces, set in a user namespace, makes the kernel refuse.
func TestRefusedNamespacesFail(t *testing.T) {
	if os.Getenv(inner) != "" {
		return
	}
	cmd := innerCommand(t, "pass", "TestInner")
	cmd.Args = append([]string{"sh", "-c", `echo 0 >/proc/sys/user/max_net_namespaces && exec "$0" "$@"`}, cmd.Args...)
	cmd.Path = "/bin/sh"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{Size: 1}},
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if code := exitCode(t, cmd.Run()); code != 1 {
		t.Errorf("exit code = %d, want 1", code)
	}
	if stdout.Len() != 0 {
		t.Errorf("tests ran or were skipped:\n%s", &stdout)
	}
	for _, want := range []string{"nstest: creating network and mount namespaces", "max_net_namespaces"} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("stderr = %q, want %q in it", &stderr, want)
		}
	}
}
