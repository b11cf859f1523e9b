package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A listener hands out connections whose requests are checked for their framing,
// and no more of them at a time than it has slots: further clients wait in the
// kernel's queue (listen(2)).
type listener struct {
	*net.TCPListener
	since  time.Time
	slots  chan struct{} // one is taken while a client is waited for
	open   atomic.Int64  // connections
	closed chan struct{}
	once   sync.Once
}

func newListener(l *net.TCPListener, most int) *listener {
	return &listener{TCPListener: l, since: time.Now(), slots: make(chan struct{}, most), closed: make(chan struct{})}
}

// listen listens at an address, at all of them if it is the zero Addr. Multipath
// TCP, which Go would offer, is left out: there is one path to a pod, and
// splice(2) knows TCP only.
func listen(ctx context.Context, at netip.AddrPort) (*net.TCPListener, error) {
	address := fmt.Sprintf(":%d", at.Port())
	if at.Addr().IsValid() {
		address = at.String()
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, &listenError{err}
	}
	return l.(*net.TCPListener), nil
}

type listenError struct{ err error }

func (e *listenError) Error() string { return fmt.Sprintf("listening for clients: %v", e.err) }
func (e *listenError) Unwrap() error { return e.err }

// Hint says what to do. A pod starts one proxy, which needs no privilege.
func (e *listenError) Hint() string {
	switch {
	case errors.Is(e.err, os.ErrPermission):
		return "ports below 1024 need the capability NET_BIND_SERVICE: set another port in EGRESS_HTTP_PROXY_LISTEN"
	case errors.Is(e.err, syscall.EADDRINUSE):
		return "another container of the pod listens on this port: set another port in EGRESS_HTTP_PROXY_LISTEN"
	}
	return ""
}

// Accept waits for a slot, and then for a client.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		<-l.slots
		return nil, err
	}
	l.open.Add(1)
	return &clientConn{TCPConn: conn, release: func() { l.open.Add(-1); <-l.slots }}, nil
}

// Close ends an Accept that waits for a slot, too.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

// A clientConn is the connection of a client. A tunnel takes the TCPConn out of
// it, which io.Copy can splice.
type clientConn struct {
	*net.TCPConn
	proxy   context.Context // ends with the proxy
	framing framing
	fault   error
	release func()
	once    sync.Once
}

// Read reads what net/http is to see. An error that is none of the connection
// makes net/http answer 400 and close it.
func (c *clientConn) Read(p []byte) (int, error) {
	if c.fault != nil {
		return 0, c.fault
	}
	n, err := c.TCPConn.Read(p)
	good, fault := c.framing.scan(p[:n])
	if fault != nil {
		c.fault = fault
		return good, fault
	}
	return n, err
}

// What net/http says to a request that it cannot read, and does not say why.
const badRequest = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request"

// Write writes to the client, with the reason where a request is refused for its
// framing.
func (c *clientConn) Write(p []byte) (int, error) {
	if c.fault != nil && string(p) == badRequest {
		if _, err := fmt.Fprintf(c.TCPConn, "%s: %s\n", p, c.fault); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return c.TCPConn.Write(p)
}

// Close gives the slot back.
func (c *clientConn) Close() error {
	c.once.Do(c.release)
	return c.TCPConn.Close()
}
