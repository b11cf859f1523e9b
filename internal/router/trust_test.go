package router_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// The router advertisement of a foreign host: a router, a prefix for addresses and a
// prefix on the link without end.
var (
	foreignRouter = netip.MustParseAddr("fe80::bad")
	foreignMAC    = net.HardwareAddr{2, 0, 0, 0, 0, 0xbd}
	foreignPrefix = netip.MustParsePrefix("2001:db8:bad::/64")
	foreignOnLink = netip.MustParsePrefix("2001:db8:bad:1::/64")
)

// sendFrame sends an Ethernet frame from a namespace.
func sendFrame(p *labtest.Pod, ns *netns.Namespace, name string, frame []byte) {
	p.Helper()
	index := p.Link(p.Handle(ns), name).Attrs().Index
	if err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index})
	}); err != nil {
		p.Fatal(err)
	}
}

// advertisement returns the frame of the foreign router's advertisement to all nodes
// (RFC 4861, section 4.2).
func advertisement() []byte {
	const onLink, autonomous, forever = 0x80, 0x40, 0xffffffff
	prefix := func(p netip.Prefix, flags byte, lifetime uint32) []byte {
		option := append([]byte{3, 4, byte(p.Bits()), flags}, make([]byte, 28)...)
		binary.BigEndian.PutUint32(option[4:], lifetime)
		binary.BigEndian.PutUint32(option[8:], lifetime)
		copy(option[16:], p.Addr().AsSlice())
		return option
	}
	message := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0} // a router for 1800 s
	message = slices.Concat(message, prefix(foreignPrefix, onLink|autonomous, 3600), prefix(foreignOnLink, onLink, forever))
	to := netip.MustParseAddr("ff02::1")
	ends := slices.Concat(foreignRouter.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(message[2:], checksum(slices.Concat(ends, []byte{0, 0, byte(len(message) >> 8), byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6}, message)))
	header := []byte{0x60, 0, 0, 0, byte(len(message) >> 8), byte(len(message)), unix.IPPROTO_ICMPV6, 255}
	return slices.Concat([]byte{0x33, 0x33, 0, 0, 0, 1}, foreignMAC, []byte{0x86, 0xdd}, header, ends, message)
}

// advertise sends the advertisement, and waits until it has arrived in the pod.
func advertise(p *labtest.Pod) {
	p.Helper()
	capture, err := p.Lab.Capture(p.Lab.Router, "macvlan0")
	if err != nil {
		p.Fatal(err)
	}
	sendFrame(p, p.Lab.Outside, lab.LANLink, advertisement())
	if _, err := capture.Wait(p.Context(), func(f lab.Frame) bool { return f.Source().String() == foreignMAC.String() }); err != nil {
		p.Fatal(err)
	}
}

// believesAdvertisements sets sysctls as a namespace has them by default.
func believesAdvertisements(p *labtest.Pod, name string) {
	p.Helper()
	for key, value := range map[string]string{"disable_ipv6": "0", "accept_ra": "1", "autoconf": "1", "accept_redirects": "1"} {
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/"+name+"/"+key, value); err != nil {
			p.Fatal(err)
		}
	}
}

// ipv6 describes the IPv6 addresses of macvlan0 and the routes by it, without those of
// the link itself.
func ipv6(p *labtest.Pod) []string {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	addresses, err := h.AddrList(macvlan, netlink.FAMILY_V6)
	if err != nil {
		p.Fatal(err)
	}
	var found []string
	for _, a := range addresses {
		if !a.IP.IsLinkLocalUnicast() {
			found = append(found, "address "+a.IPNet.String())
		}
	}
	routes, err := h.RouteList(macvlan, netlink.FAMILY_V6)
	if err != nil {
		p.Fatal(err)
	}
	for _, r := range routes {
		if !r.Dst.IP.IsLinkLocalUnicast() && !r.Dst.IP.IsMulticast() {
			found = append(found, fmt.Sprintf("route %s protocol %d", r.Dst, r.Protocol))
		}
	}
	slices.Sort(found)
	return found
}

