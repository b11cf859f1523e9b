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
)

// A dialer connects to servers, from ports that it chooses itself.
//
// A client that ends its connection first makes the proxy do the same with the
// server, and the proxy's port then waits for a minute (TIME_WAIT, RFC 9293
// section 3.6). A connection from whatever port the kernel has left takes ever
// longer to find one, and after some 28,000 to one server there is none, unless
// net.ipv4.tcp_tw_reuse is 1, which takes privilege to set. But a port that is
// bound before the connection is made the kernel lets be used again all the
// same; timestamps keep the two connections apart (RFC 6191; tcp_twsk_unique in
// net/ipv4/tcp_ipv4.c, __inet_hash_connect in net/ipv4/inet_hashtables.c).
type dialer struct {
	first, count uint32        // the ports; count 0: the kernel chooses
	next         atomic.Uint32 // each in turn, so that one waits for as long as can be
	keepAlive    bool          // ask servers if they are still there
}

// portRange is the file of the ports to connect from (ip(7)).
const portRange = "/proc/sys/net/ipv4/ip_local_port_range"

func newDialer() *dialer {
	var d dialer
	text, err := os.ReadFile(portRange)
	if err != nil {
		return &d // no /proc: the kernel's choice is as good as it was
	}
	var first, last uint32
	if n, _ := fmt.Sscan(string(text), &first, &last); n == 2 && first <= last {
		d.first, d.count = first, last-first+1
		d.next.Store(rand.Uint32()) // where one before this may not have been just now (RFC 6056)
	}
	return &d
}

// dial begins to connect to a server and returns the socket, which is connected
// once it can be written to.
func (d *dialer) dial(to netip.AddrPort) (int32, error) {
	// A port may be one that is listened on, or from which there is a
	// connection to that server.
	const most = 64
	for range min(d.count, most) {
		fd, err := d.dialFrom(uint16(d.first+d.next.Add(1)%d.count), to)
		if !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return fd, err
		}
	}
	return d.dialFrom(0, to)
}

// dialFrom begins to connect from a port, or from one that the kernel chooses: not
// by binding to port 0, which takes one that has no connection at all, where
// connect(2) finds one that has none to this server.
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
		// Others may have the port too if they allow it: for connections to other
		// servers, after this one, or to listen (socket(7)).
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

// reach connects to a server, says something and ends the connection by a reset,
// so that no port is kept (TIME_WAIT).
func (d *dialer) reach(ctx context.Context, to netip.AddrPort, say []byte) error {
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
	_, err = conn.Write(say)
	return err
}
