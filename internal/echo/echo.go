// Package echo builds and parses the frames of a ping: echo requests and replies of ICMP
// (RFC 792) and ICMPv6 (RFC 4443) over Ethernet. It is pure.
//
// A standby asks the gateway by them who holds the reserved address: the reply goes to the
// hardware address that the gateway has for it.
package echo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// The EtherTypes (RFC 894, section 1; RFC 2464, section 3).
const (
	EtherTypeIPv4 = 0x0800
	EtherTypeIPv6 = 0x86dd
)

// The types of messages, and the protocols (RFC 792; RFC 4443, sections 4.1 and 4.2).
const (
	request4, reply4, icmp4 = 8, 0, 1
	request6, reply6, icmp6 = 128, 129, 58
)

// The lengths of the parts of a frame, and the hop limit of a request, which a witness
// beyond the gateway needs.
const (
	macLength   = 6
	etherLength = 14
	ipv4Length  = 20
	ipv6Length  = 40
	icmpLength  = 8
	hopLimit    = 64
	minimum     = 60 // length of an Ethernet frame without its checksum (IEEE 802.3)
)

// MaxLength is the number of bytes in which Parse finds all that it needs, of a reply
// without IP options.
const MaxLength = etherLength + ipv6Length + icmpLength

// NumberOffset is the offset of the number in a message: the identifier and the sequence
// number, of 16 bits each, taken as one of 32.
const NumberOffset = 4

// A Request is an echo request.
type Request struct {
	From, Via net.HardwareAddr // of the interface, and of the next hop
	Source    netip.Addr
	Target    netip.Addr // of the same family
	Number    uint32     // of the request, which the reply repeats
}

// Frame returns the Ethernet frame of a request.
func (r Request) Frame() ([]byte, error) {
	if len(r.From) != macLength || len(r.Via) != macLength {
		return nil, fmt.Errorf("build echo request: expected hardware addresses of %d bytes, found %q and %q", macLength, r.From, r.Via)
	}
	if r.Source.Is4() != r.Target.Is4() || !r.Source.IsValid() || !r.Target.IsValid() {
		return nil, fmt.Errorf("build echo request: expected addresses of one family, found %s and %s", r.Source, r.Target)
	}
	b := make([]byte, 0, MaxLength)
	b = append(b, r.Via...)
	b = append(b, r.From...)
	if r.Source.Is4() {
		b = binary.BigEndian.AppendUint16(b, EtherTypeIPv4)
		// Version and header length, DS field, total length, identification, do not
		// fragment, hop limit, protocol, checksum (RFC 791, section 3.1).
		b = append(b, 0x45, 0, 0, ipv4Length+icmpLength, 0, 0, 0x40, 0, hopLimit, icmp4, 0, 0)
		b = append(b, r.Source.AsSlice()...)
		b = append(b, r.Target.AsSlice()...)
		binary.BigEndian.PutUint16(b[etherLength+10:], Checksum(b[etherLength:], 0))
		b = r.message(b, request4)
		binary.BigEndian.PutUint16(b[etherLength+ipv4Length+2:], Checksum(b[etherLength+ipv4Length:], 0))
		return b[:minimum], nil // the rest is padding, zero
	}
	b = binary.BigEndian.AppendUint16(b, EtherTypeIPv6)
	// Version, length of the payload, next header, hop limit (RFC 8200, section 3).
	b = append(b, 0x60, 0, 0, 0, 0, icmpLength, icmp6, hopLimit)
	b = append(b, r.Source.AsSlice()...)
	b = append(b, r.Target.AsSlice()...)
	b = r.message(b, request6)
	// Also over the pseudo-header: addresses, length and protocol (RFC 8200, section 8.1).
	binary.BigEndian.PutUint16(b[etherLength+ipv6Length+2:], Checksum(b[etherLength+8:], icmpLength+icmp6))
	return b, nil
}

// message appends the ICMP message, without its checksum.
func (r Request) message(b []byte, kind byte) []byte {
	return binary.BigEndian.AppendUint32(append(b, kind, 0, 0, 0), r.Number)
}

// Checksum returns the Internet checksum of data and of what start is the sum of (RFC 1071);
// 0 if data contains the right one.
func Checksum(data []byte, start uint32) uint16 {
	total := start
	for i := 0; i+1 < len(data); i += 2 {
		total += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		total += uint32(data[len(data)-1]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total) //nolint:gosec // folded above
}

// A Reply is an echo reply.
type Reply struct {
	Source netip.Addr // who answers
	Target netip.Addr
	Number uint32 // of the request
}

var errOther = errors.New("parse echo reply: another frame")

// Parse parses the Ethernet frame of an echo reply. Its checksums are left to those who
// act on the payload: a reply that is damaged has no number of a request.
func Parse(frame []byte) (Reply, error) {
	if len(frame) < etherLength+ipv4Length+icmpLength {
		return Reply{}, errOther
	}
	packet := frame[etherLength:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case EtherTypeIPv4:
		length := int(packet[0]&0xf) * 4
		fragment := binary.BigEndian.Uint16(packet[6:]) & 0x3fff // more fragments, and the offset
		if packet[0]>>4 != 4 || length < ipv4Length || packet[9] != icmp4 || fragment != 0 || len(packet) < length+icmpLength || packet[length] != reply4 {
			return Reply{}, errOther
		}
		return Reply{netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20])), binary.BigEndian.Uint32(packet[length+NumberOffset:])}, nil
	case EtherTypeIPv6:
		if len(packet) < ipv6Length+icmpLength || packet[0]>>4 != 6 || packet[6] != icmp6 || packet[ipv6Length] != reply6 {
			return Reply{}, errOther
		}
		return Reply{netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40])), binary.BigEndian.Uint32(packet[ipv6Length+NumberOffset:])}, nil
	}
	return Reply{}, errOther
}
