package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// TestMain makes the test binary the program, under the name egress-lab, and runs the tests
// in namespaces of their own.
func TestMain(m *testing.M) {
	testscript.Main(nstest.M{Tests: m}, map[string]func(){"egress-lab": main})
}

// router returns the path of an egress-router built from this tree: a copy for this test,
// which every user can execute.
func router(t *testing.T) string {
	t.Helper()
	path, err := buildRouter()
	if err != nil {
		t.Fatal(err)
	}
	return copyProgram(t, path, "egress-router")
}

var buildRouter = sync.OnceValues(func() (string, error) {
	// The tests' own /run ends with them. egress-lab has a /run of its own.
	directory, err := os.MkdirTemp("/run", "egress-router-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(directory, "egress-router")
	build := exec.Command("go", "build", "-o", path, "../egress-router")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	return path, nil
})

// copyProgram copies a program into a directory that every user may enter.
func copyProgram(t *testing.T, path, name string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return writeProgram(t, text, name)
}

func writeProgram(t *testing.T, text []byte, name string) string {
	t.Helper()
	directory, err := os.MkdirTemp("", "egress-lab-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(directory) })
	path := filepath.Join(directory, name)
	if err := errors.Join(os.Chmod(directory, 0o755), os.WriteFile(path, text, 0o755)); err != nil {
		t.Fatal(err)
	}
	return path
}

// labCommand returns this program as a user starts it: without the marker of the tests'
// namespaces.
func labCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("egress-lab")
	if err != nil {
		t.Fatal(err)
	}
	// A limit for a command that hangs, below the time limit of the tests.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, path, args...)
	// With go test -cover, a binary without GOCOVERDIR prints a warning on stderr.
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + t.TempDir(), "GOCOVERDIR=" + t.TempDir()}, nstest.Environment()...)
	cmd.WaitDelay = time.Minute
	return cmd
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd) (code int, stdout, stderr string) {
	t.Helper()
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), log.String()
}

func TestDemo(t *testing.T) {
	// With IPv6 there is a second pod, whose router is ready for one family after the other.
	answers, ready, six := 5, 2, ""
	if link.HasIPv6() {
		answers, ready, six = 9, 4, "\n  tcp 8080   [2001:db8::26]:80   [2001:db8::26]:80   2001:db8:12::99   ok\n"
	}
	code, stdout, stderr := finish(t, labCommand(t, "demo", router(t)))
	if code != 0 || stderr != "" || !strings.HasSuffix(stdout, fmt.Sprintf("\ndemo: all %d answers as expected\n", answers)) {
		t.Errorf("exit code %d, stderr %q, stdout:\n%s", code, stderr, stdout)
	}
	for _, want := range []string{
		"to tcp port 80 of the pod: refused.\n",
		"\n  tcp 8443   203.0.113.26:443    203.0.113.26:443    192.168.12.99   ok\n",
		"\n  udp 53     203.0.113.27:53     203.0.113.27:53     192.168.12.99   ok\n",
		six,
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("stdout lacks %q:\n%s", want, stdout)
		}
	}
	// On a busy machine IPv6 may be ready with IPv4.
	if n := strings.Count(stdout, "msg=ready"); n != ready && (ready < 4 || n != ready-1) {
		t.Errorf("the router was ready %d times, want %d:\n%s", n, ready, stdout)
	}
}

// Each pod of the demo has the backend that is asked for.
func TestDemoWithBackend(t *testing.T) {
	for backend, logged := range map[string]string{"iptables": `"iptables v`, "nftables": "nftables"} {
		t.Run(backend, func(t *testing.T) {
			code, stdout, stderr := finish(t, labCommand(t, "demo", router(t), backend))
			if code != 0 || stderr != "" {
				t.Errorf("exit code %d, stderr %q, stdout:\n%s", code, stderr, stdout)
			}
			pods := 1
			if link.HasIPv6() {
				pods = 2
			}
			for _, want := range []string{"\n  EGRESS_ROUTER_BACKEND=" + backend + "\n", ` msg="rules loaded" backend=` + logged} {
				if n := strings.Count(stdout, want); n < pods {
					t.Errorf("stdout has %q %d times, want at least %d:\n%s", want, n, pods, stdout)
				}
			}
		})
	}
}

