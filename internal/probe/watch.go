package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A Watch records which hosts send IP packets to the reserved address, by one interface.
type Watch struct {
	file  *os.File
	raw   syscall.RawConn
	ended chan struct{}

	mu     sync.Mutex
	seen   map[netip.Addr]bool
	resets map[netip.AddrPort]int
}

// Listen begins to record packets to an address that arrive by an interface, in the network
// namespace of the calling thread. It needs CAP_NET_RAW.
func Listen(index int, to netip.Addr) (*Watch, error) {
	filter, err := bpf.Assemble(program(to))
	if err != nil {
		return nil, fmt.Errorf("assemble filter: %w", err)
	}
	sock := make([]unix.SockFilter, len(filter))
	for i, r := range filter {
		sock[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	// With protocol 0 it receives nothing before it has the filter (packet(7)).
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	w := &Watch{file: os.NewFile(uintptr(fd), "packet"), ended: make(chan struct{}), seen: make(map[netip.Addr]bool), resets: make(map[netip.AddrPort]int)}
	protocol := uint16(unix.ETH_P_IP)
	if to.Is6() {
		protocol = unix.ETH_P_IPV6
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(sock)), Filter: &sock[0]}) //nolint:gosec // a few
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: index})
	}
	if err == nil {
		w.raw, err = w.file.SyscallConn()
	}
	if err != nil {
		_ = w.file.Close()
		return nil, fmt.Errorf("watch interface: %w", err)
	}
	go w.run()
	return w, nil
}

// program returns the filter for packets to an address that others have sent. Its offsets
// are in the IP header (RFC 791, RFC 8200).
func program(to netip.Addr) []bpf.Instruction {
	offset, words := uint32(16), to.AsSlice()
	if to.Is6() {
		offset = 24
	}
	p := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: unix.PACKET_OUTGOING, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
	for i := 0; i < len(words); i += 4 {
		p = append(p,
			bpf.LoadAbsolute{Off: offset + uint32(i), Size: 4}, //nolint:gosec // below 16
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(words[i:]), SkipTrue: 1},
			bpf.RetConstant{Val: 0},
		)
	}
	return append(p, bpf.RetConstant{Val: largestHeader})
}

// largestHeader is the length of the longest IPv4 header and of one of TCP, in bytes.
const largestHeader = 80

func (w *Watch) run() {
	defer close(w.ended)
	var b [largestHeader]byte
	for {
		var n int
		var err error
		waited := w.raw.Read(func(fd uintptr) bool {
			n, _, err = unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
			return !errors.Is(err, unix.EAGAIN)
		})
		if waited != nil {
			return
		}
		if err == nil {
			w.take(b[:n])
		}
	}
}

// take records a packet.
func (w *Watch) take(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case len(b) >= 40 && b[0]>>4 == 6:
		w.seen[netip.AddrFrom16([16]byte(b[8:24]))] = true
	case len(b) >= 20 && b[0]>>4 == 4:
		from, header := netip.AddrFrom4([4]byte(b[12:16])), int(b[0]&15)*4
		w.seen[from] = true
		if b[9] == unix.IPPROTO_TCP && len(b) >= header+14 && b[header+13]&4 != 0 {
			w.resets[netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[header:]))] = int(b[8])
		}
	}
}

// Close ends the Watch, after it has recorded what has arrived.
func (w *Watch) Close() {
	_ = w.file.SetReadDeadline(time.Unix(1, 0))
	<-w.ended
	_ = w.raw.Control(func(fd uintptr) {
		for {
			var b [largestHeader]byte
			n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			w.take(b[:n])
		}
	})
	_ = w.file.Close() // nothing was written
}

// Seen reports whether a host has sent a packet.
func (w *Watch) Seen(from netip.Addr) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen[from]
}

// ResetTTL returns the TTL of a TCP reset from a server; 0: there was none.
func (w *Watch) ResetTTL(from netip.AddrPort) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.resets[from]
}
