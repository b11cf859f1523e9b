package nft_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	nfnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/rules"
)

// The links of a router: the two sides, and another one.
var links = []string{"in0", "out0", "third0"}

// firstIndex is the index of the first link in the router. It differs from that of its
// peer, as the lab's do.
const firstIndex = 101

// linkName returns the name of a link of the router.
func linkName(index uint32) string {
	if index < firstIndex {
		return "lo"
	}
	return links[index-firstIndex]
}

const (
	clusterSide = iota
	egressSide
	thirdSide
	itself // packets that the router sends
)

// hosts are the addresses of one family.
type hosts struct {
	router, client  netip.Addr // on the cluster side
	source, gateway netip.Addr // on the egress side
	server, second  netip.Addr // behind the gateway
	third, other    netip.Addr // of the router and of a host on the third side
	free            netip.Addr // of nobody, on the egress side
}

func addresses(text string) hosts {
	a := strings.Fields(text)
	at := func(i int) netip.Addr { return netip.MustParseAddr(a[i]) }
	return hosts{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)}
}

// clients returns more clients, since rules match one in so many.
func (h hosts) clients() (all []netip.Addr) {
	for a := h.client; len(all) < 8; all = append(all, a) {
		a = a.Next()
	}
	return all
}

var families = []rules.Family{rules.IPv4, rules.IPv6}

var of = map[rules.Family]hosts{
	rules.IPv4: addresses("10.1.0.1 10.1.0.2 192.168.12.99 192.168.12.1 203.0.113.25 203.0.113.26 172.16.0.1 172.16.0.2 192.168.12.98"),
	rules.IPv6: addresses("fd00:1::1 fd00:1::2 2001:db8:12::99 2001:db8:12::1 2001:db8:25::25 2001:db8:25::26 fd00:3::1 fd00:3::2 2001:db8:12::98"),
}

// A station is a router between hosts that consist of packet sockets.
type station struct {
	router, outside *netns.Namespace
	sockets         [3]int
	raw             map[rules.Family]int // sockets of the router
	log             int                  // netlink socket for packets
	table           *nfnetlink.Conn      // for connections
	buffer          [64 << 10]byte
	sentinels       uint16
	traffic         []packet
	reasons         map[string][]string // logged packets by family and reason
}