// A router advertisement of the physical network gives the pod neither an address nor
// a route, in each mode, whichever program created the interface.
func TestAdvertisementIsIgnored(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "legacy", "http-proxy"} {
		for _, creates := range []bool{false, true} {
			t.Run(fmt.Sprintf("mode %s, creates the interface: %v", mode, creates), func(t *testing.T) {
				t.Parallel()
				p := labtest.New(t, lab.Options{NoMacvlan: creates}, labtest.IptablesNFT)
				p.Env["EGRESS_ROUTER_MODE"] = mode
				if creates {
					p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_HOST_NETNS"] = "true", labtest.File(p.Lab.Node)
					believesAdvertisements(p, "default")
				} else {
					believesAdvertisements(p, "macvlan0")
				}
				if mode == "legacy" {
					p.Start(mode).AwaitLog(1, "msg=ready")
				} else {
					p.OK()
				}
				advertise(p)
				if found := ipv6(p); len(found) > 0 {
					t.Errorf("the pod has\n%s\nwant nothing", strings.Join(found, "\n"))
				}
			})
		}
	}
}

// Addresses and routes that the pod took from an advertisement before are removed, by
// a run and by a router that stays. Those of an administrator stay.
func TestAdvertisedStateIsRemoved(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	believesAdvertisements(p, "macvlan0")
	// The kernel then adds a second address, and deletes it with the first.
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/macvlan0/use_tempaddr", "2"); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	setMacvlanUp(p)
	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	address := labtest.Addr("fd00:12::99/64")
	address.Flags = unix.IFA_F_NODAD
	if err := h.AddrAdd(macvlan, address); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*netlink.Route{
		{Dst: labtest.IPNet("2001:db8:9::/48"), Gw: netip.MustParseAddr("fd00:12::1").AsSlice(), LinkIndex: macvlan.Attrs().Index, Protocol: unix.RTPROT_STATIC},
		{Dst: labtest.IPNet("fd00:13::/64"), LinkIndex: macvlan.Attrs().Index},
	} {
		if err := h.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	peer := labtest.Addr("fd00:14::1/128")
	peer.Peer, peer.Flags = labtest.IPNet("fd00:15::/64"), unix.IFA_F_NODAD
	if err := h.AddrAdd(macvlan, peer); err != nil {
		t.Fatal(err)
	}
	var own []string
	p.Until("the kernel has added the peer's route", func() bool {
		own = ipv6(p)
		return slices.Contains(own, "route fd00:15::/128 protocol 2")
	})
	believed := func() bool {
		found := strings.Join(ipv6(p), "\n")
		return strings.Contains(found, "address 2001:db8:bad:") && strings.Contains(found, "route ::/0 protocol 9") &&
			strings.Contains(found, "route 2001:db8:bad::/64") && strings.Contains(found, "route 2001:db8:bad:1::/64")
	}
	advertise(p)
	p.Until("the pod believes the advertisement", believed)
	p.OK()
	if found := ipv6(p); !slices.Equal(found, own) {
		t.Errorf("the pod has\n%s\nwant\n%s", strings.Join(found, "\n"), strings.Join(own, "\n"))
	}
	p.WantUnchanged(p.OK())
	p.WantExample()

	p.Env["EGRESS_HEALTH_INTERVAL"] = "0"
	r := p.Start("legacy")
	r.AwaitLog(1, "msg=ready")
	p.Until("the first comparison is over", func() bool { code, _ := p.Health(); return code == 0 })
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/macvlan0/accept_ra", "1"); err != nil {
		t.Fatal(err)
	}
	// Without the rules that drop it, as a kernel without ip6tables.
	p.NFT("delete table ip6 egress-router")
	advertise(p)
	p.Until("the router has repaired", func() bool {
		value, err := p.Lab.Sysctl(p.Lab.Router, "net/ipv6/conf/macvlan0/accept_ra")
		return err == nil && value == "0" && slices.Equal(ipv6(p), own)
	})
}

