package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
)

// wantFarAnswer asks the pod from a client in another subnet.
func (p *pod) wantFarAnswer(proto string, port uint16, server string) {
	p.Helper()
	a, err := p.ask(p.lab.Far, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Errorf("from another subnet, %s port %d: %v", proto, port, err)
	} else if a.Server != netip.MustParseAddrPort(server) || a.Peer.Addr() != source {
		p.Errorf("from another subnet, %s port %d: %s answered and saw %s; want %s, which sees %s", proto, port, a.Server, a.Peer.Addr(), server, source)
	}
}

// Replies to clients that only the pod's original default route reaches go back
// by it: of redirected connections, and of sockets of the pod. The reverse-path
// filter is loosened where it is strict.
func TestReplyPath(t *testing.T) {
	eachFlavour(t, lab.Options{}, func(p *pod) {
		for _, filter := range []string{"0", "1", "2"} {
			for _, name := range []string{"all", "eth0"} {
				if err := p.lab.SetSysctl(p.lab.Router, "net/ipv4/conf/"+name+"/rp_filter", filter); err != nil {
					p.Fatal(err)
				}
				p.ok()
				p.wantExample()
				p.wantFarAnswer("tcp", 8080, "203.0.113.26:80")
				p.wantFarAnswer("udp", 53, "203.0.113.27:53")
				p.wantUnchanged(p.ok())
			}
		}
	})
}

func TestReplyPathOfLocalSockets(t *testing.T) {
	for _, mode := range []string{"http-proxy", "init"} {
		t.Run(mode, func(t *testing.T) {
			p := newPod(t, lab.Options{}, "nft")
			p.env["EGRESS_ROUTER_MODE"] = mode
			p.env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25"
			if _, err := p.lab.Serve(p.lab.Router, "tcp", netip.MustParseAddrPort("10.128.0.98:8080")); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				p.ok()
				for _, client := range []struct {
					name string
					ask  func() (lab.Answer, error)
				}{
					{"client", func() (lab.Answer, error) {
						return p.lab.Ask(t.Context(), p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
					}},
					{"far", func() (lab.Answer, error) {
						return p.lab.Ask(t.Context(), p.lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
					}},
				} {
					if _, err := client.ask(); err != nil {
						t.Errorf("%s: %v", client.name, err)
					}
				}
			}
		})
	}
}

// The original default route is gone from the main table when the container
// starts again; the replies' table has it.
func TestReplyPathSurvivesDamage(t *testing.T) {
	p := newPod(t, lab.Options{}, "nft")
	p.ok()
	state := p.state()
	h, err := p.lab.Netlink(p.lab.Router)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	rules, err := h.RuleList(netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	deleted := 0
	for _, r := range rules {
		if r.Table == 4711 {
			deleted++
			if err := h.RuleDel(&r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if deleted != 2 {
		t.Errorf("%d routing rules, want 2: one by mark, one by address", deleted)
	}
	p.iptables("-t", "mangle", "-F")
	stray := netlink.NewRule()
	stray.Family, stray.Table, stray.Mark, stray.Priority = netlink.FAMILY_V4, 4711, 0x77, 77
	if err := h.RuleAdd(stray); err != nil {
		t.Fatal(err)
	}
	eth, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	_, network, err := net.ParseCIDR("198.51.100.0/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RouteAdd(&netlink.Route{Dst: network, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index, Table: 4711}); err != nil {
		t.Fatal(err)
	}
	p.ok()
	p.wantState(state)
	p.wantFarAnswer("tcp", 80, "203.0.113.25:80")
}

// Name servers and the networks of EGRESS_CLUSTER_CIDRS stay reachable by the
// cluster side, with the pod's own address.
func TestClusterDestinations(t *testing.T) {
	p := newPod(t, lab.Options{}, "nft")
	p.env["EGRESS_CLUSTER_CIDRS"] = "10.129.0.0/24"
	if _, err := p.lab.Serve(p.lab.Far, "tcp", netip.AddrPortFrom(lab.FarAddr, 80)); err != nil {
		t.Fatal(err)
	}
	p.ok()
	a, err := p.lab.Ask(t.Context(), p.lab.Router, "tcp", netip.AddrPortFrom(lab.FarAddr, 80))
	if err != nil || a.Peer.Addr() != lab.RouterAddr {
		t.Errorf("answer %v, error %v; want to be seen as %s", a, err, lab.RouterAddr)
	}
	// The tests' resolv.conf has this name server.
	if state := p.state(); !strings.Contains(state, "route 10.96.0.10 via 10.128.0.1 dev eth0\n") {
		t.Errorf("no route to the name server:\n%s", state)
	}
	p.wantUnchanged(p.ok())
	p.wantExample()
}

// Where the cluster side has no default route, a reply that it cannot deliver
// goes nowhere; it does not leave on the physical network with the pod's
// address.
func TestReplyNeverLeavesByEgressSide(t *testing.T) {
	p := newPod(t, lab.Options{}, "nft")
	h, err := p.lab.Netlink(p.lab.Router)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.RouteDel(&netlink.Route{Gw: lab.NodeAddr.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	p.ok()
	capture, err := p.lab.Capture(p.lab.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := p.lab.Ask(t.Context(), p.lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answer %v, error %v; want none", a, err)
	}
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	sent := 0
	for _, f := range capture.Frames() {
		if ip, ok := f.IPv4(); ok && !f.Outgoing {
			sent++
			if ip.Src.Addr() != source {
				t.Errorf("on the physical network: %s", f)
			}
		}
	}
	if sent == 0 {
		t.Error("the request did not reach the physical network: nothing is shown")
	}
	p.wantExample()
}

// Another program's mark, table and rules are left alone when ours are moved.
func TestOtherMarkAndTable(t *testing.T) {
	eachFlavour(t, lab.Options{}, func(p *pod) {
		p.env["EGRESS_REPLY_MARK"], p.env["EGRESS_REPLY_TABLE"] = "0x80000000", "77"
		p.ok()
		p.wantExample()
		p.wantFarAnswer("tcp", 80, "203.0.113.25:80")
		p.wantUnchanged(p.ok())
	})
}
