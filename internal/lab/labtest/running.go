package labtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// RepairLogged is the router's log message at the end of a repair.
const RepairLogged = "msg=reconciled"

// A Running is a router that stays.
type Running struct {
	*Pod
	Cmd *exec.Cmd

	terminate sync.Once // a second SIGTERM would end the router at once

	mu  sync.Mutex
	log bytes.Buffer
}

// Terminate sends a SIGTERM, for a test that checks what the router does before it ends.
func (r *Running) Terminate() {
	r.terminate.Do(func() { _ = r.Cmd.Process.Signal(syscall.SIGTERM) })
}

// Write appends to the log of the router.
func (r *Running) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(b)
}

// Logged returns the log of the router so far.
func (r *Running) Logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// Repaired returns how many repairs the router has logged so far.
func (r *Running) Repaired() int { return strings.Count(r.Logged(), RepairLogged) }

// Start starts the router in a mode in which it stays. When the test ends, the
// router gets a SIGTERM and has to end with exit code 0. A test that failed then
// prints the end of its log.
func (p *Pod) Start(mode string) *Running {
	p.Helper()
	p.Env["EGRESS_ROUTER_MODE"] = mode
	return p.StartCommand("egress-router")
}

// StartCommand starts another command of the router likewise.
func (p *Pod) StartCommand(name string) *Running {
	p.Helper()
	r := &Running{Pod: p, Cmd: p.Command(name)}
	r.Cmd.Stderr = r
	if err := p.Lab.Start(p.Lab.Router, r.Cmd); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() {
		r.Terminate()
		late := time.AfterFunc(Patience, func() { _ = r.Cmd.Process.Kill() })
		defer late.Stop()
		if err := r.Cmd.Wait(); err != nil {
			p.Errorf("after SIGTERM: %v", err)
		}
		if p.Failed() {
			p.Logf("log of the router:\n%s", Tail(r.Logged()))
		}
	})
	return r
}

// AwaitLog waits until the router has logged a text n times.
func (r *Running) AwaitLog(n int, text string) {
	r.Helper()
	r.Until(fmt.Sprintf("%q is logged %d times", text, n), func() bool { return strings.Count(r.Logged(), text) >= n })
}

// AwaitAfter waits until the router has logged a text after the last of another one, however
// often each of them came before: a busy machine adds pairs of them.
func (r *Running) AwaitAfter(last, text string) {
	r.Helper()
	r.Until(fmt.Sprintf("%q is logged after the last %q", text, last), func() bool {
		log := r.Logged()
		i := strings.LastIndex(log, last)
		return i >= 0 && strings.Contains(log[i+len(last):], text)
	})
}

// Settle waits until the namespace is in a state again.
func (r *Running) Settle(want string) {
	r.Helper()
	var got string
	if !Poll(func() bool {
		var err error
		if got, err = r.state(); err != nil {
			got = err.Error() // such as a table that was replaced meanwhile
		}
		return err == nil && got == want
	}) {
		r.Errorf("state after %v (-want +got):\n%s", Patience, diff(want, got))
	}
}

// HealthAddr is where a program of a pod serves health by HTTP.
var HealthAddr = netip.AddrPortFrom(lab.RouterAddr, 9465)

// Health asks as an exec probe does, without privilege, and returns the exit code.
// It asks again if a program does not answer in time, as on a busy machine.
func (p *Pod) Health() (code int, stdout string) {
	p.Helper()
	var r Result
	p.Until("programs answer for their health", func() bool {
		r = p.Exec("without-privilege", "health")
		return !strings.Contains(r.Stderr, "no answer in ")
	})
	return r.Code, r.Stdout
}

// Metric returns a value of /metrics, asked from the cluster side at HealthAddr.
func (p *Pod) Metric(name string) int {
	p.Helper()
	text := p.Metrics()
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				p.Fatal(err)
			}
			return int(n)
		}
	}
	p.Fatalf("/metrics lacks %s:\n%s", name, text)
	return 0
}

// Metrics returns the page /metrics.
func (p *Pod) Metrics() string {
	p.Helper()
	return p.Page("/metrics")
}

// Page returns a page of the health endpoint. It asks again after a connection without an
// answer: the endpoint ends one whose request takes long, as on a machine that has stood still.
func (p *Pod) Page(path string) string {
	p.Helper()
	var text []byte
	p.Until(path+" answers", func() bool {
		conn := p.Dial(p.Lab.Client, "tcp", HealthAddr)
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: pod\r\n\r\n", path)
		var err error
		text, err = io.ReadAll(conn)
		return err == nil && len(text) > 0
	})
	return string(text)
}

// Comparisons returns the number of comparisons by the router so far, from /metrics.
func (p *Pod) Comparisons() int { return p.Metric("egress_router_comparisons_total") }

// AwaitComparisons waits for n more comparisons.
func (r *Running) AwaitComparisons(n int) {
	r.Helper()
	for want := r.Comparisons() + n; r.Comparisons() < want; {
		next := r.Comparisons() + 1
		r.Until("one more comparison", func() bool { return r.Comparisons() >= next })
	}
}

// Visitors are a client that connects through the pod without pause.
type Visitors struct {
	p    *Pod
	stop context.CancelFunc
	done chan struct{}

	mu     sync.Mutex
	good   []time.Time
	failed int
	ever   bool     // one was good
	wrong  []string // answers of another server, or to another source
}

// Visit begins to connect to the first destination.
func (p *Pod) Visit() *Visitors {
	ctx, cancel := context.WithCancel(p.Context())
	v := &Visitors{p: p, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(v.done)
		// A connection that is lost is given up long before TCP would try again,
		// but not so soon that a busy machine completes none.
		const shortest, longest = 60 * time.Millisecond, 4 * time.Second
		for patience := shortest; ctx.Err() == nil; {
			once, done := context.WithTimeout(ctx, patience)
			a, err := p.Lab.Ask(once, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			done()
			v.mu.Lock()
			switch {
			case err != nil:
				v.failed++
				patience = min(2*patience, longest)
			case a.Peer.Addr() != lab.Source:
				v.wrong = append(v.wrong, fmt.Sprint(a))
			default:
				v.good, v.ever = append(v.good, time.Now()), true
				patience = max(patience*3/4, shortest)
			}
			v.mu.Unlock()
			time.Sleep(time.Millisecond) // the processor is the router's too
		}
	}()
	p.Cleanup(func() { cancel(); <-v.done })
	return v
}

// Since returns how many connections were made, and failed, since the last call,
// and the longest time without one.
func (v *Visitors) Since(begin time.Time) (good, failed int, gap time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	last := begin
	for _, at := range append(v.good, time.Now()) {
		if at.After(begin) {
			gap = max(gap, at.Sub(last))
			last = at
		}
	}
	good, failed = len(v.good), v.failed
	v.good, v.failed = nil, 0
	return good, failed, gap
}

// WantRight ends the visits. It checks that there were some, that each answer came
// from the first destination, and that this saw the reserved address.
func (v *Visitors) WantRight() {
	v.p.Helper()
	v.p.Until("a connection is made", func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.ever
	})
	v.stop()
	<-v.done
	if len(v.wrong) > 0 {
		v.p.Errorf("%d answers of another server, or to another source, such as %v", len(v.wrong), v.wrong[0])
	}
}