// Every fault is printed, and makes the exit code 1.
func TestDemoFindsFaults(t *testing.T) {
	script := func(text string) string { return writeProgram(t, []byte("#!/bin/sh\n"+text), "router") }
	for _, test := range []struct {
		name, program, stdout, stderr string
	}{
		{"does nothing", "/bin/true", "  tcp 80     203.0.113.25:80     nobody: refused   -            WRONG\n", "demo: 5 of 5 answers are wrong; "},
		{"fails", script("echo because >&2; exit 3\n"), "\n  because\n", "demo: the router failed with exit code 3; "},
		{"changes something each time", script("echo 'msg=\"rules loaded\"' >&2\nexec " + router(t)), "WRONG: the second run logged \"rules loaded\".\n", `demo: the second run logged "rules loaded"`},
		{"other server", script(`EGRESS_DESTINATION="${EGRESS_DESTINATION%27}26" exec ` + router(t)), "nobody: refused", "demo: 2 of 5 answers are wrong\n"},
		{"other source", script("EGRESS_SOURCE=192.168.12.98/24 exec " + router(t)), "   192.168.12.98   WRONG\n", "demo: 5 of 5 answers are wrong\n"},
		{"is not there", "/nowhere/egress-router", "", "hint: make build creates bin/egress-router\ndemo: finding the router: stat /nowhere/egress-router: no such file or directory\n"},
		{"is not a program", "/etc/passwd", "", "demo: finding the router: \"/etc/passwd\" is not an executable file\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			code, stdout, stderr := finish(t, labCommand(t, "demo", test.program))
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if !strings.Contains(stdout, test.stdout) || strings.Contains(stdout, "demo: all") {
				t.Errorf("stdout lacks %q, or claims success:\n%s", test.stdout, stdout)
			}
			if !strings.Contains(stderr, test.stderr) {
				t.Errorf("stderr = %q, want %q in it", stderr, test.stderr)
			}
		})
	}
}

func TestInvalidArgumentsPrintUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"demo"}, {"show", "/bin/true"}, {"demo", "/bin/true", "load"}, {"demo", "/bin/true", "nftables", "more"}, {"bench"}, {"bench", "/bin/true", "all"}, {"bench", "/bin/true", "load", "more"}, {"faults"}, {"faults", "/bin/true", "none"}, {"faults", "/bin/true", "0"}, {"faults", "/bin/true", "1", "2", "3"}} {
		code, stdout, stderr := finish(t, labCommand(t, args...))
		if code != 2 || stdout != "" || !strings.HasSuffix(stderr, usage) {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q; want the usage", args, code, stdout, stderr)
		}
	}
}

// An ordinary user needs only user namespaces. If an ordinary user runs this test, there is
// no other user to become, and TestDemo has shown the same.
func TestDemoWithoutRoot(t *testing.T) {
	uids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(strings.Fields(string(uids)), " ") != "0 0 4294967295" {
		return
	}
	cmd := labCommand(t, "demo", router(t))
	cmd.Path = copyProgram(t, cmd.Path, "egress-lab")
	cmd.Dir = filepath.Dir(cmd.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if code, stdout, stderr := finish(t, cmd); code != 0 {
		t.Errorf("exit code %d, stderr %q, stdout:\n%s", code, stderr, stdout)
	}
}

// After a signal at any time there is no process, namespace, link or file of the program.
func TestInterruptedLeavesNothing(t *testing.T) {
	for _, name := range []string{"demo", "bench"} {
		for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
			t.Run(name+"/"+s.String(), func(t *testing.T) { interrupt(t, name, s) })
		}
	}
}

