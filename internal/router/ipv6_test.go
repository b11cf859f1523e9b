package router_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/ndp"
	"github.com/egress-router/egress-router/internal/spec"
)

// dualStack makes a pod of both families with a server for each.
func dualStack(p *labtest.Pod, sources, gateways string) {
	p.Helper()
	p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "extended", sources, gateways
	p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 2001:db8::25 80\n82 tcp 2001:db8:12::80 80\n"
	for _, addr := range []string{"[2001:db8::25]:80", "[2001:db8:12::80]:80"} {
		p.Serve(p.Lab.Outside, "tcp", addr)
	}
}

// wantDualStack checks that clients of each family reach their servers, also one behind a
// router of the cluster.
func wantDualStack(p *labtest.Pod) {
	p.Helper()
	p.WantAnswer("tcp", 80, "203.0.113.25:80")
	wantDual(p, p.Lab.Client, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
	wantDual(p, p.Lab.Far, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
	wantDual(p, p.Lab.Client, "tcp", "[fd00:10:128::98]:82", "[2001:db8:12::80]:80", lab.Source6)
}

// readyIPv6 reports whether the router has logged that IPv6 is ready.
func readyIPv6(log string) bool {
	return regexp.MustCompile("msg=ready .*2001:db8:12::99/64").MatchString(log)
}

// advertised reports whether a host announced an IPv6 address.
func advertised(mac string, a netip.Addr) func(lab.Frame) bool {
	return func(f lab.Frame) bool {
		m, err := ndp.Parse(f.Data)
		return err == nil && m.Type == ndp.Advertisement && m.Target == a && m.MAC.String() == mac && bytes.HasPrefix(f.Destination(), []byte{0x33, 0x33})
	}
}

// A pod with sources of both families redirects both, IPv4 first. The second run changes
// nothing.
func TestDualStack(t *testing.T) {
	t.Parallel()
	for name, gateway := range map[string]string{"link-local gateway": "fe80::1", "gateway of the subnet": "2001:db8:12::1"} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
				dualStack(p, "2001:db8:12::99/64, 192.168.12.99/24", "192.168.12.1, "+gateway)
				out := captureMacvlan(p)
				first := p.OK()
				// On a busy machine the detection may end before IPv4 is ready.
				if ready := strings.SplitN(first.Stderr, "msg=ready", 2); len(ready) < 2 || !strings.Contains(strings.SplitN(ready[1], "\n", 2)[0], "192.168.12.99/24") ||
					!readyIPv6(first.Stderr) {
					p.Errorf("want IPv4 to be ready first, then IPv6; stderr:\n%s", first.Stderr)
				}
				if _, err := out.Wait(p.Context(), advertised(macOf(p), lab.Source6)); err != nil {
					p.Errorf("no advertisement: %v", err)
				}
				wantDualStack(p)
				wantSources6(p, out, lab.Source6)
				if again := p.OK(); strings.Contains(again.Stderr, "network changed") || strings.Contains(again.Stderr, "rules loaded") {
					p.Errorf("the second run changes something:\n%s", again.Stderr)
				}
				if r := p.Exec("egress-router", "plan", "--kernel"); !strings.Contains(r.Stdout, nothingMissing) {
					p.Errorf("plan --kernel:\n%s%s", r.Stdout, r.Stderr)
				}
				wantDualStack(p)
			})
		})
	}
}

// Each of several sources is announced, and some clients have it.
func TestSeveralSources(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		second := lab.Source.Next()
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"] = "extended", "192.168.12.99/24, "+second.String()+"/24"
		out := captureMacvlan(p)
		p.OK()
		for _, a := range []netip.Addr{lab.Source, second} {
			for _, op := range []uint16{2, 1} {
				if _, err := out.Wait(p.Context(), func(f lab.Frame) bool {
					m, ok := f.ARP()
					return ok && m.Op == op && m.Announces() && m.SenderIP == a
				}); err != nil {
					p.Errorf("%s not announced by operation %d: %v", a, op, err)
				}
			}
		}
		// Clients differ in the last bits of their addresses.
		h := p.Handle(p.Lab.Client)
		eth := p.Link(h, lab.ClientLink)
		seen := make(map[netip.Addr]bool)
		for _, client := range []string{"10.128.0.71/23", "10.128.0.70/23"} {
			if !strings.HasPrefix(client, lab.ClientAddr.String()) {
				if err := h.AddrDel(eth, labtest.Addr(lab.ClientAddr.String()+"/23")); err != nil {
					p.Fatal(err)
				}
				if err := h.AddrAdd(eth, labtest.Addr(client)); err != nil {
					p.Fatal(err)
				}
			}
			ask := func() netip.Addr {
				p.Helper()
				answer, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
				if err != nil {
					p.Fatal(err)
				}
				return answer.Peer.Addr()
			}
			source := ask()
			if seen[source] = true; ask() != source {
				p.Errorf("client %s changes its source", client)
			}
		}
		if len(seen) != 2 || !seen[lab.Source] || !seen[second] {
			p.Errorf("clients have the sources %v, want both", seen)
		}
		if again := p.OK(); strings.Contains(again.Stderr, "network changed") || strings.Contains(again.Stderr, "rules loaded") {
			p.Errorf("the second run changes something:\n%s", again.Stderr)
		}
	})
}

