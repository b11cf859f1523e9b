package router_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/spec"
)

// A damaged is a router that repairs one damage after the other under traffic.
type damaged struct {
	*labtest.Running
	want     string // state before and after
	watch    labtest.Watch
	visitors *labtest.Visitors
	flushes  []flush
}

// A flush is the time from a [labtest.RulesetFlushed] to its repair.
type flush struct{ from, to time.Time }

func startDamaged(p *labtest.Pod, interval time.Duration) *damaged {
	p.Helper()
	p.Env["EGRESS_HEALTH_INTERVAL"] = interval.String()
	p.Strict()
	r := p.Start("legacy")
	r.AwaitLog(1, "msg=ready")
	p.WantExample()
	return &damaged{Running: r, want: p.State(), watch: p.Watch(p.Lab.Router, "macvlan0", "eth0"), visitors: p.Visit()}
}

// repair does a damage and waits until the state is as before. It reports false if
// the router came between two steps of the damage.
func (r *damaged) repair(d labtest.Damage) bool {
	r.Helper()
	begin := time.Now()
	err := r.Damage(d)
	if interrupted := errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH); err != nil && !interrupted {
		r.Fatalf("damage %q: %v", d.Name, err)
	}
	if r.Settle(r.want); r.Failed() {
		r.Fatalf("not repaired: %s", d.Name)
	}
	if d.Name == labtest.RulesetFlushed {
		r.watch.Outgoing("macvlan0") // reads the sent frames, which sets their time
		r.flushes = append(r.flushes, flush{begin, time.Now()})
	}
	return err == nil
}

// wantRight ends the traffic, and checks that no packet left with another source
// or by another interface.
//
// No rule stops a packet that is between two hooks of netfilter while all tables are
// flushed. Each processor has at most one such packet.
func (r *damaged) wantRight() {
	r.Helper()
	r.WantExample()
	r.visitors.WantRight()
	r.watch.WantNothing("eth0", labtest.ToServers)
	between := make([]int, len(r.flushes))
	for _, f := range r.watch.Outgoing("macvlan0") {
		if ip, _ := f.IPv4(); ip.Src.Addr() == lab.Source {
			continue
		}
		i := slices.IndexFunc(r.flushes, func(flush flush) bool { return f.At.After(flush.from) && f.At.Before(flush.to) })
		if i < 0 {
			r.Errorf("frame on macvlan0 without the source %s: %s", lab.Source, f)
		} else if between[i]++; between[i] > runtime.NumCPU() {
			r.Errorf("frame on macvlan0, packet %d since the ruleset was flushed: %s", between[i], f)
		}
	}
}

