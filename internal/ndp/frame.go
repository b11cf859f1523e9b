// Package ndp builds and parses the messages of IPv6 in place of ARP: neighbour
// solicitations and advertisements (RFC 4861) over Ethernet. Package arp sends and
// receives them.
package ndp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/egress-router/egress-router/internal/echo"
)

// EtherType is that of IPv6 (RFC 2464, section 3).
const EtherType = 0x86dd

// A Type is the type of an ICMPv6 message.
type Type uint8

// The types (RFC 4861, sections 4.3 and 4.4).
const (
	Solicitation  Type = 135
	Advertisement Type = 136
)

// The values of fixed fields (RFC 8200, section 3; RFC 4861, sections 4.3, 4.4 and 4.6.1).
const (
	nextHeader  = 58  // ICMPv6
	hopLimit    = 255 // of every message: no router has forwarded it
	sourceMAC   = 1   // option with the sender's hardware address, of a solicitation
	targetMAC   = 2   // option with the target's, of an advertisement
	solicited   = 1 << 30
	override    = 1 << 29
	macLength   = 6
	optionUnits = 1 // length of the option, in 8 bytes
)

// The offsets of the fields in a frame: 14 bytes of Ethernet header, 40 of IPv6, then the
// message.
const (
	etherTypeOffset   = 12
	lengthOffset      = 18
	nextHeaderOffset  = 20
	hopLimitOffset    = 21
	sourceOffset      = 22
	destinationOffset = 38
	typeOffset        = 54
	codeOffset        = 55
	checksumOffset    = 56
	flagsOffset       = 58
	targetOffset      = 62
	optionsOffset     = 78
	// FrameEnd is the length of the frames that this package builds.
	FrameEnd = 86
)

// A Message is a neighbour solicitation or advertisement.
type Message struct {
	Type Type
	// MAC is the hardware address of the sender: that of an advertisement's option, if
	// it has one, otherwise of the frame.
	MAC    net.HardwareAddr
	Source netip.Addr // of a probe for duplicates the unspecified address
	Target netip.Addr
}

// check checks that mac and addresses fit in a message.
func check(mac net.HardwareAddr, addresses ...netip.Addr) error {
	if len(mac) != macLength {
		return fmt.Errorf("hardware address %q: expected %d bytes, found %d", mac, macLength, len(mac))
	}
	for _, a := range addresses {
		if !a.Is6() || a.Is4In6() {
			return fmt.Errorf("%q is not an IPv6 address", a)
		}
	}
	return nil
}

var (
	allNodes   = netip.MustParseAddr("ff02::1")        // RFC 4291, section 2.7.1
	solicited0 = netip.MustParseAddr("ff02::1:ff00:0") // of a solicited-node address, RFC 4291, section 2.7.1
)

// multicastMAC returns the hardware address of a multicast address (RFC 2464, section 7).
func multicastMAC(a netip.Addr) net.HardwareAddr {
	b := a.As16()
	return append(net.HardwareAddr{0x33, 0x33}, b[12:]...)
}

// solicitedNode returns the multicast address of a host with an address.
func solicitedNode(a netip.Addr) netip.Addr {
	group, address := solicited0.As16(), a.As16()
	copy(group[13:], address[13:])
	return netip.AddrFrom16(group)
}

// Announce returns a frame that announces address at mac to all nodes: an unsolicited
// advertisement that overrides older entries (RFC 4861, section 7.2.6).
func Announce(mac net.HardwareAddr, address netip.Addr) ([]byte, error) {
	if err := check(mac, address); err != nil {
		return nil, fmt.Errorf("announce %s: %w", address, err)
	}
	return frame(Advertisement, override, multicastMAC(allNodes), mac, address, allNodes, address, targetMAC), nil
}

// Solicit returns a frame in which the holder of source, at mac, asks for the hardware
// address of target (RFC 4861, section 7.2.2), or, if via is that address, whether it
// still has it (section 7.3.3). The source of a probe for another holder is the
// unspecified address, and the frame has no option (RFC 4862, section 5.4.2).
func Solicit(target netip.Addr, via, mac net.HardwareAddr, source netip.Addr) ([]byte, error) {
	if err := check(mac, target, source); err != nil {
		return nil, fmt.Errorf("solicit %s: %w", target, err)
	}
	to := target
	if via == nil {
		to = solicitedNode(target)
		via = multicastMAC(to)
	}
	return frame(Solicitation, 0, via, mac, source, to, target, sourceMAC), nil
}

