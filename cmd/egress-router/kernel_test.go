package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// A fresh pod, the same again, and the state that the contract describes.
func TestInit(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		p.wantExample()
		state := p.state()
		for _, want := range []string{
			"macvlan0 up true forwards true",
			"address 192.168.12.99/24\n",
			"route default via 192.168.12.1 dev macvlan0",
			"route 192.168.12.1 dev macvlan0 scope link",
		} {
			if !strings.Contains(state, want) {
				p.Errorf("state lacks %q:\n%s", want, state)
			}
		}
		for line := range strings.Lines(state) {
			if strings.HasPrefix(line, "route default") && !strings.Contains(line, " table ") && !strings.Contains(line, "dev macvlan0") {
				p.Errorf("another default route in the main table: %s", line)
			}
		}

		p.wantUnchanged(p.ok())
		p.wantState(state)
		p.wantExample()
	})
}

// A damage is something that somebody does to a router.
type damage struct {
	name string
	do   func(h *netlink.Handle, macvlan, eth netlink.Link) error
}

// damagedRules returns damages to the rules of the pod's backend.
func (p *pod) damagedRules() []damage {
	var damages []damage
	add := func(name string, do func()) {
		damages = append(damages, damage{name, func(*netlink.Handle, netlink.Link, netlink.Link) error { do(); return nil }})
	}
	if p.backend == nftables {
		for name, lines := range map[string][]string{
			"one redirect deleted":      {"delete element ip egress-router redirects { tcp . 8080 : 203.0.113.26 . 80 }"},
			"one redirect elsewhere":    {"delete element ip egress-router redirects { tcp . 80 : 203.0.113.25 . 80 }", "add element ip egress-router redirects { tcp . 80 : 203.0.113.27 . 80 }"},
			"one redirect too many":     {"add element ip egress-router redirects { tcp . 9000 : 203.0.113.25 . 80 }"},
			"redirects flushed":         {"flush map ip egress-router redirects"},
			"redirect rule flushed":     {"flush chain ip egress-router nat-prerouting"},
			"a rule too many":           {"insert rule ip egress-router nat-prerouting tcp dport 80 accept"},
			"source rule deleted":       {"flush chain ip egress-router nat-postrouting"},
			"a chain gone":              {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting"},
			"a chain too many":          {"add chain ip egress-router mine { type nat hook prerouting priority -190 ; }", "add rule ip egress-router mine tcp dport 80 accept"},
			"a chain elsewhere":         {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting", "add chain ip egress-router nat-postrouting { type nat hook postrouting priority 300 ; }"},
			"a policy that drops":       {"add chain ip egress-router filter-input { type filter hook input priority filter - 1 ; policy drop ; }"},
			"a set too many":            {"add set ip egress-router mine { type ipv4_addr ; }"},
			"all rules flushed":         {"flush table ip egress-router"},
			"the table gone":            {"delete table ip egress-router"},
			"the table switched off":    {"add table ip egress-router { flags dormant ; }"},
			"what lets cross flushed":   {"flush chain ip egress-router filter-forward"},
			"the IPv6 table gone":       {"delete table ip6 egress-router"},
			"the IPv6 rules flushed":    {"flush table ip6 egress-router"},
			"everything flushed":        {"flush ruleset"},
			"the marks flushed":         {"flush chain ip egress-router mangle-prerouting"},
			"a rule of another kind in": {"add rule ip egress-router filter-input iifname macvlan0 limit rate 1/second accept"},
		} {
			add(name, func() {
				for _, line := range lines {
					p.nft(line)
				}
			})
		}
		return damages
	}
	nat := func(name string, args ...string) {
		add(name, func() { p.iptables(append([]string{"-t", "nat"}, args...)...) })
	}
	nat("one redirect deleted", "-D", "EGRESS-PREROUTING", "2")
	nat("redirects flushed", "-F", "EGRESS-PREROUTING")
	nat("a rule too many", "-I", "EGRESS-PREROUTING", "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
	nat("source rule deleted", "-F", "EGRESS-POSTROUTING")
	nat("a jump gone", "-D", "POSTROUTING", "-j", "EGRESS-POSTROUTING")
	nat("a jump twice", "-A", "PREROUTING", "-j", "EGRESS-PREROUTING")
	nat("all of the table flushed", "-F")
	add("a chain of another version, in use", func() {
		p.iptables("-t", "nat", "-N", "EGRESS-OUTPUT")
		p.iptables("-t", "nat", "-A", "EGRESS-OUTPUT", "-p", "tcp", "-j", "ACCEPT")
		p.iptables("-t", "nat", "-A", "OUTPUT", "-j", "EGRESS-OUTPUT")
	})
	add("a tree that is not in use", func() {
		p.iptables("-t", "nat", "-N", "EGRESS-TCP")
		p.iptables("-t", "nat", "-N", "EGRESS-TCP-0-4095")
		p.iptables("-t", "nat", "-A", "EGRESS-TCP", "-p", "tcp", "--dport", "0:4095", "-g", "EGRESS-TCP-0-4095")
		p.iptables("-t", "nat", "-I", "EGRESS-PREROUTING", "-p", "tcp", "-j", "EGRESS-TCP")
	})
	add("what lets cross flushed", func() { p.iptables("-F", "EGRESS-FORWARD") })
	add("the marks flushed", func() { p.iptables("-t", "mangle", "-F", "EGRESS-PREROUTING") })
	add("the IPv6 rules flushed", func() { p.tool(p.program("ip6tables"), "-F") })
	add("an IPv6 jump gone", func() { p.tool(p.program("ip6tables"), "-D", "INPUT", "-j", "EGRESS-INPUT") })
	return damages
}

// Whatever was damaged, the next run repairs it, and nothing else.
func TestDamage(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		state := p.state()
		address := &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source.AsSlice(), Mask: net.CIDRMask(24, 32)}}
		everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		for _, damage := range append(p.damagedRules(), []damage{
			{"address gone", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.AddrDel(macvlan, address) }},
			{"link down", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkSetDown(macvlan) }},
			{"default route back on eth0", func(h *netlink.Handle, _, eth netlink.Link) error {
				return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
			}},
			{"a second default route", func(h *netlink.Handle, _, eth netlink.Link) error {
				return h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index, Priority: 100})
			}},
			{"a default route that drops", func(h *netlink.Handle, _, _ netlink.Link) error {
				return h.RouteReplace(&netlink.Route{Dst: everywhere, Type: unix.RTN_BLACKHOLE})
			}},
			{"no default route", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
				return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: macvlan.Attrs().Index})
			}},
			{"no route to the gateway", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
				return h.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: lab.GatewayAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
			}},
			{"no forwarding", func(*netlink.Handle, netlink.Link, netlink.Link) error {
				return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0)
			}},
			{"another default route in front of ours", func(h *netlink.Handle, _, eth netlink.Link) error {
				return prepend(h, &netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
			}},
			{"another route to the gateway in front of ours", func(h *netlink.Handle, _, eth netlink.Link) error {
				gateway := &net.IPNet{IP: lab.GatewayAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}
				return prepend(h, &netlink.Route{Dst: gateway, LinkIndex: eth.Attrs().Index, Scope: netlink.SCOPE_LINK})
			}},
			{"no route to the subnet", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
				_, subnet, err := net.ParseCIDR("192.168.12.0/24")
				if err != nil {
					return err
				}
				return h.RouteDel(&netlink.Route{Dst: subnet, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
			}},
			{"no forwarding by one interface", func(*netlink.Handle, netlink.Link, netlink.Link) error {
				return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/forwarding", []byte("0"), 0)
			}},
		}...) {
			err := p.lab.Router.Do(func() error {
				h, err := p.lab.Netlink(p.lab.Router)
				if err != nil {
					return err
				}
				defer h.Close()
				macvlan, err := h.LinkByName("macvlan0")
				if err != nil {
					return err
				}
				eth, err := h.LinkByName("eth0")
				if err != nil {
					return err
				}
				return damage.do(h, macvlan, eth)
			})
			if err != nil {
				p.Errorf("%s: doing it: %v", damage.name, err)
				continue
			}
			if p.state() == state {
				p.Errorf("%s: the damage changed nothing", damage.name)
			}
			p.ok()
			if got := p.state(); got != state {
				p.Errorf("%s: not repaired.\n--- want\n%s--- is\n%s", damage.name, state, got)
			}
			p.wantExample()
		}
	})
}

