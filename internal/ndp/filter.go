package ndp

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Filter returns the filter of a packet socket for addresses (classic BPF,
// Documentation/networking/filter.rst): advertisements of them, and solicitations from
// them. Other IPv6 traffic, and the neighbour discovery of other hosts, does not wake the
// process. It accepts at most length bytes of a frame.
//
// Frames for other hosts (PACKET_OTHERHOST) and outgoing frames (PACKET_OUTGOING) are
// dropped too.
func Filter(length uint32, addresses ...netip.Addr) ([]bpf.Instruction, error) {
	if err := check(make([]byte, macLength), addresses...); err != nil {
		return nil, fmt.Errorf("build neighbour discovery filter: %w", err)
	}
	drop, accept := bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: length}
	p := []bpf.Instruction{
		// To this host, broadcast, multicast: 0, 1, 2 (linux/if_packet.h).
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: unix.PACKET_MULTICAST, SkipTrue: 4},
		bpf.LoadAbsolute{Off: etherTypeOffset, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: EtherType, SkipTrue: 2},
		bpf.LoadAbsolute{Off: nextHeaderOffset, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: nextHeader, SkipTrue: 1},
		drop,
		// X is the offset of the sender's address.
		bpf.LoadAbsolute{Off: typeOffset, Size: 1},
		bpf.LoadConstant{Dst: bpf.RegX, Val: targetOffset},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(Advertisement), SkipTrue: 3},
		bpf.LoadConstant{Dst: bpf.RegX, Val: sourceOffset},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(Solicitation), SkipTrue: 1},
		drop,
	}
	for _, a := range addresses {
		b := a.As16()
		for word := range uint32(4) {
			p = append(p,
				bpf.LoadIndirect{Off: 4 * word, Size: 4},
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(b[4*word:]), SkipTrue: uint8(2*(3-word) + 1)}, //nolint:gosec // at most 7
			)
		}
		p = append(p, accept)
	}
	return append(p, drop), nil // the kernel also drops a frame too short for a load
}