// newStation creates the namespaces and links of a router.
func newStation() (s *station, err error) {
	s = &station{sockets: [3]int{-1, -1, -1}, log: -1, raw: make(map[rules.Family]int), traffic: append(traffic(rules.IPv4), traffic(rules.IPv6)...)}
	if s.router, err = netns.New(); err == nil {
		s.outside, err = netns.New()
	}
	if err == nil {
		err = s.outside.Do(func() error { return sysctl("net/ipv6/conf/default/disable_ipv6", "1") })
	}
	if err == nil {
		err = s.router.Do(s.connect)
	}
	if err == nil {
		err = s.outside.Do(s.plug)
	}
	if err == nil {
		err = s.router.Do(s.receives)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *station) close() {
	for _, fd := range append(slices.Collect(maps.Values(s.raw)), append(s.sockets[:], s.log)...) {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	if s.table != nil {
		_ = s.table.Close()
	}
	for _, ns := range []*netns.Namespace{s.router, s.outside} {
		if ns != nil {
			_ = ns.Close()
		}
	}
}

func sysctl(key, value string) error {
	return os.WriteFile("/proc/sys/"+key, []byte(value), 0)
}

// mac returns the hardware address of a router's link (end 0) or of its peer (end 1).
func mac(link, end int) net.HardwareAddr {
	return net.HardwareAddr{2, 0, 0, 0, byte(end), byte(link)}
}

// connect sets up the router: its links, addresses, routes and static neighbours.
// Nothing in it sends packets on its own, except for reports of multicast listeners.
func (s *station) connect() error {
	for key, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/disable_ipv6": "0",
		"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0",
		"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/default/send_redirects": "0",
		"net/ipv6/conf/default/accept_dad": "0", "net/ipv6/conf/default/accept_ra": "0", "net/ipv6/conf/default/addr_gen_mode": "1",
		"net/ipv4/icmp_ratemask": "0", "net/ipv6/icmp/ratemask": "255", // answers without a limit
		"net/ipv4/conf/default/accept_redirects": "0", "net/ipv6/conf/default/accept_redirects": "0",
	} {
		if err := sysctl(key, value); err != nil {
			return err
		}
	}
	for i, name := range links {
		veth := netlink.NewVeth(netlink.LinkAttrs{Name: name, HardwareAddr: mac(i, 0), MTU: []int{1500, 1400, 1500}[i], Index: firstIndex + i})
		veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = name, mac(i, 1), netlink.NsFd(s.outside.Fd())
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(veth); err != nil {
			return err
		}
		for _, f := range families {
			h, bits := of[f], map[rules.Family]int{rules.IPv4: 24, rules.IPv6: 64}[f]
			own, peers := []netip.Addr{h.router, h.source, h.third}[i], [][]netip.Addr{append(h.clients(), h.client), {h.gateway, h.free}, {h.other}}[i]
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: own.AsSlice(), Mask: net.CIDRMask(bits, own.BitLen())}}
			if f == rules.IPv6 {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(veth, addr); err != nil {
				return err
			}
			for _, peer := range peers {
				neighbour := &netlink.Neigh{LinkIndex: veth.Index, State: netlink.NUD_PERMANENT, IP: peer.AsSlice(), HardwareAddr: mac(i, 1)}
				if err := netlink.NeighAdd(neighbour); err != nil {
					return err
				}
			}
			if i != egressSide {
				continue
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Index, Gw: h.gateway.AsSlice()}); err != nil {
				return err
			}
		}
	}
	return nil
}

// keepConnections lets no connection end by time. The kernel has these sysctls once rules
// use conntrack.
func keepConnections() error {
	for _, name := range []string{"generic_timeout", "icmp_timeout", "icmpv6_timeout", "tcp_timeout_close", "tcp_timeout_syn_sent", "udp_timeout", "udp_timeout_stream"} {
		if err := sysctl("net/netfilter/nf_conntrack_"+name, "3600"); err != nil {
			return err
		}
	}
	return nil
}

// plug opens the packet sockets of the hosts, when frames pass on every link.
func (s *station) plug() error {
	for i, name := range links {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		// The kernel starts the queue of a link later (see internal/lab, awaitUp).
		if err := until(name+" is up", func() bool {
			link, err := netlink.LinkByName(name)
			return err == nil && link.Attrs().OperState == netlink.OperUp
		}); err != nil {
			return err
		}
		if s.sockets[i], err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(s.sockets[i], &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index}); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	return nil
}

