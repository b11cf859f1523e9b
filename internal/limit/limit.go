// Package limit limits the connections of a server, so that clients that do nothing do
// not keep others out.
//
// The HTTP proxy has a listener of its own. It limits open files instead of connections,
// lets a new client wait until one of its connections rests, and never closes one with a part
// of a request, whose client would lose work. Here the answers are short and asked for again,
// and a new connection must not wait: a kubelet restarts a pod whose probe fails. A common
// listener would contain both policies, and share no more than the count of each client.
package limit

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// stalled is the time without progress after which a client counts as one that does
	// not read its answer.
	stalled = time.Second
	// progress is the number of bytes after which a write of an answer counts as having
	// made progress.
	progress = 16 << 10
)

// A Listener has at most as many open connections as it has slots. If all are taken, a
// new connection takes the slot of another that does nothing, which is closed. In this
// order:
//
//   - one of a client that has more than its share,
//   - an answer that its client has not read for a second,
//   - one that waits for a request, or the rest of one,
//   - another answer that is being written.
//
// Among equals it is the one with the longest time without progress; for a request, the
// bytes of a part of it are none. A connection whose request is being processed is not
// closed: the new one waits.
type Listener struct {
	net.Listener
	slots, share int

	mu      sync.Mutex
	changed *sync.Cond // a connection can be closed now, or one was
	conns   map[*Conn]struct{}
	clients map[netip.Addr]int // number of their connections
	closed  bool
}

// New limits the connections of a listener. A client has more than its share if it has
// more connections than that; share is smaller than slots.
func New(l net.Listener, slots, share int) *Listener {
	limited := &Listener{Listener: l, slots: slots, share: share, conns: make(map[*Conn]struct{}), clients: make(map[netip.Addr]int)}
	limited.changed = sync.NewCond(&limited.mu)
	return limited
}

// Accept waits for a connection, a *Conn, and for a slot.
func (l *Listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &Conn{Conn: conn, listener: l, client: clientOf(conn.RemoteAddr()), since: time.Now()}
	if !l.enter(c) {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	return c, nil
}

// Close also ends an Accept that waits for a slot.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.changed.Broadcast()
	l.mu.Unlock()
	return l.Listener.Close()
}

// enter gives a connection a slot. It returns false if the listener is closed.
func (l *Listener) enter(c *Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.conns) >= l.slots && !l.closed {
		if victim := l.victim(); victim != nil {
			l.leave(victim)
			_ = victim.Conn.Close() // nobody waits for what it sends
		} else {
			l.changed.Wait()
		}
	}
	if l.closed {
		return false
	}
	l.conns[c] = struct{}{}
	l.clients[c.client]++
	return true
}

// leave takes a slot back. The caller has the lock.
func (l *Listener) leave(c *Conn) {
	if _, has := l.conns[c]; !has {
		return
	}
	delete(l.conns, c)
	if l.clients[c.client]--; l.clients[c.client] == 0 {
		delete(l.clients, c.client)
	}
	l.changed.Broadcast()
}

// victim returns the connection whose slot another one gets, if there is one. The
// caller has the lock.
func (l *Listener) victim() *Conn {
	var victim *Conn
	var rank int
	now := time.Now()
	for c := range l.conns {
		if c.busy && !c.writing {
			continue
		}
		r := 1
		switch {
		case c.writing && now.Sub(c.since) >= stalled:
			r = 0
		case c.writing:
			r = 2
		}
		if l.clients[c.client] <= l.share {
			r += 3
		}
		if victim == nil || r < rank || r == rank && c.since.Before(victim.since) {
			victim, rank = c, r
		}
	}
	return victim
}

// clientOf returns the client of a connection: its address. Networks do not count: the
// pods of a node share a network of IPv6, and none chooses its address.
func clientOf(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap().WithZone("")
}

// A Conn is a connection of a Listener.
type Conn struct {
	net.Conn
	listener *Listener
	client   netip.Addr

	// Guarded by the listener's lock:
	busy, writing bool
	since         time.Time // last progress
}

// Busy is called when a whole request was read: it is being processed, until Idle.
func (c *Conn) Busy() { c.set(true, false) }

// Idle is called when a request was processed.
func (c *Conn) Idle() { c.set(false, false) }

func (c *Conn) set(busy, writing bool) {
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy, c.writing, c.since = busy, writing, time.Now()
	l.changed.Broadcast()
}

// Write writes a part of an answer.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.listener.mu.Lock()
	busy := c.busy
	c.listener.mu.Unlock()
	defer c.set(busy, false)
	for {
		c.set(busy, true)
		written, err := c.Conn.Write(p[n:min(n+progress, len(p))])
		if n += written; err != nil || n == len(p) {
			return n, err
		}
	}
}

// Close releases the slot.
func (c *Conn) Close() error {
	c.listener.mu.Lock()
	c.listener.leave(c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}
