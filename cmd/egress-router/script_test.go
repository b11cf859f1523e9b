package main

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
)

var update = flag.Bool("update", false, "rewrite what testdata/script expects to be printed")

// TestScripts runs testdata/script, which has the exact output and exit codes of
// the program.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "../../testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			env.Setenv("NL", "\n")
			env.Values[labKey{}] = new(*lab.Lab)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"last":                last,
			"refused":             refused,
			"exits":               exits,
			"lab":                 startLab,
			"await-default-route": awaitDefaultRoute,
			"signal":              signalAll,
			"await-idle":          awaitIdle,
			"await-listener":      awaitListener,
			"await-healthy":       awaitHealthy,
			"masked":              masked,
		},
	})
}

func arguments(ts *testscript.TestScript, neg bool, args []string, usage string) {
	if neg || len(args) != len(strings.Fields(usage))-1 {
		ts.Fatalf("usage: %s", usage)
	}
}

// last checks the last line on stderr of the command before.
func last(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "last REGEXP")
	matchLast(ts, ts.ReadFile("stderr"), args[0])
}

func matchLast(ts *testscript.TestScript, stderr, want string) {
	lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	if got := lines[len(lines)-1]; !regexp.MustCompile("^" + want + "$").MatchString(got) {
		ts.Fatalf("the last line on stderr is %q, want %q", got, want)
	}
}

// refused runs the program, which has to print a sentence as its last line, a hint
// before it, and nothing on stdout.
func refused(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "refused SENTENCE HINT")
	if err := ts.Exec("egress-router"); err == nil {
		ts.Fatalf("exit code 0, want 1 and %q", args[0])
	}
	if out := ts.ReadFile("stdout"); out != "" {
		ts.Fatalf("stdout %q, want nothing", out)
	}
	stderr := ts.ReadFile("stderr")
	matchLast(ts, stderr, regexp.QuoteMeta(args[0]))
	if !strings.Contains(stderr, args[1]) {
		ts.Fatalf("stderr lacks %q:\n%s", args[1], stderr)
	}
}

// exits checks the exit code of a command.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARGUMENT...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	if exit, ok := err.(*exec.ExitError); err != nil && ok && fmt.Sprint(exit.ExitCode()) == args[0] {
		return
	}
	ts.Fatalf("%v: %v, want exit code %s", args[1:], err, args[0])
}

// startLab makes a lab for the script and sets ROUTER to the file of the
// router's namespace. Scripts run at the same time: servers and their clients run in
// that namespace.
func startLab(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "lab")
	l, err := lab.New(lab.Options{})
	ts.Check(err)
	ts.Defer(l.Close)
	ts.Setenv("ROUTER", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.Router.Fd()))
	*ts.Value(labKey{}).(**lab.Lab) = l
}

// labKey is where a script's lab is kept.
type labKey struct{}

// awaitDefaultRoute waits until the router has done the last change of routes.
func awaitDefaultRoute(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "await-default-route")
	l := *ts.Value(labKey{}).(**lab.Lab)
	await(ts, "forwarding and a default route by macvlan0", func() bool {
		found := false
		ts.Check(l.Router.Do(func() error {
			kernel, err := link.Open()
			if err != nil {
				return err
			}
			defer kernel.Close()
			s, err := kernel.Observe(plan.Network{Interface: "macvlan0"})
			for _, r := range s.Routes {
				found = found || s.Forwards && r.IsDefault() && r.Gateway == netip.MustParseAddr("192.168.12.1")
			}
			return err
		}))
		return found
	})
}

// awaitIdle waits until the commands in the background have executed the program and
// all its threads have slept for a while, so that the start is complete.
func awaitIdle(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "await-idle")
	for _, cmd := range ts.BackgroundCmds() {
		idle := 0
		await(ts, "an idle process", func() bool {
			idle++
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
			ts.Check(err)
			threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", cmd.Process.Pid))
			ts.Check(err)
			for _, thread := range threads {
				if stat, err := os.ReadFile(thread); err == nil && !strings.Contains(string(stat), ") S ") {
					idle = 0
				}
			}
			if !strings.HasPrefix(string(name), "egress-router\x00") {
				idle = 0
			}
			return idle > 30
		})
	}
}

// awaitListener waits until a program in the router's namespace listens.
func awaitListener(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "await-listener ADDRESS")
	l := *ts.Value(labKey{}).(**lab.Lab)
	await(ts, "a listener at "+args[0], func() bool {
		conn, err := l.Dial(context.Background(), l.Router, "tcp", netip.MustParseAddrPort(args[0]))
		if err == nil {
			ts.Check(conn.Close())
		}
		return err == nil
	})
}

// awaitHealthy waits until all programs in the router's namespace are ready, including
// the named one, if any.
func awaitHealthy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 1 {
		ts.Fatalf("usage: await-healthy [PROGRAM]")
	}
	await(ts, "a program that is ready", func() bool {
		err := ts.Exec("nsenter", "--net="+ts.Getenv("ROUTER"), "egress-router", "health")
		return err == nil && (len(args) == 0 || strings.Contains(ts.ReadFile("stdout"), args[0]+" "))
	})
}

// masked writes the output of health to the file masked, without the parts that differ
// from run to run: the version, the ages, and the widths that follow from them.
func masked(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "masked")
	text := ts.ReadFile("stdout")
	for _, mask := range []struct{ what, by string }{
		{`(?m)^([a-z-]+)( [^ :]+)?: `, "$1 VERSION: "},
		{`\b(\d+[dhms])+\b`, "AGE"},
		{`(\S) +`, "$1 "},
	} {
		text = regexp.MustCompile(mask.what).ReplaceAllString(text, mask.by)
	}
	ts.Check(os.WriteFile(ts.MkAbs("masked"), []byte(text), 0o644)) //nolint:gosec // as everything of a script
}

// signalAll sends a signal to every command in the background.
func signalAll(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, "signal TERM|INT|HUP")
	signal, known := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}[args[0]]
	if !known {
		ts.Fatalf("usage: signal TERM|INT|HUP")
	}
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(signal))
	}
}

func await(ts *testscript.TestScript, what string, is func() bool) {
	if !labtest.Poll(is) {
		ts.Fatalf("timeout after %v: %s", labtest.Patience, what)
	}
}
