package tcpproxy

import (
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls that move data or make the kernel send something. The descriptors
// never block, so these calls return as soon as the kernel has done its work, and
// the scheduler need not hear of them: after 20 µs of an ordinary system call,
// which on a virtual link sending to the other end takes, it would give the
// processor's goroutines to another thread, with the wake-ups that this costs
// (retake in runtime/proc.go).

func rawRead(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func rawWrite(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func rawSplice(from, to int32, most int) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(most), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// rawConnect begins to connect a socket.
func rawConnect(fd int32, to netip.AddrPort) syscall.Errno {
	// In network byte order (ip(7), ipv6(7)).
	port := to.Port()<<8 | to.Port()>>8
	v4 := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port}
	v6 := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: to.Addr().As16()}
	at, size := unsafe.Pointer(&v6), unsafe.Sizeof(v6)
	if to.Addr().Is4() {
		v4.Addr = to.Addr().As4()
		at, size = unsafe.Pointer(&v4), unsafe.Sizeof(v4)
	}
	_, _, errno := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(at), size)
	return errno
}

// rawEnd ends the sending half of a connection.
func rawEnd(fd int32) syscall.Errno {
	_, _, errno := syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return errno
}

// rawClose closes a descriptor, which also takes it from the loop it is in
// (epoll(7), question 6).
func rawClose(fd int32) { _, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// rawReset ends a connection by a reset, since one that was not ended by its
// peers must not look as if it were. That also leaves nothing behind in the state
// TIME_WAIT, which would keep a local port (RFC 9293 section 3.6).
func rawReset(fd int32) {
	_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	rawClose(fd)
}

// rawPoll returns what has happened to the descriptors of an epoll(7), without
// waiting. It is called by a goroutine that waits by other means.
func rawPoll(epoll uintptr, events []unix.EpollEvent) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, epoll, uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// addrPort returns the address of one side of a connection.
func addrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// keepAlive makes the kernel ask a silent peer every 15 s if it is there, and give
// it up after nine times without an answer, as the standard library would.
func keepAlive(fd int) {
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15)
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15)
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9)
}