// receives returns when the router has routes to its own addresses and links, which the
// kernel completes later for IPv6 (net/ipv6/addrconf.c, addrconf_dad_work).
func (s *station) receives() error {
	for _, f := range families {
		for _, own := range []netip.Addr{of[f].router, of[f].source, of[f].third} {
			if err := until("route to "+own.String(), func() bool {
				routes, err := netlink.RouteGet(own.AsSlice())
				return err == nil && routes[0].Type == unix.RTN_LOCAL
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// until waits for a state of the kernel of which it does not notify.
func until(what string, reached func() bool) error {
	for end := time.Now().Add(10 * time.Minute); !reached(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("waiting until %s", what)
		}
	}
	return nil
}

// The source ports of packets that the observer treats in a way of its own.
const (
	untrackedPort = 777
	sentinelPort  = 778
)

// observerGroup is the group of nfnetlink_log of the observer.
const observerGroup = 1

// addObserver adds rules that log. At every hook, a chain behind all others logs each
// packet. Sentinels are logged and dropped in front of all chains.
func addObserver() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Name: "observer", Family: nftables.TableFamilyINet})
	chain := func(name string, hook *nftables.ChainHook, priority nftables.ChainPriority, rules ...[]expr.Any) {
		at := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: &priority})
		for _, r := range rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: at, Exprs: r})
		}
	}
	log := func(prefix string) []expr.Any {
		return []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: observerGroup, Data: []byte(prefix)}}
	}
	port := func(n uint16, then ...expr.Any) []expr.Any {
		return append([]expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, n)},
		}, then...)
	}
	drop := &expr.Verdict{Kind: expr.VerdictDrop}
	chain("sentinel", nftables.ChainHookPrerouting, -500, port(sentinelPort, log("sentinel")[0], drop))
	chain("untracked-output", nftables.ChainHookOutput, -310, port(untrackedPort, &expr.Notrack{}))
	chain("untracked", nftables.ChainHookPrerouting, -310, port(untrackedPort, &expr.Notrack{}))
	chain("reports", nftables.ChainHookOutput, -500, []expr.Any{ // of multicast listeners (RFC 9777)
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{143}}, drop,
	})
	for name, hook := range map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput, "forward": nftables.ChainHookForward,
		"output": nftables.ChainHookOutput, "postrouting": nftables.ChainHookPostrouting,
	} {
		chain(name, hook, 400, log(name))
	}
	return c.Flush()
}

// open opens the sockets of the router, and adds the observer.
func (s *station) open() (err error) {
	if err := addObserver(); err != nil {
		return err
	}
	if s.table, err = nfnetlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return err
	}
	for f, family := range map[rules.Family]int{rules.IPv4: unix.AF_INET, rules.IPv6: unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW) // raw(7)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		s.raw[f] = fd
	}
	// A plain socket: the library's changes the goroutine for every message.
	if s.log, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(s.log, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
		return err
	}
	for _, group := range []uint16{observerGroup, rules.LogGroup} {
		e := nfnetlink.NewAttributeEncoder()
		e.ByteOrder = binary.BigEndian
		e.Uint8(1, 1)                           // NFULA_CFG_CMD: bind
		e.Bytes(2, []byte{0, 0, 0, 0xff, 2, 0}) // NFULA_CFG_MODE: copy 255 bytes
		e.Uint32(5, 1)                          // NFULA_CFG_QTHRESH: do not wait for more
		attributes, err := e.Encode()
		if err != nil {
			return err
		}
		m := request(unix.NFNL_SUBSYS_ULOG, 1, nfnetlink.Acknowledge, group, attributes)
		m.Header.Length = uint32(unix.NLMSG_HDRLEN + len(m.Data)) //nolint:gosec // a short message
		b, err := m.MarshalBinary()
		if err != nil {
			return err
		}
		if err := unix.Sendto(s.log, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return os.NewSyscallError("sendto", err)
		}
		answer, err := s.receive()
		if err != nil {
			return err
		}
		if m := answer[0]; m.Header.Type != unix.NLMSG_ERROR || binary.NativeEndian.Uint32(m.Data) != 0 {
			return fmt.Errorf("bind to nflog group %d: %x", group, m.Data)
		}
	}
	return nil
}

// receive returns the next messages of the log.
func (s *station) receive() ([]syscall.NetlinkMessage, error) {
	for {
		n, _, err := unix.Recvfrom(s.log, s.buffer[:], 0)
		if err == nil {
			return syscall.ParseNetlinkMessage(s.buffer[:n])
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, os.NewSyscallError("recvfrom", err)
		}
	}
}

// request returns a request of nfnetlink (linux/netfilter/nfnetlink.h).
func request(subsystem, kind int, flags nfnetlink.HeaderFlags, resource uint16, attributes []byte) nfnetlink.Message {
	return nfnetlink.Message{
		Header: nfnetlink.Header{Type: nfnetlink.HeaderType(subsystem<<8 | kind), Flags: nfnetlink.Request | flags},
		Data:   append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, resource), attributes...),
	}
}

