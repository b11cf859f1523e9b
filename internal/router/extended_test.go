package router_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// extended is a list of the extended grammar.
const extended = `5300      tcp,udp 203.0.113.25           # both
6000-6010   udp      203.0.113.26             # the same ports
7000-7100   tcp      203.0.113.26 17000-17100
30000-30100 udp      203.0.113.26 9000-9100
40000-41000 tcp      203.0.113.25 1443        # one port
3868        sctp     203.0.113.27 3869
5000-5010   sctp     203.0.113.27 5100-5110
`

// Every form of the extended grammar redirects real traffic, in a short list and in one
// that is a tree of chains. The next run changes nothing.
func TestExtendedRedirects(t *testing.T) {
	t.Parallel()
	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, "%d tcp 203.0.113.26 443\n", 20001+i)
	}
	for name, list := range map[string]string{"short": extended, "long": many.String() + extended} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", list
				for _, s := range []string{
					"tcp 203.0.113.25:5300", "udp 203.0.113.25:5300", "udp 203.0.113.26:6000", "udp 203.0.113.26:6010", "tcp 203.0.113.26:17000",
					"tcp 203.0.113.26:17042", "tcp 203.0.113.26:17100", "udp 203.0.113.26:9042", "tcp 203.0.113.25:1443",
				} {
					proto, addr, _ := strings.Cut(s, " ")
					p.Serve(p.Lab.Outside, proto, addr)
				}
				p.OK()
				p.WantAnswer("tcp", 5300, "203.0.113.25:5300")
				p.WantAnswer("udp", 5300, "203.0.113.25:5300")
				p.WantAnswer("udp", 6000, "203.0.113.26:6000")
				p.WantAnswer("udp", 6010, "203.0.113.26:6010")
				p.WantAnswer("tcp", 7000, "203.0.113.26:17000")
				p.WantAnswer("tcp", 7042, "203.0.113.26:17042")
				p.WantAnswer("tcp", 7100, "203.0.113.26:17100")
				p.WantAnswer("udp", 30042, "203.0.113.26:9042")
				p.WantAnswer("tcp", 40000, "203.0.113.25:1443")
				p.WantAnswer("tcp", 40500, "203.0.113.25:1443")
				p.WantAnswer("tcp", 41000, "203.0.113.25:1443")
				for _, port := range []uint16{5999, 6011, 30101} {
					p.WantRefused("udp", port)
				}
				for _, port := range []uint16{6000, 6999, 7101, 39999, 41001} {
					p.WantRefused("tcp", port)
				}
				wantSCTP(p, 3868, 3869)
				wantSCTP(p, 5007, 5107)

				state := p.State()
				p.WantUnchanged(p.OK())
				p.WantState(state)
			})
		})
	}
}

// The counters have a line for each range, and the router that stays applies another
// range without a break of other connections.
func TestExtendedReload(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Serve(p.Lab.Outside, "udp", "203.0.113.26:9042")
		p.Serve(p.Lab.Outside, "udp", "203.0.113.26:9142")
		r, replace := startWithFile(p, "80 tcp 203.0.113.25\n30000-30100 udp 203.0.113.26 9000-9100 # first\n")
		conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		answers := bufio.NewReader(conn)
		p.WantEcho("before the change", conn, answers)
		p.WantAnswer("udp", 30042, "203.0.113.26:9042")
		counted := func(n int, labels string) {
			p.Helper()
			line := fmt.Sprintf("egress_router_connections_total{%s} %d\n", labels, n)
			p.Until(line, func() bool { return strings.Contains(p.Metrics(), line) })
		}
		counted(1, `destination="203.0.113.26:9000-9100",port="30000-30100",protocol="udp"`)

		replace("80 tcp 203.0.113.25\n30000-30100 udp 203.0.113.26 9100-9200\n")
		r.AwaitLog(2, "rules loaded")
		p.WantAnswer("udp", 30042, "203.0.113.26:9142")
		counted(1, `destination="203.0.113.26:9100-9200",port="30000-30100",protocol="udp"`)
		p.WantEcho("after the change", conn, answers)
	})
}

// A redirect that the legacy grammar refuses, and the extended one would accept, says so.
func TestExtendedHint(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_DESTINATION"] = "3868 sctp 203.0.113.27"
	p.WantRefusal("", "EGRESS_DESTINATION value '3868 sctp 203.0.113.27' is invalid", "EGRESS_GRAMMAR=extended accepts this line")
}

