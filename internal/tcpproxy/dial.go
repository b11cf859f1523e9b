package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/sysctl"
)

// A dialer connects to servers, from ports that it chooses itself.
//
// If a client ends its connection first, so does the proxy with that to the server,
// and the proxy's port stays in TIME_WAIT for a minute (RFC 9293 section 3.6). The
// kernel needs ever longer to find a free port for the next connection, and after some
// 28,000 connections to one server there is none, unless net.ipv4.tcp_tw_reuse is 1,
// which requires privilege. But the kernel reuses a port in TIME_WAIT if it is bound
// before the connection is made; timestamps distinguish the two connections (RFC 6191;
// tcp_twsk_unique in net/ipv4/tcp_ipv4.c, __inet_hash_connect in
// net/ipv4/inet_hashtables.c).
type dialer struct {
	first, count uint32        // the ports; count 0: the kernel chooses
	next         atomic.Uint32 // ports take turns, so that each rests as long as possible
	keepAlive    bool          // send keepalive probes to servers
}

// portRange is the sysctl with the range of local ports (ip(7)).
const portRange = "net.ipv4.ip_local_port_range"

func newDialer() *dialer {
	var d dialer
	text, err := sysctl.Read(portRange)
	if err != nil {
		return &d // without /proc the kernel chooses the ports
	}
	var first, last uint32
	if n, _ := fmt.Sscan(text, &first, &last); n == 2 && first <= last {
		d.first, d.count = first, last-first+1
		d.next.Store(rand.Uint32()) // not the ports of a previous process (RFC 6056)
	}
	return &d
}

// dial begins to connect to a server and returns the socket, which is connected once
// it is writable.
func (d *dialer) dial(to netip.AddrPort) (int32, error) {
	// A port may have a listener, or a connection to that server.
	const most = 64
	for range min(d.count, most) {
		fd, err := d.dialFrom(uint16(d.first+d.next.Add(1)%d.count), to)
		if !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return fd, err
		}
	}
	return d.dialFrom(0, to)
}

// dialFrom begins to connect from a port. For port 0 the kernel chooses one: connect(2)
// finds a port without a connection to this server, while a bind to port 0 would
// require one without any connection.
func (d *dialer) dialFrom(port uint16, to netip.AddrPort) (int32, error) {
	family, everywhere := unix.AF_INET6, netip.IPv6Unspecified()
	if to.Addr().Is4() {
		family, everywhere = unix.AF_INET, netip.IPv4Unspecified()
	}
	fd, errno := rawSocket(family)
	if errno != 0 {
		return 0, os.NewSyscallError("socket", errno)
	}
	what := "bind"
	if port != 0 {
		// Other sockets with this option may share the port: for connections to
		// other servers, for later ones, or to listen (socket(7)).
		rawOption(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		errno = rawBind(fd, netip.AddrPortFrom(everywhere, port))
	}
	if errno == 0 {
		if d.keepAlive {
			keepAlive(fd)
		}
		what, errno = "connect", rawConnect(fd, to)
	}
	if errno != 0 && errno != unix.EINPROGRESS {
		rawClose(fd)
		return 0, os.NewSyscallError(what, errno)
	}
	return fd, nil
}

// reach connects to a server, sends data and resets the connection, so that no port
// stays in TIME_WAIT.
func (d *dialer) reach(ctx context.Context, to netip.AddrPort, data []byte) error {
	fd, err := d.dial(to)
	if err != nil {
		return err
	}
	conn := os.NewFile(uintptr(fd), "") // in the runtime's poller, since it does not block
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Write(func(uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = syscall.Errno(code)
		}
		if _, none := unix.Getpeername(int(fd)); err == nil && none != nil {
			return false
		}
		failed = os.NewSyscallError("connect", err)
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_, err = conn.Write(data)
	return err
}
