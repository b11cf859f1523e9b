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

// Frame is an Ethernet frame as a [Capture] saw it. Its methods decode only what
// tests ask about, and of a frame too short for that nothing.
type Frame struct {
	At       time.Time // when it was read, a little after it passed
	Outgoing bool      // sent by the captured namespace, not received
	Data     []byte    // from the destination address on
}

// The length of an Ethernet header, and offsets in it.
const (
	sourceOffset    = 6
	etherTypeOffset = 12
	headerLen       = 14
)

// EtherType is the protocol above, unix.ETH_P_IP for example; 0 if the frame is
// too short to say.
func (f Frame) EtherType() uint16 {
	if len(f.Data) < headerLen {
		return 0
	}
	return binary.BigEndian.Uint16(f.Data[etherTypeOffset:])
}

// Source is the hardware address of the sender.
func (f Frame) Source() net.HardwareAddr {
	if len(f.Data) < headerLen {
		return nil
	}
	return net.HardwareAddr(bytes.Clone(f.Data[sourceOffset:etherTypeOffset]))
}

// Destination is the hardware address it is sent to.
func (f Frame) Destination() net.HardwareAddr {
	if len(f.Data) < headerLen {
		return nil
	}
	return net.HardwareAddr(bytes.Clone(f.Data[:sourceOffset]))
}

// Packet is an IPv4 packet (RFC 791). The ports are 0 where a packet has none:
// another protocol than TCP, UDP, UDP-Lite and SCTP, or a fragment that is not
// the first.
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

// ARP is an ARP message for IPv4 over Ethernet (RFC 826).
type ARP struct {
	Op                 uint16 // 1 is a request, 2 a reply
	SenderMAC          net.HardwareAddr
	SenderIP, TargetIP netip.Addr
	TargetMAC          net.HardwareAddr
}

// Announces says whether the message tells others about the sender's own address
// (RFC 5227, section 3) instead of asking or answering.
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

// String is one line for the message of a test that fails.
func (f Frame) String() string {
	way := "in "
	if f.Outgoing {
		way = "out"
	}
	if p, ok := f.IPv4(); ok {
		return fmt.Sprintf("%s %s > %s ip protocol %d %s > %s", way, f.Source(), f.Destination(), p.Protocol, p.Src, p.Dst)
	}
	if a, ok := f.ARP(); ok {
		return fmt.Sprintf("%s %s > %s arp op %d %s is-at %s for %s (%s)", way, f.Source(), f.Destination(),
			a.Op, a.SenderIP, a.SenderMAC, a.TargetIP, a.TargetMAC)
	}
	return fmt.Sprintf("%s %s > %s ethertype %#04x, %d bytes", way, f.Source(), f.Destination(), f.EtherType(), len(f.Data))
}
