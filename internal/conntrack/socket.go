package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// bufferSize is for events that wait while this process does not run: the events
// of some 10,000 connections, in bytes as the kernel accounts for them.
const bufferSize = 8 << 20

// A socket is one of netlink(7), in the network namespace of the thread that
// made it. It is read here and not by a library since two things matter that
// libraries leave out: that listening goes on after events were lost, and that
// a listing is taken in message by message, however long it is.
//
// Nor does Go's poller watch it, which every event would wake, also while nobody
// wants to read.
type socket struct {
	fd       int    // -1: closed
	sequence uint32 // of the last request
}

// openSocket returns a socket that receives the events of the given groups, and
// does not wait for them.
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
	// Where this is not allowed, net.core.rmem_max is the limit (socket(7)).
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bufferSize) != nil {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bufferSize); err != nil {
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
		_ = unix.Close(s.fd) // nothing was written that could be lost
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

// ask sends a request, for a listing (NLM_F_DUMP) or with an acknowledgement
// (NLM_F_ACK), and calls fn for each message of the answer. It always takes the
// whole answer in: the kernel refuses a request while a listing is under way.
func (s *socket) ask(kind, flags uint16, attributes [][2]uint32, fn func(message)) error {
	s.sequence++
	if err := unix.Sendto(s.fd, request(kind, flags, s.sequence, attributes...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	b := make([]byte, 64<<10) // twice what the kernel sends at a time (netlink_dump in net/netlink/af_netlink.c)
	for {
		n, err := s.read(b)
		if err != nil {
			return err
		}
		for m, rest, ok := split(b[:n]); ok; m, rest, ok = split(rest) {
			if m.sequence != s.sequence {
				continue // of an answer that failed
			}
			if m.kind == unix.NLMSG_DONE || m.kind == unix.NLMSG_ERROR {
				return failure(m)
			}
			fn(m)
		}
	}
}

// failure returns the error that ends an answer, if any.
func failure(m message) error {
	if len(m.data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(m.data)); n != 0 { //nolint:gosec // the kernel's own int
		return unix.Errno(-n) //nolint:gosec // an error number, negated
	}
	return nil
}

// A KernelError says that connections cannot be watched here.
type KernelError struct {
	Doing string // what failed
	Err   error
}

func (e *KernelError) Error() string { return fmt.Sprintf("%s: %v", e.Doing, e.Err) }

// Unwrap returns what the kernel said.
func (e *KernelError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *KernelError) Hint() string {
	if errors.Is(e.Err, unix.EPERM) {
		return "connection tracking requires the capability NET_ADMIN"
	}
	return "the kernel lacks nf_conntrack_netlink, or the module is not loaded: modprobe nf_conntrack_netlink on the node"
}