// prepend adds a route in front of one with the same destination: netlink has
// no call for it, so the others are deleted and appended.
func prepend(h *netlink.Handle, r *netlink.Route) error {
	routes, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: r.Dst}, netlink.RT_FILTER_DST)
	if err != nil {
		return err
	}
	for _, other := range routes {
		if err := h.RouteDel(&other); err != nil {
			return err
		}
	}
	if err := h.RouteAdd(r); err != nil {
		return err
	}
	for _, other := range routes {
		if err := h.RouteAppend(&other); err != nil {
			return err
		}
	}
	return nil
}

// Rules of other programs stay, and do not come before ours: a masquerading
// rule would choose another source address.
func TestForeignRules(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.iptables("-t", "nat", "-N", "CNI-HOSTPORT")
		p.iptables("-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "CNI-HOSTPORT")
		p.iptables("-t", "nat", "-A", "CNI-HOSTPORT", "-p", "tcp", "-j", "DNAT", "--to-destination", "203.0.113.27:9000")
		p.iptables("-t", "nat", "-A", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.iptables("-t", "nat", "-N", "EGRESS-MYLOG") // not a name of ours
		foreign := []string{
			":EGRESS-MYLOG -\n",
			"-A PREROUTING -p tcp -m tcp --dport 80 -j CNI-HOSTPORT\n",
			"-A CNI-HOSTPORT -p tcp -j DNAT --to-destination 203.0.113.27:9000\n",
			"-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.77\n",
		}
		p.ok()
		p.wantExample()

		// And again when they get in front afterwards.
		p.iptables("-t", "nat", "-I", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.ok()
		p.wantExample()
		p.wantUnchanged(p.ok())
		state := p.state()
		for _, rule := range foreign {
			if !strings.Contains(state, rule) {
				p.Errorf("a foreign rule is gone: %s", rule)
			}
		}
	})
}

// Changed destinations take effect, in one step.
func TestChangedDestinations(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		p.env["EGRESS_DESTINATION"] = "81 tcp 203.0.113.26 80\n"
		p.ok()
		p.wantAnswer("tcp", 81, "203.0.113.26:80")
		p.wantRefused("tcp", 8080)
		p.wantRefused("udp", 53)
	})
}