// run sends the packets to a router without connections, and returns what was observed,
// with the connections if list is set.
func (s *station) run(list bool) (string, error) {
	// IPCTNL_MSG_CT_DELETE without a tuple deletes all connections.
	if _, err := s.table.Execute(request(unix.NFNL_SUBSYS_CTNETLINK, 2, nfnetlink.Acknowledge, 0, nil)); err != nil {
		return "", fmt.Errorf("delete connections: %w", err)
	}
	var b strings.Builder
	s.reasons = make(map[string][]string)
	for _, p := range s.traffic {
		if err := s.send(p.link, p.data); err != nil {
			return "", err
		}
		var seen []string
		for looped := true; looped; {
			more, err := s.await()
			if err != nil {
				return "", fmt.Errorf("packet %s: %w", p.name, err)
			}
			seen = append(seen, more...)
			// What the router sends to itself may arrive behind the sentinel.
			looped = slices.ContainsFunc(more, func(way string) bool { return strings.Contains(way, " to lo ") })
		}
		fmt.Fprintf(&b, "%s: %s\n", p.name, strings.Join(seen, ", "))
	}
	for _, reason := range slices.Sorted(maps.Keys(s.reasons)) {
		// The first packets: later ones pass the limit as time passes.
		logged := s.reasons[reason]
		fmt.Fprintf(&b, "log %s: %s\n", reason, strings.Join(logged[:min(len(logged), rules.LogBurst)], ", "))
	}
	if !list {
		return b.String(), nil
	}
	connections, err := s.connections()
	for _, c := range connections {
		fmt.Fprintf(&b, "connection %s\n", c)
	}
	return b.String(), err
}

func (s *station) send(link int, data []byte) error {
	if link == itself {
		var err error
		if data[0]>>4 == 4 {
			err = unix.Sendto(s.raw[rules.IPv4], data, 0, &unix.SockaddrInet4{Addr: [4]byte(data[16:])})
		} else {
			err = unix.Sendto(s.raw[rules.IPv6], data, 0, &unix.SockaddrInet6{Addr: [16]byte(data[24:])})
		}
		if errors.Is(err, unix.EPERM) {
			return nil // a rule drops it
		}
		return os.NewSyscallError("sendto", err)
	}
	kind := uint16(unix.ETH_P_IP)
	if data[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	frame := slices.Concat(mac(link, 0), mac(link, 1), binary.BigEndian.AppendUint16(nil, kind), data)
	_, err := unix.Write(s.sockets[link], frame)
	return os.NewSyscallError("write", err)
}

// await sends a sentinel, reads the log until the router has received it, and returns the
// packets of the observer.
func (s *station) await() (seen []string, err error) {
	s.sentinels++
	h := of[rules.IPv4]
	if err := s.send(clusterSide, ip(h.client, h.router, unix.IPPROTO_UDP, udp(sentinelPort, s.sentinels, nil))); err != nil {
		return nil, err
	}
	for {
		messages, err := s.receive()
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			if m.Header.Type != unix.NFNL_SUBSYS_ULOG<<8 {
				continue
			}
			d, err := nfnetlink.NewAttributeDecoder(m.Data[4:])
			if err != nil {
				return nil, err
			}
			d.ByteOrder = binary.BigEndian
			var prefix, way string
			var payload []byte
			for d.Next() { // linux/netfilter/nfnetlink_log.h, nfulnl_attr_type
				switch d.Type() {
				case 2:
					way += fmt.Sprintf(" mark %#x", d.Uint32())
				case 4:
					way += " from " + linkName(d.Uint32())
				case 5:
					way += " to " + linkName(d.Uint32())
				case 9:
					payload = d.Bytes()
				case 10:
					prefix = d.String()
				}
			}
			if err := d.Err(); err != nil {
				return nil, err
			}
			text, transport := describe(payload)
			switch group := binary.BigEndian.Uint16(m.Data[2:]); {
			case prefix == "sentinel":
				if binary.BigEndian.Uint16(transport[2:]) == s.sentinels {
					return seen, nil
				}
			case group == rules.LogGroup:
				key := fmt.Sprintf("IPv%d %s", payload[0]>>4, prefix)
				s.reasons[key] = append(s.reasons[key], way+" "+text)
			default:
				seen = append(seen, prefix+way+" "+text)
			}
		}
	}
}

