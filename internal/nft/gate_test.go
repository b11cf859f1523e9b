package nft_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/rules"
)

// long is a lifetime that no test outlasts.
const long = 24 * time.Hour

// The types of messages for neighbours (RFC 4861).
const (
	solicitation = 135
	advertises   = 136
)

// aMark is the mark of the gate of tests.
const aMark = 0x47415445

// A gated is a lab whose router has the reserved addresses behind a gate. Its gateway answers no
// pings: the test does.
type gated struct {
	*testing.T
	*lab.Lab
	nft.Gate
	marked, plain, gateway packetSocket // of the router with and without the mark, and of the gateway
	seen                   *lab.Capture // by the gateway
	number                 uint32
	replies                uint64 // that the gateway has sent
}

// gates returns the gates that tests have: with the egress hook and without, and with either family
// first.
func gates(ticket, permit time.Duration) map[string]nft.Gate {
	all := make(map[string]nft.Gate)
	for _, without := range []bool{false, true} {
		for _, first := range []string{"IPv4", "IPv6"} {
			g := nft.Gate{
				Interface: "macvlan0", Sources: []netip.Addr{lab.Source, lab.Source6}, Witnesses: []netip.Addr{lab.GatewayAddr, lab.GatewayAddr6},
				Mark: aMark, Ticket: ticket, Permit: permit, WithoutEgress: without,
			}
			if first == "IPv6" {
				slices.Reverse(g.Sources)
			}
			name := first + " egress hook"
			if without {
				name = first + " postrouting"
			}
			all[name] = g
		}
	}
	return all
}

// eachGate runs a test with each gate, loaded before the addresses are there. A kernel without the
// egress hook refuses one with it.
func eachGate(t *testing.T, ticket, permit time.Duration, test func(*gated)) {
	has, known := labtest.HasNetdevEgress(t)
	for name, g := range gates(ticket, permit) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if known && !has && !g.WithoutEgress {
				wantNoHook(t, g)
				return
			}
			test(newGated(t, g))
		})
	}
}

// wantNoHook checks that a gate is not loaded, and leaves nothing.
func wantNoHook(t *testing.T, gate nft.Gate) {
	t.Helper()
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	opened := gate.Open()
	defer opened.Close()
	if err := l.Router.Do(opened.Load); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("loading a gate with the egress hook: error %v, want %v", err, unix.EOPNOTSUPP)
	}
	var left bytes.Buffer
	list := exec.Command("nft", "list", "ruleset")
	list.Stdout = &left
	if err := l.Run(l.Router, list); err != nil || left.Len() > 0 {
		t.Errorf("a gate that is not loaded leaves %q, error %v", &left, err)
	}
}

func newGated(t *testing.T, gate nft.Gate) *gated {
	t.Helper()
	l, err := lab.New(lab.Options{IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	g := &gated{T: t, Lab: l, Gate: gate.Open()}
	t.Cleanup(g.Gate.Close)
	g.inRouter(gate.Load)
	g.set(l.Outside, "net/ipv4/icmp_echo_ignore_all", "1")
	g.set(l.Outside, "net/ipv6/icmp/echo_ignore_all", "1")
	g.set(l.Router, "net/ipv4/ip_forward", "1")
	g.set(l.Router, "net/ipv6/conf/all/forwarding", "1")
	g.set(l.Router, "net/ipv6/conf/macvlan0/accept_dad", "0")
	g.configure()
	set, err := rules.ParseExtended(fmt.Sprintf("7 udp %s,%s", lab.Remote[0], lab.Remote6[0]), nil)
	if err != nil {
		t.Fatal(err)
	}
	g.inRouter(func() error {
		tx, err := nft.BeginAll(t.Context(), rules.IPv4, rules.IPv6)
		if err == nil {
			_, err = tx.Apply(t.Context(), rules.NewPlan(set, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{lab.Source, lab.Source6}, Mark: 0x1000}))
		}
		return err
	})
	g.marked, g.plain = g.open(l.Router, "macvlan0", aMark), g.open(l.Router, "macvlan0", 0)
	g.gateway = g.open(l.Outside, lab.LANLink, 0)
	g.countReplies()
	if g.seen, err = l.Capture(l.Outside, lab.LANLink); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *gated) set(ns *netns.Namespace, key, value string) {
	g.Helper()
	if err := g.SetSysctl(ns, key, value); err != nil {
		g.Fatal(err)
	}
}

// configure adds the addresses and the default routes, and the neighbours that the gate keeps the
// kernels from finding.
func (g *gated) configure() {
	g.Helper()
	router, outside := g.handle(g.Router), g.handle(g.Outside)
	defer router.Close()
	defer outside.Close()
	egress, lan := g.link(router, "macvlan0"), g.link(outside, lab.LANLink)
	if err := router.LinkSetUp(egress); err != nil {
		g.Fatal(err)
	}
	// The kernel adds the local route of an IPv6 address once the link is up.
	g.until("the link is up", func() bool { return g.link(router, "macvlan0").Attrs().OperState == netlink.OperUp })
	var steps []error
	for _, f := range []struct {
		source, gateway netip.Addr
		bits            int
	}{{lab.Source, lab.GatewayAddr, 24}, {lab.Source6, lab.GatewayAddr6, 64}} {
		address := &netlink.Addr{IPNet: &net.IPNet{IP: f.source.AsSlice(), Mask: net.CIDRMask(f.bits, f.source.BitLen())}, Flags: unix.IFA_F_NODAD}
		everywhere := &net.IPNet{IP: make(net.IP, f.source.BitLen()/8), Mask: net.CIDRMask(0, f.source.BitLen())}
		steps = append(steps,
			router.AddrAdd(egress, address),
			router.RouteReplace(&netlink.Route{Dst: everywhere, Gw: f.gateway.AsSlice(), LinkIndex: egress.Attrs().Index}),
			router.NeighSet(&netlink.Neigh{LinkIndex: egress.Attrs().Index, IP: f.gateway.AsSlice(), HardwareAddr: lan.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}),
			outside.NeighSet(&netlink.Neigh{LinkIndex: lan.Attrs().Index, IP: f.source.AsSlice(), HardwareAddr: egress.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}),
		)
	}
	for i, err := range steps {
		if err != nil {
			g.Fatalf("step %d: %v", i, err)
		}
	}
	for _, a := range g.Sources {
		g.until("the address is usable", func() bool {
			found, err := router.RouteGet(a.AsSlice())
			return err == nil && len(found) > 0 && found[0].Type == unix.RTN_LOCAL
		})
	}
}

func (g *gated) handle(ns *netns.Namespace) *netlink.Handle {
	g.Helper()
	h, err := g.Netlink(ns)
	if err != nil {
		g.Fatal(err)
	}
	return h
}

func (g *gated) link(h *netlink.Handle, name string) netlink.Link {
	g.Helper()
	found, err := h.LinkByName(name)
	if err != nil {
		g.Fatal(err)
	}
	return found
}

// inRouter calls fn in the router's namespace.
func (g *gated) inRouter(fn func() error) {
	g.Helper()
	if err := g.Router.Do(fn); err != nil {
		g.Fatal(err)
	}
}

// A packetSocket sends frames (packet(7)).
type packetSocket struct {
	t     *testing.T
	fd    int
	index int
	mac   net.HardwareAddr
}

func (g *gated) open(ns *netns.Namespace, link string, mark int) packetSocket {
	g.Helper()
	s := packetSocket{t: g.T}
	err := ns.Do(func() error {
		found, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		s.index, s.mac = found.Index, found.HardwareAddr
		if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
	})
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { _ = unix.Close(s.fd) })
	return s
}

