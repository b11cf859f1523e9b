// Package arp announces the reserved addresses to the physical network, and detects
// other holders of an address and a missing gateway.
//
// Neighbours with an older entry for an address would keep sending to another
// node until the entry expires (minutes). A gratuitous announcement updates the
// entry at once.
//
// [Ask] and [Acquire] probe for another holder before an address is taken; a
// [Watch] detects claims afterwards (RFC 5227).
//
// For IPv6 addresses it does the same by the messages of package ndp, except for Acquire:
// the kernel detects duplicates itself before it uses an address (RFC 4862, section 5.4).
package arp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/egress-router/egress-router/internal/ndp"
)

// An Operation is the ARP opcode (RFC 826).
type Operation uint16

// The operations (RFC 826).
const (
	Request Operation = 1
	Reply   Operation = 2
)

// The values of the fixed fields of an ARP packet for IPv4 over Ethernet
// (RFC 826; IANA "ARP Parameters").
const (
	etherTypeARP  = 0x0806
	etherTypeIPv4 = 0x0800
	hardwareEther = 1
	macLength     = 6
	ipv4Length    = 4
	minimumLength = 60 // length of an Ethernet frame without its checksum (IEEE 802.3)
)

// The offsets of the fields in a frame: 14 bytes of Ethernet header, then the
// packet (RFC 826).
const (
	etherTypeOffset = 12
	fixedOffset     = 14 // hardware and protocol type
	lengthsOffset   = 18 // lengths of hardware and protocol addresses
	operationOffset = 20
	senderMACOffset = 22
	senderIPOffset  = 28
	targetMACOffset = 32
	targetIPOffset  = 38
	packetEnd       = 42
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// A Packet is an ARP packet for IPv4 over Ethernet (RFC 826), or the same of IPv6: a
// solicitation is a request, and an advertisement a reply, with its target as the sender.
type Packet struct {
	Operation Operation
	SenderMAC net.HardwareAddr
	SenderIP  netip.Addr
	TargetMAC net.HardwareAddr
	TargetIP  netip.Addr
}

// Parse parses an Ethernet frame. It accepts only requests and replies for IPv4
// over Ethernet, as the kernel does (arp_process in net/ipv4/arp.c). The bytes
// after the packet are padding.
func Parse(frame []byte) (Packet, error) {
	if len(frame) < packetEnd {
		return Packet{}, fmt.Errorf("parse frame: expected at least %[2]d bytes, found %[1]d", len(frame), packetEnd)
	}
	if t := binary.BigEndian.Uint16(frame[etherTypeOffset:]); t != etherTypeARP {
		return Packet{}, fmt.Errorf("parse frame: expected EtherType %#04x, found %#04x", etherTypeARP, t)
	}
	if fixed := frame[fixedOffset:operationOffset]; !bytes.Equal(fixed, []byte{0, hardwareEther, etherTypeIPv4 >> 8, 0, macLength, ipv4Length}) {
		return Packet{}, fmt.Errorf("parse ARP packet: expected types and lengths of IPv4 over Ethernet, found %x", fixed)
	}
	operation := Operation(binary.BigEndian.Uint16(frame[operationOffset:]))
	if operation != Request && operation != Reply {
		return Packet{}, fmt.Errorf("parse ARP packet: expected operation request or reply, found %d", operation)
	}
	return Packet{
		Operation: operation,
		SenderMAC: bytes.Clone(frame[senderMACOffset:senderIPOffset]),
		SenderIP:  netip.AddrFrom4([4]byte(frame[senderIPOffset:targetMACOffset])),
		TargetMAC: bytes.Clone(frame[targetMACOffset:targetIPOffset]),
		TargetIP:  netip.AddrFrom4([4]byte(frame[targetIPOffset:packetEnd])),
	}, nil
}

// parse parses a frame of the family of an address.
func parse(frame []byte, ipv6 bool) (Packet, error) {
	if !ipv6 {
		return Parse(frame)
	}
	m, err := ndp.Parse(frame)
	if err != nil {
		return Packet{}, err
	}
	if m.Type == ndp.Advertisement {
		return Packet{Operation: Reply, SenderMAC: m.MAC, SenderIP: m.Target}, nil
	}
	return Packet{Operation: Request, SenderMAC: m.MAC, SenderIP: m.Source, TargetIP: m.Target}, nil
}

// probes reports whether p is a probe for address, which does not claim it
// (RFC 5227 section 1.1, "ARP Probe").
func (p Packet) probes(address netip.Addr) bool {
	return p.Operation == Request && p.SenderIP.IsUnspecified() && p.TargetIP == address
}

// frame returns p as a broadcast Ethernet frame.
func (p Packet) frame() []byte {
	b := make([]byte, 0, minimumLength)
	b = append(b, broadcast...)
	b = append(b, p.SenderMAC...)
	b = binary.BigEndian.AppendUint16(b, etherTypeARP)

	b = binary.BigEndian.AppendUint16(b, hardwareEther)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv4)
	b = append(b, macLength, ipv4Length)
	b = binary.BigEndian.AppendUint16(b, uint16(p.Operation))
	b = append(b, p.SenderMAC...)
	b = append(b, p.SenderIP.AsSlice()...)
	b = append(b, p.TargetMAC...)
	b = append(b, p.TargetIP.AsSlice()...)
	return b[:minimumLength] // the rest is padding, zero
}

