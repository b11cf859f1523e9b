package labtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// A Running is a router that stays.
type Running struct {
	*Pod
	Cmd *exec.Cmd

	mu      sync.Mutex
	log     bytes.Buffer
	repairs int // that were complete so far
}

// Write takes what the router logs.
func (r *Running) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := max(0, r.log.Len()-len(RepairLogged)+1) // one may come in two pieces
	_, _ = r.log.Write(b)                           // never fails
	r.repairs += bytes.Count(r.log.Bytes()[from:], []byte(RepairLogged))
	return len(b), nil
}

// Repaired returns how many repairs were complete so far.
func (r *Running) Repaired() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.repairs
}

// Logged returns what the router has logged so far.
func (r *Running) Logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// Start starts the router in a mode in which it stays, and waits until it has
// compared everything once. It is told to stop when the test ends, and has to end
// with exit code 0.
func (p *Pod) Start(mode string) *Running {
	p.Helper()
	p.Env["EGRESS_ROUTER_MODE"] = mode
	r := &Running{Pod: p, Cmd: p.Command("egress-router")}
	r.Cmd.Stderr = r
	if err := p.Lab.Start(p.Lab.Router, r.Cmd); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() {
		_ = r.Cmd.Process.Signal(syscall.SIGTERM)
		if err := r.Cmd.Wait(); err != nil {
			p.Errorf("told to stop: %v", err)
		}
		if p.Failed() {
			p.Logf("the router logged:\n%s", r.Logged())
		}
	})
	return r
}

// AwaitLog waits until the router has logged a text n times.
func (r *Running) AwaitLog(n int, text string) {
	r.Helper()
	r.Until(fmt.Sprintf("%q is logged %d times", text, n), func() bool { return strings.Count(r.Logged(), text) >= n })
}

// Until waits for a condition, longer than what comes takes on a busy machine.
func (r *Running) Until(what string, holds func() bool) {
	r.Helper()
	for begin := time.Now(); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begin) > 15*time.Second {
			r.Fatalf("not after 15 s: %s\n%s", what, r.Logged())
		}
	}
}

// Visitors are a client that connects through the pod without pause.
type Visitors struct {
	stop context.CancelFunc
	done chan struct{}

	mu     sync.Mutex
	good   []time.Time
	failed int
	wrong  []string // answers of another server, or to another source
}

// Visit begins to connect to the first destination.
func (p *Pod) Visit() *Visitors {
	ctx, cancel := context.WithCancel(p.Context())
	t := &Visitors{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		for ctx.Err() == nil {
			once, done := context.WithTimeout(ctx, 60*time.Millisecond)
			a, err := p.Lab.Ask(once, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			done()
			t.mu.Lock()
			switch {
			case err != nil:
				t.failed++
			case a.Peer.Addr() != lab.Source:
				t.wrong = append(t.wrong, fmt.Sprint(a))
			default:
				t.good = append(t.good, time.Now())
			}
			t.mu.Unlock()
			time.Sleep(time.Millisecond) // the processor is the router's too
		}
	}()
	p.Cleanup(func() { cancel(); <-t.done })
	return t
}

// Since returns how many connections were made, and failed, since the last call,
// and the longest time without one.
func (t *Visitors) Since(begin time.Time) (good, failed int, gap time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := begin
	for _, at := range append(t.good, time.Now()) {
		if at.After(begin) {
			gap = max(gap, at.Sub(last))
			last = at
		}
	}
	good, failed = len(t.good), t.failed
	t.good, t.failed = nil, 0
	return good, failed, gap
}

// WantRight ends the visits, and checks that each answer came from the server
// that was wanted, and saw the reserved address.
func (t *Visitors) WantRight(p *Pod) {
	p.Helper()
	t.stop()
	<-t.done
	if len(t.wrong) > 0 {
		p.Errorf("%d answers of another server, or to another source: %v", len(t.wrong), t.wrong[0])
	}
}

// RepairLogged is what the router logs when a repair is complete.
const RepairLogged = "reconciled"

// Settle waits until the namespace is in a state again.
func (r *Running) Settle(want string) {
	r.Helper()
	for range 20 {
		if r.State() == want {
			return
		}
	}
	r.WantState(want)
}

// Until waits for a condition, longer than what comes takes on a busy
// machine.
func (p *Pod) Until(what string, holds func() bool) {
	p.Helper()
	for begin := time.Now(); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			p.Fatalf("not after 30 s: %s", what)
		}
	}
}

// HealthAddr is where a program of a pod is asked by HTTP.
var HealthAddr = netip.AddrPortFrom(lab.RouterAddr, 9465)

// Health asks as an exec probe does, without privilege, and returns the exit code.
func (p *Pod) Health() (code int, stdout string) {
	p.Helper()
	cmd := p.Command("without-privilege", "health")
	var out bytes.Buffer
	cmd.Stdout = &out
	err := p.Lab.Run(p.Lab.Router, cmd)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), out.String()
	}
	if err != nil {
		p.Fatal(err)
	}
	return 0, out.String()
}