// send sends a frame. The kernel returns ENOBUFS for one that an egress hook drops.
func (s packetSocket) send(to net.HardwareAddr, etherType uint16, content []byte) {
	s.t.Helper()
	if err := s.try(to, etherType, content); err != nil {
		s.t.Fatal(err)
	}
}

// try does the same, and returns another error.
func (s packetSocket) try(to net.HardwareAddr, etherType uint16, content []byte) error {
	frame := binary.BigEndian.AppendUint16(slices.Concat(to, s.mac), etherType)
	err := unix.Sendto(s.fd, append(frame, content...), 0, &unix.SockaddrLinklayer{Ifindex: s.index})
	if err == unix.ENOBUFS {
		return nil
	}
	return err
}

var toAll = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// etherTypeOf returns the EtherType of packets with an address.
func etherTypeOf(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.ETH_P_IP
	}
	return unix.ETH_P_IPV6
}

// icmp returns a packet with a message, whose header has 8 bytes.
func icmp(from, to netip.Addr, kind4, kind6 byte, number uint32, content ...byte) []byte {
	protocol, kind := byte(unix.IPPROTO_ICMP), kind4
	if from.Is6() {
		protocol, kind = unix.IPPROTO_ICMPV6, kind6
	}
	packet := ip(from, to, protocol, append(binary.BigEndian.AppendUint32([]byte{kind, 0, 0, 0}, number), content...))
	if kind == solicitation || kind == advertises {
		packet[7] = 255 // hop limit (RFC 4861, section 7.1)
	}
	return packet
}

// arpMessage returns an ARP message (RFC 826).
func arpMessage(operation uint16, sender net.HardwareAddr, from netip.Addr, target net.HardwareAddr, to netip.Addr) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, 1, 8, 0, 6, 4}, operation)
	return slices.Concat(b, sender, from.AsSlice(), target, to.AsSlice())
}

// ping sends a ping from the first source with the given number, and returns it as the witness
// sees it.
func (g *gated) ping(number uint32) {
	g.Helper()
	g.inRouter(func() error { return g.Number(number) })
	from, to := g.Sources[0], g.witness()
	g.marked.send(g.gateway.mac, etherTypeOf(from), icmp(from, to, 8, 128, number))
}

// reply sends the answer to a ping from a host.
func (g *gated) reply(from, to netip.Addr, number uint32) {
	g.replies++
	g.gateway.send(g.marked.mac, etherTypeOf(from), icmp(from, to, 0, 129, number))
}

// countReplies adds a chain behind that of the gate, which counts answers to pings that the gate has
// let pass. It drops those to live tickets, and counts them itself.
func (g *gated) countReplies() {
	g.Helper()
	g.inRouter(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		hook := nftables.ChainPriority(10)
		chain := conn.AddChain(&nftables.Chain{
			Name: behind.Name, Table: conn.AddTable(behind), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress, Priority: &hook, Device: "macvlan0",
		})
		for _, message := range [][2]byte{{unix.IPPROTO_ICMP, 0}, {unix.IPPROTO_ICMPV6, 129}} {
			conn.AddRule(&nftables.Rule{Table: behind, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Register: 1, Data: message[:1]},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1}, &expr.Cmp{Register: 1, Data: message[1:]},
				&expr.Counter{},
			}})
		}
		return conn.Flush()
	})
}

// behind is the table with that chain.
var behind = &nftables.Table{Name: "behind", Family: nftables.TableFamilyNetdev}

// awaitReplies returns when the gate has handled all answers.
func (g *gated) awaitReplies() {
	g.Helper()
	g.until("the answers arrive", func() bool {
		var n uint64
		g.inRouter(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			rules, err := conn.GetRules(behind, &nftables.Chain{Name: behind.Name})
			for _, r := range rules {
				n += r.Exprs[len(r.Exprs)-1].(*expr.Counter).Packets
			}
			if err != nil {
				return err
			}
			answered, err := g.Answered()
			n += answered
			return err
		})
		return n == g.replies
	})
}

