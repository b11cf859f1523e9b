package arp

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// program returns the filter of a socket for address and gateway (classic BPF,
// Documentation/networking/filter.rst): ARP packets whose sender has or claims one
// of them, and probes for address. The ARP of other hosts does not wake the
// process.
//
// Frames for other hosts (PACKET_OTHERHOST) and outgoing frames (PACKET_OUTGOING)
// are dropped too, as in the kernel (arp_rcv in net/ipv4/arp.c).
func program(address, gateway netip.Addr) ([]bpf.Instruction, error) {
	if !gateway.IsValid() {
		gateway = address
	}
	for _, a := range []netip.Addr{address, gateway} {
		if !a.Is4() {
			return nil, fmt.Errorf("build ARP filter: %q is not an IPv4 address", a)
		}
	}
	number := func(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()) }
	const types, lengths = hardwareEther<<16 | etherTypeIPv4, macLength<<8 | ipv4Length
	return []bpf.Instruction{
		// To this host, broadcast, multicast: 0, 1, 2 (linux/if_packet.h).
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: unix.PACKET_MULTICAST, SkipTrue: 13},
		bpf.LoadAbsolute{Off: etherTypeOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherTypeARP, SkipTrue: 11},
		bpf.LoadAbsolute{Off: fixedOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: types, SkipTrue: 9},
		bpf.LoadAbsolute{Off: lengthsOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: lengths, SkipTrue: 7},

		bpf.LoadAbsolute{Off: senderIPOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: number(address), SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: number(gateway), SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 3},
		bpf.LoadAbsolute{Off: targetIPOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(address), SkipTrue: 1},

		bpf.RetConstant{Val: packetEnd}, // accept, without the padding
		bpf.RetConstant{Val: 0},         // drop; the kernel also drops a frame too short for a load
	}, nil
}

// attach sets p as the filter of a socket (SO_ATTACH_FILTER, socket(7)).
func attach(fd int, p []bpf.Instruction) error {
	raw, err := bpf.Assemble(p)
	if err != nil {
		return fmt.Errorf("assemble ARP filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return fmt.Errorf("attach ARP filter: %w", err)
	}
	return nil
}