// Without an IPv4 source IPv4 is closed, and the pod keeps its own default route.
func TestIPv6Only(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "2001:db8:12::99/64", "fe80::1")
		p.Env["EGRESS_DESTINATION"] = "81 tcp 2001:db8::25 80\n"
		before := p.Exec("ip", "-4", "route").Stdout
		p.OK()
		wantDual(p, p.Lab.Client, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
		if after := p.Exec("ip", "-4", "route").Stdout; !strings.Contains(after, strings.TrimSpace(before)) && after != before {
			p.Errorf("IPv4 routes before:\n%safter:\n%s", before, after)
		}
		if r := p.Exec("egress-router", "plan", "--kernel"); !strings.Contains(r.Stdout, nothingMissing) {
			p.Errorf("plan --kernel:\n%s%s", r.Stdout, r.Stderr)
		}
	})
}

// takeSource6 gives a host of the physical network the reserved IPv6 address.
func takeSource6(p *labtest.Pod) (leave func()) {
	p.Helper()
	h := p.Handle(p.Lab.Outside)
	lan := p.Link(h, lab.LANLink)
	address := &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
	if err := h.AddrAdd(lan, address); err != nil {
		p.Fatal(err)
	}
	return func() {
		if err := h.AddrDel(lan, address); err != nil {
			p.Fatal(err)
		}
	}
}

// An IPv6 address that another host has is never used: IPv4 works without it, and IPv6 is
// closed until the host has left.
func TestDuplicateAddress(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		leave := takeSource6(p)
		out := captureMacvlan(p)

		p.Env["EGRESS_CONFLICT"] = "refuse"
		before := p.Exec("ip", "-6", "route").Stdout
		if r := p.Exec(); r.Code != 1 || !strings.Contains(r.Stderr, "take reserved address 2001:db8:12::99: already in use") || strings.Contains(r.Stderr, "msg=ready") {
			p.Errorf("refuse: exit code %d, stderr:\n%s", r.Code, r.Stderr)
		}
		if after := p.Exec("ip", "-6", "route").Stdout; strings.Contains(after, "unreachable default") || strings.Contains(after, "metric 1 ") {
			p.Errorf("refuse: routes before:\n%safter:\n%s", before, after)
		}

		p.Env["EGRESS_CONFLICT"] = "warn"
		r := p.OK()
		if !strings.Contains(r.Stderr, `msg="reserved address conflict" address=2001:db8:12::99 mac=`) {
			p.Errorf("no conflict in the log:\n%s", r.Stderr)
		}
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		in := captureOn(p, p.Lab.Router, "eth0")
		for _, port := range []uint16{81, 82} {
			ctx, cancel := context.WithCancel(p.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if conn, err := p.Lab.Dial(ctx, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr6, port)); err == nil {
					p.Errorf("connected to port %d", port)
					_ = conn.Close()
				}
			}()
			arrives := func(f lab.Frame) bool {
				ip, ok := f.IPv6()
				return ok && !f.Outgoing && ip.Dst == netip.AddrPortFrom(lab.RouterAddr6, port)
			}
			if _, err := in.Wait(ctx, arrives); err != nil {
				p.Error(err)
			}
			cancel()
			<-ended
		}
		if slices.ContainsFunc(out.Frames(), func(f lab.Frame) bool {
			ip, ok := f.IPv6()
			return ok && f.Outgoing && ip.Src.Addr() == lab.Source6
		}) {
			p.Error("a packet left with the address of another host")
		}
		leave()
		p.OK()
		wantDualStack(p)
	})
}