// awaitLeft returns when the gateway has got all frames that sockets of the router have sent.
func (g *gated) awaitLeft() {
	g.Helper()
	g.number++
	host := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 0x0a000000+g.number)))
	probe := arpMessage(1, g.plain.mac, netip.IPv4Unspecified(), make(net.HardwareAddr, 6), host)
	g.plain.send(toAll, unix.ETH_P_ARP, probe)
	g.await(g.seen, "the probe", func(f lab.Frame) bool { return bytes.HasSuffix(f.Data, probe) })
}

func (g *gated) await(at *lab.Capture, what string, match func(lab.Frame) bool) {
	g.Helper()
	if _, err := at.Wait(g.Context(), match); err != nil {
		g.Fatalf("%s: %v", what, err)
	}
}

// left returns the gate's permit.
func (g *gated) left() (left time.Duration) {
	g.Helper()
	g.inRouter(func() (err error) { left, err = g.Left(); return err })
	return left
}

func (g *gated) until(what string, holds func() bool) {
	g.Helper()
	for begin := time.Now(); !holds(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > lab.Patience {
			g.Fatalf("timeout: %s", what)
		}
	}
}

// unlock opens the gate as a router does.
func (g *gated) unlock() {
	g.Helper()
	g.inRouter(func() error { return g.Arm(long) })
	g.number++
	g.ping(g.number)
	g.reply(g.witness(), g.Sources[0], g.number)
	g.until("the gate opens", func() bool { return g.left() > 0 })
}

// reveals reports whether a frame from the router tells the network of a reserved address.
func reveals(f lab.Frame) bool {
	if f.Outgoing {
		return false
	}
	a, isARP := f.ARP()
	p4, is4 := f.IPv4()
	p6, is6 := f.IPv6()
	ours := func(a netip.Addr) bool { return a == lab.Source || a == lab.Source6 }
	advert := is6 && bytes.Contains(f.Data[54:], append([]byte{0x20, 0, 0, 0}, lab.Source6.AsSlice()...)) // flags and target
	return isARP && ours(a.SenderIP) || is4 && ours(p4.Src.Addr()) || is6 && ours(p6.Src.Addr()) || advert
}

// An emission sends a frame with a reserved address.
type emission struct {
	name   string
	arp    bool // that rules behind routing do not see
	packet bool // of a packet socket, likewise
	send   func(*gated)
	sees   func(lab.Frame) bool
}

// emissions returns all ways by which a router sends with a reserved address. Each sends frames that
// no other one does.
func emissions() (all []emission) {
	unicast := func(host string, a netip.Addr) netip.Addr { // another host of the network of a
		if a.Is4() {
			return netip.MustParseAddr("192.168.12." + host)
		}
		return netip.MustParseAddr("2001:db8:12::" + host)
	}
	to := func(a netip.Addr, port uint16) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			p4, is4 := f.IPv4()
			p6, is6 := f.IPv6()
			return is4 && p4.Dst == netip.AddrPortFrom(a, port) || is6 && p6.Dst == netip.AddrPortFrom(a, port)
		}
	}
	sender := func(op uint16, target netip.Addr) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			a, is := f.ARP()
			return is && a.Op == op && a.SenderIP == lab.Source && a.TargetIP == target
		}
	}
	neighbour := func(kind byte, from, target netip.Addr) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			p, is := f.IPv6()
			return is && p.Src.Addr() == from && p.Protocol == unix.IPPROTO_ICMPV6 && len(f.Data) >= 78 && f.Data[54] == kind && netip.AddrFrom16([16]byte(f.Data[62:78])) == target
		}
	}
	datagram := func(g *gated, ns *netns.Namespace, to netip.AddrPort) {
		g.Helper()
		if err := ns.Do(func() error {
			conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
			if err != nil {
				return err
			}
			defer conn.Close()
			_, _ = conn.Write([]byte("?")) // ENOBUFS if it is dropped
			return nil
		}); err != nil {
			g.Fatal(err)
		}
	}
	for _, f := range []struct{ router, remote, source netip.Addr }{{lab.RouterAddr, lab.Remote[0], lab.Source}, {lab.RouterAddr6, lab.Remote6[0], lab.Source6}} {
		family := map[bool]string{true: "IPv4 ", false: "IPv6 "}[f.source.Is4()]
		other := unicast("77", f.source)
		all = append(all,
			emission{name: family + "forwarded", send: func(g *gated) { datagram(g, g.Client, netip.AddrPortFrom(f.router, 7)) }, sees: to(f.remote, 7)},
			emission{name: family + "own", send: func(g *gated) { datagram(g, g.Router, netip.AddrPortFrom(f.remote, 8)) }, sees: to(f.remote, 8)},
			emission{name: family + "packet socket", packet: true, sees: to(f.remote, 9), send: func(g *gated) {
				g.plain.send(g.gateway.mac, etherTypeOf(f.source), ip(f.source, f.remote, unix.IPPROTO_UDP, udp(5, 9, nil)))
			}},
			emission{name: family + "marked data", packet: true, sees: to(f.remote, 10), send: func(g *gated) {
				g.marked.send(g.gateway.mac, etherTypeOf(f.source), ip(f.source, f.remote, unix.IPPROTO_UDP, udp(5, 10, nil)))
			}},
			emission{name: family + "another protocol's frame", packet: true, sees: to(f.remote, 11), send: func(g *gated) {
				frame := binary.BigEndian.AppendUint16(slices.Concat(g.gateway.mac, g.plain.mac), etherTypeOf(f.source))
				frame = append(frame, ip(f.source, f.remote, unix.IPPROTO_UDP, udp(5, 11, nil))...)
				address := &unix.SockaddrLinklayer{Ifindex: g.plain.index, Protocol: unix.ETH_P_ARP<<8&0xff00 | unix.ETH_P_ARP>>8}
				if err := unix.Sendto(g.plain.fd, frame, 0, address); err != nil && err != unix.ENOBUFS {
					g.Fatal(err)
				}
			}},
		)
		if f.source.Is4() {
			all = append(all, emission{name: "ARP request", arp: true, send: func(g *gated) { datagram(g, g.Router, netip.AddrPortFrom(other, 8)) }, sees: sender(1, other)},
				emission{name: "ARP reply", arp: true, sees: sender(2, lab.LANServer), send: func(g *gated) {
					g.gateway.send(toAll, unix.ETH_P_ARP, arpMessage(1, g.gateway.mac, lab.LANServer, make([]byte, 6), lab.Source))
				}},
			)
			continue
		}
		all = append(all, emission{name: "solicitation", send: func(g *gated) { datagram(g, g.Router, netip.AddrPortFrom(other, 8)) }, sees: neighbour(solicitation, lab.Source6, other)},
			emission{name: "advertisement", sees: neighbour(advertises, lab.Source6, lab.Source6), send: func(g *gated) {
				options := slices.Concat(lab.Source6.AsSlice(), []byte{1, 1}, g.gateway.mac)
				g.gateway.send(g.marked.mac, unix.ETH_P_IPV6, icmp(lab.LANServer6, lab.Source6, 0, solicitation, 0, options...))
			}},
		)
		all = append(all, forgeries()...)
	}
	return all
}

