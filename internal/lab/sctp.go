package lab

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A socket of SCTP in the one-to-one style has the calls of one of TCP (sctp(7); RFC 6458,
// section 4), so that package net takes it for one. Each is bound to one address: an association
// between several (RFC 9260, section 6.4) does not survive a translation.

// streamSCTP opens a socket in the calling thread's namespace. The error is a
// unix.EPROTONOSUPPORT if the kernel has no SCTP.
func streamSCTP(addr netip.AddrPort) (fd int, err error) {
	family := unix.AF_INET6
	if addr.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	return fd, os.NewSyscallError("socket", err)
}

// listenSCTP listens in the calling thread's namespace.
func listenSCTP(addr netip.AddrPort) (net.Listener, error) {
	fd, err := streamSCTP(addr)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "sctp")
	defer func() { _ = file.Close() }() // the listener has a copy
	if err := unix.Bind(fd, sockaddrOf(addr)); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return plainListener{l}, nil
}

// plainListener hides from package io that its connections are those of package net, which
// would splice them.
type plainListener struct{ net.Listener }

func (l plainListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{conn}, nil
}

// dialSCTP opens an association from the calling thread's namespace, until the deadline of ctx.
func dialSCTP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	fd, err := streamSCTP(addr)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "sctp")
	defer func() { _ = file.Close() }() // the connection has a copy
	if err := bindToRoute(fd, addr); err != nil {
		return nil, err
	}
	if err := connectSCTP(ctx, fd, sockaddrOf(addr)); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{conn}, nil
}

// bindToRoute binds a socket to the address with which the kernel sends to another one. Unbound,
// an association would offer all addresses of the namespace.
func bindToRoute(fd int, to netip.AddrPort) error {
	probe, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)) // sends nothing
	if err != nil {
		return err
	}
	defer probe.Close()
	from := probe.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	return os.NewSyscallError("bind", unix.Bind(fd, sockaddrOf(netip.AddrPortFrom(from, 0))))
}

// sockaddrOf returns an address as a socket takes it.
func sockaddrOf(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
}

// connectSCTP waits until the socket is connected.
func connectSCTP(ctx context.Context, fd int, to unix.Sockaddr) error {
	err := unix.Connect(fd, to)
	if !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	for ctx.Err() == nil {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		const moment = 10 * time.Millisecond // after which ctx may have ended
		if n, err := unix.Poll(poll, int(moment.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		} else if n <= 0 {
			continue
		}
		errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && errno != 0 {
			err = unix.Errno(errno)
		}
		return os.NewSyscallError("connect", err)
	}
	return os.ErrDeadlineExceeded
}