// Chunks of SCTP (RFC 9260, section 3.2), and the tags of both ends.
const (
	sctpInit       = 1
	sctpInitAck    = 2
	sctpCookieEcho = 10
	sctpCookieAck  = 11
	clientTag      = 0x11111111
	serverTag      = 0x22222222
)

// sctpPacket returns a packet with one chunk. The checksum is CRC32c, in the byte order of
// RFC 9260, appendix A.
func sctpPacket(from, to uint16, tag uint32, chunk byte, content ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(b, 0, 0, 0, 0, chunk, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(4+len(content)))
	b = append(b, content...)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// initiation returns the fixed part of INIT and INIT ACK.
func initiation(tag uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, tag)
	b = binary.BigEndian.AppendUint32(b, 65536)
	return append(b, 0, 10, 0, 10, 0, 0, 0, 1)
}

// wantSCTP opens an association by raw sockets, since the kernel may have no SCTP of its
// own: the server sees the reserved address, and the client the pod.
func wantSCTP(p *labtest.Pod, local, remote uint16) {
	p.Helper()
	listen := func(ns *netns.Namespace, at string) *net.IPConn {
		p.Helper()
		var c *net.IPConn
		if err := ns.Do(func() (err error) {
			c, err = net.ListenIP("ip4:132", &net.IPAddr{IP: net.ParseIP(at)})
			return err
		}); err != nil {
			p.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(labtest.Patience))
		return c
	}
	client, server := listen(p.Lab.Client, "0.0.0.0"), listen(p.Lab.Outside, "203.0.113.27")
	defer client.Close()
	defer server.Close()
	const from = 36412
	send := func(c *net.IPConn, to netip.Addr, packet []byte) {
		p.Helper()
		if _, err := c.WriteToIP(packet, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			p.Fatal(err)
		}
	}
	// receive returns the next packet with a chunk, and its sender.
	receive := func(c *net.IPConn, chunk byte) (packet []byte, sender netip.Addr) {
		p.Helper()
		for {
			b := make([]byte, 1500)
			n, a, err := c.ReadFromIP(b)
			if err != nil {
				p.Fatalf("no packet with chunk %d: %v", chunk, err)
			}
			if n > 12 && b[12] == chunk {
				sender, _ := netip.AddrFromSlice(a.IP)
				return b[:n], sender.Unmap()
			}
		}
	}
	wantPorts := func(what string, packet []byte, from, to uint16) {
		p.Helper()
		if got := [2]uint16{binary.BigEndian.Uint16(packet), binary.BigEndian.Uint16(packet[2:])}; got != [2]uint16{from, to} {
			p.Errorf("%s has ports %d, want %d and %d", what, got, from, to)
		}
		sum := slices.Clone(packet)
		copy(sum[8:12], make([]byte, 4))
		if crc32.Checksum(sum, crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(packet[8:]) {
			p.Errorf("%s has a wrong checksum", what)
		}
	}
	send(client, lab.RouterAddr, sctpPacket(from, local, 0, sctpInit, initiation(clientTag)...))
	packet, sender := receive(server, sctpInit)
	if wantPorts("INIT", packet, binary.BigEndian.Uint16(packet), remote); sender != lab.Source {
		p.Errorf("INIT came from %s, want %s", sender, lab.Source)
	}
	port := binary.BigEndian.Uint16(packet) // NAT may have changed it
	send(server, lab.Source, sctpPacket(remote, port, clientTag, sctpInitAck, initiation(serverTag)...))
	packet, sender = receive(client, sctpInitAck)
	if wantPorts("INIT ACK", packet, local, from); sender != lab.RouterAddr {
		p.Errorf("INIT ACK came from %s, want %s", sender, lab.RouterAddr)
	}
	send(client, lab.RouterAddr, sctpPacket(from, local, serverTag, sctpCookieEcho, 1, 2, 3, 4))
	packet, _ = receive(server, sctpCookieEcho)
	wantPorts("COOKIE ECHO", packet, port, remote)
	send(server, lab.Source, sctpPacket(remote, port, clientTag, sctpCookieAck))
	packet, _ = receive(client, sctpCookieAck)
	wantPorts("COOKIE ACK", packet, local, from)
}