// askARP asks an interface of the pod for addresses by ARP, and then for one that is
// answered. It returns the senders of the answers.
func askARP(p *labtest.Pod, ns *netns.Namespace, name, pod string, sender, answered netip.Addr, targets ...netip.Addr) []netip.Addr {
	p.Helper()
	to := p.Link(p.Handle(p.Lab.Router), pod).Attrs().HardwareAddr // answers to a broadcast may be delayed
	capture, err := p.Lab.Capture(ns, name)
	if err != nil {
		p.Fatal(err)
	}
	mac := p.Link(p.Handle(ns), name).Attrs().HardwareAddr
	for _, a := range append(targets, answered) {
		frame := slices.Concat(to, mac, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1}, mac, sender.AsSlice(), make([]byte, 6), a.AsSlice())
		sendFrame(p, ns, name, frame)
	}
	reply := func(f lab.Frame) (lab.ARP, bool) {
		a, ok := f.ARP()
		return a, ok && !f.Outgoing && a.Op == uint16(arp.Reply)
	}
	if _, err := capture.Wait(p.Context(), func(f lab.Frame) bool { a, ok := reply(f); return ok && a.SenderIP == answered }); err != nil {
		p.Fatal(err)
	}
	var senders []netip.Addr
	for _, f := range capture.Frames() {
		if a, ok := reply(f); ok {
			senders = append(senders, a.SenderIP)
		}
	}
	return senders
}

// Each side answers ARP for its own addresses only, and asks from its own.
func TestARPIsOfItsSide(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "http-proxy"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			p.Env["EGRESS_ROUTER_MODE"] = mode
			for _, name := range []string{"all", "macvlan0", "eth0"} { // as a node may have it
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/"+name+"/proxy_arp", "1"); err != nil {
					t.Fatal(err)
				}
			}
			p.OK()
			if got := askARP(p, p.Lab.Outside, lab.LANLink, "macvlan0", lab.GatewayAddr, lab.Source, lab.RouterAddr, lab.ClientAddr); !slices.Equal(got, []netip.Addr{lab.Source}) {
				t.Errorf("answers on the physical network for %v, want %s only", got, lab.Source)
			}
			if got := askARP(p, p.Lab.Client, lab.ClientLink, "eth0", lab.ClientAddr, lab.RouterAddr, lab.Source, lab.LANServer); !slices.Equal(got, []netip.Addr{lab.RouterAddr}) {
				t.Errorf("answers on the cluster side for %v, want %s only", got, lab.RouterAddr)
			}
			// A socket with the reserved address that sends to the cluster side.
			p.Serve(p.Lab.Node, "udp", "10.128.0.1:7")
			capture, err := p.Lab.Capture(p.Lab.Router, "eth0")
			if err != nil {
				t.Fatal(err)
			}
			h := p.Handle(p.Lab.Router)
			if err := h.NeighDel(&netlink.Neigh{LinkIndex: p.Link(h, "eth0").Attrs().Index, IP: lab.NodeAddr.AsSlice()}); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Fatal(err)
			}
			if err := p.Lab.Router.Do(func() error {
				from, to := net.UDPAddr{IP: lab.Source.AsSlice()}, net.UDPAddr{IP: lab.NodeAddr.AsSlice(), Port: 7}
				conn, err := net.DialUDP("udp4", &from, &to)
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write([]byte("?\n"))
				return err
			}); err != nil {
				t.Fatal(err)
			}
			f, err := capture.Wait(t.Context(), func(f lab.Frame) bool {
				a, ok := f.ARP()
				return ok && f.Outgoing && a.Op == uint16(arp.Request) && a.TargetIP == lab.NodeAddr
			})
			if err != nil {
				t.Fatal(err)
			}
			if a, _ := f.ARP(); a.SenderIP != lab.RouterAddr {
				t.Errorf("eth0 asks for %s from %s, want %s", a.TargetIP, a.SenderIP, lab.RouterAddr)
			}
		})
	}
}