// check checks that mac and addresses fit in a packet.
func check(mac net.HardwareAddr, addresses ...netip.Addr) error {
	if len(mac) != macLength {
		return fmt.Errorf("hardware address %q: expected %d bytes, found %d", mac, macLength, len(mac))
	}
	for _, a := range addresses {
		if !a.Is4() {
			return fmt.Errorf("%q is not an IPv4 address", a)
		}
	}
	return nil
}

// unknown returns the target hardware address of a request: zero, as RFC 5227
// recommends in section 1.1; RFC 826 leaves it open.
func unknown() net.HardwareAddr { return make(net.HardwareAddr, macLength) }

// Announcement returns a broadcast Ethernet frame that announces address at mac:
// a gratuitous ARP of the given form (RFC 5227 section 3 has the request form,
// RFC 5944 section 4.6 both). Sender and target address are the announced one.
//
// The target hardware address of a reply is mac itself: with any other, Linux
// ignores an unsolicited reply while its entry is younger than a second
// (arp_is_garp in net/ipv4/arp.c). For a request it is zero, as in RFC 5227.
func Announcement(form Operation, mac net.HardwareAddr, address netip.Addr) ([]byte, error) {
	if err := check(mac, address); err != nil {
		return nil, fmt.Errorf("announce %s: %w", address, err)
	}
	target := unknown()
	if form == Reply {
		target = mac
	}
	return Packet{form, mac, address, target, address}.frame(), nil
}

// announcements returns the frames that announce address at mac.
func announcements(mac net.HardwareAddr, address netip.Addr) (frames [][]byte, err error) {
	if address.Is6() {
		frame, err := ndp.Announce(mac, address)
		return [][]byte{frame}, err
	}
	for _, form := range []Operation{Reply, Request} {
		frame, err := Announcement(form, mac, address)
		if err != nil {
			return nil, err
		}
		frames = append(frames, frame)
	}
	return frames, nil
}

// CheckAnnouncement returns an error if address cannot be announced at mac.
func CheckAnnouncement(mac net.HardwareAddr, address netip.Addr) error {
	_, err := announcements(mac, address)
	return err
}

// Probe returns a broadcast Ethernet frame that requests address. Its sender IP
// address is zero, so that it updates no neighbour's entry (RFC 5227 section 1.1).
func Probe(mac net.HardwareAddr, address netip.Addr) ([]byte, error) {
	if address.Is6() {
		return ndp.Solicit(address, nil, mac, netip.IPv6Unspecified())
	}
	if err := check(mac, address); err != nil {
		return nil, fmt.Errorf("probe %s: %w", address, err)
	}
	return Packet{Request, mac, netip.IPv4Unspecified(), unknown(), address}.frame(), nil
}

// requestBy returns a request as RequestFor does, by unicast to the hardware address via,
// unless that is nil.
func requestBy(via net.HardwareAddr, target netip.Addr, mac net.HardwareAddr, sender netip.Addr) ([]byte, error) {
	if target.Is6() {
		return ndp.Solicit(target, via, mac, sender)
	}
	frame, err := RequestFor(target, mac, sender)
	copy(frame, via)
	return frame, err
}

// RequestFor returns a broadcast Ethernet frame in which the holder of sender, at
// mac, requests the hardware address of target (RFC 826).
func RequestFor(target netip.Addr, mac net.HardwareAddr, sender netip.Addr) ([]byte, error) {
	if target.Is6() {
		return ndp.Solicit(target, nil, mac, sender)
	}
	if err := check(mac, target, sender); err != nil {
		return nil, fmt.Errorf("request %s: %w", target, err)
	}
	return Packet{Request, mac, sender, unknown(), target}.frame(), nil
}