// forgeries returns advertisements of the reserved address by packet sockets, in packets that could
// pass for others.
func forgeries() (all []emission) {
	linkLocal, everyone := netip.MustParseAddr("fe80::99"), netip.MustParseAddr("ff02::1")
	mac := []byte{2, 1, 2, 0, 0, 0, 0, 9}
	advertisement := func(from netip.Addr) []byte {
		return icmp(from, everyone, 0, advertises, 0x20000000, append(lab.Source6.AsSlice(), mac...)...)
	}
	for name, packet := range map[string][]byte{
		"from a link-local address":     advertisement(linkLocal),
		"without a source":              advertisement(netip.IPv6Unspecified()),
		"from another address":          advertisement(lab.LANServer6),
		"behind options for hops":       behindOptions(0, advertisement(linkLocal)),
		"behind options for the target": behindOptions(60, advertisement(linkLocal)),
	} {
		all = append(all, emission{name: "advertisement " + name, packet: true, sees: func(f lab.Frame) bool { return bytes.HasSuffix(f.Data, packet) }, send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_IPV6, packet)
		}})
	}
	return all
}

// behindOptions returns an IPv6 packet with an extension header, of eight bytes, in front of its
// message.
func behindOptions(header byte, packet []byte) []byte {
	all := slices.Concat(packet[:40], []byte{packet[6], 0, 5, 2, 0, 0, 1, 0}, packet[40:])
	all[5], all[6] = all[5]+8, header
	return all
}

// announcements returns the frames by which a router claims an address.
func announcements() (all []emission) {
	for _, operation := range []uint16{1, 2} {
		all = append(all, emission{name: fmt.Sprint("ARP announcement ", operation), packet: true, send: func(g *gated) {
			g.announce(g.marked, operation)
		}, sees: func(f lab.Frame) bool { a, is := f.ARP(); return is && a.Announces() && a.Op == operation }})
	}
	return append(all, emission{name: "unsolicited advertisement", packet: true, send: func(g *gated) { g.announce(g.marked, 0) }, sees: func(f lab.Frame) bool {
		p, is := f.IPv6()
		return is && p.Src.Addr() == lab.Source6 && p.Protocol == unix.IPPROTO_ICMPV6 && f.Data[54] == advertises && p.Dst.Addr().IsMulticast()
	}})
}

// announce announces a reserved address by ARP, or the one of IPv6 for 0.
func (g *gated) announce(s packetSocket, operation uint16) {
	if operation != 0 {
		s.send(toAll, unix.ETH_P_ARP, arpMessage(operation, s.mac, lab.Source, s.mac, lab.Source))
		return
	}
	options := slices.Concat(lab.Source6.AsSlice(), []byte{2, 1}, s.mac)
	s.send(toAll, unix.ETH_P_IPV6, icmp(lab.Source6, netip.MustParseAddr("ff02::1"), 0, advertises, 0x20000000, options...))
}

// A shut gate lets nothing with a reserved address leave, by whichever way, and probes for an address
// and link-local packets do; a claim lets marked announcements and pings leave, an open gate everything.
func TestGateDrops(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		fenced := slices.DeleteFunc(emissions(), func(e emission) bool { return g.WithoutEgress && (e.arp || e.packet) })
		since := 0         // number of the first frame that the gate may have dropped
		var let []emission // those that it lets leave
		wantDropped := func(state string, all []emission) {
			g.Helper()
			g.forgetNeighbours()
			for _, e := range all {
				dropped := g.dropped()
				e.send(g)
				g.until(state+": "+e.name+" is dropped", func() bool { return g.dropped() > dropped })
			}
			g.awaitLeft()
			for _, f := range g.seen.Frames()[since:] {
				if reveals(f) && !slices.ContainsFunc(let, func(e emission) bool { return e.sees(f) }) {
					g.Errorf("%s: %v", state, f)
				}
			}
		}
		wantSeen := func(state string, all []emission) {
			g.Helper()
			g.forgetNeighbours()
			for _, e := range all {
				e.send(g)
				g.await(g.seen, state+": "+e.name, e.sees)
			}
		}
		unmarked := emission{name: "unmarked announcement", send: func(g *gated) { g.announce(g.plain, 2) }}
		ping := emission{name: "ping", send: func(g *gated) { g.ping(1 << 31) }, sees: func(f lab.Frame) bool {
			return !f.Outgoing && bytes.Contains(f.Data, []byte{echoRequest(g), 0}) && bytes.Contains(f.Data, []byte{0x80, 0, 0, 0})
		}}
		claims := append(announcements(), ping)
		wantDropped("shut", fenced)
		if g.WithoutEgress {
			claims = nil
		} else {
			wantDropped("shut", append(claims, unmarked))
		}
		wantSeen("shut", harmless())

		g.inRouter(func() error { return g.Claim(long) })
		wantDropped("claiming", fenced)
		if !g.WithoutEgress {
			wantDropped("claiming", []emission{unmarked})
		}
		wantSeen("claiming", claims)
		let = claims
		wantDropped("claiming and seen", fenced)

		g.unlock()
		wantSeen("open", append(fenced, claims...))
		g.inRouter(g.Shut)
		if left := g.left(); left != 0 {
			g.Errorf("permit after Shut: %v", left)
		}
		g.awaitLeft()
		since, let = len(g.seen.Frames()), nil
		wantDropped("shut again", fenced)
	})
}

