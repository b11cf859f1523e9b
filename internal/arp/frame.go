// Package arp tells the physical network who has the reserved address.
//
// Neighbours that knew the address at another node would go on sending there
// until their entry expires (minutes). A gratuitous announcement makes them
// learn the new hardware address at once.
package arp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
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
	minimumLength = 60 // of an Ethernet frame without its checksum (IEEE 802.3)
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// Announcement returns an Ethernet frame that announces, to everybody on the
// link, that address is at mac: a gratuitous ARP of the given form (RFC 5227
// section 3 has the request form, RFC 5944 section 4.6 both). In each the sender
// and the target address are the announced one.
//
// The target hardware address of a reply is mac itself: Linux takes an
// unsolicited reply with another for a stray one and ignores it while its
// entry is younger than a second (arp_is_garp in net/ipv4/arp.c). That of a
// request is zero, as RFC 5227 wants it.
func Announcement(form Operation, mac net.HardwareAddr, address netip.Addr) ([]byte, error) {
	if len(mac) != macLength {
		return nil, fmt.Errorf("announcing %s: hardware address %q has %d bytes, Ethernet's have %d", address, mac, len(mac), macLength)
	}
	if !address.Is4() {
		return nil, fmt.Errorf("announcing %s: not an IPv4 address", address)
	}
	target := net.HardwareAddr(make([]byte, macLength))
	if form == Reply {
		target = mac
	}
	b := make([]byte, 0, minimumLength)
	b = append(b, broadcast...)
	b = append(b, mac...)
	b = binary.BigEndian.AppendUint16(b, etherTypeARP)

	b = binary.BigEndian.AppendUint16(b, hardwareEther)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv4)
	b = append(b, macLength, ipv4Length)
	b = binary.BigEndian.AppendUint16(b, uint16(form))
	b = append(b, mac...)
	b = append(b, address.AsSlice()...)
	b = append(b, target...)
	b = append(b, address.AsSlice()...)
	return b[:minimumLength], nil // the rest is padding, zero
}
