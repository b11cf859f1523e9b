package router_test

import (
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// wantFarAnswer asks the pod from a client in another subnet.
func wantFarAnswer(p *labtest.Pod, proto string, port uint16, server string) {
	p.Helper()
	a, err := p.Ask(p.Lab.Far, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Errorf("from another subnet, %s port %d: %v", proto, port, err)
	} else if a.Server != netip.MustParseAddrPort(server) || a.Peer.Addr() != lab.Source {
		p.Errorf("from another subnet, %s port %d: %s answered and saw %s; want %s, which sees %s", proto, port, a.Server, a.Peer.Addr(), server, lab.Source)
	}
}

// Replies to clients that only the pod's original default route reaches go back by
// that route. The router loosens a strict reverse-path filter.
func TestReplyPathIsClusterSide(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		for _, filter := range []string{"0", "1", "2"} {
			for _, name := range []string{"all", "eth0"} {
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/"+name+"/rp_filter", filter); err != nil {
					p.Fatal(err)
				}
				p.OK()
				p.WantExample()
				wantFarAnswer(p, "tcp", 8080, "203.0.113.26:80")
				wantFarAnswer(p, "udp", 53, "203.0.113.27:53")
				p.WantUnchanged(p.OK())
			}
		}
	})
}

// Replies of the pod's own sockets go back by it as well.
func TestReplyPathOfLocalSockets(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"http-proxy", "init"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			p.Env["EGRESS_ROUTER_MODE"] = mode
			p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25"
			p.Serve(p.Lab.Router, "tcp", "10.128.0.98:8080")
			for range 2 {
				p.OK()
				for _, client := range []struct {
					name string
					ask  func() (lab.Answer, error)
				}{
					{"client", func() (lab.Answer, error) {
						return p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
					}},
					{"far", func() (lab.Answer, error) {
						return p.Ask(p.Lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
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

// The next run restores the routing rules and marks of replies. By then only the
// reply table has the original default route.
func TestReplyPathSurvivesDamage(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.OK()
	state := p.State()
	h := p.Handle(p.Lab.Router)
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
		t.Errorf("%d routing rules lead to the reply table, want 2: one by mark, one by address", deleted)
	}
	p.Iptables("-t", "mangle", "-F")
	stray := netlink.NewRule()
	stray.Family, stray.Table, stray.Mark, stray.Priority = netlink.FAMILY_V4, 4711, 0x77, 77
	if err := h.RuleAdd(stray); err != nil {
		t.Fatal(err)
	}
	eth := p.Link(h, "eth0")
	_, network, err := net.ParseCIDR("198.51.100.0/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RouteAdd(&netlink.Route{Dst: network, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index, Table: 4711}); err != nil {
		t.Fatal(err)
	}
	p.OK()
	p.WantState(state)
	wantFarAnswer(p, "tcp", 80, "203.0.113.25:80")
}

// Name servers and the networks of EGRESS_CLUSTER_CIDRS stay reachable by the
// cluster side, with the pod's own address.
func TestClusterCIDRsUseClusterSide(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_CLUSTER_CIDRS"] = "10.129.0.0/24"
	p.Serve(p.Lab.Far, "tcp", netip.AddrPortFrom(lab.FarAddr, 80).String())
	p.OK()
	a, err := p.Ask(p.Lab.Router, "tcp", netip.AddrPortFrom(lab.FarAddr, 80))
	if err != nil || a.Peer.Addr() != lab.RouterAddr {
		t.Errorf("answer %v, error %v; want to be seen as %s", a, err, lab.RouterAddr)
	}
	// The tests' resolv.conf has this name server.
	if state := p.State(); !strings.Contains(state, "route 10.96.0.10 via 10.128.0.1 dev eth0\n") {
		t.Errorf("state lacks a route to the name server:\n%s", state)
	}
	p.WantUnchanged(p.OK())
	p.WantExample()
}

// If the cluster side has no default route, a reply that it cannot deliver is
// dropped. It does not leave on the physical network with the pod's address.
func TestReplyNeverLeavesByEgressSide(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	h := p.Handle(p.Lab.Router)
	if err := h.RouteDel(&netlink.Route{Gw: lab.NodeAddr.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	p.OK()
	capture, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	p.Until("a request on the physical network", func() bool { // the time may be over before it is sent
		wantNoAnswer(p, p.Lab.Far, "tcp", "10.128.0.98:80")
		return slices.ContainsFunc(capture.Frames(), func(f lab.Frame) bool { _, ok := f.IPv4(); return ok && !f.Outgoing })
	})
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, f := range capture.Frames() {
		if ip, ok := f.IPv4(); ok && !f.Outgoing && ip.Src.Addr() != lab.Source {
			t.Errorf("frame on the physical network without the source %s: %s", lab.Source, f)
		}
	}
	p.WantExample()
}

// EGRESS_REPLY_MARK and EGRESS_REPLY_TABLE can be set.
func TestOtherMarkAndTableWork(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_REPLY_MARK"], p.Env["EGRESS_REPLY_TABLE"] = "0x80000000", "77"
		p.OK()
		p.WantExample()
		wantFarAnswer(p, "tcp", 80, "203.0.113.25:80")
		p.WantUnchanged(p.OK())
	})
}

// A client of any subnet learns the smaller MTU of the egress side: the pod's ICMP
// error goes back by the cluster side.
func TestEgressMTUReachesClient(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		h := p.Handle(p.Lab.Router)
		macvlan := p.Link(h, "macvlan0")
		if err := h.LinkSetMTU(macvlan, 1400); err != nil {
			p.Fatal(err)
		}
		conn := p.Dial(p.Lab.Far, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
		raw, err := conn.(*net.UDPConn).SyscallConn()
		if err != nil {
			p.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}); err != nil {
			p.Fatal(err)
		}
		p.Until("the client knows the MTU", func() bool {
			_, err := conn.Write(make([]byte, 1450))
			return errors.Is(err, unix.EMSGSIZE)
		})
		p.WantUnchanged(p.OK())
	})
}

// A line can redirect to the pod itself, to change a port.
func TestRedirectToPodItself(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_DESTINATION"] = "80 tcp 192.168.12.99 8080"
	p.OK()
	p.Serve(p.Lab.Router, "tcp", "192.168.12.99:8080")
	for name, client := range map[string]*netns.Namespace{"client": p.Lab.Client, "far": p.Lab.Far} {
		if _, err := p.Ask(client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The router works with each layout that a CNI plugin may give the cluster
// interface.
func TestClusterInterfaceLayouts(t *testing.T) {
	t.Parallel()
	network := func(s string) *net.IPNet {
		_, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, test := range []struct {
		name    string
		prepare func(h *netlink.Handle, eth netlink.Link) error
		env     map[string]string
		state   []string // lines of the state after the run
		log     string
	}{
		{
			name: "address with two lengths",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				return h.AddrAdd(eth, &netlink.Addr{IPNet: network("10.128.0.98/32")})
			},
			state: []string{"rule priority 20000 from 10.128.0.98/32 table 4711"},
		},
		{
			name: "route of EGRESS_CLUSTER_CIDRS",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				return h.RouteAdd(&netlink.Route{Dst: network("172.30.0.0/16"), Gw: lab.ClientAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
			},
			env: map[string]string{"EGRESS_CLUSTER_CIDRS": "172.30.0.0/16"},
			state: []string{
				"route 172.30.0.0/16 via 10.128.0.71 dev eth0",
				"route 172.30.0.0/16 via 10.128.0.71 dev eth0 table 4711",
			},
		},
		{
			name: "link-local gateway of Calico",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				if err := h.RouteAdd(&netlink.Route{Dst: network("169.254.1.1/32"), LinkIndex: eth.Attrs().Index, Scope: netlink.SCOPE_LINK}); err != nil {
					return err
				}
				return h.RouteReplace(&netlink.Route{Dst: network("0.0.0.0/0"), Gw: net.IPv4(169, 254, 1, 1).To4(), LinkIndex: eth.Attrs().Index})
			},
			state: []string{
				"route 169.254.1.1 dev eth0 scope link table 4711",
				"route default via 169.254.1.1 dev eth0 table 4711",
			},
		},
		{
			name: "multipath default route",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				return h.RouteReplace(&netlink.Route{Dst: network("0.0.0.0/0"), MultiPath: []*netlink.NexthopInfo{
					{LinkIndex: eth.Attrs().Index, Gw: lab.NodeAddr.AsSlice()}, {LinkIndex: eth.Attrs().Index, Gw: lab.ClientAddr.AsSlice()},
				}})
			},
			state: []string{"route default table 4711"},
		},
		{
			name: "no default route",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				return h.RouteDel(&netlink.Route{Dst: network("0.0.0.0/0"), Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
			},
			state: []string{"route unreachable default metric 4294967295 table 4711"},
			log:   "no default route on cluster interface",
		},
		{
			name: "route to a destination",
			prepare: func(h *netlink.Handle, eth netlink.Link) error {
				return h.RouteAdd(&netlink.Route{Dst: network("198.51.100.0/24"), Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
			},
			env: map[string]string{"EGRESS_DESTINATION": "7 tcp 198.51.100.7\n" + labtest.Example()["EGRESS_DESTINATION"]},
			log: "destination routed by another interface",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			h := p.Handle(p.Lab.Router)
			eth := p.Link(h, "eth0")
			if err := test.prepare(h, eth); err != nil {
				t.Fatal(err)
			}
			maps.Copy(p.Env, test.env)
			if r := p.OK(); !strings.Contains(r.Stderr, test.log) {
				t.Errorf("stderr lacks %q:\n%s", test.log, r.Stderr)
			}
			state := p.State()
			for _, line := range test.state {
				if !strings.Contains(state, line+"\n") {
					t.Errorf("state lacks %q:\n%s", line, state)
				}
			}
			p.WantExample()
			p.WantUnchanged(p.OK())
		})
	}
}

// A network that an earlier run kept on the cluster side can become a destination.
func TestClusterCIDRBecomesDestination(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_DESTINATION"], p.Env["EGRESS_CLUSTER_CIDRS"] = "80 tcp 192.168.12.80", "203.0.113.0/24"
	p.OK()
	p.WantAnswer("tcp", 80, "192.168.12.80:80")
	p.Env = labtest.Example()
	p.OK()
	p.WantExample()
	p.WantUnchanged(p.OK())
}

// The next hop of the cluster interface in a default route with next hops on both
// sides, and a pair of routes to the halves of all addresses, are the cluster side's
// default route. Replies use it, and redirected connections do not.
func TestOtherFormsOfDefaultRoute(t *testing.T) {
	t.Parallel()
	for name, routes := range map[string]func(eth, macvlan int) []*netlink.Route{
		"next hops on both interfaces": func(eth, macvlan int) []*netlink.Route {
			return []*netlink.Route{{Dst: labtest.Everywhere(), MultiPath: []*netlink.NexthopInfo{
				{LinkIndex: macvlan, Gw: lab.GatewayAddr.AsSlice()}, {LinkIndex: eth, Gw: lab.NodeAddr.AsSlice()},
			}}}
		},
		"two next hops on the cluster interface": func(eth, macvlan int) []*netlink.Route {
			return []*netlink.Route{{Dst: labtest.Everywhere(), MultiPath: []*netlink.NexthopInfo{
				{LinkIndex: eth, Gw: lab.NodeAddr.AsSlice()}, {LinkIndex: macvlan, Gw: lab.GatewayAddr.AsSlice()}, {LinkIndex: eth, Gw: lab.NodeAddr.AsSlice()},
			}}}
		},
		"halves": func(eth, _ int) []*netlink.Route {
			return []*netlink.Route{
				{Dst: labtest.IPNet("0.0.0.0/1"), LinkIndex: eth, Gw: lab.NodeAddr.AsSlice()},
				{Dst: labtest.IPNet("128.0.0.0/1"), LinkIndex: eth, Gw: lab.NodeAddr.AsSlice()},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				h := p.Handle(p.Lab.Router)
				macvlan := p.Link(h, "macvlan0")
				if err := h.AddrAdd(macvlan, labtest.Addr("192.168.12.50/24")); err != nil {
					p.Fatal(err)
				}
				setMacvlanUp(p)
				if err := h.RouteDel(&netlink.Route{Gw: lab.NodeAddr.AsSlice()}); err != nil {
					p.Fatal(err)
				}
				for _, r := range routes(p.Link(h, "eth0").Attrs().Index, macvlan.Attrs().Index) {
					if err := h.RouteAdd(r); err != nil {
						p.Fatal(err)
					}
				}
				if r := p.OK(); strings.Contains(r.Stderr, "no default route on cluster interface") {
					p.Errorf("stderr has a warning:\n%s", r.Stderr)
				}
				p.WantExample()
				wantFarAnswer(p, "tcp", 80, "203.0.113.25:80")
				wantFarAnswer(p, "udp", 53, "203.0.113.27:53")
				p.WantUnchanged(p.OK())

				r := p.Start("legacy")
				r.AwaitLog(1, "msg=ready")
				p.WantExample()
				wantFarAnswer(p, "tcp", 80, "203.0.113.25:80")
				if strings.Contains(r.Logged(), "msg=repaired") {
					p.Errorf("a router that stays repairs:\n%s", labtest.Tail(r.Logged()))
				}
			})
		})
	}
}

// A run that was killed when it had deleted one of two halves is completed by the next.
func TestHalfOfDefaultRouteIsDeletedLater(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	h := p.Handle(p.Lab.Router)
	half := func(to string) {
		if err := h.RouteAdd(&netlink.Route{Dst: labtest.IPNet(to), LinkIndex: p.Link(h, "eth0").Attrs().Index, Gw: lab.NodeAddr.AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
	half("0.0.0.0/1")
	half("128.0.0.0/1")
	p.OK()
	state := p.State()
	half("128.0.0.0/1")
	p.OK()
	p.WantState(state)
	p.WantExample()
}