// redirect returns an ICMP redirect (RFC 792) from a router to the pod, for a datagram
// of the pod.
func redirect(from, to net.HardwareAddr, router, next netip.Addr, datagram, answer netip.AddrPort) []byte {
	header := func(protocol byte, length int, src, dst netip.Addr) []byte {
		h := []byte{0x45, 0, byte(length >> 8), byte(length), 0, 0, 0, 0, 64, protocol, 0, 0}
		h = slices.Concat(h, src.AsSlice(), dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		return h
	}
	udp := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, datagram.Port()), answer.Port())
	inner := slices.Concat(header(unix.IPPROTO_UDP, 30, datagram.Addr(), answer.Addr()), udp, []byte{0, 10, 0, 0})
	message := slices.Concat([]byte{5, 1, 0, 0}, next.AsSlice(), inner)
	binary.BigEndian.PutUint16(message[2:], checksum(message))
	return slices.Concat(to, from, []byte{8, 0}, header(unix.IPPROTO_ICMP, 20+len(message), router, datagram.Addr()), message)
}

// An ICMP redirect moves no next hop of the pod, on either side, in each mode.
func TestRedirectIsIgnored(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "legacy", "http-proxy"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_CLUSTER_CIDRS"] = mode, lab.FarCluster.String()
			for _, name := range []string{"all", "eth0", "macvlan0"} { // as by default
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/"+name+"/accept_redirects", "1"); err != nil {
					t.Fatal(err)
				}
			}
			p.Serve(p.Lab.Far, "udp", "10.129.0.71:53")
			h := p.Handle(p.Lab.Router)
			hop := func(to netip.Addr) string {
				routes, err := h.RouteGet(to.AsSlice())
				if err != nil {
					t.Fatal(err)
				}
				return routes[0].Gw.String()
			}
			sides := []struct {
				name         string
				server       string
				router, next netip.Addr
				ns           *netns.Namespace // that of the router
				link         string
			}{
				{"eth0", "10.129.0.71:53", lab.NodeAddr, lab.ClientAddr, p.Lab.Node, lab.Bridge},
				{"macvlan0", "203.0.113.25:53", lab.GatewayAddr, lab.LANServer, p.Lab.Outside, lab.LANLink},
			}
			forge := func(i int) {
				side := sides[i]
				to := netip.MustParseAddrPort(side.server)
				conn := p.Dial(p.Lab.Router, "udp", to)
				from := conn.LocalAddr().(*net.UDPAddr).AddrPort()
				if _, err := p.Ask(p.Lab.Router, "udp", to); err != nil { // finds the neighbour
					t.Fatal(err)
				}
				if _, err := conn.Write([]byte("?\n")); err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Read(make([]byte, 100)); err != nil {
					t.Fatal(err)
				}
				capture, err := p.Lab.Capture(p.Lab.Router, side.name)
				if err != nil {
					t.Fatal(err)
				}
				pod := p.Link(h, side.name).Attrs().HardwareAddr
				// The kernel moves a next hop to a neighbour whose hardware address it knows.
				if err := h.NeighSet(&netlink.Neigh{
					LinkIndex: p.Link(h, side.name).Attrs().Index, IP: side.next.AsSlice(), HardwareAddr: foreignMAC, State: netlink.NUD_PERMANENT,
				}); err != nil {
					t.Fatal(err)
				}
				router := p.Link(p.Handle(side.ns), side.link).Attrs().HardwareAddr
				sendFrame(p, side.ns, side.link, redirect(router, pod, side.router, side.next, from, to))
				if _, err := capture.Wait(t.Context(), func(f lab.Frame) bool {
					ip, ok := f.IPv4()
					return ok && !f.Outgoing && ip.Protocol == unix.IPPROTO_ICMP
				}); err != nil {
					t.Fatal(err)
				}
			}
			// Before the router runs, the pod believes it.
			far := netip.MustParseAddrPort(sides[0].server).Addr()
			forge(0)
			p.Until("the next hop is moved", func() bool { return hop(far) == sides[0].next.String() })
			if mode == "legacy" {
				p.Start(mode).AwaitLog(1, "msg=ready")
			} else {
				p.OK()
			}
			for i, side := range sides {
				forge(i)
				if got := hop(netip.MustParseAddrPort(side.server).Addr()); got != side.router.String() {
					t.Errorf("%s: the next hop is %s, want %s", side.name, got, side.router)
				}
			}
		})
	}
}

