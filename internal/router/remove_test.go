package router_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// remove runs the command and returns its log.
func remove(p *labtest.Pod) string {
	p.Helper()
	r := p.Exec("egress-router", "remove")
	if r.Code != 0 || r.Stdout != "" {
		p.Fatalf("remove: exit code %d, stdout %q, stderr:\n%s", r.Code, r.Stdout, r.Stderr)
	}
	return r.Stderr
}

// After remove the namespace is as before the first run, and ready for another one.
func TestRemoveLeavesNothing(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Router)
		if err := h.LinkSetUp(p.Link(h, p.Lab.MacvlanName)); err != nil { // a set interface stays up
			p.Fatal(err)
		}
		before := p.State()
		for range 2 {
			p.OK()
			p.WantExample()
			list := p.Env["EGRESS_DESTINATION"]
			p.Env["EGRESS_DESTINATION"] = "no list" // it does not matter
			remove(p)
			p.Env["EGRESS_DESTINATION"] = list
			p.WantState(before)
		}
		wantNothingToRemove(p)
		p.WantState(before)
	})
}

// wantNothingToRemove checks that a second removal finds nothing.
func wantNothingToRemove(p *labtest.Pod) {
	p.Helper()
	if log := remove(p); !strings.Contains(log, `msg="nothing to remove"`) || strings.Count(log, "\n") != 1 {
		p.Errorf("removed again, want nothing:\n%s", log)
	}
}

// Whatever other programs have done to the router's state, remove finds the rest.
func TestRemoveAfterDamage(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Strict()
		for _, damage := range p.Share(2, p.Damages()) {
			p.OK()
			if err := p.Damage(damage); err != nil {
				p.Errorf("damage %q: %v", damage.Name, err)
				continue
			}
			p.Logf("damage %q", damage.Name)
			remove(p)
			wantNothingToRemove(p)
			if text := p.State(); strings.Contains(text, "EGRESS-") || strings.Contains(text, "table egress-router") || strings.Contains(text, "192.168.12.99") || strings.Contains(text, "table 4711") {
				p.Errorf("after damage %q remains:\n%s", damage.Name, text)
			}
		}
		p.OK()
		p.WantExample()
	})
}

// While the router is removed, nothing leaves with another source, or by the cluster side.
func TestRemoveUnderTraffic(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "8080 tcp 203.0.113.26 80\n203.0.113.25\n"
		w := p.Watch(p.Lab.Router, p.Lab.MacvlanName, p.Lab.ClusterName)
		for range 3 {
			p.OK()
			traffic := p.Traffic(p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)))
			traffic.Await(5)
			remove(p)
			traffic.Await(5)
			traffic.Stop()
		}
		w.WantSource()
		w.WantNothing(p.Lab.ClusterName, labtest.ToServers)
	})
}

// Forwarding may be out of reach: then, too, no packet of an earlier connection leaves by
// the cluster side, where its source would still be the reserved address.
func TestRemoveWithReadOnlyProc(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "8080 tcp 203.0.113.26 80\n203.0.113.25\n"
		w := p.Watch(p.Lab.Router, p.Lab.MacvlanName, p.Lab.ClusterName)
		for range 3 {
			p.OK()
			traffic := p.Traffic(p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)))
			traffic.Await(5)
			r := p.Exec("with-read-only-proc", "remove")
			if want := "open /proc/sys/net/ipv4/ip_forward: read-only file system"; r.Code != 0 || !strings.Contains(r.Stderr, want) || !strings.Contains(r.Stderr, "the namespace forwards") {
				p.Errorf("exit code %d, stderr\n%s\nwant 0 and %q", r.Code, r.Stderr, want)
			}
			traffic.Await(5)
			traffic.Stop()
			if text := p.State(); strings.Contains(text, "EGRESS-") || strings.Contains(text, "table egress-router") || strings.Contains(text, "192.168.12.99") {
				p.Errorf("remains:\n%s", text)
			}
		}
		w.WantSource()
		w.WantNothing(p.Lab.ClusterName, labtest.ToServers)
	})
}

