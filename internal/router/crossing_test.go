package router_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// routeThroughPod makes the pod the gateway of the clients to the servers.
func routeThroughPod(p *labtest.Pod) {
	p.Helper()
	p.AddRoute(p.Lab.Client, lab.ClientLink, "203.0.113.0/24", "10.128.0.98")
	p.AddRoute(p.Lab.Client, lab.ClientLink, "192.168.12.0/24", "10.128.0.98")
	p.AddRoute(p.Lab.Node, lab.Bridge, "203.0.113.0/24", "10.128.0.98") // for far
}

// wantRefusedFrom checks that a request is refused.
func wantRefusedFrom(p *labtest.Pod, ns *netns.Namespace, proto, addr string) {
	p.Helper()
	if a, err := p.Ask(ns, proto, netip.MustParseAddrPort(addr)); !errors.Is(err, syscall.ECONNREFUSED) {
		p.Errorf("%s %s: answer %v, error %v; want a refusal", proto, addr, a, err)
	}
}

// wantNoAnswer checks that a request gets no answer and no refusal.
func wantNoAnswer(p *labtest.Pod, ns *netns.Namespace, proto, addr string) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), labtest.Silence)
	defer cancel()
	a, err := p.Lab.Ask(ctx, ns, proto, netip.MustParseAddrPort(addr))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		p.Errorf("%s %s: answer %v, error %v; want silence", proto, addr, a, err)
	}
}

// The pod refuses a packet that is routed through it and that no redirect matches.
// Nothing of it leaves by the egress side.
func TestUnredirectedTrafficIsRefused(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "8080 tcp 203.0.113.26 80\n"
		p.OK()
		routeThroughPod(p)
		w := p.Watch(p.Lab.Router, "macvlan0")
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			for _, proto := range []string{"tcp", "udp"} {
				wantRefusedFrom(p, client, proto, "203.0.113.25:53")
				wantRefusedFrom(p, client, proto, "10.128.0.98:53") // the pod itself
			}
		}
		wantRefusedFrom(p, p.Lab.Client, "tcp", "192.168.12.80:80")
		if ping(p, p.Lab.Client, netip.MustParseAddr("203.0.113.25"), labtest.Silence) {
			p.Error("a ping crosses, want none")
		}
		w.WantNothing("macvlan0", func(lab.Packet) bool { return true })

		// A redirect also matches a packet that is routed through the pod.
		p.WantAnswer("tcp", 8080, "203.0.113.26:80")
		a, err := p.Ask(p.Lab.Client, "tcp", netip.MustParseAddrPort("203.0.113.25:8080"))
		if err != nil || a.Server.String() != "203.0.113.26:80" || a.Peer.Addr() != lab.Source {
			p.Errorf("answer %v, error %v; want 203.0.113.26:80", a, err)
		}
		w.WantSource()
	})
}

// A packet that belongs to no connection is not translated. It does not leave, in
// either direction.
func TestStrayPacketsAreDropped(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		for name, crossing := range map[string]string{"redirected": "redirected", "open": "open"} {
			p.Env["EGRESS_FORWARD"] = crossing
			p.OK()
			routeThroughPod(p)
			p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
			// The kernel does not track a segment in the middle of a connection.
			if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
				p.Fatal(err)
			}
			w := p.Watch(p.Lab.Router, "macvlan0", "eth0")
			sendACK(p, p.Lab.Client, "10.128.0.71", "203.0.113.25")
			sendACK(p, p.Lab.Outside, "203.0.113.25", "10.128.0.71")
			sendACK(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99")
			// They have arrived when a later packet has.
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
			w.WantSource()
			if !slices.ContainsFunc(w.Captures["eth0"].Frames(), func(f lab.Frame) bool {
				ip, ok := f.IPv4()
				return ok && !f.Outgoing && ip.Dst.Port() == strayPort
			}) {
				p.Errorf("%s: the segment did not reach the pod", name)
			}
			for _, link := range []string{"macvlan0", "eth0"} {
				w.WantNothing(link, func(ip lab.Packet) bool { return ip.Dst.Port() == strayPort || ip.Src.Port() == strayPort })
			}
			// The pod's own segment, from an address of lo.
			lo := p.Handle(p.Lab.Router)
			if err := lo.AddrReplace(p.Link(lo, "lo"), labtest.Addr("198.51.100.98/32")); err != nil {
				p.Fatal(err)
			}
			if err := trySendACK(p.Lab.Router, "198.51.100.98", "203.0.113.25"); !errors.Is(err, unix.EPERM) {
				p.Errorf("a segment of the pod's own: error %v, want EPERM", err)
			}
			w.WantNothing("macvlan0", func(ip lab.Packet) bool { return ip.Dst.Port() == strayPort })
		}
	})
}

