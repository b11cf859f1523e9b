package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

// A listener accepts connections, at most as many at a time as shares has places. Some more wait accepted, so that each client
// gets its share, and the rest in the kernel's queue (listen(2)).
type listener struct {
	*net.TCPListener
	*shares
	proxy  *Proxy
	since  time.Time
	failed chan error // of accept(2)
	closed chan struct{}
	once   sync.Once
}

func newListener(l *net.TCPListener, p *Proxy) *listener {
	full := func() bool { return p.used() >= p.connections-1 }
	n := &listener{TCPListener: l, proxy: p, shares: newShares(p.config.MaxConnections, full), since: time.Now(), failed: make(chan error), closed: make(chan struct{})}
	go n.accept()
	return n
}

func (l *listener) accept() {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			select {
			case l.failed <- err: // Serve decides whether to go on
				continue
			case <-l.closed:
				return
			}
		}
		c, err := newClientConn(l.proxy, conn, l.shares)
		if err != nil { // it was closed
			continue
		}
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
func (l *listener) Accept() (*clientConn, error) {
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
