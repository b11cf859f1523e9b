package lab

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Frame is an Ethernet frame of a [Capture]. Its methods decode only what tests use, and
// report frames that are too short as not decoded.
type Frame struct {
	At       time.Time // when the frame passed: the kernel's clock CLOCK_REALTIME
	Outgoing bool      // sent, not received, by the captured namespace
	Data     []byte    // the frame, which begins with the destination address
}

// The length of an Ethernet header, and offsets in it.
const (
	sourceOffset    = 6
	etherTypeOffset = 12
	headerLen       = 14
)

// EtherType returns the protocol of the payload, unix.ETH_P_IP for example; 0 if the frame
// is too short.
func (f Frame) EtherType() uint16 {
	if len(f.Data) < headerLen {
		return 0
	}
	return binary.BigEndian.Uint16(f.Data[etherTypeOffset:])
}

// Source returns the hardware address of the sender.
func (f Frame) Source() net.HardwareAddr {
	if len(f.Data) < headerLen {
		return nil
	}
	return net.HardwareAddr(bytes.Clone(f.Data[sourceOffset:etherTypeOffset]))
}

// Destination returns the hardware address of the receiver.
func (f Frame) Destination() net.HardwareAddr {
	if len(f.Data) < headerLen {
		return nil
	}
	return net.HardwareAddr(bytes.Clone(f.Data[:sourceOffset]))
}

// Packet is an IPv4 or IPv6 packet (RFC 791, RFC 8200). The ports are 0 if the packet has none: for protocols
// other than TCP, UDP, UDP-Lite and SCTP, and for fragments after the first.
type Packet struct {
	Protocol uint8 // unix.IPPROTO_TCP for example
	Src, Dst netip.AddrPort
}

// IPv4 decodes an IPv4 packet.
func (f Frame) IPv4() (Packet, bool) {
	if f.EtherType() != unix.ETH_P_IP {
		return Packet{}, false
	}
	b := f.Data[headerLen:]
	if len(b) < 20 || b[0]>>4 != 4 {
		return Packet{}, false
	}
	length := int(b[0]&0xf) * 4
	if length < 20 || len(b) < length {
		return Packet{}, false
	}
	p := Packet{Protocol: b[9]}
	var src, dst uint16
	fragment := binary.BigEndian.Uint16(b[6:]) & 0x1fff
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP:
		if ports := b[length:]; fragment == 0 && len(ports) >= 4 {
			src, dst = binary.BigEndian.Uint16(ports), binary.BigEndian.Uint16(ports[2:])
		}
	}
	p.Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), src)
	p.Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), dst)
	return p, true
}

// IPv6 decodes an IPv6 packet without extension headers. Of another one Protocol is the
// number of the first extension header.
func (f Frame) IPv6() (Packet, bool) {
	if f.EtherType() != unix.ETH_P_IPV6 {
		return Packet{}, false
	}
	b := f.Data[headerLen:]
	if len(b) < 40 || b[0]>>4 != 6 {
		return Packet{}, false
	}
	p := Packet{Protocol: b[6]}
	var src, dst uint16
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP:
		if ports := b[40:]; len(ports) >= 4 {
			src, dst = binary.BigEndian.Uint16(ports), binary.BigEndian.Uint16(ports[2:])
		}
	}
	p.Src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), src)
	p.Dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[24:40])), dst)
	return p, true
}

// ARP is an ARP message for IPv4 over Ethernet (RFC 826).
type ARP struct {
	Op                 uint16 // 1 is a request, 2 a reply
	SenderMAC          net.HardwareAddr
	SenderIP, TargetIP netip.Addr
	TargetMAC          net.HardwareAddr
}

// Announces reports whether the message is an announcement of the sender's own address
// (RFC 5227, section 3), not a request or a reply.
func (a ARP) Announces() bool { return a.SenderIP == a.TargetIP }

// ARP decodes an ARP message.
func (f Frame) ARP() (ARP, bool) {
	if f.EtherType() != unix.ETH_P_ARP {
		return ARP{}, false
	}
	b := f.Data[headerLen:]
	// Ethernet, IPv4, and the lengths of their addresses.
	if len(b) < 28 || !bytes.Equal(b[:6], []byte{0, 1, 8, 0, 6, 4}) {
		return ARP{}, false
	}
	return ARP{
		Op:        binary.BigEndian.Uint16(b[6:]),
		SenderMAC: bytes.Clone(b[8:14]),
		SenderIP:  netip.AddrFrom4([4]byte(b[14:18])),
		TargetMAC: bytes.Clone(b[18:24]),
		TargetIP:  netip.AddrFrom4([4]byte(b[24:28])),
	}, true
}

// String returns the frame as one line, for the messages of tests.
func (f Frame) String() string {
	way := "in "
	if f.Outgoing {
		way = "out"
	}
	if p, ok := f.IPv4(); ok {
		return fmt.Sprintf("%s %s > %s ip protocol %d %s > %s", way, f.Source(), f.Destination(), p.Protocol, p.Src, p.Dst)
	}
	if p, ok := f.IPv6(); ok {
		return fmt.Sprintf("%s %s > %s ipv6 protocol %d %s > %s", way, f.Source(), f.Destination(), p.Protocol, p.Src, p.Dst)
	}
	if a, ok := f.ARP(); ok {
		return fmt.Sprintf("%s %s > %s arp op %d %s is-at %s for %s (%s)", way, f.Source(), f.Destination(),
			a.Op, a.SenderIP, a.SenderMAC, a.TargetIP, a.TargetMAC)
	}
	return fmt.Sprintf("%s %s > %s ethertype %#04x, %d bytes", way, f.Source(), f.Destination(), f.EtherType(), len(f.Data))
}