// Without a length the address is /32, and everything goes by the gateway.
func TestSourceWithoutLength(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.env["EGRESS_SOURCE"] = "192.168.12.99"
		p.ok()
		p.wantExample()
		if state := p.state(); !strings.Contains(state, "address 192.168.12.99/32\n") {
			p.Errorf("the address is not /32:\n%s", state)
		}
		p.wantUnchanged(p.ok())
	})
}

// The lengths at both ends of what is accepted.
func TestSourceLengths(t *testing.T) {
	for _, length := range []string{"/0", "/8", "/31"} {
		t.Run(length, func(t *testing.T) {
			p := newPod(t, lab.Options{}, iptablesNFT)
			p.env["EGRESS_SOURCE"] = "192.168.12.99" + length
			p.ok()
			p.wantExample()
			p.wantUnchanged(p.ok())
		})
	}
}

func TestNoFallback(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25"
		p.ok()
		p.wantAnswer("tcp", 80, "203.0.113.25:80")
		p.wantRefused("tcp", 9000)
		p.wantRefused("udp", 80)
	})
}

// The local port is one of the protocol written: the same port of the other
// protocol goes to the fallback.
func TestUDP(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.env["EGRESS_DESTINATION"] = "5353 udp 203.0.113.25 53\n203.0.113.27"
		p.ok()
		p.wantAnswer("udp", 5353, "203.0.113.25:53")
		p.wantAnswer("udp", 53, "203.0.113.27:53")
	})
}

// Only comments: nothing is redirected, whatever leaves has the address.
func TestOnlyComments(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	p.env["EGRESS_DESTINATION"] = "# 80 tcp 203.0.113.25\n"
	r := p.ok()
	if !strings.Contains(r.stderr, "nothing is redirected") {
		t.Errorf("no warning:\n%s", r.stderr)
	}
	p.wantRefused("tcp", 80)
	if !strings.Contains(p.state(), "-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99\n") {
		t.Errorf("no source rule:\n%s", p.state())
	}
}

