package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/lab"
)

// A running is a router that stays.
type running struct {
	*pod
	cmd *exec.Cmd

	mu      sync.Mutex
	log     bytes.Buffer
	repairs int // that were complete so far
}

// Write takes what the router logs.
func (r *running) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := max(0, r.log.Len()-len(repaired)+1) // one may come in two pieces
	_, _ = r.log.Write(b)                       // never fails
	r.repairs += bytes.Count(r.log.Bytes()[from:], []byte(repaired))
	return len(b), nil
}

// repaired returns how many repairs were complete so far.
func (r *running) repaired() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.repairs
}

// logged returns what the router has logged so far.
func (r *running) logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

// start starts the router in a mode in which it stays, and waits until it has
// compared everything once. It is told to stop when the test ends, and has to end
// with exit code 0.
func (p *pod) start(mode string) *running {
	p.Helper()
	p.env["EGRESS_ROUTER_MODE"] = mode
	r := &running{pod: p, cmd: p.command("egress-router")}
	r.cmd.Stderr = r
	if err := p.lab.Start(p.lab.Router, r.cmd); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() {
		_ = r.cmd.Process.Signal(syscall.SIGTERM)
		if err := r.cmd.Wait(); err != nil {
			p.Errorf("told to stop: %v", err)
		}
		if p.Failed() {
			p.Logf("the router logged:\n%s", r.logged())
		}
	})
	return r
}

// await waits until the router has logged a text n times.
func (r *running) await(n int, text string) {
	r.Helper()
	r.until(fmt.Sprintf("%q is logged %d times", text, n), func() bool { return strings.Count(r.logged(), text) >= n })
}

// until waits for a condition, longer than what comes takes on a busy machine.
func (r *running) until(what string, holds func() bool) {
	r.Helper()
	for begin := time.Now(); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begin) > 15*time.Second {
			r.Fatalf("not after 15 s: %s\n%s", what, r.logged())
		}
	}
}

func everywhere() *net.IPNet { return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)} }

// Visitors are a client that connects through the pod without pause.
type visitors struct {
	stop context.CancelFunc
	done chan struct{}

	mu     sync.Mutex
	good   []time.Time
	failed int
	wrong  []string // answers of another server, or to another source
}

// visit begins to connect to the first destination.
func (p *pod) visit() *visitors {
	ctx, cancel := context.WithCancel(p.Context())
	t := &visitors{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		for ctx.Err() == nil {
			once, done := context.WithTimeout(ctx, 60*time.Millisecond)
			a, err := p.lab.Ask(once, p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			done()
			t.mu.Lock()
			switch {
			case err != nil:
				t.failed++
			case a.Peer.Addr() != source:
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

// since returns how many connections were made, and failed, since the last call,
// and the longest time without one.
func (t *visitors) since(begin time.Time) (good, failed int, gap time.Duration) {
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

// TestRepair damages everything that the router configured, one thing after the
// other, under traffic. Each is repaired, what is told of by events at once and
// the rest within the interval, and no packet leaves with another source.
func TestRepair(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		// Events alone, where there are events for everything.
		interval := time.Duration(0)
		if p.backend == iptablesLegacy {
			interval = 300 * time.Millisecond
		}
		p.env["EGRESS_HEALTH_INTERVAL"] = interval.String()
		p.strict()
		r := p.start("legacy")
		r.await(1, "msg=ready")
		p.wantExample()
		want := p.state()
		watch := p.watch(p.lab.Router, "macvlan0", "eth0")
		visitors := p.visit()

		var table strings.Builder
		var times []time.Duration
		// One that only a router can repair that was there before.
		forgotten := damage{"no default route in the table of replies", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere(), Table: config.DefaultReplyTable, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}}
		// One that nobody would know for one who looks for the first time.
		taken := damage{"a default route by a gateway that is none on eth0", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere(), Gw: netip.MustParseAddr("10.128.0.200").AsSlice(), LinkIndex: eth.Attrs().Index})
		}}
		for _, d := range append(p.damages(), forgotten, taken) {
			before := r.repaired()
			visitors.since(time.Now())
			begin := time.Now()
			if err := p.damage(d); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH) {
				r.settle(want) // one of several steps, and the router came in between
				continue
			} else if err != nil {
				p.Fatalf("%s: doing it: %v", d.name, err)
			}
			r.until("repaired: "+d.name, func() bool { return r.repaired() > before })
			took := time.Since(begin)
			if r.settle(want); p.Failed() {
				p.Fatalf("not repaired: %s", d.name)
			}
			good, failed, gap := visitors.since(begin)
			fmt.Fprintf(&table, "%-46s %8.1f ms %5d %5d %8.1f ms\n", d.name, ms(took), good, failed, ms(gap))
			times = append(times, took)
			p.wantExample()
		}
		slices.Sort(times)
		p.Logf("\n%-46s %11s %5s %5s %11s\n%s%-46s %8.1f ms", "damage", "repaired in", "good", "lost", "none for", &table, "median", ms(times[len(times)/2]))
		visitors.wantRight(p)
		watch.wantSource()
		watch.wantNothing("eth0", toServers)
	})
}

