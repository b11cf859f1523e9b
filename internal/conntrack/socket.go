package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
)

// bufferSize is the size of the buffer for events of one kind that wait while this
// process does not run: some 10,000, in bytes by the kernel's accounting.
const bufferSize = 8 << 20

// A socket is a netlink(7) socket in the network namespace of the thread that
// opened it. Libraries lack two things: they stop after lost events, and they
// collect a whole dump before they return it.
//
// Go's poller does not watch the socket, since every event would wake it, even
// while nothing reads.
type socket struct {
	fd       int    // -1: closed
	sequence uint32 // sequence number of the last request
}

// openSocket returns a socket. With groups it receives their events, and reads do
// not block.
func openSocket(groups ...int) (*socket, error) {
	kind := unix.SOCK_RAW | unix.SOCK_CLOEXEC
	if len(groups) > 0 {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(unix.AF_NETLINK, kind, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := &socket{fd: fd}
	if err := s.prepare(groups); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *socket) prepare(groups []int) error {
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if len(groups) == 0 {
		return nil
	}
	// If that is not permitted, net.core.rmem_max is the limit (socket(7)).
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, len(groups)*bufferSize) != nil {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, len(groups)*bufferSize); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

func (s *socket) close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd) // no written data can be lost
	}
	s.fd = -1
}

func (s *socket) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, b)
		if !errors.Is(err, unix.EINTR) {
			return n, os.NewSyscallError("read", err)
		}
	}
}

// ask sends a request, for a dump (NLM_F_DUMP) or with an acknowledgement
// (NLM_F_ACK), and calls fn for each message of the answer. It always reads the
// whole answer: the kernel refuses a request during a dump.
func (s *socket) ask(kind, flags uint16, attributes [][2]uint32, fn func(message)) error {
	s.sequence++
	if err := unix.Sendto(s.fd, request(kind, flags, s.sequence, attributes...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	b := make([]byte, 64<<10) // twice the kernel's largest piece (netlink_dump in net/netlink/af_netlink.c)
	for {
		n, err := s.read(b)
		if err != nil {
			return err
		}
		for m, rest, ok := split(b[:n]); ok; m, rest, ok = split(rest) {
			if m.sequence != s.sequence {
				continue // part of an earlier, failed answer
			}
			if m.kind == unix.NLMSG_DONE || m.kind == unix.NLMSG_ERROR {
				return failure(m)
			}
			fn(m)
		}
	}
}

// failure returns the error at the end of an answer, if any.
func failure(m message) error {
	if len(m.data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(m.data)); n != 0 { //nolint:gosec // the kernel's own int
		return unix.Errno(-n) //nolint:gosec // an error number, negated
	}
	return nil
}

// A KernelError reports that connections cannot be tracked.
type KernelError struct {
	Doing string // what failed
	Err   error
}

func (e *KernelError) Error() string { return fmt.Sprintf("%s: %v", e.Doing, e.Err) }

// Unwrap returns the kernel's error.
func (e *KernelError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *KernelError) Hint(wording.Names) string {
	if errors.Is(e.Err, unix.EPERM) {
		return "connection tracking requires the capability NET_ADMIN"
	}
	return "the kernel lacks nf_conntrack_netlink, or the module is not loaded: modprobe nf_conntrack_netlink on the node"
}
