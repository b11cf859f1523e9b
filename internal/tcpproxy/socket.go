package tcpproxy

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of a connection bypass the scheduler, since the descriptors never
// block. An ordinary system call wakes up the thread that monitors long ones
// (entersyscall in runtime/proc.go), which after 20 µs, the duration of a send over a
// virtual link, hands the processor's goroutines to another thread.

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

// rawAccept returns the next connection of a listener and its remote address.
func rawAccept(listener uintptr) (int32, netip.AddrPort, syscall.Errno) {
	for {
		var from unix.RawSockaddrInet6 // the larger one
		size := uint32(unsafe.Sizeof(from))
		fd, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, listener, uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch errno {
		case 0:
			return int32(fd), addrPort(&from), 0
		case unix.EINTR, unix.ECONNABORTED: // the client has reset it
		default:
			return 0, netip.AddrPort{}, errno
		}
	}
}

// localAddr returns the local address of a connection.
func localAddr(fd int32) netip.AddrPort {
	var at unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(at))
	_, _, _ = syscall.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&at)), uintptr(unsafe.Pointer(&size)))
	return addrPort(&at)
}

// rawAddr returns the kernel's form of an address of either family, with the port in
// network byte order (ip(7), ipv6(7)).
func rawAddr(a netip.AddrPort) (raw unix.RawSockaddrInet6, size uintptr) {
	port := networkOrder(a.Port())
	if a.Addr().Is4() {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&raw))
		*v4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: a.Addr().As4()}
		return raw, unsafe.Sizeof(*v4)
	}
	raw = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: a.Addr().As16()}
	return raw, unsafe.Sizeof(raw)
}

func addrPort(raw *unix.RawSockaddrInet6) netip.AddrPort {
	if raw.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(raw))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), networkOrder(v4.Port))
	}
	return netip.AddrPortFrom(netip.AddrFrom16(raw.Addr).Unmap(), networkOrder(raw.Port))
}

func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

func rawSocket(family int) (int32, syscall.Errno) {
	fd, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return int32(fd), errno
}

func rawBind(fd int32, at netip.AddrPort) syscall.Errno {
	raw, size := rawAddr(at)
	_, _, errno := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&raw)), size)
	return errno
}

// rawConnect begins to connect a socket.
func rawConnect(fd int32, to netip.AddrPort) syscall.Errno {
	raw, size := rawAddr(to)
	_, _, errno := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&raw)), size)
	return errno
}

// rawOption sets a numeric option of a socket. Errors are ignored, since no option is
// essential.
func rawOption(fd int32, level, option uintptr, value int32) {
	_, _, _ = syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), level, option, uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
}

// rawEnd ends the sending half of a connection.
func rawEnd(fd int32) syscall.Errno {
	_, _, errno := syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return errno
}

// rawClose closes a descriptor, which also removes it from its epoll (epoll(7),
// question 6).
func rawClose(fd int32) { _, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// rawReset resets a connection, so that its peer does not take the end for that of a
// complete stream. A reset also leaves no TIME_WAIT, which would occupy a local port
// (RFC 9293 section 3.6).
func rawReset(fd int32) {
	_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	rawClose(fd)
}

// rawPoll returns the events of an epoll(7) without waiting; the runtime's poller
// waits.
func rawPoll(epoll int32, events []unix.EpollEvent) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// rawControl adds a descriptor to an epoll, or changes its events.
func rawControl(epoll int32, how int, fd int32, event *unix.EpollEvent) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(how), uintptr(fd), uintptr(unsafe.Pointer(event)), 0, 0)
	return errno
}

// keepAlive enables keepalive probes every 15 s, and ends the connection after nine
// unanswered ones, as the standard library does.
func keepAlive(fd int32) {
	rawOption(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	rawOption(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15)
	rawOption(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15)
	rawOption(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9)
}