// A list from a file, larger than an environment variable can be.
func TestDestinationFile(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		var list strings.Builder
		for port := 10001; port <= 20000; port++ {
			fmt.Fprintf(&list, "%d tcp 203.0.113.26 443\n", port)
		}
		file := filepath.Join(p.TempDir(), "destinations")
		if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
			p.Fatal(err)
		}
		delete(p.env, "EGRESS_DESTINATION")
		p.env["EGRESS_DESTINATION_FILE"] = file
		p.ok()
		p.wantAnswer("tcp", 10001, "203.0.113.26:443")
		p.wantAnswer("tcp", 20000, "203.0.113.26:443")
		p.wantRefused("tcp", 20001)
		p.wantUnchanged(p.ok())
	})
}

func TestInterfaceNames(t *testing.T) {
	eachBackend(t, lab.Options{MacvlanName: "net1", ClusterName: "net0"}, func(p *pod) {
		p.env["EGRESS_INTERFACE"], p.env["EGRESS_CLUSTER_INTERFACE"] = "net1", "net0"
		p.ok()
		p.wantExample()
		p.wantUnchanged(p.ok())
	})
}

// A CNI's own address in the same subnet neither breaks the reserved one nor is
// it a source, for redirected traffic or for sockets of the pod.
func TestOtherAddress(t *testing.T) {
	for _, test := range []struct {
		name, address string
		up            bool
	}{
		{"same subnet, up", "192.168.12.50/24", true},
		{"same subnet, down", "192.168.12.50/24", false},
		{"wider subnet", "192.168.12.50/16", true},
		{"single address", "192.168.12.50/32", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPod(t, lab.Options{}, iptablesNFT)
			h := p.handle(p.lab.Router)
			macvlan := p.link(h, "macvlan0")
			other, err := netlink.ParseAddr(test.address)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.AddrAdd(macvlan, other); err != nil {
				t.Fatal(err)
			}
			if test.up {
				if err := h.LinkSetUp(macvlan); err != nil {
					t.Fatal(err)
				}
			}
			p.ok()
			p.wantExample()
			for _, server := range []string{"192.168.12.80:80", "203.0.113.25:80"} {
				a, err := p.lab.Ask(context.Background(), p.lab.Router, "tcp", netip.MustParseAddrPort(server))
				if err != nil {
					t.Error(err)
				} else if a.Peer.Addr() != source {
					t.Errorf("%s saw a socket of the pod as %s", server, a.Peer)
				}
			}
			p.wantUnchanged(p.ok())
			// The reserved address outlives the other one.
			if err := h.AddrDel(macvlan, other); err != nil {
				t.Fatal(err)
			}
			if state := p.state(); !strings.Contains(state, "address 192.168.12.99/24\n") {
				t.Errorf("the reserved address went with the other one:\n%s", state)
			}
			p.ok()
			p.wantExample()
		})
	}
}