// oneNetwork makes the LAN's gateway a host of the cluster side's bridge, to which the
// egress interface then leads. It returns the gateway's interface there.
func oneNetwork(p *labtest.Pod) (outside *netlink.Handle, gateway netlink.Link) {
	p.Helper()
	// The gateway moves to the bridge of the cluster side.
	const port, gatewayLink = "port-gateway", "lan1"
	node := p.Handle(p.Lab.Node)
	outside = p.Handle(p.Lab.Outside)
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: port, Index: 401, MasterIndex: p.Link(node, lab.Bridge).Attrs().Index})
	veth.PeerName, veth.PeerNamespace = gatewayLink, netlink.NsFd(p.Lab.Outside.Fd())
	if err := node.LinkAdd(veth); err != nil {
		p.Fatal(err)
	}
	if err := outside.LinkDel(p.Link(outside, lab.LANLink)); err != nil {
		p.Fatal(err)
	}
	for _, end := range []struct {
		h    *netlink.Handle
		name string
	}{{node, port}, {outside, gatewayLink}} {
		if err := end.h.LinkSetUp(p.Link(end.h, end.name)); err != nil {
			p.Fatal(err)
		}
	}
	if err := outside.AddrAdd(p.Link(outside, gatewayLink), labtest.Addr("192.168.12.1/24")); err != nil {
		p.Fatal(err)
	}
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.Bridge, netlink.MACVLAN_MODE_PRIVATE)
	return outside, p.Link(outside, gatewayLink)
}

// A gateway in the network of the cluster side is right if it is in that of the egress
// interface too, and the reserved address in no network that the pod knows.
func TestGatewayOfBothSides(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{NoMacvlan: true}, labtest.IptablesNFT)
	outside, gateway := oneNetwork(p)
	if err := outside.AddrAdd(gateway, labtest.Addr("10.128.0.71/23")); err != nil {
		t.Fatal(err)
	}
	p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "192.168.12.99", "10.128.0.71"
	p.OK()
	p.WantAnswer("tcp", 80, "203.0.113.25:80")
	p.WantUnchanged(p.OK())
}

// On a network that both interfaces are in, the gateway finds the reserved address at
// the egress interface only.
func TestBothInterfacesOnOneNetwork(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{NoMacvlan: true}, func(p *labtest.Pod) {
		outside, gateway := oneNetwork(p)
		p.OK()
		index := gateway.Attrs().Index
		for range 10 {
			// The gateway asks anew.
			if err := outside.NeighDel(&netlink.Neigh{LinkIndex: index, IP: lab.Source.AsSlice()}); err != nil && !errors.Is(err, unix.ENOENT) {
				p.Fatal(err)
			}
			if p.WantAnswer("tcp", 80, "203.0.113.25:80"); p.Failed() {
				return
			}
		}
	})
}

// A strict reverse-path filter that uses marks, as WireGuard sets it on a node, is
// loosened on the egress side, by a run and by a router that stays.
func TestFilterByMarkIsLoosened(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		strict := func(filter string) {
			p.Helper()
			for _, s := range []string{"net/ipv4/conf/all/src_valid_mark", "net/ipv4/conf/" + filter + "/rp_filter"} {
				if err := p.Lab.SetSysctl(p.Lab.Router, s, "1"); err != nil {
					p.Fatal(err)
				}
			}
		}
		for _, filter := range []string{"macvlan0", "all"} {
			strict(filter)
			p.OK()
			p.WantExample()
			p.WantUnchanged(p.OK())
		}
		p.Env["EGRESS_HEALTH_INTERVAL"] = "0"
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.Until("the first comparison is over", func() bool { code, _ := p.Health(); return code == 0 })
		strict("macvlan0")
		r.AwaitLog(1, `done="set net/ipv4/conf/macvlan0/rp_filter = 2"`)
		p.WantExample()
	})
}