// A router that stays repairs every part of IPv6, closes it while its address is missing,
// and is ready without it.
func TestDualStackRepairs(t *testing.T) {
	t.Parallel()
	everywhere := labtest.IPNet("::/0")
	table, mark := spec.DefaultReplyTable, uint32(spec.DefaultReplyMark)
	rule := func(arrival string) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Table, r.Priority = netlink.FAMILY_V6, table, 20000
		if r.Mark, r.Mask = mark, &mark; arrival != "" {
			r.Mark, r.Mask, r.Priority, r.IifName = 0, nil, 19999, arrival
		}
		return r
	}
	damages := []labtest.Damage{
		{Name: "address deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.AddrDel(macvlan, labtest.Addr("2001:db8:12::99/64"))
		}},
		{Name: "default route deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: macvlan.Attrs().Index, Priority: 1})
		}},
		{Name: "default route moved to eth0", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, LinkIndex: eth.Attrs().Index, Gw: lab.NodeAddr6.AsSlice(), Priority: 1})
		}},
		{Name: "rejecting route deleted", Do: func(h *netlink.Handle, _, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, Type: unix.RTN_UNREACHABLE, Priority: 2})
		}},
		{Name: "subnet route deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: labtest.IPNet("2001:db8:12::/64"), LinkIndex: macvlan.Attrs().Index})
		}},
		{Name: "closed", Do: func(h *netlink.Handle, _, _ netlink.Link) error { return h.RuleAdd(rule("eth0")) }},
		{Name: "reply rule deleted", Do: func(h *netlink.Handle, _, _ netlink.Link) error { return h.RuleDel(rule("")) }},
		{Name: "reply route deleted", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: eth.Attrs().Index, Table: table})
		}},
		{Name: "link set down", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkSetDown(macvlan) }},
	}
	labtest.EachBackendInTurn(t, 2, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		r := p.Start("legacy")
		r.Until("IPv6 is ready", func() bool { return readyIPv6(r.Logged()) })
		wantDualStack(p)
		out := captureMacvlan(p)
		all := append(slices.Clone(damages), labtest.Damage{Name: "forwarding turned off", Do: func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/all/forwarding", "0")
		}})
		for _, d := range all {
			repaired := r.Repaired()
			if err := p.Damage(d); err != nil {
				p.Fatalf("%s: %v", d.Name, err)
			}
			r.Until(d.Name+" is repaired", func() bool { return r.Repaired() > repaired })
			r.Until("nothing is missing after "+d.Name, func() bool {
				s := p.Exec("egress-router", "plan", "--kernel").Stdout
				return strings.Contains(s, nothingMissing)
			})
			if wantDualStack(p); p.Failed() {
				p.Fatalf("after %s", d.Name)
			}
		}
		wantSources6(p, out, lab.Source6)
		p.Until("health has the gateway of IPv6", func() bool { // a link that was down may have lost it
			code, text := p.Health()
			return code == 0 && strings.Contains(text, "gateway-ipv6") && strings.Contains(text, "fe80::1 answers NDP")
		})

		// Without the gateway of IPv6 the router is ready: IPv4 works.
		h := p.Handle(p.Lab.Outside)
		lan := p.Link(h, lab.LANLink)
		gateway := &netlink.Addr{IPNet: &net.IPNet{IP: lab.GatewayLinkLocal.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
		if err := h.AddrDel(lan, gateway); err != nil {
			p.Fatal(err)
		}
		const silent, found = `msg="gateway does not answer NDP" gateway=fe80::1`, `msg="gateway answers NDP" gateway=fe80::1`
		r.AwaitAfter(found, silent)
		if code, text := p.Health(); code != 0 || !strings.Contains(text, "fe80::1 does not answer NDP") {
			p.Errorf("health: exit code %d\n%s", code, text)
		}
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		if err := h.AddrAdd(lan, gateway); err != nil {
			p.Fatal(err)
		}
		r.AwaitAfter(silent, found)
	})
}

// A router that stays is ready while IPv4 works. It opens IPv6 once the address is added
// again, and no other host has it.
func TestReadyWithDuplicateAddress(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{IPv6: true}, labtest.Nftables)
	dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
	leave := takeSource6(p)
	r := p.Start("legacy")
	r.AwaitLog(1, `msg="reserved address conflict" address=2001:db8:12::99`)
	const closed = "2001:db8:12::99/64, another host has 2001:db8:12::99"
	r.Until("health has the address", func() bool {
		code, text := p.Health()
		return code == 0 && strings.Contains(text, closed)
	})
	p.WantAnswer("tcp", 80, "203.0.113.25:80")
	leave()
	// As the router does itself a minute later.
	h := p.Handle(p.Lab.Router)
	if err := h.AddrDel(p.Link(h, "macvlan0"), labtest.Addr("2001:db8:12::99/64")); err != nil {
		p.Fatal(err)
	}
	r.Until("IPv6 is open", func() bool {
		_, text := p.Health()
		return !strings.Contains(text, closed) && strings.Contains(p.Exec("egress-router", "plan", "--kernel").Stdout, nothingMissing)
	})
	wantDualStack(p)
}