// A packet of the physical network with a source of the cluster gets no answer into
// the cluster. Only the reserved address answers.
func TestForgedSourceIsNotAnswered(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "http-proxy"} {
		t.Run(mode, func(t *testing.T) { testForgedSource(t, mode) })
	}
}

func testForgedSource(t *testing.T, mode string) {
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_ROUTER_MODE"] = mode
		p.OK()
		p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
		h := p.Handle(p.Lab.Outside)
		if err := h.AddrAdd(p.Link(h, "lo"), labtest.Addr("10.128.0.71/32")); err != nil {
			p.Fatal(err)
		}
		w := p.Watch(p.Lab.Router, "eth0", "macvlan0")
		request := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1} // RFC 792
		sendICMP(p, p.Lab.Outside, "10.128.0.71", "192.168.12.99", request)
		sendICMP(p, p.Lab.Outside, "203.0.113.25", "10.128.0.98", request)
		sendACK(p, p.Lab.Outside, "10.128.0.71", "192.168.12.99")
		sendACK(p, p.Lab.Outside, "203.0.113.25", "10.128.0.98")
		if !ping(p, p.Lab.Outside, lab.Source, labtest.Patience) {
			p.Error("the reserved address does not answer a ping")
		}
		w.WantNothing("eth0", func(ip lab.Packet) bool { return ip.Protocol == unix.IPPROTO_ICMP || ip.Src.Port() == strayPort })
		w.WantSource()
	})
}

// strayPort is the destination port of stray segments.
const strayPort = 4242

// sendACK sends a TCP segment with ACK alone, which opens no connection.
func sendACK(p *labtest.Pod, ns *netns.Namespace, from, to string) {
	p.Helper()
	if err := trySendACK(ns, from, to); err != nil {
		p.Fatal(err)
	}
}

func trySendACK(ns *netns.Namespace, from, to string) error {
	segment := ackSegment(netip.AddrPortFrom(netip.MustParseAddr(from), 40000), netip.AddrPortFrom(netip.MustParseAddr(to), strayPort), 1, 1)
	return sendIP(ns, "ip4:tcp", from, to, segment)
}

// ackSegment returns a TCP segment with ACK alone.
func ackSegment(from, to netip.AddrPort, seq, ack uint32) []byte {
	segment := make([]byte, 20) // RFC 9293, section 3.1
	binary.BigEndian.PutUint16(segment[0:], from.Port())
	binary.BigEndian.PutUint16(segment[2:], to.Port())
	binary.BigEndian.PutUint32(segment[4:], seq)
	binary.BigEndian.PutUint32(segment[8:], ack)
	segment[12], segment[13] = 5<<4, 0x10 // length in words, ACK
	binary.BigEndian.PutUint16(segment[14:], 1000)
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, 6, 0, 20})
	binary.BigEndian.PutUint16(segment[16:], checksum(append(pseudo, segment...)))
	return segment
}

// sendICMP sends an ICMP message, and fills in its checksum.
func sendICMP(p *labtest.Pod, ns *netns.Namespace, from, to string, message []byte) {
	p.Helper()
	message = slices.Clone(message)
	binary.BigEndian.PutUint16(message[2:], checksum(message))
	if err := sendIP(ns, "ip4:icmp", from, to, message); err != nil {
		p.Fatal(err)
	}
}