// frame returns a message as an Ethernet frame.
func frame(t Type, flags uint32, via, mac net.HardwareAddr, source, destination, target netip.Addr, option byte) []byte {
	b := make([]byte, 0, FrameEnd)
	b = append(b, via...)
	b = append(b, mac...)
	b = binary.BigEndian.AppendUint16(b, EtherType)

	b = append(b, 0x60, 0, 0, 0, 0, 0, nextHeader, hopLimit) // version 6, length below
	b = append(b, source.AsSlice()...)
	b = append(b, destination.AsSlice()...)

	b = append(b, byte(t), 0, 0, 0) // checksum below
	b = binary.BigEndian.AppendUint32(b, flags)
	b = append(b, target.AsSlice()...)
	if !source.IsUnspecified() {
		b = append(b, option, optionUnits)
		b = append(b, mac...)
	}
	binary.BigEndian.PutUint16(b[lengthOffset:], uint16(len(b)-typeOffset)) //nolint:gosec // at most 32
	binary.BigEndian.PutUint16(b[checksumOffset:], checksum(b))
	return b
}

// checksum returns the checksum of a message in a frame, over the message and the
// pseudo-header (RFC 8200, section 8.1); 0 if that in the frame is right.
func checksum(b []byte) uint16 {
	return echo.Checksum(b[sourceOffset:], uint32(len(b)-typeOffset)+nextHeader) //nolint:gosec // a frame is short
}

// Parse parses an Ethernet frame. It accepts only valid solicitations and advertisements
// (RFC 4861, section 7.1). The bytes after the packet are padding.
func Parse(frame []byte) (Message, error) {
	if len(frame) < optionsOffset {
		return Message{}, fmt.Errorf("parse frame: expected at least %[2]d bytes, found %[1]d", len(frame), optionsOffset)
	}
	if t := binary.BigEndian.Uint16(frame[etherTypeOffset:]); t != EtherType {
		return Message{}, fmt.Errorf("parse frame: expected EtherType %#04x, found %#04x", EtherType, t)
	}
	end := typeOffset + int(binary.BigEndian.Uint16(frame[lengthOffset:]))
	if end < optionsOffset || end > len(frame) {
		return Message{}, fmt.Errorf("parse IPv6 packet: expected an end from %d to %d, found %d", optionsOffset, len(frame), end)
	}
	frame = frame[:end]
	m := Message{Type: Type(frame[typeOffset]), MAC: bytes.Clone(frame[macLength : 2*macLength])}
	switch {
	case frame[nextHeaderOffset] != nextHeader || m.Type != Solicitation && m.Type != Advertisement || frame[codeOffset] != 0:
		return Message{}, fmt.Errorf("parse IPv6 packet: expected a neighbour solicitation or advertisement, found header %d, type %d", frame[nextHeaderOffset], m.Type)
	case frame[hopLimitOffset] != hopLimit:
		return Message{}, fmt.Errorf("parse neighbour message: expected hop limit %d, found %d", hopLimit, frame[hopLimitOffset])
	case checksum(frame) != 0:
		return Message{}, fmt.Errorf("parse neighbour message: invalid checksum")
	}
	m.Source = netip.AddrFrom16([16]byte(frame[sourceOffset:destinationOffset]))
	m.Target = netip.AddrFrom16([16]byte(frame[targetOffset:optionsOffset]))
	for options := frame[optionsOffset:]; len(options) > 0; {
		if len(options) < 8 || options[1] == 0 || int(options[1])*8 > len(options) {
			return Message{}, fmt.Errorf("parse neighbour message: invalid option %x", options)
		}
		if options[0] == targetMAC && options[1] == optionUnits && m.Type == Advertisement {
			m.MAC = bytes.Clone(options[2:8])
		}
		options = options[int(options[1])*8:]
	}
	return m, nil
}
