package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
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
	keepAlive    time.Duration // of net.Dialer
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

// dial connects to a server.
func (d *dialer) dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	// A port may be one that is listened on, or from which there is a
	// connection to that server.
	const most = 64
	for range min(d.count, most) {
		conn, err := d.dialFrom(ctx, d.first+d.next.Add(1)%d.count, to)
		if !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return conn, err
		}
	}
	return d.dialFrom(ctx, 0, to)
}

// dialFrom connects from a port, or from one that the kernel chooses.
func (d *dialer) dialFrom(ctx context.Context, port uint32, to netip.AddrPort) (*net.TCPConn, error) {
	from := net.Dialer{Control: shareable, KeepAlive: d.keepAlive}
	if port != 0 {
		return from.DialTCP(ctx, "tcp", netip.AddrPortFrom(netip.Addr{}, uint16(port)), to)
	}
	// DialTCP would bind to port 0, which takes a port that has no connection at
	// all; connect(2) finds one that has none to this server.
	conn, err := from.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// shareable lets a socket's port be bound by others that allow it too: for
// connections to other servers, after this one, or to listen (socket(7),
// SO_REUSEADDR).
func shareable(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	})
	return errors.Join(err, failed)
}
