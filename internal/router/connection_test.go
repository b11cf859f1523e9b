package router_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A run drops conntrack entries whose destination or source the plan no longer has.
func TestExistingConnectionsFollowNewRules(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		const was, is = "203.0.113.25:53", "203.0.113.27:53"
		// Another program's rule makes the kernel track connections.
		p.Iptables("-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "1", "-j", "ACCEPT")
		p.Env["EGRESS_DESTINATION"] = "53 udp 203.0.113.25\n"
		f := p.Flow(53)
		if a, err := f.Try(); err == nil {
			p.Errorf("answer %v without a router, want none", a)
		}
		p.OK()
		f.WantAnswer("a flow from before the router", was, "192.168.12.99")

		p.Env["EGRESS_DESTINATION"] = "53 udp 203.0.113.27\n"
		p.OK()
		f.WantAnswer("to another destination", is, "192.168.12.99")

		p.Env["EGRESS_SOURCE"] = "192.168.12.98/24"
		p.OK()
		f.WantAnswer("from another source", is, "192.168.12.98")

		capture, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		begin := time.Now()
		p.FlushSourceRule()
		during := p.Flow(53) // a flow that starts without a source rule
		_, _ = during.Try()
		p.OK()
		for _, f := range []*labtest.Flow{f, during} {
			f.WantAnswer("after a flow without a source rule", is, "192.168.12.98")
		}
		_ = capture.Stop()
		for _, frame := range capture.Frames() {
			if ip, ok := frame.IPv4(); ok && !frame.Outgoing && ip.Src.Addr() != netip.MustParseAddr("192.168.12.98") && frame.At.After(begin) && ip.Dst.Port() == 53 {
				p.Errorf("frame without the source 192.168.12.98: %s", frame)
			}
		}
		during.WantAnswer("the flow that started without a source rule", is, "192.168.12.98")
	})
}

// The kernel drops all packets of a connection that the NAT rules have not seen.
func TestUntranslatedConnectionIsDropped(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "53 udp 203.0.113.27\n"
		p.OK()
		p.FlushSourceRule()
		f := p.Flow(53)
		_, _ = f.Try()
		capture, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		for range 3 {
			if a, err := f.Try(); err == nil {
				p.Errorf("answer %v to a datagram with the client's source, want none", a)
			}
		}
		if err := capture.Stop(); err != nil {
			p.Fatal(err)
		}
		for _, frame := range capture.Frames() {
			if _, ok := frame.IPv4(); ok && !frame.Outgoing {
				p.Errorf("frame on the physical network: %s", frame)
			}
		}
		p.OK()
		f.WantAnswer("after a run", "203.0.113.27:53", "192.168.12.99")
	})
}

// Routers that start at the same time configure the pod one after the other, and
// all succeed.
func TestConcurrentRunsTakeTurns(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	results := make(chan labtest.Result)
	for range 4 {
		go func() { results <- p.Exec() }()
	}
	for range 4 {
		if r := <-results; r.Code != 0 {
			t.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
		}
	}
	p.WantExample()
	p.WantUnchanged(p.OK())
}

// An alternative name of an interface is refused: rules do not match it.
func TestAlternativeNameIsRefused(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	h := p.Handle(p.Lab.Router)
	eth := p.Link(h, "eth0")
	if err := h.LinkAddAltName(eth, "cluster0"); err != nil {
		t.Fatal(err)
	}
	before := p.State()
	p.Env["EGRESS_CLUSTER_INTERFACE"] = "cluster0"
	if r := p.Exec(); r.Code != 1 || r.Last() != `egress-router: interface "cluster0" not found; interfaces: eth0, macvlan0` {
		t.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
	}
	p.WantState(before)
}

// Redirected packets do not leave by another interface when the egress side loses
// its default route or its interface.
func TestEgressLostStopsTraffic(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(h *netlink.Handle, macvlan, eth netlink.Link) error{
		"default route back on eth0": func(h *netlink.Handle, _, eth netlink.Link) error {
			everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		},
		"macvlan0 gone": func(h *netlink.Handle, macvlan, eth netlink.Link) error {
			everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
			if err := h.LinkDel(macvlan); err != nil {
				return err
			}
			return h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		},
	} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.OK()
				open := p.Flow(53)
				open.WantAnswer("before", "203.0.113.27:53", "192.168.12.99")
				h := p.Handle(p.Lab.Router)
				macvlan := p.Link(h, "macvlan0")
				eth := p.Link(h, "eth0")
				capture, err := p.Lab.Capture(p.Lab.Router, "eth0")
				if err != nil {
					p.Fatal(err)
				}
				if err := damage(h, macvlan, eth); err != nil {
					p.Fatal(err)
				}
				for _, f := range []*labtest.Flow{open, p.Flow(53), p.Flow(54)} {
					if a, err := f.Try(); err == nil {
						p.Errorf("answer %v, want none", a)
					}
				}
				if err := capture.Stop(); err != nil {
					p.Fatal(err)
				}
				asked := 0
				for _, frame := range capture.Frames() {
					ip, ok := frame.IPv4()
					switch {
					case !ok:
					case !frame.Outgoing:
						asked++
					case netip.MustParsePrefix("203.0.113.0/24").Contains(ip.Dst.Addr()):
						p.Errorf("frame sent back to the cluster network: %s", frame)
					}
				}
				if asked < 3 {
					p.Errorf("the pod received %d datagrams, want at least 3", asked)
				}
			})
		})
	}
}