// A router that stays repairs each damage under traffic, and no packet leaves with
// another source.
func TestRepair(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		// Events alone, if there are events for everything.
		interval, damages := time.Duration(0), p.NotifiedDamages()
		if p.Backend == labtest.IptablesLegacy {
			interval, damages = 300*time.Millisecond, p.Damages()
		}
		r := startDamaged(p, interval)
		// Only a router that ran before the damage can repair these two.
		damages = append(damages, labtest.Damage{Name: "reply table default route deleted", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: labtest.Everywhere(), Table: spec.DefaultReplyTable, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}}, labtest.Damage{Name: "default route by another gateway on eth0", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: labtest.Everywhere(), Gw: netip.MustParseAddr("10.128.0.200").AsSlice(), LinkIndex: eth.Attrs().Index})
		}})
		var table strings.Builder
		var times []time.Duration
		for _, d := range p.Share(0, damages) {
			r.visitors.Since(time.Now())
			begin, before := time.Now(), r.Repaired()
			if !r.repair(d) {
				continue
			}
			// The log may come after the state.
			r.Until("the repair is logged", func() bool { return r.Repaired() > before })
			reconciled := logTimes(r.Running, labtest.RepairLogged)
			took := reconciled[len(reconciled)-1].Sub(begin)
			good, failed, gap := r.visitors.Since(begin)
			fmt.Fprintf(&table, "%-46s %8.1f ms %5d %5d %8.1f ms\n", d.Name, ms(took), good, failed, ms(gap))
			times = append(times, took)
			p.WantExample()
		}
		slices.Sort(times)
		p.Logf("\n%-46s %11s %5s %5s %11s\n%s%-46s %8.1f ms", "damage", "repaired in", "good", "lost", "none for", &table, "median", ms(times[len(times)/2]))
		r.wantRight()
	})
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// The router repairs damages in a random order, the same in each run, each as soon
// as the one before is repaired.
func TestRandomDamages(t *testing.T) {
	t.Parallel()
	rounds := map[labtest.Backend]int{labtest.Nftables: 30, labtest.IptablesNFT: 10, labtest.IptablesLegacy: 6}
	if nstest.Long() {
		rounds = map[labtest.Backend]int{labtest.Nftables: 1000, labtest.IptablesNFT: 200, labtest.IptablesLegacy: 100}
	}
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		r := startDamaged(p, 100*time.Millisecond)
		random := rand.New(rand.NewPCG(5, 227))
		damages := p.Damages()
		begin := time.Now()
		for range rounds[p.Backend] {
			r.repair(damages[random.IntN(len(damages))])
		}
		took := time.Since(begin)
		good, failed, gap := r.visitors.Since(begin)
		p.Logf("%d damages in %v; connections: %d good, %d failed, none for %.0f ms at most", rounds[p.Backend], took.Round(time.Millisecond), good, failed, ms(gap))
		r.wantRight()
	})
}

// logTime returns the time of a line of the router's log.
func logTime(r *labtest.Running, line string) time.Time {
	r.Helper()
	stamp, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
	at, err := time.Parse(time.RFC3339, stamp)
	if err != nil {
		r.Fatal(err)
	}
	return at
}

// logTimes returns the times of the log lines that contain a text.
func logTimes(r *labtest.Running, text string) (times []time.Time) {
	r.Helper()
	for line := range strings.Lines(r.Logged()) {
		if strings.Contains(line, text) {
			times = append(times, logTime(r, line))
		}
	}
	return times
}

// contested matches the end of the log line of a contested repair.
var contested = regexp.MustCompile(`msg="repair contested, backing off".* wait=(\S+)\n`)

// A repair that is undone again and again waits longer each time. The log and the
// health report say so.
func TestContestedRepairWaits(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	r := p.Start("legacy")
	r.AwaitLog(1, "msg=ready")
	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	// waits returns how long each contested repair made the next one wait. The router
	// begins to wait after it has logged the repair.
	waits := func() (waits []time.Duration) {
		var repaired time.Time
		var wait time.Duration
		for line := range strings.Lines(r.Logged()) {
			if strings.Contains(line, "msg=repaired ") {
				at := logTime(r, line)
				if wait > 0 {
					// The log has milliseconds.
					if waited := at.Sub(repaired) + 2*time.Millisecond; waited < wait {
						t.Fatalf("the next repair came after %v, want at least %v", waited, wait)
					}
					waits = append(waits, wait)
				}
				repaired, wait = at, 0
			} else if m := contested.FindStringSubmatch(line); m != nil {
				var err error
				if wait, err = time.ParseDuration(m[1]); err != nil {
					t.Fatal(err)
				}
			}
		}
		return waits
	}
	for len(waits()) < 3 {
		before := r.Repaired()
		if err := h.LinkSetDown(macvlan); err != nil {
			t.Fatal(err)
		}
		r.Until("repaired", func() bool { return r.Repaired() > before })
	}
	if waits := waits(); !slices.IsSorted(waits) {
		t.Errorf("waits %v, want each longer than the one before", waits)
	}
	// The gateway may not have answered between two faults, so the exit code may be 1.
	if code, out := p.Health(); !regexp.MustCompile(`(?m)^  kernel +warning .* repair contested by another program: set macvlan0 up$`).MatchString(out) {
		t.Errorf("health: exit code %d\n%s", code, out)
	}
}