func echoRequest(g *gated) byte {
	if g.Sources[0].Is4() {
		return 8
	}
	return 128
}

// witness returns the gateway's address of the family of the first source.
func (g *gated) witness() netip.Addr {
	if g.Sources[0].Is4() {
		return lab.GatewayAddr
	}
	return lab.GatewayAddr6
}

// dropped returns the number of packets that the gate has dropped.
func (g *gated) dropped() (n uint64) {
	g.Helper()
	g.inRouter(func() (err error) { n, err = g.Dropped(); return err })
	return n
}

// forgetNeighbours lets the router ask for the hosts of emissions again.
func (g *gated) forgetNeighbours() {
	g.Helper()
	h := g.handle(g.Router)
	defer h.Close()
	for _, host := range []string{"192.168.12.77", "2001:db8:12::77"} {
		err := h.NeighDel(&netlink.Neigh{LinkIndex: g.marked.index, IP: net.ParseIP(host)})
		if err != nil && err != unix.ENOENT {
			g.Fatal(err)
		}
	}
}

// harmless returns frames that say nothing of a reserved address.
func harmless() []emission {
	linkLocal, everyone := netip.MustParseAddr("fe80::99"), netip.MustParseAddr("ff02::1")
	is := func(kind byte, from netip.Addr) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			p, is := f.IPv6()
			return is && p.Src.Addr() == from && p.Protocol == unix.IPPROTO_ICMPV6 && f.Data[54] == kind
		}
	}
	return []emission{
		{name: "probe", send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_ARP, arpMessage(1, g.plain.mac, netip.IPv4Unspecified(), make([]byte, 6), lab.Source))
		}, sees: func(f lab.Frame) bool {
			a, is := f.ARP()
			return is && a.SenderIP == netip.IPv4Unspecified() && a.TargetIP == lab.Source
		}},
		{name: "IPv6 probe", send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_IPV6, icmp(netip.IPv6Unspecified(), everyone, 0, solicitation, 0, lab.Source6.AsSlice()...))
		}, sees: is(solicitation, netip.IPv6Unspecified())},
		{name: "link-local solicitation", send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_IPV6, icmp(linkLocal, everyone, 0, solicitation, 0, lab.GatewayAddr6.AsSlice()...))
		}, sees: is(solicitation, linkLocal)},
		{name: "report of a listener", send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_IPV6, behindOptions(0, icmp(linkLocal, everyone, 0, 143, 0)))
		}, sees: func(f lab.Frame) bool { return len(f.Data) == 14+40+8+8 && f.Data[62] == 143 }},
		{name: "link-local advertisement", send: func(g *gated) {
			g.plain.send(toAll, unix.ETH_P_IPV6, icmp(linkLocal, everyone, 0, advertises, 0x20000000, linkLocal.AsSlice()...))
		}, sees: is(advertises, linkLocal)},
	}
}

// Only the answer of the witness to a live ping that left after Arm opens.
func TestGateOpens(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		witness, source := g.witness(), g.Sources[0]
		wantShut := func(what string, from, to netip.Addr, number uint32) {
			g.Helper()
			g.reply(from, to, number)
			g.awaitReplies()
			if left := g.left(); left != 0 {
				g.Errorf("%s opened the gate for %v", what, left)
			}
		}
		g.ping(1)
		wantShut("an answer to a ping of a shut gate", witness, source, 1)
		g.inRouter(func() error { return g.Claim(long) })
		g.ping(2)
		wantShut("an answer before Arm", witness, source, 2)
		g.inRouter(func() error { return g.Arm(long) })
		wantShut("an answer to a ping before Arm", witness, source, 2)
		g.ping(3)
		other, second := lab.LANServer, lab.Source6
		if source.Is6() {
			other, second = lab.LANServer6, lab.Source
		}
		wantShut("another host's answer", other, source, 3)
		wantShut("an answer to another number", witness, source, 4)
		wantShut("an answer to the second source", g.Witnesses[slices.IndexFunc(g.Witnesses, func(a netip.Addr) bool { return a.Is4() == second.Is4() })], second, 3)
		g.reply(witness, source, 3)
		g.awaitReplies()
		if left := g.left(); left == 0 {
			g.Error("the answer did not open the gate")
		}
		g.inRouter(g.Shut)
		wantShut("an answer after Shut", witness, source, 3)

		// What an answer on its way during Shut leaves does not open either.
		g.inRouter(func() error { return g.Extend(long) })
		if left := g.left(); left != 0 {
			g.Errorf("a late answer opened the gate for %v", left)
		}
		dropped := g.dropped()
		emissions()[1].send(g)
		g.until("the packet is dropped", func() bool { return g.dropped() > dropped })
		g.inRouter(func() error { return g.Arm(long) })
		if left := g.left(); left != 0 {
			g.Errorf("Arm left a permit for %v", left)
		}
	})
}