// sendIP sends a packet with the given content.
func sendIP(ns *netns.Namespace, network, from, to string, content []byte) error {
	return sendTTL(ns, network, from, to, content, 64)
}

// sendTTL sends a packet with the given content and time to live.
func sendTTL(ns *netns.Namespace, network, from, to string, content []byte, ttl int) error {
	return ns.Do(func() error {
		c, err := net.DialIP(network, &net.IPAddr{IP: net.ParseIP(from)}, &net.IPAddr{IP: net.ParseIP(to)})
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		if ctrlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, ttl)
		}); ctrlErr != nil || err != nil {
			return errors.Join(ctrlErr, err)
		}
		_, err = c.Write(content)
		return err
	})
}

// checksum returns the checksum of the Internet protocols (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// ping reports whether an echo request is answered in time.
func ping(p *labtest.Pod, ns *netns.Namespace, addr netip.Addr, patience time.Duration) bool {
	p.Helper()
	var c *net.IPConn
	err := ns.Do(func() (err error) {
		c, err = net.DialIP("ip4:icmp", nil, &net.IPAddr{IP: addr.AsSlice()})
		return err
	})
	if err != nil {
		p.Fatal(err)
	}
	defer c.Close()
	request := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1} // RFC 792
	binary.BigEndian.PutUint16(request[2:], checksum(request))
	if _, err := c.Write(request); err != nil {
		return false
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	for b := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(b) // without the IP header
		if err != nil {
			return false
		}
		if n >= 8 && b[0] == 0 && b[4] == 0x12 && b[5] == 0x34 {
			return true
		}
	}
}

// With EGRESS_FORWARD=open every connection of the cluster side crosses, with the
// reserved address, and none of the other side.
func TestForwardOpenCrosses(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"], p.Env["EGRESS_FORWARD"] = "8080 tcp 203.0.113.26 80\n", "open"
		p.OK()
		routeThroughPod(p)
		w := p.Watch(p.Lab.Router, "macvlan0")
		for _, server := range []struct{ proto, addr string }{
			{"tcp", "203.0.113.25:80"}, {"tcp", "203.0.113.27:9000"}, {"udp", "203.0.113.27:53"}, {"tcp", "192.168.12.80:80"},
		} {
			a, err := p.Ask(p.Lab.Client, server.proto, netip.MustParseAddrPort(server.addr))
			if err != nil || a.Peer.Addr() != lab.Source {
				p.Errorf("%v: answer %v, error %v", server, a, err)
			}
		}
		if a, err := p.Ask(p.Lab.Far, "tcp", netip.MustParseAddrPort("203.0.113.25:80")); err != nil || a.Peer.Addr() != lab.Source {
			p.Errorf("from another subnet: answer %v, error %v", a, err)
		}
		if !ping(p, p.Lab.Client, netip.MustParseAddr("203.0.113.25"), labtest.Patience) {
			p.Error("a ping does not cross")
		}
		p.WantAnswer("tcp", 8080, "203.0.113.26:80")
		w.WantSource()
		p.WantUnchanged(p.OK())
		wantClosedToPhysicalNetwork(p)

		// The next run closes it again, also for an open connection.
		conn, _ := p.Open(p.Lab.Client, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
		delete(p.Env, "EGRESS_FORWARD")
		p.OK()
		wantRefusedFrom(p, p.Lab.Client, "tcp", "203.0.113.25:80")
		wantReset(p, "the open connection", conn)
	})
}