// connections returns the connections that the kernel has (linux/netfilter/nfnetlink_conntrack.h).
func (s *station) connections() (found []string, err error) {
	messages, err := s.table.Execute(request(unix.NFNL_SUBSYS_CTNETLINK, 1, nfnetlink.Dump, 0, nil))
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	for _, m := range messages {
		d, err := nfnetlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, err
		}
		d.ByteOrder = binary.BigEndian
		var text string
		for d.Next() {
			switch d.Type() {
			case 1, 2: // CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
				text += fmt.Sprintf("%x ", d.Bytes())
			case 3: // CTA_STATUS: expected, has a reply, assured, confirmed, SNAT, DNAT, helper
				text += fmt.Sprintf("status %#x ", d.Uint32()&(1|1<<1|1<<2|1<<3|1<<4|1<<5|1<<13))
			case 5: // CTA_HELP
				text += fmt.Sprintf("helper %q ", bytes.Trim(d.Bytes()[4:], "\x00"))
			case 8: // CTA_MARK
				text += fmt.Sprintf("mark %#x ", d.Uint32())
			}
		}
		if err := d.Err(); err != nil {
			return nil, err
		}
		found = append(found, text)
	}
	slices.Sort(found)
	return found, nil
}

// describe returns the parts of a packet that rules can change, and its transport
// header: addresses, ports, flags and maximum segment size, or type and content of a
// message.
func describe(b []byte) (text string, transport []byte) {
	var protocol byte
	var from, to netip.Addr
	standard := 536 // maximum segment size without the option (RFC 9293, section 3.7.1)
	if b[0]>>4 == 4 {
		protocol, transport = b[9], b[20:]
		from, to = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	} else {
		protocol, transport, standard = b[6], b[40:], 1220
		from, to = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	}
	port := func(at int) uint16 { return binary.BigEndian.Uint16(transport[at:]) }
	switch protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		text = fmt.Sprintf("%s > %s protocol %d", netip.AddrPortFrom(from, port(0)), netip.AddrPortFrom(to, port(2)), protocol)
		if protocol == unix.IPPROTO_TCP && len(transport) >= 20 {
			text += fmt.Sprintf(" flags %#x seq %x", transport[13], transport[4:12])
			if transport[13]&tcpSYN != 0 {
				size := standard
				if transport[12]>>4 > 5 && transport[20] == 2 {
					size = int(port(22))
				}
				text += fmt.Sprintf(" mss %d", size)
			}
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		text = fmt.Sprintf("%s > %s message %d.%d", from, to, transport[0], transport[1])
		if quotes := transport[0] < 128 && protocol == unix.IPPROTO_ICMPV6 || transport[0] == 3 || transport[0] == 11; quotes {
			quoted, _ := describe(transport[8:])
			text += " (" + quoted + ")"
		} else {
			text += fmt.Sprintf(" %x", transport[4:8])
		}
	default:
		text = fmt.Sprintf("%s > %s protocol %d", from, to, protocol)
	}
	return text, transport
}

// A packet of the test.
type packet struct {
	name string
	link int // by which the router receives it
	data []byte
}

// The flags of TCP (RFC 9293, section 3.1).
const (
	tcpSYN = 1 << 1
	tcpRST = 1 << 2
	tcpACK = 1 << 4
)

