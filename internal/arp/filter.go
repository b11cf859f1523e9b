package arp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/ndp"
)

// program returns the filter of a socket for addresses and gateway (classic BPF,
// Documentation/networking/filter.rst): ARP packets whose sender has or claims one
// of them, and probes for an address. The ARP of other hosts does not wake the
// process.
//
// Frames for other hosts (PACKET_OTHERHOST) and outgoing frames (PACKET_OUTGOING)
// are dropped too, as in the kernel (arp_rcv in net/ipv4/arp.c).
func program(addresses []netip.Addr, gateway netip.Addr) ([]bpf.Instruction, error) {
	senders := slices.Clone(addresses)
	if gateway.IsValid() {
		senders = append(senders, gateway)
	}
	if addresses[0].Is6() {
		return ndp.Filter(largest, senders...)
	}
	const types, lengths = hardwareEther<<16 | etherTypeIPv4, macLength<<8 | ipv4Length
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: packetEnd} // without the padding
	p := []bpf.Instruction{
		// To this host, broadcast, multicast: 0, 1, 2 (linux/if_packet.h).
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: unix.PACKET_MULTICAST, SkipTrue: 6},
		bpf.LoadAbsolute{Off: etherTypeOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherTypeARP, SkipTrue: 4},
		bpf.LoadAbsolute{Off: fixedOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: types, SkipTrue: 2},
		bpf.LoadAbsolute{Off: lengthsOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: lengths, SkipTrue: 1},
		drop,
	}
	among := func(addresses []netip.Addr) error {
		for _, a := range addresses {
			if !a.Is4() {
				return fmt.Errorf("build ARP filter: %q is not an IPv4 address", a)
			}
			p = append(p, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(a.AsSlice()), SkipTrue: 1}, accept)
		}
		return nil
	}
	p = append(p, bpf.LoadAbsolute{Off: senderIPOffset, Size: 4})
	if err := among(senders); err != nil {
		return nil, err
	}
	p = append(p, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, drop, bpf.LoadAbsolute{Off: targetIPOffset, Size: 4})
	if err := among(addresses); err != nil {
		return nil, err
	}
	return append(p, drop), nil // the kernel also drops a frame too short for a load
}
