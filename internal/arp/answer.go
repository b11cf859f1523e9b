package arp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/packet"
)

// ListenRequests returns a Station that receives the requests of any host for addresses of IPv4,
// for a process that answers them itself. Its frames have a mark.
func ListenRequests(index int, addresses []netip.Addr, mark uint32) (*Station, error) {
	c := new(conn)
	var err error
	if c.Conn, err = packet.Listen(index, etherTypeARP, requestsFor(addresses)); err != nil {
		return nil, fmt.Errorf("listen for ARP requests: %w", err)
	}
	if err := c.Mark(mark); err != nil {
		c.close()
		return nil, err
	}
	return &Station{c}, nil
}

// requestsFor returns the filter of a socket for requests for addresses: program leaves out those
// of other hosts than the gateway.
func requestsFor(addresses []netip.Addr) (filter []bpf.Instruction) {
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: packetEnd} // without the padding
	// To this host, broadcast, multicast: 0, 1, 2 (linux/if_packet.h).
	filter = append(filter, bpf.LoadExtension{Num: bpf.ExtType}, bpf.JumpIf{Cond: bpf.JumpLessOrEqual, Val: unix.PACKET_MULTICAST, SkipTrue: 1}, drop)
	for _, field := range []struct{ offset, size, want uint32 }{
		{etherTypeOffset, 2, etherTypeARP},
		{fixedOffset, 4, hardwareEther<<16 | etherTypeIPv4},
		{lengthsOffset, 2, macLength<<8 | ipv4Length},
		{operationOffset, 2, uint32(Request)},
	} {
		filter = append(filter, bpf.LoadAbsolute{Off: field.offset, Size: int(field.size)}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: field.want, SkipTrue: 1}, drop)
	}
	filter = append(filter, bpf.LoadAbsolute{Off: targetIPOffset, Size: 4})
	for _, a := range addresses {
		filter = append(filter, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(a.AsSlice()), SkipTrue: 1}, accept)
	}
	return append(filter, drop)
}

// Answer returns an Ethernet frame that answers a request of ARP, to its sender: the address that it
// asks for is at mac (RFC 826).
func (p Packet) Answer(mac net.HardwareAddr) ([]byte, error) {
	if p.Operation != Request {
		return nil, fmt.Errorf("answer ARP: expected a request, found operation %d", p.Operation)
	}
	if err := check(p.SenderMAC, p.SenderIP); err != nil {
		return nil, fmt.Errorf("answer ARP: sender: %w", err)
	}
	if err := check(mac, p.TargetIP); err != nil {
		return nil, fmt.Errorf("answer ARP: %w", err)
	}
	frame := Packet{Reply, mac, p.TargetIP, p.SenderMAC, p.SenderIP}.frame()
	copy(frame, p.SenderMAC)
	return frame, nil
}