// wantClosedToPhysicalNetwork checks that new connections from the physical
// network reach neither the pod nor, through it, the cluster, while echo
// requests and ARP do. TCP to the reserved address is refused.
func wantClosedToPhysicalNetwork(p *labtest.Pod) {
	p.Helper()
	// A host there has a route to the cluster by the pod.
	p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
	defer func() {
		h := p.Handle(p.Lab.Outside)
		_ = h.RouteDel(&netlink.Route{Dst: labtest.IPNet("10.128.0.0/23")})
	}()
	for _, proto := range []string{"tcp", "udp"} {
		for _, at := range []struct {
			ns   *netns.Namespace
			addr string
		}{
			{p.Lab.Router, "192.168.12.99:7070"}, {p.Lab.Router, "10.128.0.98:7070"}, {p.Lab.Client, "10.128.0.71:7070"},
		} {
			s := p.Serve(at.ns, proto, at.addr)
			defer s.Close()
		}
	}
	w := p.Watch(p.Lab.Router, "eth0")
	var asking sync.WaitGroup
	for _, proto := range []string{"tcp", "udp"} {
		for _, addr := range []string{"192.168.12.99:7070", "192.168.12.99:7071", "10.128.0.98:7070", "10.128.0.71:7070"} {
			want := wantNoAnswer
			if proto == "tcp" && strings.HasPrefix(addr, lab.Source.String()) {
				want = wantRefusedFrom
			}
			asking.Go(func() { want(p, p.Lab.Outside, proto, addr) })
		}
	}
	asking.Wait()
	fromOutside := func(ip lab.Packet) bool {
		return lab.LAN.Contains(ip.Src.Addr()) || labtest.Servers.Contains(ip.Src.Addr())
	}
	w.WantNothing("eth0", func(ip lab.Packet) bool { return fromOutside(ip) && ip.Dst.Port() == 7070 })
	if ping(p, p.Lab.Outside, lab.ClientAddr, labtest.Silence) {
		p.Error("a ping from the physical network reaches the cluster, want no answer")
	}
	if !ping(p, p.Lab.Outside, lab.Source, labtest.Patience) {
		p.Error("the reserved address does not answer a ping")
	}
	h := p.Handle(p.Lab.Router)
	mac, err := p.Lab.Neighbour(p.Lab.Outside, lab.LANLink, lab.Source)
	if err != nil || mac.String() != p.Link(h, "macvlan0").Attrs().HardwareAddr.String() {
		p.Errorf("the reserved address is at %s (%v), want macvlan0", mac, err)
	}
}

// In each mode only replies come in from the physical network.
func TestPhysicalNetworkReachesNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "http-proxy"} {
		t.Run(mode, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
					p.Fatal(err)
				}
				p.Env["EGRESS_ROUTER_MODE"] = mode
				// Before the router, a listener answers the physical network.
				h := p.Handle(p.Lab.Router)
				macvlan := p.Link(h, "macvlan0")
				if err := h.LinkSetUp(macvlan); err != nil {
					p.Fatal(err)
				}
				if err := h.AddrAdd(macvlan, labtest.Addr("192.168.12.99/24")); err != nil {
					p.Fatal(err)
				}
				s := p.Serve(p.Lab.Router, "tcp", "192.168.12.99:7070")
				conn, _ := p.Open(p.Lab.Outside, "tcp", s.Addr)
				p.OK()
				// The open connection ends.
				wantReset(p, "the open connection", conn)
				s.Close()
				wantClosedToPhysicalNetwork(p)
				// Connections of the pod work.
				a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
				if err != nil || a.Peer.Addr() != lab.Source {
					p.Errorf("a socket of the pod: answer %v, error %v", a, err)
				}
			})
		})
	}
}