// wantRight ends the visits, and checks that each answer came from the server
// that was wanted, and saw the reserved address.
func (t *visitors) wantRight(p *pod) {
	p.Helper()
	t.stop()
	<-t.done
	if len(t.wrong) > 0 {
		p.Errorf("%d answers of another server, or to another source: %v", len(t.wrong), t.wrong[0])
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// repaired is what the router logs when a repair is complete.
const repaired = "as wanted again"

// TestRandomDamages does damages in a random order, the same in each run, one as
// soon as the one before is repaired, under traffic. In the end all is as in the
// beginning, and nothing is left over.
func TestRandomDamages(t *testing.T) {
	for b, n := range map[backend]int{nftables: 1000, iptablesNFT: 200, iptablesLegacy: 100} {
		t.Run(b.name, func(t *testing.T) {
			p := newPod(t, lab.Options{}, b)
			p.env["EGRESS_HEALTH_INTERVAL"] = "0" // events alone, where there are any
			if b == iptablesLegacy {
				p.env["EGRESS_HEALTH_INTERVAL"] = "100ms"
			}
			p.strict()
			r := p.start("legacy")
			r.await(1, "msg=ready")
			want := p.state()
			watch := p.watch(p.lab.Router, "macvlan0", "eth0")
			visitors := p.visit()

			random := rand.New(rand.NewPCG(5, 227))
			damages := p.damages()
			begin := time.Now()
			var flushed []time.Time
			for i := range n {
				d := damages[random.IntN(len(damages))]
				before := r.repaired()
				if d.name == "everything flushed" {
					flushed = append(flushed, time.Now())
				}
				if err := p.damage(d); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH) {
					continue // one of several steps, and the router came in between
				} else if err != nil {
					p.Fatalf("%d: %s: doing it: %v", i, d.name, err)
				}
				r.until("repaired: "+d.name, func() bool { return r.repaired() > before })
			}
			took := time.Since(begin)
			r.settle(want)
			good, failed, gap := visitors.since(begin)
			p.Logf("%d damages in %v; connections: %d good, %d failed, none for %.0f ms at most", n, took.Round(time.Millisecond), good, failed, ms(gap))
			p.wantExample()
			visitors.wantRight(p)
			watch.wantNothing("eth0", toServers)
			for _, f := range watch.outgoing("macvlan0") {
				// A packet that is between two hooks when all rules of all tables go
				// at once has nothing left that could stop it.
				inBetween := func(at time.Time) bool { return f.At.After(at) && f.At.Sub(at) < 30*time.Millisecond }
				if ip, _ := f.IPv4(); ip.Src.Addr() != source && !slices.ContainsFunc(flushed, inBetween) {
					p.Errorf("by macvlan0: %s", f)
				}
			}
		})
	}
}

// TestContested has two damages done in turn, each as soon as the other is
// repaired: the router says so, and does not keep up.
func TestContested(t *testing.T) {
	p := newPod(t, lab.Options{}, nftables)
	r := p.start("legacy")
	r.await(1, "msg=ready")
	h := p.handle(p.lab.Router)
	macvlan := p.link(h, "macvlan0")
	const during = 5 * time.Second
	for begin, n := time.Now(), 0; time.Since(begin) < during; n++ {
		var err error
		before := r.repaired()
		if n%2 == 0 {
			err = h.LinkSetDown(macvlan)
		} else {
			err = p.lab.SetSysctl(p.lab.Router, "net/ipv4/ip_forward", "0")
		}
		if err != nil {
			t.Fatal(err)
		}
		for r.repaired() == before && time.Since(begin) < during {
			time.Sleep(time.Millisecond)
		}
	}
	r.await(1, "something else undoes the repair again and again")
	if n := r.repaired(); n < 20 || n > 80 {
		t.Errorf("%d repairs in %v", n, during)
	}
	if code, out := p.health(); !strings.Contains(out, "something else undoes a repair again and again") {
		t.Errorf("health: exit code %d\n%s", code, out)
	}
}

// settle waits until the namespace is in a state again.
func (r *running) settle(want string) {
	r.Helper()
	for range 20 {
		if r.state() == want {
			return
		}
	}
	r.wantState(want)
}
