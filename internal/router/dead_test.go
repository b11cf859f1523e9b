package router_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// accept starts a listener in the outside and returns a function that returns its
// next connection.
func accept(p *labtest.Pod, addr string) (next func() net.Conn) {
	p.Helper()
	var l net.Listener
	if err := p.Lab.Outside.Do(func() (err error) {
		l, err = net.Listen("tcp4", addr)
		return err
	}); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = l.Close() })
	return func() net.Conn {
		p.Helper()
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(labtest.Patience))
		conn, err := l.Accept()
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

// wantReset checks that a peer that sends data learns that its connection is dead. The
// answer of a slow server may come before. Only the first call after the reset returns
// it.
func wantReset(p *labtest.Pod, what string, conn net.Conn) {
	p.Helper()
	_ = conn.SetDeadline(time.Now().Add(labtest.Patience))
	_, err := conn.Write([]byte("still there?\n"))
	for b := make([]byte, 100); err == nil; {
		_, err = conn.Read(b)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		p.Errorf("%s: %v, want a reset", what, err)
	}
}

// A server that sends on a connection that the pod no longer has gets a reset: after
// a take-over by a new pod, and after its line was removed. Ident queries are
// refused. All answers leave by the egress side.
func TestDeadSessionIsReset(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25 7000\n81 tcp 203.0.113.25 80\n"
		p.OK()
		next := accept(p, "203.0.113.25:7000")
		open := func() net.Conn {
			p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			return next()
		}
		w := p.Watch(p.Lab.Router, "eth0", "macvlan0")

		takenOver := open()
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil { // as in the new pod
			p.Fatal(err)
		}
		wantReset(p, "after a take-over", takenOver)

		removed := open()
		p.Env["EGRESS_DESTINATION"] = "81 tcp 203.0.113.25 80\n"
		p.OK()
		wantReset(p, "after its line was removed", removed)

		wantRefusedFrom(p, p.Lab.Outside, "tcp", "192.168.12.99:113")
		w.WantSource()
		w.WantNothing("eth0", func(ip lab.Packet) bool { return ip.Src.Port() == 113 || ip.Src.Addr() == lab.Source })
		p.WantAnswer("tcp", 81, "203.0.113.25:80")
	})
}

// A segment of a client beyond the window of its connection does not end the
// connection.
func TestStraySegmentOfClientIsDropped(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		for range 8 {
			w := p.Watch(p.Lab.Router, "eth0")
			conn, r := p.Open(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			p.WantEcho("before", conn, r)
			client := netip.MustParseAddrPort(conn.LocalAddr().String())
			ofClient := func(f lab.Frame) bool {
				ip, ok := f.IPv4()
				return ok && !f.Outgoing && ip.Src == client
			}
			const ip, tcp = 14, 14 + 20 // offsets of the headers in a frame
			number := func(f lab.Frame) uint32 { return binary.BigEndian.Uint32(f.Data[tcp+4:]) }
			// The client has received everything: it takes a reset with the number of the
			// next byte (RFC 9293, section 3.10.7.4).
			var seq, ack uint32
			for _, f := range w.Captures["eth0"].Frames() {
				switch packet, ok := f.IPv4(); {
				case !ok:
				case ofClient(f):
					seq = number(f)
				case packet.Dst == client:
					if size := binary.BigEndian.Uint16(f.Data[ip+2:]) - 20 - uint16(f.Data[tcp+12]>>4)*4; size > 0 {
						ack = number(f) + uint32(size)
					}
				}
			}
			stray := ackSegment(client, netip.AddrPortFrom(lab.RouterAddr, 80), seq+1<<28, ack)
			if err := sendIP(p.Lab.Client, "ip4:tcp", client.Addr().String(), lab.RouterAddr.String(), stray); err != nil {
				p.Fatal(err)
			}
			if _, err := w.Captures["eth0"].Wait(p.Context(), func(f lab.Frame) bool {
				return ofClient(f) && number(f) == seq+1<<28
			}); err != nil {
				p.Fatal(err)
			}
			p.WantEcho("after a stray segment", conn, r)
		}
	})
}

// A packet from the physical network for another address than the reserved one gets
// no answer, whatever its time to live and its way.
func TestTransitFromPhysicalNetworkIsNotAnswered(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "http-proxy", "open"} {
		t.Run(mode, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				if p.Env["EGRESS_ROUTER_MODE"] = mode; mode == "open" {
					p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_FORWARD"] = "init", "open"
				}
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
					p.Fatal(err)
				}
				p.OK()
				p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
				p.AddRoute(p.Lab.Outside, lab.LANLink, "198.51.100.0/24", "192.168.12.99") // whose way is back
				w := p.Watch(p.Lab.Router, "macvlan0", "eth0")
				datagram := []byte{0x9c, 0x40, strayPort >> 8, strayPort & 0xff, 0, 8, 0, 0} // RFC 768
				for _, to := range []string{"10.128.0.71", "10.128.0.98", "198.51.100.1"} {
					for _, ttl := range []int{1, 64} {
						segment := ackSegment(netip.MustParseAddrPort("203.0.113.25:40000"), netip.AddrPortFrom(netip.MustParseAddr(to), strayPort), 1, 1)
						for network, content := range map[string][]byte{"ip4:udp": datagram, "ip4:tcp": segment} {
							if err := sendTTL(p.Lab.Outside, network, "203.0.113.25", to, content, ttl); err != nil {
								p.Fatal(err)
							}
						}
					}
				}
				// They have arrived when a later packet has been answered.
				wantRefusedFrom(p, p.Lab.Outside, "tcp", "192.168.12.99:113")
				arrived := 0
				for _, f := range w.Captures["macvlan0"].Frames() {
					if ip, ok := f.IPv4(); ok && !f.Outgoing && ip.Dst.Port() == strayPort {
						arrived++
					}
				}
				if arrived != 12 {
					p.Errorf("%d packets have arrived, want 12", arrived)
				}
				w.WantNothing("macvlan0", func(ip lab.Packet) bool { return ip.Src.Port() != 113 })
				w.WantNothing("eth0", func(ip lab.Packet) bool { return ip.Src.Addr() == lab.Source || ip.Dst.Port() == strayPort })
			})
		})
	}
}