func interrupt(t *testing.T, name string, s syscall.Signal) {
	started := filepath.Join(t.TempDir(), "started")
	// A router that hangs, and has a child process that hangs.
	cmd := labCommand(t, name, writeProgram(t, fmt.Appendf(nil, "#!/bin/sh\nsleep 600 &\n>%s\nwait\n", started), "router"))
	tmp := t.TempDir()
	cmd.Env = append(cmd.Env, "TMPDIR="+tmp)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the router has started", func() bool { _, err := os.Stat(started); return err == nil })
	processes := descendants(t, cmd.Process.Pid)
	spaces := namespaces(t, processes)
	// The second process of egress-lab, the script and its sleep; the namespace
	// of the second process and the five of the lab.
	if len(processes) < 3 || len(spaces) < 6 {
		t.Fatalf("processes %v in namespaces %v, want 3 and 6", processes, spaces)
	}

	if err := cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // cmd.ProcessState has the result
	if s == syscall.SIGKILL {
		if cmd.ProcessState.Exited() {
			t.Errorf("%s, want killed", cmd.ProcessState)
		}
	} else if cmd.ProcessState.ExitCode() != 1 || stderr.String() != name+": interrupted\n" {
		t.Errorf("%s, stderr %q; want exit code 1 and the reason", cmd.ProcessState, &stderr)
	}
	eventually(t, "its processes have ended", func() bool {
		return !slices.ContainsFunc(processes, func(p process) bool { return p.alive() })
	})
	eventually(t, "nothing holds its namespaces", func() bool {
		held := namespaces(t, everyProcess(t))
		return !slices.ContainsFunc(spaces, func(n string) bool { return slices.Contains(held, n) })
	})
	links, err := net.Interfaces()
	if err != nil || len(links) != 1 {
		t.Errorf("links %v (%v), want only lo", links, err)
	}
	for _, directory := range []string{"/run/netns", tmp} {
		if files, err := os.ReadDir(directory); len(files) > 0 || err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s contains %v (%v), want no files", directory, files, err)
		}
	}
}

// eventually waits for a condition that the kernel establishes in the background.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(lab.Patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timeout after %s: %s", lab.Patience, what)
		}
	}
}

// A process is a running or ended process; its start time distinguishes it from a later
// process with the same number.
type process struct {
	pid, parent int
	state       string
	start       string
}

// everyProcess lists the processes of the machine (proc_pid_stat(5)).
func everyProcess(t *testing.T) []process {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var all []process
	for _, f := range files {
		if p, ok := readProcess(f); ok {
			all = append(all, p)
		}
	}
	return all
}

func readProcess(file string) (process, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return process{}, false // it has ended
	}
	// The name, in parentheses, may contain any character.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
	if err != nil || len(fields) < 20 {
		return process{}, false
	}
	parent, err := strconv.Atoi(fields[1])
	return process{pid: pid, parent: parent, state: fields[0], start: fields[19]}, err == nil
}

// alive reports whether the process runs: a zombie does not.
func (p process) alive() bool {
	now, ok := readProcess(fmt.Sprintf("/proc/%d/stat", p.pid))
	return ok && now.start == p.start && now.state != "Z" && now.state != "X"
}

// descendants lists the children of a process, their children, and so on.
func descendants(t *testing.T, pid int) []process {
	t.Helper()
	all := everyProcess(t)
	family := []int{pid}
	var found []process
	for i := 0; i < len(family); i++ {
		for _, p := range all {
			if p.parent == family[i] {
				family, found = append(family, p.pid), append(found, p)
			}
		}
	}
	return found
}

// namespaces lists the network namespaces other than the tests' own that
// processes are in or hold open.
func namespaces(t *testing.T, processes []process) []string {
	t.Helper()
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range processes {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.pid)) // the pattern is a good one
		for _, link := range append(links, fmt.Sprintf("/proc/%d/ns/net", p.pid)) {
			// An error means that the process has ended.
			if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, "net:[") && to != own && !slices.Contains(found, to) {
				found = append(found, to)
			}
		}
	}
	return found
}