// Rules of iptables (legacy) that nothing can remove keep nothing else in place.
func TestRemoveWithoutIptables(t *testing.T) {
	t.Parallel()
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		r := p.Exec("without-iptables", "remove")
		legacy := strings.Contains(p.State(), "EGRESS-")
		if want := "iptables (legacy): looking for iptables: "; legacy != (r.Code == 1 && strings.Contains(r.Last(), want)) {
			p.Errorf("exit code %d, rules remain: %v, stderr:\n%s", r.Code, legacy, r.Stderr)
		}
		if text := p.State(); strings.Contains(text, "table egress-router") || strings.Contains(text, "192.168.12.99/24") {
			p.Errorf("remains:\n%s", text)
		}
		remove(p)
		wantNothingToRemove(p)
	})
}

// Of a run that was killed after any of its steps, and whose interface was deleted since
// then or not, nothing remains.
func TestRemoveOfKilledRun(t *testing.T) {
	t.Parallel()
	for lines := range 24 { // of the log; a run has about 20
		t.Run(fmt.Sprintf("after %d lines", lines), func(t *testing.T) {
			t.Parallel()
			p := newIPv6Pod(t)
			before := p.Inventory(p.Lab.Router)
			killAfter(p, lines)
			if lines%3 == 2 {
				h := p.Handle(p.Lab.Router)
				if l, err := h.LinkByName("macvlan0"); err == nil {
					if err := h.LinkDel(l); err != nil {
						p.Fatal(err)
					}
				}
			}
			remove(p)
			p.WantInventory(p.Lab.Router, "pod", before)
			wantNothingToRemove(p)
			p.OK()
			p.WantExample()
		})
	}
}

// A pod with sources of both families is as before, too.
func TestRemoveDualStack(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Router)
		if err := h.LinkSetUp(p.Link(h, p.Lab.MacvlanName)); err != nil { // a set interface stays up
			p.Fatal(err)
		}
		dualStack(p, "192.168.12.99/24, 192.168.12.100/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		network := func() string {
			p.Helper()
			text := p.Inventory(p.Lab.Router)
			for _, args := range [][]string{{"-6", "rule"}, {"-6", "route", "show", "table", "all"}, {"rule"}, {"route", "show", "table", "all"}} {
				out := strings.Split(p.Tool("ip", args...), "\n")
				// The kernel times what router advertisements set, and lists local routes in any order.
				slices.Sort(out)
				text += strings.Join(out, "\n")
			}
			return text + p.State()
		}
		wantLinkLocal(p)
		before := network()
		for range 2 {
			p.OK()
			wantDual(p, p.Lab.Client, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
			remove(p)
			if after := network(); after != before {
				p.Errorf("- before, + after:\n%s", cmp.Diff(before, after))
			}
		}
		wantNothingToRemove(p)
	})
}

// After a change of the sources and the gateways, remove finds what an earlier run has set.
func TestRemoveAfterOtherSources(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Router)
		if err := h.LinkSetUp(p.Link(h, p.Lab.MacvlanName)); err != nil { // a set interface stays up
			p.Fatal(err)
		}
		routes := func() string {
			p.Helper()
			var text []string
			for _, args := range [][]string{{"-6", "rule"}, {"rule"}, {"-6", "route", "show", "default"}, {"route", "show", "default"}, {"route", "show", "table", "4711"}} {
				out, err := p.TryTool("ip", args...)
				if err != nil { // no such table
					out = ""
				}
				text = append(text, out)
			}
			return strings.Join(text, "\n")
		}
		before := routes()
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		p.OK()
		p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "192.168.12.98/24", "192.168.12.2"
		remove(p)
		if after := routes(); after != before {
			p.Errorf("- before, + after:\n%s", cmp.Diff(before, after))
		}
		wantNothingToRemove(p)
	})
}
