package labtest

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// SCTPInitChunk is the first chunk of an association, at byte 12 (RFC 9260, section 3).
const SCTPInitChunk = 1

// The other chunks (RFC 9260, section 3.2), and the tags of both ends.
const (
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

// WantSCTP opens an association by raw sockets, since the kernel may have no SCTP of its
// own: the server sees the reserved address, and the client the pod.
func (p *Pod) WantSCTP(local, remote uint16) {
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
		_ = c.SetDeadline(time.Now().Add(Patience))
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
	send(client, lab.RouterAddr, SCTPInit(from, local))
	packet, sender := receive(server, SCTPInitChunk)
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

// SCTPInit returns the first packet of an association.
func SCTPInit(from, to uint16) []byte {
	return sctpPacket(from, to, 0, SCTPInitChunk, initiation(clientTag)...)
}
