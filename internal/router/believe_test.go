package router_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// allow sets a sysctl of the pod that protects it, or that a read-only /proc/sys
// leaves as it is, so that the rules alone are tested.
func allow(p *labtest.Pod, key, value string) {
	p.Helper()
	if err := p.Lab.SetSysctl(p.Lab.Router, key, value); err != nil {
		p.Fatal(err)
	}
}

// nextHop returns the next hop of packets of the pod from an address to another.
func nextHop(p *labtest.Pod, h *netlink.Handle, from, to string) string {
	p.Helper()
	routes, err := h.RouteGetWithOptions(net.ParseIP(to), &netlink.RouteGetOptions{SrcAddr: net.ParseIP(from)})
	if err != nil || len(routes) != 1 {
		p.Fatalf("route from %s to %s: %v, error %v", from, to, routes, err)
	}
	return routes[0].Gw.String()
}

// A redirect from either side changes no next hop of the pod: neither a forged one
// nor one that quotes a packet of an open connection. ARP and connections work.
func TestRedirectMessageIsIgnored(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "http-proxy"} {
		t.Run(mode, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_ROUTER_MODE"] = mode
				p.OK()
				p.WantUnchanged(p.OK())
				believe := func() {
					for _, link := range []string{"all", "eth0", "macvlan0"} {
						allow(p, "net/ipv4/conf/"+link+"/accept_redirects", "1")
						allow(p, "net/ipv4/conf/"+link+"/secure_redirects", "0")
					}
				}
				believe()
				h := p.Handle(p.Lab.Router)
				// An open connection, which the second message quotes: the kernel takes one
				// with the number of the next segment.
				w := p.Watch(p.Lab.Router, "macvlan0")
				conn := p.Dial(p.Lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
				if _, err := lab.ReadAnswer(bufio.NewReader(conn)); err != nil {
					p.Fatal(err)
				}
				var segment []byte
				for _, f := range w.Outgoing("macvlan0") {
					if ip, _ := f.IPv4(); ip.Dst.String() == "203.0.113.25:80" {
						segment = f.Data[14+20:][:8]
					}
				}
				sides := []struct {
					by                            *netns.Namespace
					hop, better, pod, destination string
					protocol                      byte
					quoted                        []byte
				}{
					// The kernel accepts any echo reply as one of its own.
					{p.Lab.Node, "10.128.0.1", "10.128.0.71", "10.128.0.98", "10.129.0.71", unix.IPPROTO_ICMP, []byte{0, 0, 0xff, 0xff, 0, 0, 0, 0}},
					{p.Lab.Outside, "192.168.12.1", "192.168.12.80", "192.168.12.99", "203.0.113.25", unix.IPPROTO_TCP, segment},
				}
				send := func(i int) {
					s := sides[i]
					// RFC 792: the better gateway, and the beginning of the packet.
					inner := make([]byte, 20, 28)
					inner[0], inner[3], inner[8], inner[9] = 0x45, 40, 63, s.protocol
					copy(inner[12:], netip.MustParseAddr(s.pod).AsSlice())
					copy(inner[16:], netip.MustParseAddr(s.destination).AsSlice())
					binary.BigEndian.PutUint16(inner[10:], checksum(inner[:20]))
					message := slices.Concat([]byte{5, 1, 0, 0}, netip.MustParseAddr(s.better).AsSlice(), inner, s.quoted)
					sendICMP(p, s.by, s.hop, s.pod, message)
				}
				hop := func(i int) string { return nextHop(p, h, sides[i].pod, sides[i].destination) }
				for i, s := range sides {
					// The kernel takes only a next hop whose hardware address it knows.
					if !ping(p, p.Lab.Router, netip.MustParseAddr(s.better), labtest.Patience) {
						p.Fatalf("%s does not answer a ping", s.better)
					}
					if hop(i) != s.hop {
						p.Fatalf("next hop to %s: %s, want %s", s.destination, hop(i), s.hop)
					}
					send(i)
					// It has arrived when a later packet has been answered.
					if !ping(p, s.by, netip.MustParseAddr(s.pod), labtest.Patience) {
						p.Errorf("%s does not answer a ping", s.pod)
					}
					if hop(i) != s.hop {
						p.Errorf("next hop to %s after a redirect: %s, want %s", s.destination, hop(i), s.hop)
					}
				}
				// Without the rules both are believed.
				p.Clear()
				for i, s := range sides {
					p.Until("a redirect is believed", func() bool { send(i); return hop(i) == s.better })
				}
			})
		})
	}
}