// Without such marks a strict filter of the egress side stays strict.
func TestStrictFilterOfEgressSideStays(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	const filter = "net/ipv4/conf/macvlan0/rp_filter"
	if err := p.Lab.SetSysctl(p.Lab.Router, filter, "1"); err != nil {
		t.Fatal(err)
	}
	p.OK()
	p.WantExample()
	if value, err := p.Lab.Sysctl(p.Lab.Router, filter); err != nil || value != "1" {
		t.Errorf("rp_filter of macvlan0 is %q (%v), want 1", value, err)
	}
}

// A half-closed connection lasts hours without a packet, also if the namespace had
// shorter times; longer ones stay.
func TestHalfClosedConnectionLasts(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		const timeout = "net/netfilter/nf_conntrack_tcp_timeout_"
		for key, value := range map[string]string{"established": "600", "last_ack": "1000"} {
			if err := p.Lab.SetSysctl(p.Lab.Router, timeout+key, value); err != nil {
				p.Fatal(err)
			}
		}
		p.OK()
		for key, want := range map[string]string{"established": "432000", "close_wait": "7440", "fin_wait": "240", "last_ack": "1000"} {
			if got, err := p.Lab.Sysctl(p.Lab.Router, timeout+key); err != nil || got != want {
				p.Errorf("%s%s is %q (%v), want %s", timeout, key, got, err, want)
			}
		}
		// A server that sends after the client has closed its half.
		var server net.Listener
		if err := p.Lab.Outside.Do(func() (err error) {
			server, err = net.Listen("tcp4", "203.0.113.27:7000")
			return err
		}); err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { _ = server.Close() })
		client := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 7000))
		conn, err := server.Accept()
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { _ = conn.Close() })
		if err := client.(*net.TCPConn).CloseWrite(); err != nil {
			p.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			p.Fatal("the server reads data, want the end")
		}
		p.Until("the kernel keeps the connection for two hours", func() bool {
			var left uint32
			if err := p.Lab.Router.Do(func() error {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
				for _, f := range flows {
					if f.Forward.DstPort == 7000 {
						left = f.TimeOut
					}
				}
				return err
			}); err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				p.Fatal(err)
			}
			return left > 7000 && left <= 7440
		})
		if _, err := conn.Write([]byte("late\n")); err != nil {
			p.Fatal(err)
		}
		if n, err := client.Read(make([]byte, 5)); n == 0 || err != nil {
			p.Errorf("the client reads %d bytes, error %v; want the server's data", n, err)
		}
	})
}

// A routing rule for one of the kernel's tables that another program has moved to
// another priority is not missing.
func TestMovedRoutingRuleStays(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	h := p.Handle(p.Lab.Router)
	for _, move := range []struct{ table, from, to int }{{unix.RT_TABLE_LOCAL, 0, 100}, {unix.RT_TABLE_MAIN, 32766, 32000}} {
		r := netlink.NewRule()
		r.Family, r.Table, r.Priority = netlink.FAMILY_V4, move.table, move.to
		if err := h.RuleAdd(r); err != nil {
			t.Fatal(err)
		}
		r.Priority = move.from
		if err := h.RuleDel(r); err != nil {
			t.Fatal(err)
		}
	}
	if r := p.OK(); strings.Contains(r.Stderr, "table 254") || strings.Contains(r.Stderr, "table 255") {
		t.Errorf("stderr has a routing rule for a table of the kernel:\n%s", r.Stderr)
	}
	p.WantExample()
}