// The physical network does not reach the pod while the first run loads its rules,
// which may take long.
func TestPhysicalNetworkReachesNothingDuringStart(t *testing.T) {
	t.Parallel()
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
			p.Fatal(err)
		}
		p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
		p.Serve(p.Lab.Router, "tcp", "10.128.0.98:7070")
		// The address is not on the link yet.
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_nonlocal_bind", "1"); err != nil {
			p.Fatal(err)
		}
		p.Serve(p.Lab.Router, "tcp", "192.168.12.99:7071")
		// The rules are loaded once the file exists.
		hold, real := filepath.Join(p.TempDir(), "go"), p.Path
		p.Path = p.Programs("case $0 in */iptables-restore) until [ -e " + hold + " ]; do sleep 0.01; done; esac\nexec $real \"$@\"\n")
		cmd := p.Command("egress-router")
		p.Path = real
		w := p.Watch(p.Lab.Router, "eth0")
		if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
			p.Fatal(err)
		}
		ended, stop := context.WithCancel(p.Context())
		var asking sync.WaitGroup
		var rounds atomic.Int64
		for _, addr := range []string{"10.128.0.98:7070", "192.168.12.99:7071", "10.128.0.71:7070"} {
			asking.Go(func() {
				for ; ended.Err() == nil; rounds.Add(1) {
					ctx, cancel := context.WithTimeout(ended, 50*time.Millisecond)
					a, err := p.Lab.Ask(ctx, p.Lab.Outside, "tcp", netip.MustParseAddrPort(addr))
					refused := errors.Is(err, syscall.ECONNREFUSED) && !strings.HasPrefix(addr, lab.Source.String())
					if err == nil || refused {
						p.Errorf("%s: answer %v, error %v; want none", addr, a, err)
					}
					cancel()
				}
			})
		}
		p.Until("each is asked several times", func() bool { return rounds.Load() >= 20 })
		if err := os.WriteFile(hold, nil, 0o600); err != nil {
			p.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			p.Errorf("the router: %v", err)
		}
		stop()
		asking.Wait()
		w.WantNothing("eth0", func(ip lab.Packet) bool { return lab.LAN.Contains(ip.Src.Addr()) })
		p.WantExample()
	})
}

// The client learns the smaller MTU that a router of the physical network reports
// to the reserved address.
func TestPathMTUReachesClient(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		for name, ns := range map[string]*netns.Namespace{"client": p.Lab.Client, "far": p.Lab.Far} {
			w := p.Watch(p.Lab.Router, "macvlan0")
			conn := p.Dial(ns, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
			dontFragment(p, conn)
			if _, err := conn.Write(make([]byte, 1400)); err != nil {
				p.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(p.Context(), labtest.Patience)
			defer cancel()
			sent, err := w.Captures["macvlan0"].Wait(ctx, func(f lab.Frame) bool {
				ip, ok := f.IPv4()
				return ok && f.Outgoing && labtest.ToServers(ip)
			})
			if err != nil {
				p.Fatal(err)
			}
			// RFC 792 and 1191: "fragmentation needed", with the MTU and the
			// beginning of the packet.
			const header = 14 // length of an Ethernet header
			message := slices.Concat([]byte{3, 4, 0, 0, 0, 0, 1200 >> 8, 1200 & 0xff}, sent.Data[header:header+28])
			sendICMP(p, p.Lab.Outside, "192.168.12.1", "192.168.12.99", message)
			p.Until("the MTU of the path is known to "+name, func() bool {
				_, err := conn.Write(make([]byte, 1400))
				return errors.Is(err, unix.EMSGSIZE)
			})
		}
	})
}

// dontFragment makes a socket refuse datagrams that are too long for its path.
func dontFragment(p *labtest.Pod, conn net.Conn) {
	p.Helper()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		p.Fatal(err)
	}
	if ctrlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}); ctrlErr != nil || err != nil {
		p.Fatal(ctrlErr, err)
	}
}

// If the pod forwards IPv6, nothing crosses unless EGRESS_FORWARD is open, and the
// physical network reaches no listener of the pod. Neighbour discovery works.
func TestIPv6IsNotForwarded(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		enableIPv6(p)
		for _, at := range []struct {
			ns   *netns.Namespace
			addr string
		}{{p.Lab.Outside, "[fd00:12::1]:80"}, {p.Lab.Router, "[fd00:12::99]:7070"}, {p.Lab.Router, "[fd00:10::98]:7070"}} {
			p.Serve(at.ns, "tcp", at.addr)
		}
		through, inside := "[fd00:12::1]:80", "[fd00:12::99]:7070"
		// Without a router both are reached, once neighbours are found.
		awaitConnection(p, p.Lab.Client, through)
		awaitConnection(p, p.Lab.Outside, inside)

		for _, mode := range []string{"http-proxy", "init"} {
			p.Env["EGRESS_ROUTER_MODE"] = mode
			p.OK()
			wantNoAnswer(p, p.Lab.Client, "tcp", through)
			wantNoAnswer(p, p.Lab.Outside, "tcp", inside)
			wantConnection(p, p.Lab.Client, "[fd00:10::98]:7070") // by the cluster side
			wantConnection(p, p.Lab.Router, through)              // the pod's own
		}
		p.Serve(p.Lab.Client, "tcp", "[fd00:10::71]:7070")
		p.Env["EGRESS_FORWARD"] = "open"
		p.OK()
		wantConnection(p, p.Lab.Client, through)
		wantNoAnswer(p, p.Lab.Outside, "tcp", inside)
		wantNoAnswer(p, p.Lab.Outside, "tcp", "[fd00:10::71]:7070")
		p.WantUnchanged(p.OK())
	})
}