// Queries other than echo requests get no answer on the physical network.
func TestTimestampAndMaskQueriesAreNotAnswered(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		for _, mode := range []string{"http-proxy", "init"} {
			p.Env["EGRESS_ROUTER_MODE"] = mode
			p.OK()
			w := p.Watch(p.Lab.Router, "macvlan0")
			for kind, length := range map[byte]int{13: 20, 15: 8, 17: 12} { // RFC 792 and 950
				message := make([]byte, length)
				message[0] = kind
				sendICMP(p, p.Lab.Outside, "192.168.12.1", "192.168.12.99", message)
			}
			wantRefusedFrom(p, p.Lab.Outside, "tcp", "192.168.12.99:113") // later
			w.WantNothing("macvlan0", func(ip lab.Packet) bool { return ip.Protocol == unix.IPPROTO_ICMP })
			if !ping(p, p.Lab.Outside, lab.Source, labtest.Patience) {
				p.Errorf("%s: the reserved address does not answer a ping", mode)
			}
		}
	})
}

// sendICMPv6 sends an ICMPv6 message of neighbour discovery, which has the hop limit
// 255 (RFC 4861). The kernel fills in its checksum (RFC 3542).
func sendICMPv6(p *labtest.Pod, ns *netns.Namespace, link, from, to string, message []byte) {
	p.Helper()
	if err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		for _, option := range []int{unix.IPV6_MULTICAST_HOPS, unix.IPV6_UNICAST_HOPS} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, option, 255); err != nil {
				return err
			}
		}
		addr := func(s string) *unix.SockaddrInet6 {
			return &unix.SockaddrInet6{Addr: netip.MustParseAddr(s).As16(), ZoneId: uint32(l.Index)}
		}
		if err := unix.Bind(fd, addr(from)); err != nil {
			return fmt.Errorf("bind to %s: %w", from, err)
		}
		return unix.Sendto(fd, message, 0, addr(to))
	}); err != nil {
		p.Fatal(err)
	}
}

// Neither a router advertisement nor a redirect of the physical network changes the
// pod's IPv6, whatever the sysctls. Neighbour discovery works.
func TestIPv6OfPhysicalNetworkIsNotBelieved(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		enableIPv6(p)
		const first, better = "fe80::1", "fe80::2"
		h := p.Handle(p.Lab.Outside)
		for _, a := range []string{first, better} {
			addr := labtest.Addr(a + "/64")
			addr.Flags = unix.IFA_F_NODAD
			if err := h.AddrAdd(p.Link(h, lab.LANLink), addr); err != nil {
				p.Fatal(err)
			}
		}
		p.Serve(p.Lab.Outside, "tcp", "[fd00:12::1]:80")
		pod := p.Handle(p.Lab.Router)
		macvlan := p.Link(pod, "macvlan0")
		if err := pod.RouteAdd(&netlink.Route{Dst: labtest.IPNet("fd00:99::/64"), Gw: net.ParseIP(first), LinkIndex: macvlan.Attrs().Index}); err != nil {
			p.Fatal(err)
		}
		believed := func() (found []string) {
			routes, err := pod.RouteList(macvlan, netlink.FAMILY_V6)
			if err != nil {
				p.Fatal(err)
			}
			for _, r := range routes {
				if r.Protocol == unix.RTPROT_RA || r.Dst != nil && r.Dst.String() == "fd00:13::/64" {
					found = append(found, r.String())
				}
			}
			if via := nextHop(p, pod, "fd00:12::99", "fd00:99::1"); via != first {
				found = append(found, "next hop "+via)
			}
			return found
		}
		// RFC 4861, section 4.2, with a prefix, section 4.6.2: on-link, autonomous.
		advertisement := slices.Concat([]byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0},
			[]byte{3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, net.ParseIP("fd00:13::"))
		// Section 4.5.
		redirect := slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, net.ParseIP(better), net.ParseIP("fd00:99::1"))
		send := func() {
			for key, value := range map[string]string{"accept_ra": "2", "accept_redirects": "1", "forwarding": "0", "autoconf": "1"} {
				allow(p, "net/ipv6/conf/macvlan0/"+key, value)
			}
			sendICMPv6(p, p.Lab.Outside, lab.LANLink, first, "ff02::1", advertisement)
			sendICMPv6(p, p.Lab.Outside, lab.LANLink, first, "fd00:12::99", redirect)
			// They have arrived when a later packet has been answered.
			wantConnection(p, p.Lab.Router, "[fd00:12::1]:80")
		}
		for _, mode := range []string{"http-proxy", "init", "open"} {
			if p.Env["EGRESS_ROUTER_MODE"] = mode; mode == "open" {
				p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_FORWARD"] = "init", "open"
			}
			p.OK()
			awaitConnection(p, p.Lab.Router, "[fd00:12::1]:80")
			send()
			if found := believed(); len(found) > 0 {
				p.Errorf("%s: the pod believes %v", mode, found)
			}
		}
		// Without the rules it does.
		p.Clear()
		p.Until("the pod believes both", func() bool { send(); return len(believed()) >= 3 })
	})
}
