package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// serve serves a report until the test ends, or the function is called.
func serve(t *testing.T, p place, r Report) (log *book, stop func()) {
	t.Helper()
	log = new(book)
	ctx, cancel := context.WithCancel(t.Context())
	wait := p.serve(ctx, r.Program, func() Report { return r }, log.logger())
	stop = func() { cancel(); wait() }
	t.Cleanup(stop)
	return log, stop
}

func wantReports(t *testing.T, p place, want ...Report) {
	t.Helper()
	got, err := p.askAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("reports (- want, + got):\n%s", diff)
	}
}

func sockets(t *testing.T, p place) []string {
	t.Helper()
	names, err := filepath.Glob(p.dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestServe(t *testing.T) {
	p := newPlace(t)
	var none *NoProgramError
	if _, err := p.askAll(t.Context()); !errors.As(err, &none) {
		t.Errorf("without a program: %v", err)
	}
	_, stop := serve(t, p, report(Router))
	wantReports(t, p, report(Router))

	// The reports of several programs are sorted by name.
	_, stopDNS := serve(t, p, report(DNSProxy))
	wantReports(t, p, report(DNSProxy), report(Router))
	stop()
	wantReports(t, p, report(DNSProxy))
	stopDNS()
	if left := sockets(t, p); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Every user may connect, regardless of the program's umask.
func TestModes(t *testing.T) {
	p := newPlace(t)
	old := unix.Umask(0o077)
	serve(t, p, report(Router))
	unix.Umask(old)
	for name, want := range map[string]os.FileMode{p.dir: 0o755 | os.ModeDir, sockets(t, p)[0]: 0o666 | os.ModeSocket} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
}

// Programs in another network namespace with the same /run are not asked.
func TestOtherNamespace(t *testing.T) {
	p := newPlace(t)
	serve(t, p, report(Router))
	other := p
	other.netns = "/proc/self/ns/mnt" // another number
	other.abstract += "other/"
	serve(t, other, report(HTTPProxy))
	if n := len(sockets(t, p)); n != 2 {
		t.Errorf("%d sockets, want 2", n)
	}
	wantReports(t, p, report(Router))
	wantReports(t, other, report(HTTPProxy))
}

// The socket of a process that was killed counts as no program.
func TestStaleSocket(t *testing.T) {
	p := newPlace(t)
	_, stop := serve(t, p, report(Router))
	name := sockets(t, p)[0]
	stop()
	l, err := listenUnix(name)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close() // the file stays
	if _, err := p.askAll(t.Context()); !errors.As(err, new(*NoProgramError)) {
		t.Errorf("asking by a stale socket: %v", err)
	}
	serve(t, p, report(Router))
	wantReports(t, p, report(Router))
	if left := sockets(t, p); len(left) != 1 {
		t.Errorf("sockets: %v", left)
	}
}

// A second process of a program leaves the socket of the first one alone, logs that, and
// answers after the end of the first one.
func TestSecondProcess(t *testing.T) {
	for _, dir := range []string{"", "/proc/egress-router"} {
		p := newPlace(t)
		if dir != "" {
			p.dir = dir // abstract
		}
		log, stop := serve(t, p, report(Router))
		second := report(Router)
		second.Version = "v2"
		log2, stop2 := serve(t, p, second)
		if !strings.Contains(log2.String(), `level=WARN msg="health socket in use" program=router`) || strings.Contains(log.String(), "level=WARN") {
			t.Errorf("log of the second: %s, of the first: %s", log2, log)
		}
		wantReports(t, p, report(Router))
		stop()
		for begin := time.Now(); ; {
			if got, err := p.askAll(t.Context()); err == nil && len(got) == 1 && got[0].Version == "v2" {
				break
			}
			if time.Since(begin) > time.Minute {
				t.Fatal("the second process does not answer after the end of the first one")
			}
		}
		_, stop3 := serve(t, p, report(Router)) // ends without the socket
		stop3()
		wantReports(t, p, second)
		stop2()
		if left := sockets(t, p); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// Of many sockets that get the name at the same time, one has it, and answers.
func TestGiveTogether(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "router.sock")
	var all sync.WaitGroup
	var first atomic.Int32
	for i := range 20 {
		made := fmt.Sprintf("%s.%d", name, i)
		l, err := listenUnix(made)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		all.Go(func() {
			switch err := give(made, name); {
			case err == nil:
				first.Add(1)
			case !errors.Is(err, errInUse):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := first.Load(); n != 1 || !answers(name) {
		t.Errorf("%d have the name, want 1; answers: %v", n, answers(name))
	}
}

// Clients that do not read do not delay others, and lose their connection at the
// time limit.
func TestStuckClients(t *testing.T) {
	big := report(Router)
	for range 5 {
		big.Checks = append(big.Checks, Check{Name: "big", Detail: strings.Repeat("x", 100_000)}) // more than a socket holds
	}
	stuck := func(t *testing.T, p place, n int) {
		t.Helper()
		for range n {
			conn, err := net.Dial("unix", sockets(t, p)[0])
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
		}
	}
	t.Run("few", func(t *testing.T) {
		p := newPlace(t)
		serve(t, p, big)
		stuck(t, p, maxAnswers-1)
		wantReports(t, p, big)
	})
	t.Run("many", func(t *testing.T) {
		p := newPlace(t)
		p.write = 50 * time.Millisecond
		_, stop := serve(t, p, big)
		stuck(t, p, 3*maxAnswers)
		for {
			// Its own time may be too short too on a busy machine.
			if got, err := p.askAll(t.Context()); err == nil && len(got) == 1 {
				break
			}
		}
		stop()
	})
}

// A program that hangs is an error, and the others answer.
func TestStuckProgram(t *testing.T) {
	p := newPlace(t)
	stuck := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	wait := p.serve(ctx, Router, func() Report { <-stuck; return Report{} }, new(book).logger())
	defer func() { close(stuck); cancel(); wait() }()
	serve(t, p, report(DNSProxy))
	var got []Report
	var err error
	// The other program may need more time on a busy machine.
	for p.ask = 100 * time.Millisecond; p.ask < 2*patience; p.ask *= 2 {
		if got, err = p.askAll(t.Context()); len(got) > 0 {
			break
		}
	}
	if len(got) != 1 || got[0].Program != DNSProxy {
		t.Errorf("reports: %v, %v", got, err)
	}
	failed, ok := errors.AsType[*AskError](err)
	if !ok || !strings.HasSuffix(err.Error(), ".sock\": no answer in "+p.ask.String()) || failed.Hint(nil) == "" {
		t.Errorf("error: %v", err)
	}
}

// If the directory cannot be created, the sockets are abstract.
func TestAbstract(t *testing.T) {
	p := newPlace(t)
	p.dir = "/proc/egress-router"
	log, stop := serve(t, p, report(Router))
	if !strings.Contains(log.String(), "level=DEBUG") || strings.Contains(log.String(), "level=WARN") {
		t.Errorf("log: %s", log)
	}
	serve(t, p, report(HTTPProxy))
	wantReports(t, p, report(HTTPProxy), report(Router))
	stop()
	wantReports(t, p, report(HTTPProxy))

	// Sockets in the file system come first.
	inFile := p
	inFile.dir = newPlace(t).dir
	serve(t, inFile, report(DNSProxy))
	wantReports(t, inFile, report(DNSProxy))
}

// Without /proc the socket is abstract, since the namespace has no ID.
func TestNoProc(t *testing.T) {
	p := newPlace(t)
	p.netns = "/nowhere"
	log, _ := serve(t, p, report(Router))
	if !strings.Contains(log.String(), "reading the network namespace ID") {
		t.Errorf("log: %s", log)
	}
	wantReports(t, p, report(Router))
}

// An abstract socket is reachable only in its network namespace.
func TestAbstractOtherNamespace(t *testing.T) {
	p := newPlace(t)
	p.dir = "/proc/egress-router"
	serve(t, p, report(Router))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestAskedElsewhere$", "-test.v")
	cmd.Env = append(os.Environ(), "ABSTRACT="+p.abstract)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestAskedElsewhere(t *testing.T) {
	p := newPlace(t)
	if p.abstract = os.Getenv("ABSTRACT"); p.abstract == "" {
		return // it is for TestAbstractOtherNamespace
	}
	p.dir = "/proc/egress-router"
	if got, err := p.askAll(t.Context()); !errors.As(err, new(*NoProgramError)) {
		t.Errorf("asked from another namespace: %v, %v", got, err)
	}
}

// An answer that is no report is an error.
func TestInvalidReport(t *testing.T) {
	p := newPlace(t)
	_, stop := serve(t, p, report(Router))
	name := sockets(t, p)[0]
	stop()
	l, err := listenUnix(name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("how are you?"))
			_ = conn.Close()
		}
	}()
	if got, err := p.askAll(t.Context()); !errors.As(err, new(*AskError)) {
		t.Errorf("reports %v, error %v", got, err)
	}
}