// The pod's own connections, as those of a proxy, have the source of their family, and
// none leaves with another one while IPv6 is closed.
func TestProxyOfBothFamilies(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		p.Env["EGRESS_ROUTER_MODE"] = "http-proxy"
		p.OK()
		for server, source := range map[string]netip.Addr{"203.0.113.25:80": lab.Source, "[2001:db8::25]:80": lab.Source6, "[2001:db8:12::80]:80": lab.Source6} {
			wantDual(p, p.Lab.Router, "tcp", server, server, source)
		}
		// Without the default route of the physical network there is no other one.
		h := p.Handle(p.Lab.Router)
		if err := h.RouteDel(&netlink.Route{Dst: labtest.IPNet("::/0"), LinkIndex: p.Link(h, "macvlan0").Attrs().Index, Priority: 1}); err != nil {
			p.Fatal(err)
		}
		if a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort("[2001:db8::25]:80")); !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
			p.Errorf("answer %v, error %v; want no route", a, err)
		}
	})
}

// Router advertisements of the cluster's network keep their effect with forwarding: the
// default route for replies comes from them.
func TestClusterRouterAdvertisements(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		h := p.Handle(p.Lab.Router)
		eth := p.Link(h, "eth0")
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/eth0/accept_ra", "1"); err != nil {
			p.Fatal(err)
		}
		if err := h.RouteDel(&netlink.Route{Dst: labtest.IPNet("::/0"), LinkIndex: eth.Attrs().Index, Gw: lab.NodeAddr6.AsSlice()}); err != nil {
			p.Fatal(err)
		}
		// The frame of the foreign router, from the node: its link-local address is the
		// gateway, which must be the node's for replies to arrive.
		node := p.Handle(p.Lab.Node)
		own := p.Link(node, lab.Bridge)
		if err := node.AddrAdd(own, &netlink.Addr{IPNet: &net.IPNet{IP: foreignRouter.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}); err != nil {
			p.Fatal(err)
		}
		advertised := func() bool {
			return strings.Contains(p.Exec("ip", "-6", "route").Stdout, "default via "+foreignRouter.String()+" dev eth0 proto ra")
		}
		p.Until("the pod takes the advertisement", func() bool {
			sendFrame(p, p.Lab.Node, lab.Bridge, advertisement())
			return advertised()
		})
		p.OK()
		if !advertised() {
			p.Errorf("the advertised default route is gone:\n%s", p.Exec("ip", "-6", "route").Stdout)
		}
		wantDual(p, p.Lab.Far, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
		if again := p.OK(); strings.Contains(again.Stderr, "network changed") {
			p.Errorf("the second run changes something:\n%s", again.Stderr)
		}
	})
}

// Connections of both families are counted for their lines, and their ports for each
// source.
func TestCountersOfBothFamilies(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1")
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
		r := p.Start("legacy")
		r.Until("IPv6 is ready", func() bool { return readyIPv6(r.Logged()) })
		r.Until("connections are counted", func() bool { return strings.Contains(p.Metrics(), "egress_router_connections_total{") })
		wantDualStack(p)
		for _, name := range []string{
			`egress_router_connections_total{destination="203.0.113.25:80",port="80",protocol="tcp"}`,
			`egress_router_connections_total{destination="[2001:db8:12::80]:80",port="82",protocol="tcp"}`,
			`egress_router_source_ports_in_use{destination="203.0.113.25:80",protocol="tcp",source="192.168.12.99"}`,
			`egress_router_source_ports_in_use{destination="[2001:db8:12::80]:80",protocol="tcp",source="2001:db8:12::99"}`,
		} {
			if n := p.Metric(name); n != 1 {
				p.Errorf("%s = %d, want 1", name, n)
			}
		}
	})
}

// Another length of an IPv6 address replaces it: the kernel has an address once.
func TestLengthOfIPv6Source(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{IPv6: true}, labtest.Nftables)
	dualStack(p, "", "192.168.12.1, fe80::1")
	for _, length := range []string{"128", "64"} {
		p.Env["EGRESS_SOURCE"] = "192.168.12.99/24, 2001:db8:12::99/" + length
		p.OK()
		wantDual(p, p.Lab.Client, "tcp", "[fd00:10:128::98]:81", "[2001:db8::25]:80", lab.Source6)
		if out := p.Tool("ip", "-6", "address", "show", "dev", p.Lab.MacvlanName); strings.Count(out, "2001:db8:12::99/"+length+" ") != 1 || strings.Count(out, "2001:") != 1 {
			t.Errorf("addresses:\n%s", out)
		}
	}
}