// An answer after the ticket's life, or the arm's, does not open.
func TestGateTicketsEnd(t *testing.T) {
	eachGate(t, 20*time.Millisecond, long, func(g *gated) {
		gone := func(set string) {
			g.Helper()
			g.until(set+" ends", func() bool {
				var n int
				g.inRouter(func() (err error) { n, err = g.Count(set); return err })
				return n == 0
			})
		}
		g.inRouter(func() error { return g.Arm(long) })
		g.ping(1)
		gone("ticket")
		g.reply(g.witness(), g.Sources[0], 1)
		g.awaitReplies()
		if left := g.left(); left != 0 {
			g.Errorf("a late answer opened the gate for %v", left)
		}
		g.Ticket = long
		g.inRouter(g.Load)
		g.inRouter(func() error { return g.Arm(20 * time.Millisecond) })
		g.ping(2)
		gone("arm")
		g.reply(g.witness(), g.Sources[0], 2)
		g.awaitReplies()
		if left := g.left(); left != 0 {
			g.Errorf("an answer after the arm's life opened the gate for %v", left)
		}
	})
}

// A sender sends numbered datagrams from the first source, and knows when it began to send each.
type sender struct {
	mu    sync.Mutex
	begun []time.Time
}

// startSender starts one, until stop is called.
func (g *gated) startSender() (s *sender, stop func()) {
	g.Helper()
	to := lab.Remote[0]
	if g.Sources[0].Is6() {
		to = lab.Remote6[0]
	}
	var conn *net.UDPConn
	g.inRouter(func() (err error) {
		conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 5000)))
		return err
	})
	s, ended, done := new(sender), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := uint32(0); ; n++ {
			select {
			case <-ended:
				return
			default:
			}
			s.mu.Lock()
			s.begun = append(s.begun, time.Now())
			s.mu.Unlock()
			_, _ = conn.Write(binary.BigEndian.AppendUint32([]byte("numbered"), n)) // ENOBUFS while it is shut
			time.Sleep(200 * time.Microsecond)
		}
	}()
	return s, sync.OnceFunc(func() { close(ended); <-done; _ = conn.Close() })
}

// sent returns when the sender began to send the datagrams that the gateway has seen.
func (s *sender) sent(seen []lab.Frame) (times []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range seen {
		if at := bytes.Index(f.Data, []byte("numbered")); at >= 0 && !f.Outgoing {
			times = append(times, s.begun[binary.BigEndian.Uint32(f.Data[at+8:])])
		}
	}
	return times
}

// keepOpen answers pings that the router sends, until stop is called, and returns when the last
// answer has certainly arrived.
func (g *gated) keepOpen() (stop func() time.Time) {
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ended:
				return
			default:
			}
			g.number++
			g.ping(g.number)
			g.reply(g.witness(), g.Sources[0], g.number)
			time.Sleep(time.Millisecond)
		}
	}()
	return func() time.Time {
		close(ended)
		<-done
		g.awaitReplies()
		return time.Now()
	}
}

// Without answers the last packet leaves before the end of the permit, never after.
func TestGatePermitEnds(t *testing.T) {
	stops := 20
	if nstest.Long() {
		stops = 100
	}
	const permit = 60 * time.Millisecond
	eachGate(t, long, permit, func(g *gated) {
		s, stop := g.startSender()
		defer stop()
		closest := permit
		for range stops {
			from := len(g.seen.Frames())
			g.unlockAgain()
			end := g.keepOpen()
			g.until("packets leave", func() bool { return len(s.sent(g.seen.Frames()[from:])) > 10 })
			limit := end().Add(permit)
			dropped := g.dropped()
			g.until("packets are dropped", func() bool { return g.dropped() > dropped+10 && time.Now().After(limit) })
			g.awaitLeft()
			times := s.sent(g.seen.Frames()[from:])
			last := times[len(times)-1]
			if last.After(limit) {
				g.Errorf("the last packet left %v after the end of the permit", last.Sub(limit))
			}
			closest = min(closest, limit.Sub(last))
			if left := g.left(); left != 0 {
				g.Errorf("permit after its end: %v", left)
			}
		}
		g.Logf("the last packet left at least %v before the end", closest)
	})
}

// unlockAgain opens a gate whose permit ends, which takes several tries on a busy machine.
func (g *gated) unlockAgain() {
	g.Helper()
	g.inRouter(func() error { return g.Arm(long) })
}

// After Shut nothing leaves, under traffic and while answers arrive.
func TestGateShuts(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		s, stop := g.startSender()
		defer stop()
		for range 20 {
			from := len(g.seen.Frames())
			g.unlockAgain()
			end := g.keepOpen()
			g.until("packets leave", func() bool { return len(s.sent(g.seen.Frames()[from:])) > 10 })
			g.inRouter(g.Shut)
			shut := time.Now()
			dropped := g.dropped()
			g.until("packets are dropped", func() bool { return g.dropped() > dropped+10 })
			end()
			g.awaitLeft()
			for _, at := range s.sent(g.seen.Frames()[from:]) {
				if at.After(shut) {
					g.Errorf("a packet left %v after Shut", at.Sub(shut))
				}
			}
			if left := g.left(); left != 0 {
				g.Errorf("permit after Shut: %v", left)
			}
		}
	})
}

// Loading an open gate again lets every packet leave; after the repair of a damaged one none does.
func TestGateLoadsUnderTraffic(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		s, stop := g.startSender()
		defer stop()
		g.until("packets are dropped", func() bool { return g.dropped() > 0 })
		g.unlock()
		from := len(g.seen.Frames())
		g.until("packets leave", func() bool { return len(s.sent(g.seen.Frames()[from:])) > 0 })
		dropped := g.dropped()
		for n := 10; n <= 100; n += 10 {
			g.inRouter(g.Load)
			g.until("more packets leave", func() bool { return len(s.sent(g.seen.Frames()[from:])) > n })
		}
		if more := g.dropped() - dropped; more > 0 {
			g.Errorf("%d packets dropped", more)
		}
		g.nft("flush chain " + g.tableName() + " reply")
		g.inRouter(g.Load)
		repaired := time.Now()
		g.until("packets are dropped", func() bool { return g.dropped() > 10 })
		for _, at := range s.sent(g.seen.Frames()[from:]) {
			if at.After(repaired) {
				g.Errorf("a packet left %v after the repair", at.Sub(repaired))
			}
		}
	})
}