// enableIPv6 gives the client, both sides of the pod and the outside addresses,
// and makes the pod a router of IPv6.
func enableIPv6(p *labtest.Pod) {
	p.Helper()
	for _, a := range []struct {
		ns         *netns.Namespace
		link, addr string
	}{
		{p.Lab.Client, lab.ClientLink, "fd00:10::71/64"}, {p.Lab.Router, "eth0", "fd00:10::98/64"},
		{p.Lab.Router, "macvlan0", "fd00:12::99/64"}, {p.Lab.Outside, lab.LANLink, "fd00:12::1/64"},
	} {
		if err := p.Lab.SetSysctl(a.ns, "net/ipv6/conf/"+a.link+"/disable_ipv6", "0"); err != nil {
			p.Fatal(err)
		}
		h := p.Handle(a.ns)
		l := p.Link(h, a.link)
		if err := h.LinkSetUp(l); err != nil {
			p.Fatal(err)
		}
		addr := labtest.Addr(a.addr)
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(l, addr); err != nil {
			p.Fatal(err)
		}
	}
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/all/forwarding", "1"); err != nil {
		p.Fatal(err)
	}
	p.AddRoute(p.Lab.Client, lab.ClientLink, "fd00:12::/64", "fd00:10::98")
	p.AddRoute(p.Lab.Outside, lab.LANLink, "fd00:10::/64", "fd00:12::99")
}

// wantConnection checks that a server answers.
func wantConnection(p *labtest.Pod, ns *netns.Namespace, addr string) {
	p.Helper()
	if _, err := p.Ask(ns, "tcp", netip.MustParseAddrPort(addr)); err != nil {
		p.Errorf("tcp %s: %v", addr, err)
	}
}

// awaitConnection waits until a server answers. A neighbour solicitation is lost
// while the link of the neighbour has not joined its group, and the kernel sends the
// next one seconds later.
func awaitConnection(p *labtest.Pod, ns *netns.Namespace, addr string) {
	p.Helper()
	p.Until("tcp "+addr+" answers", func() bool {
		ctx, cancel := context.WithTimeout(p.Context(), 2*time.Second)
		defer cancel()
		_, err := p.Lab.Ask(ctx, ns, "tcp", netip.MustParseAddrPort(addr))
		return err == nil
	})
}

