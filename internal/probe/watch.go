package probe

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/packet"
)

// A Watch collects IP packets to the reserved address that arrive by one interface. The
// kernel keeps some hundred until Close reads them.
type Watch struct {
	conn   *packet.Conn
	seen   map[netip.Addr]bool
	resets map[netip.AddrPort]int
}

// The offsets in a frame (RFC 894; RFC 791, section 3.1; RFC 8200, section 3; RFC 9293,
// section 3.1).
const (
	ether        = 14
	protocol4    = ether + 9
	destination4 = ether + 16
	protocol6    = ether + 6
	destination6 = ether + 24
	header6      = ether + 40
	tcpFlags     = 13 // in the header of TCP

	rst = 1 << 2
)

// Watched is what a Watch collects.
type Watched uint8

// What a Watch collects.
const (
	Everything Watched = iota
	Resets             // of TCP
)

// Listen begins to collect packets to an address that arrive by an interface, in the network
// namespace of the calling thread. It needs CAP_NET_RAW.
func Listen(index int, to netip.Addr, what Watched) (*Watch, error) {
	etherType := uint16(unix.ETH_P_IP)
	if to.Is6() {
		etherType = unix.ETH_P_IPV6
	}
	conn, err := packet.Listen(index, etherType, program(to, what))
	if err != nil {
		return nil, err
	}
	return &Watch{conn: conn, seen: make(map[netip.Addr]bool), resets: make(map[netip.AddrPort]int)}, nil
}

// program returns the filter for packets to an address, which others have sent.
func program(to netip.Addr, what Watched) []bpf.Instruction {
	drop := bpf.RetConstant{Val: 0}
	unless := func(load bpf.Instruction, test bpf.JumpTest, value uint32) []bpf.Instruction {
		return []bpf.Instruction{load, bpf.JumpIf{Cond: test, Val: value, SkipTrue: 1}, drop}
	}
	p := unless(bpf.LoadExtension{Num: bpf.ExtType}, bpf.JumpLessOrEqual, unix.PACKET_MULTICAST)
	at, protocol := uint32(destination4), uint32(protocol4)
	if to.Is6() {
		at, protocol = destination6, protocol6
	}
	for words := to.AsSlice(); len(words) > 0; words = words[4:] {
		p = append(p, unless(bpf.LoadAbsolute{Off: at, Size: 4}, bpf.JumpEqual, binary.BigEndian.Uint32(words))...)
		at += 4
	}
	if what == Resets {
		p = append(p, unless(bpf.LoadAbsolute{Off: protocol, Size: 1}, bpf.JumpEqual, unix.IPPROTO_TCP)...)
		if to.Is6() {
			p = append(p, unless(bpf.LoadAbsolute{Off: header6 + tcpFlags, Size: 1}, bpf.JumpBitsSet, rst)...)
		} else {
			p = append(p, bpf.LoadMemShift{Off: ether}) // the length of the IP header
			p = append(p, unless(bpf.LoadIndirect{Off: ether + tcpFlags, Size: 1}, bpf.JumpBitsSet, rst)...)
		}
	}
	return append(p, bpf.RetConstant{Val: ether + 80}) // the headers
}

// Close ends the Watch, and reads what it has collected.
func (w *Watch) Close() {
	defer w.conn.Close()
	for {
		frame, err := w.conn.Receive(time.Unix(1, 0))
		if err != nil {
			return
		}
		w.take(frame)
	}
}

// take records a frame.
func (w *Watch) take(b []byte) {
	switch {
	case len(b) >= header6 && b[ether]>>4 == 6:
		w.seen[netip.AddrFrom16([16]byte(b[ether+8:destination6]))] = true
	case len(b) >= ether+20 && b[ether]>>4 == 4:
		from, tcp := netip.AddrFrom4([4]byte(b[ether+12:destination4])), ether+int(b[ether]&15)*4
		w.seen[from] = true
		if b[protocol4] == unix.IPPROTO_TCP && len(b) > tcp+tcpFlags && b[tcp+tcpFlags]&rst != 0 {
			w.resets[netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[tcp:]))] = int(b[ether+8])
		}
	}
}

// Seen reports, after Close, whether a host has sent a packet.
func (w *Watch) Seen(from netip.Addr) bool { return w.seen[from] }

// ResetTTL returns, after Close, the TTL of a TCP reset from a server; 0: there was none.
func (w *Watch) ResetTTL(from netip.AddrPort) int { return w.resets[from] }