// tableName returns the gate's table as nft(8) takes it.
func (g *gated) tableName() string {
	if g.WithoutEgress {
		return "inet " + nft.GateTable
	}
	return "netdev " + nft.GateTable
}

// Loading what is there changes nothing, and a damaged gate is found, and is shut after its repair.
func TestGateLoadsAgain(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		wantLoaded := func(what string) {
			g.Helper()
			var found []string
			g.inRouter(func() (err error) { found, err = g.Differs(); return err })
			if len(found) > 0 {
				g.Errorf("%s: differences: %q", what, found)
			}
		}
		wantLoaded("loaded")
		g.unlock()
		wantLoaded("open")
		listed := g.listed()
		g.inRouter(g.Load)
		if g.left() == 0 {
			g.Error("loading a gate again closed it")
		}
		if again := g.listed(); again != listed {
			g.Errorf("loading a gate again changed it:\n%s\n%s", listed, again)
		}
		table := g.tableName()
		damages := []string{
			"delete table " + table,
			"flush table " + table,
			"flush chain " + table + " egress",
			"flush chain " + table + " reply",
			"add rule " + table + " reply accept",
			"insert rule " + table + " egress accept",
			"add set " + table + " more { type mark; }",
			"add chain " + table + " more",
			"add table " + table + " { flags dormant; }",
			fmt.Sprintf("delete table %s; add table %[1]s", table),
		}
		for _, damage := range damages {
			g.unlock()
			g.nft(damage)
			var found []string
			g.inRouter(func() (err error) { found, err = g.Differs(); return err })
			if len(found) == 0 {
				g.Errorf("%s: no difference", damage)
			}
			g.inRouter(g.Load)
			wantLoaded(damage)
			if left := g.left(); left != 0 {
				g.Errorf("%s: open for %v after the repair", damage, left)
			}
			dropped := g.dropped()
			emissions()[1].send(g)
			g.until(damage+": the packet is dropped", func() bool { return g.dropped() > dropped })
		}
		g.unlock()
		for what, other := range map[string]func(*nft.Gate){
			"ticket":  func(o *nft.Gate) { o.Ticket /= 2 },
			"permit":  func(o *nft.Gate) { o.Permit /= 2 },
			"mark":    func(o *nft.Gate) { o.Mark++ },
			"source":  func(o *nft.Gate) { o.Sources = []netip.Addr{netip.MustParseAddr("192.168.12.98"), lab.Source6} },
			"witness": func(o *nft.Gate) { o.Witnesses = []netip.Addr{lab.LANServer, lab.LANServer6} },
			"device":  func(o *nft.Gate) { o.Interface = "eth0" },
		} {
			o := g.Gate
			other(&o)
			var found []string
			g.inRouter(func() (err error) { found, err = o.Differs(); return err })
			inRules := !g.WithoutEgress || what != "mark" && what != "ticket"
			if len(found) == 0 && inRules {
				g.Errorf("another %s: no difference", what)
			}
		}
		var loaded, removed bool
		g.inRouter(func() (err error) { loaded, err = nft.GateLoaded(); return err })
		if !loaded {
			g.Error("GateLoaded of a gate: false")
		}
		g.inRouter(func() (err error) { removed, err = nft.RemoveGate(); return err })
		g.inRouter(func() (err error) { loaded, err = nft.GateLoaded(); return err })
		if text := g.nft("list ruleset"); !removed || loaded || strings.Contains(text, nft.GateTable) {
			g.Errorf("after RemoveGate:\n%s", text)
		}
		claim := func() error { return g.Claim(long) }
		if err := g.Router.Do(claim); !errors.Is(err, unix.ENOENT) {
			g.Errorf("claim without a gate: %v, want %v", err, unix.ENOENT)
		}
		g.inRouter(g.Load)
		g.inRouter(claim)
	})
}