// traffic returns the packets of a family. They are those of redirected connections, with
// replies as the server of [environment] sends them; and everything else that arrives.
func traffic(f rules.Family) []packet {
	h := of[f]
	var all []packet
	add := func(name string, link int, from, to netip.Addr, protocol byte, transport []byte) {
		all = append(all, packet{f.String() + " " + name, link, ip(from, to, protocol, transport)})
	}
	const clients, server = 1000, 500000 // first sequence numbers
	mss := []byte{2, 4, 1460 >> 8, 1460 & 0xff}
	icmp, echo, reply, unreachable, redirect, closed := byte(unix.IPPROTO_ICMP), byte(8), byte(0), byte(3), byte(5), byte(3)
	if f == rules.IPv6 {
		icmp, echo, reply, unreachable, redirect, closed = unix.IPPROTO_ICMPV6, 128, 129, 1, 137, 4
	}
	tcp := func(name string, link int, from netip.Addr, fromPort uint16, to netip.Addr, toPort uint16, flags byte, seq, ack uint32, options []byte) {
		b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, fromPort), toPort)
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, seq), ack)
		b = append(b, byte(5+len(options)/4)<<4, flags, 0x20, 0, 0, 0, 0, 0)
		add(name, link, from, to, unix.IPPROTO_TCP, append(b, options...))
	}
	datagram := func(name string, link int, from netip.Addr, fromPort uint16, to netip.Addr, toPort uint16) {
		add(name, link, from, to, unix.IPPROTO_UDP, udp(fromPort, toPort, []byte("\x00\x01file\x00octet\x00"))) // a request of TFTP
	}
	message := func(name string, link int, from, to netip.Addr, kind, code, id byte, content []byte) {
		add(name, link, from, to, icmp, append([]byte{kind, code, 0, 0, 0, id, 0, 1}, content...))
	}
	tcp("SYN, redirected", clusterSide, h.client, 1001, h.router, 80, tcpSYN, clients, 0, mss)
	tcp("SYN ACK", egressSide, h.server, 8080, h.source, 1001, tcpSYN|tcpACK, server, clients+1, mss)
	tcp("ACK", clusterSide, h.client, 1001, h.router, 80, tcpACK, clients+1, server+1, nil)
	tcp("ACK of the server", egressSide, h.server, 8080, h.source, 1001, tcpACK, server+1, clients+1, nil)
	tcp("outside of the window", clusterSide, h.client, 1001, h.router, 80, tcpACK, clients+1<<30, server+1, nil)
	tcp("outside of the window, by the server", egressSide, h.server, 8080, h.source, 1001, tcpACK, server+1<<30, clients+1, nil)
	tcp("RST of the server", egressSide, h.server, 8080, h.source, 1001, tcpRST|tcpACK, server+1, clients+1, nil)
	tcp("SYN, not redirected", clusterSide, h.client, 1002, h.router, 81, tcpSYN, clients, 0, nil)
	tcp("SYN through the router", clusterSide, h.client, 1003, h.second, 80, tcpSYN, clients, 0, nil)
	tcp("SYN to the server", clusterSide, h.client, 1004, h.server, 8080, tcpSYN, clients, 0, mss)
	tcp("RST to a connection that opens", egressSide, h.server, 8080, h.source, 1004, tcpRST|tcpACK, 0, clients+1, nil)
	tcp("ACK of no connection", clusterSide, h.client, 1005, h.router, 80, tcpACK, clients, server, nil)
	tcp("SYN ACK of no connection", clusterSide, h.client, 1006, h.router, 80, tcpSYN|tcpACK, clients, server, mss)
	tcp("SYN RST", clusterSide, h.client, 1007, h.router, 80, tcpSYN|tcpRST, clients, 0, nil)
	tcp("SYN of the gateway", egressSide, h.gateway, 1008, h.source, 22, tcpSYN, clients, 0, mss)
	tcp("SYN into the cluster", egressSide, h.gateway, 1009, h.client, 80, tcpSYN, clients, 0, mss)
	tcp("SYN by the third side", thirdSide, h.other, 1010, h.third, 80, tcpSYN, clients, 0, mss)
	tcp("SYN through the third side", thirdSide, h.other, 1011, h.server, 8080, tcpSYN, clients, 0, mss)
	tcp("SYN to the third side", clusterSide, h.client, 1012, h.other, 80, tcpSYN, clients, 0, mss)
	tcp("SYN, untracked", clusterSide, h.client, untrackedPort, h.router, 80, tcpSYN, clients, 0, mss)
	tcp("SYN through the router, untracked", clusterSide, h.client, untrackedPort, h.server, 80, tcpSYN, clients, 0, mss)
	tcp("SYN of the server, untracked", egressSide, h.server, untrackedPort, h.source, 80, tcpSYN, clients, 0, mss)
	datagram("UDP, redirected", clusterSide, h.client, 2001, h.router, 53)
	datagram("UDP of the server", egressSide, h.server, 53, h.source, 2001)
	datagram("UDP, redirected, again", clusterSide, h.client, 2001, h.router, 53)
	datagram("UDP, not redirected", clusterSide, h.client, 2002, h.router, 54)
	datagram("UDP of the fallback", egressSide, h.second, 54, h.source, 2002)
	datagram("UDP through the router", clusterSide, h.client, 2003, h.server, 53)
	datagram("UDP of the gateway", egressSide, h.gateway, 2004, h.source, 53)
	datagram("UDP by the third side", thirdSide, h.other, 2005, h.third, 53)
	datagram("UDP, untracked", clusterSide, h.client, untrackedPort, h.router, 53)
	datagram("TFTP", clusterSide, h.client, 2006, h.router, 69)
	datagram("expected", egressSide, h.server, 3006, h.source, 2006)
	datagram("to the expected", clusterSide, h.client, 2006, h.router, 3006)
	datagram("expected, again", egressSide, h.server, 3006, h.source, 2006)
	datagram("TFTP by the third side", thirdSide, h.other, 2007, h.client, 69)
	datagram("expected by the third side", clusterSide, h.client, 3007, h.other, 2007)
	message("echo", clusterSide, h.client, h.router, echo, 0, 1, nil)
	message("echo through the router", clusterSide, h.client, h.server, echo, 0, 2, nil)
	message("echo reply", egressSide, h.server, h.source, reply, 0, 2, nil)
	message("echo of the gateway", egressSide, h.gateway, h.source, echo, 0, 3, nil)
	message("echo reply of no connection", egressSide, h.gateway, h.source, reply, 0, 4, nil)
	message("error about an original packet", egressSide, h.server, h.source, unreachable, closed, 0, ip(h.source, h.server, unix.IPPROTO_UDP, udp(2001, 53, nil)))
	message("error about a reply", clusterSide, h.client, h.router, unreachable, closed, 0, ip(h.router, h.client, unix.IPPROTO_UDP, udp(53, 2001, nil)))
	message("error of no connection", egressSide, h.server, h.source, unreachable, closed, 0, ip(h.source, h.server, unix.IPPROTO_UDP, udp(1, 1, nil)))
	message("redirect", egressSide, h.gateway, h.source, redirect, 0, 0, append(h.free.AsSlice(), ip(h.source, h.server, unix.IPPROTO_UDP, udp(2001, 53, nil))...))
	tcp("SYN by the router", itself, h.source, 1101, h.server, 8080, tcpSYN, clients, 0, mss)
	tcp("SYN ACK to the router", egressSide, h.server, 8080, h.source, 1101, tcpSYN|tcpACK, server, clients+1, mss)
	tcp("outside of the window, by the router", itself, h.source, 1101, h.server, 8080, tcpACK, clients+1<<30, server+1, nil)
	tcp("SYN by the router to a client", itself, h.router, 1102, h.client, 80, tcpSYN, clients, 0, nil)
	tcp("SYN by the router, untracked", itself, h.source, untrackedPort, h.server, 80, tcpSYN, clients, 0, mss)
	tcp("SYN by the router, another source", itself, h.router, 1103, h.server, 80, tcpSYN, clients, 0, mss)
	datagram("UDP by the router", itself, h.source, 2101, h.server, 53)
	datagram("UDP by the router, again", itself, h.source, 2101, h.server, 53)
	datagram("TFTP by the router", itself, h.router, 2102, h.client, 69)
	message("echo by the router", itself, h.source, h.server, echo, 0, 5, nil)
	message("echo reply of no connection, by the router", itself, h.source, h.server, reply, 0, 6, nil)
	message("error by the router", itself, h.source, h.server, unreachable, closed, 0, ip(h.server, h.source, unix.IPPROTO_UDP, udp(53, 2101, nil)))
	message("redirect by the router", itself, h.router, h.client, redirect, 0, 0, append(h.free.AsSlice(), ip(h.client, h.server, unix.IPPROTO_UDP, udp(2003, 53, nil))...))
	for i, client := range h.clients() {
		datagram(fmt.Sprintf("UDP of client %d", i), clusterSide, client, 2200+uint16(i), h.router, 53) //nolint:gosec // a few
	}
	datagram("UDP of the router's other address", itself, h.router, 2300, h.server, 53)
	if f == rules.IPv6 { // without the hop limit of neighbour discovery, so that the kernel does not answer
		group, unspecified := netip.MustParseAddr("ff02::1:ff00:99"), netip.IPv6Unspecified()
		near, far := netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::2")
		message("solicitation", egressSide, h.gateway, group, 135, 0, 0, h.source.AsSlice())
		message("solicitation of duplicate address detection", egressSide, unspecified, group, 135, 0, 0, h.source.AsSlice())
		message("solicitation to a link-local address", egressSide, far, near, 135, 0, 0, near.AsSlice())
		message("advertisement", egressSide, h.gateway, h.source, 136, 0, 0, h.gateway.AsSlice())
		message("advertisement, by the cluster side", clusterSide, h.client, h.router, 136, 0, 0, h.client.AsSlice())
		message("query", egressSide, h.gateway, group, 130, 0, 0, group.AsSlice())
		message("solicitation by the router", itself, h.source, h.gateway, 135, 0, 0, h.gateway.AsSlice())
		message("advertisement by the router", itself, h.router, h.gateway, 136, 0, 0, h.router.AsSlice())
	}
	add("other protocol by the router", itself, h.source, h.server, 253, make([]byte, 8))
	add("other protocol", clusterSide, h.client, h.router, 253, make([]byte, 8))
	add("other protocol through the router", clusterSide, h.client, h.server, 253, make([]byte, 8))
	return all
}

