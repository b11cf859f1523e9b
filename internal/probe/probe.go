// Package probe sends few packets from the reserved address to a server, and returns what
// came back, and from whom. Every socket is bound to the egress interface and to the
// reserved address: without either of them nothing is sent, and nothing leaves by another
// path. The sockets are those of the calling thread's network namespace.
package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A From is where a probe leaves.
type From struct {
	Interface string
	Source    netip.Addr
}

// A socket is a socket of a probe, whose reads and writes have deadlines.
type socket struct {
	file *os.File
	raw  syscall.RawConn
	ipv6 bool
}

// open returns a socket that is bound to the interface and the source of f.
func (f From) open(kind, protocol int) (*socket, error) {
	family := unix.AF_INET
	if f.Source.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := &socket{file: os.NewFile(uintptr(fd), "probe"), ipv6: f.Source.Is6()} // uses the runtime's poller
	if err := f.bind(fd); err != nil {
		s.close()
		return nil, err
	}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (f From) bind(fd int) error {
	// Needs no privilege for a socket that is bound to no interface yet (since Linux 5.7).
	if err := unix.BindToDevice(fd, f.Interface); err != nil {
		return fmt.Errorf("bind to %s: %w", f.Interface, err)
	}
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if f.Source.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(f.Source, 0))); err != nil {
		return fmt.Errorf("bind to %s: %w", f.Source, err)
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func (s *socket) close() { _ = s.file.Close() } // nothing that was written can be lost

// control calls fn with the descriptor.
func (s *socket) control(fn func(fd int) error) (err error) {
	if closed := s.raw.Control(func(fd uintptr) { err = fn(int(fd)) }); closed != nil {
		return closed
	}
	return err
}

// local returns the address of the socket.
func (s *socket) local() (local netip.AddrPort) {
	_ = s.control(func(fd int) error { // without it, the probe has no port
		own, err := unix.Getsockname(fd)
		switch a := own.(type) {
		case *unix.SockaddrInet4:
			local = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)) //nolint:gosec // a port
		case *unix.SockaddrInet6:
			local = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)) //nolint:gosec // a port
		}
		return err
	})
	return local
}

// read waits for data until the given time, and tries once more then: the runtime does not
// try at all after the deadline.
func (s *socket) read(b []byte, until time.Time) (n int, err error) {
	if err := s.file.SetReadDeadline(until); err != nil {
		return 0, err
	}
	take := func(fd int) error {
		n, _, err = unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
		return err
	}
	waited := s.raw.Read(func(fd uintptr) bool {
		err = take(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if waited != nil {
		if err = s.control(take); errors.Is(err, unix.EAGAIN) {
			err = waited
		}
	}
	return n, err
}

// An ICMPError is an error that a host sent about a probe.
type ICMPError struct {
	Errno unix.Errno
	By    netip.Addr // the zero Addr: the pod's own kernel
	MTU   int        // in bytes, of an error about the size; otherwise 0
}

// The offsets in struct sock_extended_err (linux/errqueue.h), which the address of the
// sender follows.
const (
	errnoOffset  = 0
	originOffset = 4
	infoOffset   = 8
	senderOffset = 16

	originICMP  = 2 // SO_EE_ORIGIN_ICMP
	originICMP6 = 3 // SO_EE_ORIGIN_ICMP6
)

// failure returns the next error of the socket's queue (ip(7), IP_RECVERR), and false if
// there is none.
func (s *socket) failure() (found ICMPError, ok bool) {
	_ = s.control(func(fd int) error { // no error is none
		var data, control [512]byte
		_, n, _, _, err := unix.Recvmsg(fd, data[:], control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(control[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			if len(m.Data) < senderOffset+8 || m.Header.Type != unix.IP_RECVERR && m.Header.Type != unix.IPV6_RECVERR {
				continue
			}
			ok = true
			found.Errno = unix.Errno(binary.NativeEndian.Uint32(m.Data[errnoOffset:]))
			if errors.Is(found.Errno, unix.EMSGSIZE) {
				found.MTU = int(binary.NativeEndian.Uint32(m.Data[infoOffset:]))
			}
			switch sender := m.Data[senderOffset:]; m.Data[originOffset] {
			case originICMP:
				found.By = netip.AddrFrom4([4]byte(sender[4:8])) // struct sockaddr_in
			case originICMP6:
				if len(sender) >= 24 {
					found.By = netip.AddrFrom16([16]byte(sender[8:24])) // struct sockaddr_in6
				}
			}
		}
		return nil
	})
	return found, ok
}