// A new interface with the name of the old one is shut from the first packet, also if the gate was
// open.
func TestGateOfNewInterface(t *testing.T) {
	eachGate(t, long, long, func(g *gated) {
		g.unlock()
		router, node := g.handle(g.Router), g.handle(g.Node)
		defer router.Close()
		defer node.Close()
		if err := router.LinkDel(g.link(router, "macvlan0")); err != nil {
			g.Fatal(err)
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.ParentIndex, attributes.Namespace = "macvlan0", g.link(node, lab.NIC).Attrs().Index, netlink.NsFd(g.Router.Fd())
		if err := node.LinkAdd(&netlink.Macvlan{LinkAttrs: attributes, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
			g.Fatal(err)
		}
		g.inRouter(g.Load)
		g.configure()
		if left := g.left(); left != 0 {
			g.Errorf("open for %v", left)
		}
		for _, e := range emissions() {
			if strings.HasSuffix(e.name, "forwarded") || strings.HasSuffix(e.name, "own") {
				dropped := g.dropped()
				e.send(g)
				g.until(e.name+" is dropped", func() bool { return g.dropped() > dropped })
			}
		}
		for _, f := range g.seen.Frames() {
			if p, is := f.IPv4(); is && p.Protocol == unix.IPPROTO_UDP && !f.Outgoing {
				g.Errorf("%v", f)
			}
			if p, is := f.IPv6(); is && p.Protocol == unix.IPPROTO_UDP && !f.Outgoing {
				g.Errorf("%v", f)
			}
		}
		g.marked = g.open(g.Router, "macvlan0", aMark)
		g.countReplies()
		g.unlock()
	})
}

// The gate of a process that is killed shuts by itself.
func TestGateOfKilledProcess(t *testing.T) {
	const permit = 200 * time.Millisecond
	eachGate(t, long, permit, func(g *gated) {
		g.set(g.Outside, "net/ipv4/icmp_echo_ignore_all", "0")
		g.set(g.Outside, "net/ipv6/icmp/echo_ignore_all", "0")
		s, stop := g.startSender()
		defer stop()
		self, err := os.Executable()
		if err != nil {
			g.Fatal(err)
		}
		gate, err := json.Marshal(g.Gate)
		if err != nil {
			g.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(nstest.Environment(), keeperVariable+"="+string(gate), gatewayVariable+"="+g.gateway.mac.String())
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := g.Start(g.Router, cmd); err != nil {
			g.Fatal(err)
		}
		g.until("packets leave", func() bool { return len(s.sent(g.seen.Frames())) > 10 })
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		killed := time.Now()
		// While it was armed, an answer that a busy machine handles late opens.
		g.until("the gate shuts", func() bool {
			var armed int
			g.inRouter(func() (err error) { armed, err = g.Count("arm"); return err })
			return armed == 0 && time.Since(killed) > permit && g.left() == 0
		})
		shut := time.Now()
		dropped := g.dropped()
		g.until("packets are dropped", func() bool { return g.dropped() > dropped+10 })
		for _, at := range s.sent(g.seen.Frames()) {
			if at.After(shut) {
				g.Errorf("a packet left %v after the gate was shut", at.Sub(shut))
			}
		}
	})
}

// The variables of the process that holds a gate open.
const (
	keeperVariable  = "EGRESS_TEST_GATE"
	gatewayVariable = "EGRESS_TEST_GATEWAY"
)

func init() { // the process is a copy of the test binary
	if text := os.Getenv(keeperVariable); text != "" {
		fmt.Fprintln(os.Stderr, "keep a gate open:", keepGate(text))
		os.Exit(1)
	}
}

// keepGate holds a gate open, until it is killed.
func keepGate(text string) error {
	var g nft.Gate
	if err := json.Unmarshal([]byte(text), &g); err != nil {
		return err
	}
	gateway, err := net.ParseMAC(os.Getenv(gatewayVariable))
	if err != nil {
		return err
	}
	s := packetSocket{}
	found, err := net.InterfaceByName(g.Interface)
	if err != nil {
		return err
	}
	s.index, s.mac = found.Index, found.HardwareAddr
	if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK, int(g.Mark)); err != nil {
		return err
	}
	witness := g.Witnesses[slices.IndexFunc(g.Witnesses, func(a netip.Addr) bool { return a.Is4() == g.Sources[0].Is4() })]
	for n := uint32(1); ; n++ {
		left, err := g.Left()
		if err == nil && left == 0 {
			err = g.Arm(time.Second)
		}
		if err == nil {
			err = g.Number(n)
		}
		if err != nil {
			return err
		}
		if err := s.try(gateway, etherTypeOf(witness), icmp(g.Sources[0], witness, 8, 128, n)); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// listed returns the gate as nft(8) lists it, without what changes by itself.
func (g *gated) listed() string {
	g.Helper()
	var kept []string
	for line := range strings.Lines(g.nft("-s list ruleset")) {
		if !strings.Contains(line, "expires") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

// nft runs nft(8) in the router's namespace.
func (g *gated) nft(line string) string {
	g.Helper()
	cmd := exec.Command("nft", strings.Fields(line)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := g.Lab.Run(g.Router, cmd); err != nil {
		g.Fatalf("nft %s: %v\n%s", line, err, &out)
	}
	return out.String()
}

// A gate with which two routers could both be open, or one stay open, is refused.
func TestGateRefused(t *testing.T) {
	for what, spoil := range map[string]func(*nft.Gate){
		"no interface":          func(g *nft.Gate) { g.Interface = "" },
		"no source":             func(g *nft.Gate) { g.Sources = nil },
		"no witness":            func(g *nft.Gate) { g.Witnesses = nil },
		"of another family":     func(g *nft.Gate) { g.Witnesses = []netip.Addr{lab.GatewayAddr6} },
		"two witnesses":         func(g *nft.Gate) { g.Witnesses = append(g.Witnesses, lab.LANServer) },
		"no mark":               func(g *nft.Gate) { g.Mark = 0 },
		"ticket without a tick": func(g *nft.Gate) { g.Ticket = 9 * time.Millisecond },
		"permit without a tick": func(g *nft.Gate) { g.Permit = 9 * time.Millisecond },
	} {
		g := nft.Gate{Interface: "lo", Sources: []netip.Addr{lab.Source}, Witnesses: []netip.Addr{lab.GatewayAddr}, Mark: 1, Ticket: long, Permit: long}
		spoil(&g)
		if err := g.Load(); err == nil {
			t.Errorf("%s: loaded", what)
		}
		if there, err := nft.GateLoaded(); there || err != nil {
			t.Errorf("%s: loaded %v, %v", what, there, err)
		}
	}
}

// A gate with the egress hook loads if the kernel is found to have the hook, and not otherwise.
func TestHasEgressHook(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error {
		has, err := nft.HasEgressHook()
		if err != nil {
			return err
		}
		if there, err := nft.GateLoaded(); there || err != nil {
			t.Errorf("after the probe: gate loaded %v, %v", there, err)
		}
		g := nft.Gate{Interface: "lo", Sources: []netip.Addr{lab.Source}, Witnesses: []netip.Addr{lab.GatewayAddr}, Mark: 1, Ticket: long, Permit: long}
		if err := g.Load(); has != (err == nil) {
			t.Errorf("has the hook: %v; load: %v", has, err)
		}
		if found, err := g.Differs(); has != (len(found) == 0 && err == nil) {
			t.Errorf("has the hook: %v; differences %q, %v", has, found, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
