package router_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// TestRepair damages everything that the router configured, one thing after the
// other, under traffic. Each is repaired, what is told of by events at once and
// the rest within the interval, and no packet leaves with another source.
func TestRepair(t *testing.T) {
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		// Events alone, where there are events for everything.
		interval := time.Duration(0)
		if p.Backend == labtest.IptablesLegacy {
			interval = 300 * time.Millisecond
		}
		p.Env["EGRESS_HEALTH_INTERVAL"] = interval.String()
		p.Strict()
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.WantExample()
		want := p.State()
		watch := p.Watch(p.Lab.Router, "macvlan0", "eth0")
		visitors := p.Visit()

		var table strings.Builder
		var times []time.Duration
		// One that only a router can repair that was there before.
		forgotten := labtest.Damage{Name: "no default route in the table of replies", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: labtest.Everywhere(), Table: config.DefaultReplyTable, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}}
		// One that nobody would know for one who looks for the first time.
		taken := labtest.Damage{Name: "a default route by a gateway that is none on eth0", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: labtest.Everywhere(), Gw: netip.MustParseAddr("10.128.0.200").AsSlice(), LinkIndex: eth.Attrs().Index})
		}}
		for _, d := range append(p.Damages(), forgotten, taken) {
			before := r.Repaired()
			visitors.Since(time.Now())
			begin := time.Now()
			if err := p.Damage(d); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH) {
				r.Settle(want) // one of several steps, and the router came in between
				continue
			} else if err != nil {
				p.Fatalf("%s: doing it: %v", d.Name, err)
			}
			r.Until("repaired: "+d.Name, func() bool { return r.Repaired() > before })
			took := time.Since(begin)
			if r.Settle(want); p.Failed() {
				p.Fatalf("not repaired: %s", d.Name)
			}
			good, failed, gap := visitors.Since(begin)
			fmt.Fprintf(&table, "%-46s %8.1f ms %5d %5d %8.1f ms\n", d.Name, ms(took), good, failed, ms(gap))
			times = append(times, took)
			p.WantExample()
		}
		slices.Sort(times)
		p.Logf("\n%-46s %11s %5s %5s %11s\n%s%-46s %8.1f ms", "damage", "repaired in", "good", "lost", "none for", &table, "median", ms(times[len(times)/2]))
		visitors.WantRight(p)
		watch.WantSource()
		watch.WantNothing("eth0", labtest.ToServers)
	})
}

// TestRandomDamages does damages in a random order, the same in each run, one as
// soon as the one before is repaired, under traffic. In the end all is as in the
// beginning, and nothing is left over.
func TestRandomDamages(t *testing.T) {
	for b, n := range map[labtest.Backend]int{labtest.Nftables: 1000, labtest.IptablesNFT: 200, labtest.IptablesLegacy: 100} {
		t.Run(b.Name, func(t *testing.T) {
			p := labtest.New(t, lab.Options{}, b)
			p.Env["EGRESS_HEALTH_INTERVAL"] = "0" // events alone, where there are any
			if b == labtest.IptablesLegacy {
				p.Env["EGRESS_HEALTH_INTERVAL"] = "100ms"
			}
			p.Strict()
			r := p.Start("legacy")
			r.AwaitLog(1, "msg=ready")
			want := p.State()
			watch := p.Watch(p.Lab.Router, "macvlan0", "eth0")
			visitors := p.Visit()

			random := rand.New(rand.NewPCG(5, 227))
			damages := p.Damages()
			begin := time.Now()
			var flushed []time.Time
			for i := range n {
				d := damages[random.IntN(len(damages))]
				before := r.Repaired()
				if d.Name == "everything flushed" {
					flushed = append(flushed, time.Now())
				}
				if err := p.Damage(d); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ESRCH) {
					continue // one of several steps, and the router came in between
				} else if err != nil {
					p.Fatalf("%d: %s: doing it: %v", i, d.Name, err)
				}
				r.Until("repaired: "+d.Name, func() bool { return r.Repaired() > before })
			}
			took := time.Since(begin)
			r.Settle(want)
			good, failed, gap := visitors.Since(begin)
			p.Logf("%d damages in %v; connections: %d good, %d failed, none for %.0f ms at most", n, took.Round(time.Millisecond), good, failed, ms(gap))
			p.WantExample()
			visitors.WantRight(p)
			watch.WantNothing("eth0", labtest.ToServers)
			for _, f := range watch.Outgoing("macvlan0") {
				// A packet that is between two hooks when all rules of all tables go
				// at once has nothing left that could stop it.
				inBetween := func(at time.Time) bool { return f.At.After(at) && f.At.Sub(at) < 30*time.Millisecond }
				if ip, _ := f.IPv4(); ip.Src.Addr() != lab.Source && !slices.ContainsFunc(flushed, inBetween) {
					p.Errorf("by macvlan0: %s", f)
				}
			}
		})
	}
}

// TestContested has two damages done in turn, each as soon as the other is
// repaired: the router says so, and does not keep up.
func TestContested(t *testing.T) {
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	r := p.Start("legacy")
	r.AwaitLog(1, "msg=ready")
	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	const during = 5 * time.Second
	for begin, n := time.Now(), 0; time.Since(begin) < during; n++ {
		var err error
		before := r.Repaired()
		if n%2 == 0 {
			err = h.LinkSetDown(macvlan)
		} else {
			err = p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "0")
		}
		if err != nil {
			t.Fatal(err)
		}
		for r.Repaired() == before && time.Since(begin) < during {
			time.Sleep(time.Millisecond)
		}
	}
	r.AwaitLog(1, "repair contested, backing off")
	if n := r.Repaired(); n < 20 || n > 80 {
		t.Errorf("%d repairs in %v", n, during)
	}
	if code, out := p.Health(); !strings.Contains(out, "repair contested by another program") {
		t.Errorf("health: exit code %d\n%s", code, out)
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