// Redirected packets stop when the egress side is lost under traffic. None leaves
// by another interface of the pod that has a default route, and none with another
// source.
func TestEgressLostUnderTraffic(t *testing.T) {
	t.Parallel()
	const extra = "extra0"
	everywhere := labtest.IPNet("0.0.0.0/0")
	for _, damage := range []labtest.Damage{
		{Name: "macvlan0 deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkDel(macvlan) }},
		{Name: "macvlan0 down", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkSetDown(macvlan) }},
		{Name: "default route deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: macvlan.Attrs().Index})
		}},
		{Name: "default route moved to eth0", Do: func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}},
		{Name: "address deleted", Do: func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.AddrDel(macvlan, labtest.Addr("192.168.12.99/24"))
		}},
	} {
		t.Run(damage.Name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				h := p.Handle(p.Lab.Router)
				// Another network, whose gateway accepts all packets.
				veth := netlink.NewVeth(netlink.LinkAttrs{Name: extra, Index: 301})
				veth.PeerName, veth.PeerNamespace = extra, netlink.NsFd(p.Lab.Node.Fd())
				if err := h.LinkAdd(veth); err != nil {
					p.Fatal(err)
				}
				node := p.Handle(p.Lab.Node)
				for _, end := range []struct {
					h    *netlink.Handle
					addr string
				}{{h, "172.31.0.98/24"}, {node, "172.31.0.1/24"}} {
					l := p.Link(end.h, extra)
					if err := end.h.LinkSetUp(l); err != nil {
						p.Fatal(err)
					}
					if err := end.h.AddrAdd(l, labtest.Addr(end.addr)); err != nil {
						p.Fatal(err)
					}
				}
				p.OK()
				if err := h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: net.IPv4(172, 31, 0, 1).To4(), LinkIndex: p.Link(h, extra).Attrs().Index, Priority: 500}); err != nil {
					p.Fatal(err)
				}
				open := p.Flow(53)
				open.WantAnswer("before", "203.0.113.27:53", "192.168.12.99")
				conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
				macvlan, eth := p.Link(h, "macvlan0"), p.Link(h, "eth0")

				w := p.Watch(p.Lab.Router, "eth0", extra, "macvlan0")
				traffic := p.Traffic(conn)
				if err := damage.Do(h, macvlan, eth); err != nil {
					p.Fatal(err)
				}
				traffic.Await(20)
				traffic.Stop()
				for _, link := range []string{"eth0", extra} {
					w.WantNothing(link, labtest.ToServers)
				}
				w.WantSource()
				if a, err := p.Flow(53).Try(); err == nil {
					p.Errorf("answer %v, want none", a)
				}
				if _, err := h.LinkByName("macvlan0"); err != nil {
					return // the program that created it does that again
				}
				// After the next run the open connection works: it was not refused.
				p.OK()
				p.WantEcho("the open connection", conn, bufio.NewReader(conn))
			})
		})
	}
}

// Open connections end if their line is removed or changed, and continue otherwise.
func TestRemovedDestinationEndsConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n"
		p.OK()
		conns := make(map[uint16]net.Conn)
		readers := make(map[uint16]*bufio.Reader)
		for _, port := range []uint16{80, 8080, 8443} {
			conns[port], readers[port] = p.Open(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
		}
		// 8080 is removed, 8443 has another server, 81 is new.
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8443 tcp 203.0.113.25 80\n81 tcp 203.0.113.26 80\n"
		p.OK()
		for port, want := range map[uint16]error{80: nil, 8080: syscall.ECONNRESET, 8443: syscall.ECONNRESET} {
			_ = conns[port].SetDeadline(time.Now().Add(labtest.Patience))
			_, err := conns[port].Write([]byte("still there\n"))
			if err == nil {
				_, err = readers[port].ReadString('\n')
			}
			if !errors.Is(err, want) {
				p.Errorf("port %d: %v, want %v", port, err, want)
			}
		}
		p.WantAnswer("tcp", 81, "203.0.113.26:80")
		p.WantRefused("tcp", 8080)
	})
}

// A list grows from a plain chain to a tree of chains and shrinks again. The run
// after each finds nothing to change.
func TestListSizeChanges(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		small := p.State()
		for _, n := range []int{33, 300, 2000, 40} {
			var list strings.Builder
			for i := range n {
				fmt.Fprintf(&list, "%d %s 203.0.113.2%d %d\n", 1000+31*i, []string{"tcp", "udp"}[i%2], 6+i%2, []int{443, 53}[i%2])
			}
			p.Env["EGRESS_DESTINATION"] = list.String()
			p.OK()
			p.WantUnchanged(p.OK())
			for _, i := range []int{0, n / 2 / 2 * 2, n - 2 + n%2} { // even: tcp
				p.WantAnswer("tcp", uint16(1000+31*i), "203.0.113.26:443")
				p.WantAnswer("udp", uint16(1000+31*(i+1-2*(i/(n-1)))), "203.0.113.27:53")
			}
			p.WantRefused("tcp", 999)
		}
		p.Env = labtest.Example()
		p.OK()
		p.WantState(small)
	})
}
