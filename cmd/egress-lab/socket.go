package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
)

// The sockets of package net add a poller and a scheduler to every call, which cost more
// than the rules that are measured. The sockets of this file block their threads.

// The timeouts of a server's socket. The first one only ends a measurement that hangs; the
// second one ends each measurement of datagrams.
const (
	quiet    = time.Minute
	quietUDP = 50 * time.Millisecond
	buffer   = 8 << 20 // bytes of datagrams that wait for the server
	backlog  = 128     // connections that wait for the server, more than clients exist
	lasting  = 20000   // port of a client that sends datagrams
)

// listen creates a server's socket in ns.
func listen(ns *netns.Namespace, kind int, at netip.AddrPort) (socket int, err error) {
	err = ns.Do(func() (err error) {
		socket, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("making a socket: %w", err)
	}
	patience := quiet
	if kind == unix.SOCK_DGRAM {
		patience = quietUDP
	}
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	err = unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	if err == nil && kind == unix.SOCK_DGRAM {
		err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer)
		if errors.Is(err, unix.EPERM) { // only root of the machine may go beyond net.core.rmem_max
			err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
		}
	}
	if err == nil {
		err = unix.Bind(socket, address(at))
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(socket, backlog)
	}
	if err != nil {
		_ = unix.Close(socket)
		return -1, fmt.Errorf("listening at %q: %w", at, err)
	}
	return socket, nil
}

// dial creates a client's socket in the namespace of the thread. Datagrams all have the same source
// port, and so one connection in the kernel's table.
func dial(kind int, to netip.AddrPort) (socket int, err error) {
	socket, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("making a socket: %w", err)
	}
	if kind == unix.SOCK_DGRAM {
		if err := unix.Bind(socket, &unix.SockaddrInet4{Port: lasting}); err != nil {
			_ = unix.Close(socket)
			return -1, fmt.Errorf("binding: %w", err)
		}
	}
	// After a signal to the thread the kernel restarts the call.
	if err := unix.Connect(socket, address(to)); err != nil {
		_ = unix.Close(socket)
		return -1, fmt.Errorf("connecting: %w", err)
	}
	return socket, nil
}

func address(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// Signals, such as those of the Go scheduler, interrupt the calls below, and the kernel does
// not restart them if the socket has a timeout (signal(7)).

func accept(listener int) (int, error) {
	return interrupted(func() (int, error) {
		socket, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		return socket, err
	})
}

func read(socket int, buf []byte) (int, error) {
	return interrupted(func() (int, error) { return unix.Read(socket, buf) })
}

func write(socket int, buf []byte) (int, error) {
	return interrupted(func() (int, error) { return unix.Write(socket, buf) })
}

// interrupted repeats a call while it is interrupted.
func interrupted(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
