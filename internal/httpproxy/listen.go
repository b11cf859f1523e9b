package httpproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

// A listener accepts connections whose requests are checked for their framing, at most
// as many at a time as shares has places. Some more wait accepted, so that each client
// gets its share, and the rest in the kernel's queue (listen(2)).
type listener struct {
	*net.TCPListener
	*shares
	since  time.Time
	failed chan error // of accept(2)
	closed chan struct{}
	once   sync.Once
}

func newListener(l *net.TCPListener, most int, full func() bool) *listener {
	n := &listener{TCPListener: l, shares: newShares(most, full), since: time.Now(), failed: make(chan error), closed: make(chan struct{})}
	go n.accept()
	return n
}

func (l *listener) accept() {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			select {
			case l.failed <- err: // net/http decides whether to go on
				continue
			case <-l.closed:
				return
			}
		}
		c := &clientConn{TCPConn: conn, from: remoteIP(conn), shares: l.shares}
		for !l.add(c) {
			select {
			case <-l.freed:
			case <-l.closed:
				_ = conn.Close()
				return
			}
		}
	}
}

// listen listens on an address, or on all if it is the zero Addr. Multipath TCP, which
// Go would offer, is disabled: there is one path to a pod, and splice(2) supports
// plain TCP only.
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

// Hint returns what to do.
func (e *listenError) Hint(names wording.Names) string {
	hint := "the pod may not have this address: set %s to the port alone, such as :8080"
	switch {
	case errors.Is(e.err, os.ErrPermission):
		hint = "ports below 1024 need the capability NET_BIND_SERVICE: set another port in %s"
	case errors.Is(e.err, syscall.EADDRINUSE):
		hint = "another container of the pod listens on this port: set another port in %s"
	}
	return wording.Textf(hint, wording.HTTPProxyListen).In(names)
}

// Accept waits for a client with a place.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case err := <-l.failed:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close also ends the connections that wait.
func (l *listener) Close() error {
	err := l.TCPListener.Close()
	l.once.Do(func() {
		close(l.closed)
		l.close()
	})
	return err
}

// A clientConn is the connection of a client. A tunnel uses its TCPConn, which io.Copy
// can splice.
type clientConn struct {
	*net.TCPConn
	proxy   context.Context // ends with the proxy
	framing framing
	fault   error
	// statusLine is the end of the next response's first line, with its own reason
	// phrase, in place of that of net/http; empty: it stays.
	statusLine string
	headers    atomic.Int64 // of requests, read completely
	ended      atomic.Int64 // requests
	logins     logins
	idle       idleWatch
	rest       atomic.Pointer[time.Time] // limit of reading the rest of a body; nil: none
	from       netip.Addr
	shares     *shares
	state      atomic.Int32 // see shares
	once       sync.Once
}

// Read reads from the client and checks the framing. A fault makes net/http respond
// with status 400 and close the connection, but not before the requests in front have
// had their responses: net/http also reads during a request, to notice its client's
// end, which an error would be.
func (c *clientConn) Read(p []byte) (int, error) {
	if c.logins.over() {
		return 0, io.EOF
	}
	if c.state.CompareAndSwap(finishing, resting) && c.shares.waits.Load() {
		c.shares.rests()
	}
	for {
		if c.fault != nil && c.ended.Load() >= c.framing.begun-1 {
			return 0, c.fault
		}
		n, err := c.TCPConn.Read(p)
		if n > 0 {
			c.logins.between.Store(false)
		}
		if c.fault != nil {
			n = 0 // nothing behind a fault is valid
		} else {
			n, c.fault = c.framing.scan(p[:n])
			c.headers.Store(c.framing.headers())
		}
		if n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
	}
}

// limitRest limits how long net/http may read the rest of a body. No request follows.
func (c *clientConn) limitRest(limit time.Duration) {
	end := time.Now().Add(limit)
	c.rest.Store(&end)
	_ = c.TCPConn.SetReadDeadline(end)
}

// SetReadDeadline keeps the limit for the rest of a body where net/http would remove it:
// after it has stopped a Read that still runs, and before it reads the rest.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	if end := c.rest.Load(); end != nil && t.IsZero() {
		t = *end
	}
	return c.TCPConn.SetReadDeadline(t)
}

// badRequest is the response of net/http to an invalid request, without a reason.
const badRequest = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request"

// Write writes to the client. It adds the reason if a request was refused for its
// framing, and sets the reason phrase of a server.
func (c *clientConn) Write(p []byte) (int, error) {
	if string(p) == badRequest && c.fault != nil {
		if _, err := fmt.Fprintf(c.TCPConn, "%s: %s\n", p, c.fault); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	if own := c.statusLine; own != "" {
		c.statusLine = ""
		// net/http writes a header at the start of its buffer.
		if line, rest, ok := bytes.Cut(p, []byte("\r\n")); ok && len(line) > len("HTTP/1.1 ") {
			if _, err := c.TCPConn.Write(slices.Concat(line[:len("HTTP/1.1 ")], []byte(own), rest)); err != nil {
				return 0, err
			}
			return len(p), nil
		}
	}
	return c.TCPConn.Write(p)
}

// Close closes the client's server connections too, and releases the place.
func (c *clientConn) Close() error {
	err := c.TCPConn.Close()
	c.once.Do(func() {
		c.idle.close()
		c.logins.close()
		c.shares.end(c)
	})
	return err
}