// udp returns a datagram.
func udp(from, to uint16, content []byte) []byte {
	b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	return append(binary.BigEndian.AppendUint32(b, uint32(8+len(content))<<16), content...)
}

// ip returns an IP packet, with the checksums of its header and of its content.
func ip(from, to netip.Addr, protocol byte, transport []byte) []byte {
	transport = slices.Clone(transport)
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, 0, byte(len(transport) >> 8), byte(len(transport)), 0, 0, 0, protocol})
	switch protocol {
	case unix.IPPROTO_TCP:
		binary.BigEndian.PutUint16(transport[16:], checksum(append(pseudo, transport...)))
	case unix.IPPROTO_UDP:
		binary.BigEndian.PutUint16(transport[6:], checksum(append(pseudo, transport...)))
	case unix.IPPROTO_ICMP:
		binary.BigEndian.PutUint16(transport[2:], checksum(transport))
	case unix.IPPROTO_ICMPV6:
		binary.BigEndian.PutUint16(transport[2:], checksum(append(pseudo, transport...)))
	}
	if from.Is6() {
		header := []byte{6 << 4, 0, 0, 0, byte(len(transport) >> 8), byte(len(transport)), protocol, 64}
		return slices.Concat(header, from.AsSlice(), to.AsSlice(), transport)
	}
	header := slices.Concat([]byte{4<<4 | 5, 0, byte((20 + len(transport)) >> 8), byte(20 + len(transport)), 0, 0, 0, 0, 64, protocol, 0, 0}, from.AsSlice(), to.AsSlice())
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return append(header, transport...)
}

// checksum returns the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i, octet := range b {
		sum += uint32(octet) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum) //nolint:gosec // one's complement
}