// The network is told in both forms, reply first, and a neighbour that has the
// address at another node's hardware address learns the new one.
func TestAnnouncement(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	old := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := p.lab.SetStaleNeighbour(p.lab.Outside, lab.LANLink, lab.Source, old); err != nil {
		t.Fatal(err)
	}
	capture, err := p.lab.Capture(p.lab.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	p.ok()
	var forms []uint16
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := capture.Wait(ctx, func(f lab.Frame) bool {
		a, ok := f.ARP()
		return ok && a.Announces() && a.Op == 1
	}); err != nil {
		t.Errorf("waiting for the request form: %v", err)
	}
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, f := range capture.Frames() {
		if a, ok := f.ARP(); ok && a.Announces() && a.SenderIP == lab.Source {
			forms = append(forms, a.Op)
		}
	}
	if fmt.Sprint(forms) != "[2 1]" {
		t.Errorf("announcements by ARP opcode: %v, want a reply (2), then a request (1)", forms)
	}

	h := p.handle(p.lab.Router)
	macvlan := p.link(h, "macvlan0")
	got, err := p.lab.Neighbour(p.lab.Outside, lab.LANLink, lab.Source)
	if err != nil || got.String() != macvlan.Attrs().HardwareAddr.String() {
		t.Errorf("the neighbour has %s (%v), want %s", got, err, macvlan.Attrs().HardwareAddr)
	}
}

// A proxy's init container sets up the network and keeps the physical network
// out: nothing is translated or forwarded, and the destinations are not read.
func TestProxyModes(t *testing.T) {
	for _, mode := range []string{"http-proxy", "dns-proxy"} {
		t.Run(mode, func(t *testing.T) {
			eachBackend(t, lab.Options{}, func(p *pod) {
				p.env["EGRESS_ROUTER_MODE"] = mode
				p.env["EGRESS_DESTINATION"] = "not a destination"
				p.ok()
				state := p.state()
				for _, want := range []string{"macvlan0 up true forwards false", "address 192.168.12.99/24\n", "route default via 192.168.12.1 dev macvlan0"} {
					if !strings.Contains(state, want) {
						p.Errorf("state lacks %q:\n%s", want, state)
					}
				}
				for _, never := range []string{"SNAT", "DNAT", "snat", "dnat", "MARK"} {
					if strings.Contains(p.rules(), never) {
						p.Errorf("the rules have %s:\n%s", never, p.rules())
					}
				}
				a, err := p.lab.Ask(p.Context(), p.lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
				if err != nil || a.Peer.Addr() != source {
					p.Errorf("a socket of the pod: answer %v, error %v; want to be seen as %s", a, err, source)
				}
				p.wantUnchanged(p.ok())
			})
		})
	}
}

// While the router starts, and clients try all the time, no packet for a server
// leaves by another interface or with another source. Forwarding is on from the
// start, so that nothing but the order of changes can hold one back.
func TestNeverAnotherSource(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		if err := p.lab.SetSysctl(p.lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
			p.Fatal(err)
		}
		outside, err := p.lab.Capture(p.lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		cluster, err := p.lab.Capture(p.lab.Router, "eth0")
		if err != nil {
			p.Fatal(err)
		}
		stop := make(chan struct{})
		asked := make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					asked <- n
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
				for _, port := range []uint16{80, 8080, 9000} {
					_, _ = p.lab.Ask(ctx, p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
					n++
				}
				cancel()
			}
		}()
		time.Sleep(50 * time.Millisecond)
		p.ok()
		for range 3 { // and while destinations change
			p.env["EGRESS_DESTINATION"] = "9000 tcp 203.0.113.27\n80 tcp 203.0.113.26\n"
			p.ok()
			p.env = example()
			p.ok()
		}
		time.Sleep(50 * time.Millisecond)
		close(stop)
		n := <-asked
		for _, c := range []*lab.Capture{outside, cluster} {
			if err := c.Stop(); err != nil {
				p.Fatal(err)
			}
		}
		remote := netip.MustParsePrefix("203.0.113.0/24")
		seen := 0
		for _, f := range outside.Frames() {
			if ip, ok := f.IPv4(); ok && !f.Outgoing && remote.Contains(ip.Dst.Addr()) {
				seen++
				if ip.Src.Addr() != source {
					p.Errorf("on the physical network: %s", f)
				}
			}
		}
		for _, f := range cluster.Frames() {
			if ip, ok := f.IPv4(); ok && f.Outgoing && remote.Contains(ip.Dst.Addr()) {
				p.Errorf("back on the cluster network: %s", f)
			}
		}
		if seen == 0 {
			p.Errorf("none of %d requests reached the physical network", n)
		}
	})
}

// A connection that is open when the router runs again stays open.
func TestOpenConnectionSurvives(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		conn, err := p.lab.Dial(p.Context(), p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		if err != nil {
			p.Fatal(err)
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		if _, err := lab.ReadAnswer(r); err != nil {
			p.Fatal(err)
		}
		p.env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8081 tcp 203.0.113.26 80\n"
		p.ok()
		if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
			p.Fatal(err)
		}
		if _, err := conn.Write([]byte("still there\n")); err != nil {
			p.Fatal(err)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "still there\n" {
			p.Errorf("echo %q, %v", line, err)
		}
	})
}
