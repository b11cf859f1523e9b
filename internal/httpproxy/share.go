package httpproxy

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// shares decides which clients have one of a limited number of connections. Until the
// limit every client has what it wants. At the limit a client that has less than others
// takes the place of a connection without a request, so that one that opens many keeps
// nobody out. The rest waits in order.
type shares struct {
	most   int          // connections
	full   func() bool  // for another reason: no files
	parked int          // limit of connections that wait
	places atomic.Int64 // open, without the lock

	mu      sync.Mutex
	of      map[netip.Addr]map[*clientConn]struct{} // by client
	open    int
	waiting []*clientConn
	waits   atomic.Bool      // there are waiting ones
	ready   chan *clientConn // each has a place, or was closed since
	freed   chan struct{}    // a place is free, or a waiting one left
}

// mostWaiting is the largest limit of connections that wait.
const mostWaiting = 64

func newShares(most int, full func() bool) *shares {
	return &shares{
		most: most, full: full, parked: min(max(1, most/32), mostWaiting), of: map[netip.Addr]map[*clientConn]struct{}{},
		ready: make(chan *clientConn, 2*most), freed: make(chan struct{}, 1),
	}
}

// add gives a connection a place, or lets it wait. It returns false if too many wait;
// then the caller has to wait for freed.
func (s *shares) add(c *clientConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.open < s.most && !s.full():
	case s.evict(len(s.of[c.from]) + 1):
	case len(s.waiting) < s.parked:
		s.waiting = append(s.waiting, c)
		s.waits.Store(true)
		return true
	default:
		return s.replace(c)
	}
	s.admit(c)
	return true
}

func (s *shares) admit(c *clientConn) {
	conns := s.of[c.from]
	if conns == nil {
		conns = map[*clientConn]struct{}{}
		s.of[c.from] = conns
	}
	conns[c] = struct{}{}
	s.open++
	s.places.Store(int64(s.open))
	select {
	case s.ready <- c:
	default: // nobody accepts any more
		s.remove(c)
		_ = c.TCPConn.Close()
	}
}

// unpark removes a waiting connection, which gets a place.
func (s *shares) unpark(i int) {
	c := s.waiting[i]
	s.waiting = slices.Delete(s.waiting, i, i+1)
	s.waits.Store(len(s.waiting) > 0)
	s.admit(c)
}

// replace lets a connection wait in the place of one whose client has more, although as
// many wait as may. A client that has most of the places, none of them without a request,
// is refused then, since nobody behind its connections would get in.
func (s *shares) replace(c *clientConn) bool {
	last := len(s.waiting) - 1
	for i, other := range s.waiting {
		if len(s.of[other.from]) > len(s.of[s.waiting[last].from]) {
			last = i
		}
	}
	switch own := len(s.of[c.from]); {
	case len(s.of[s.waiting[last].from]) > own+1:
		_ = s.waiting[last].TCPConn.Close()
		s.waiting[last] = c
	case own > s.most/2:
		_ = c.TCPConn.Close()
	default:
		return false
	}
	return true
}

// evict closes a connection without a request of the client that has the most
// connections, if that is more than a number.
func (s *shares) evict(than int) bool {
	var largest map[*clientConn]struct{}
	for _, conns := range s.of {
		if len(conns) > max(than, len(largest)) {
			largest = conns
		}
	}
	return s.evictFrom(largest)
}

func (s *shares) evictFrom(conns map[*clientConn]struct{}) bool {
	for c := range conns {
		if c.state.Load() == resting && !c.unread() && c.state.CompareAndSwap(resting, evicted) {
			s.remove(c)
			_ = c.TCPConn.Close()
			return true
		}
	}
	return false
}

func (s *shares) remove(c *clientConn) bool {
	conns := s.of[c.from]
	if _, ok := conns[c]; !ok {
		return false
	}
	if delete(conns, c); len(conns) == 0 {
		delete(s.of, c.from)
	}
	s.open--
	s.places.Store(int64(s.open))
	return true
}

// end releases the place of a connection.
func (s *shares) end(c *clientConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.remove(c) {
		s.next()
	}
}

// next gives free places to those who wait, those with the fewest connections first.
func (s *shares) next() {
	for s.open < s.most && len(s.waiting) > 0 && !s.full() {
		first := 0
		for i, c := range s.waiting {
			if len(s.of[c.from]) < len(s.of[s.waiting[first].from]) {
				first = i
			}
		}
		s.unpark(first)
	}
	select {
	case s.freed <- struct{}{}:
	default:
	}
}

// retry gives free places to those who wait.
func (s *shares) retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// evictAny closes a connection without a request, of the client that has the most
// connections if it has one.
func (s *shares) evictAny() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.evict(0) {
		return true
	}
	for _, conns := range s.of {
		if s.evictFrom(conns) {
			return true
		}
	}
	return false
}

// rests handles the end of a request: a client that waits may take the place.
func (s *shares) rests() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.waiting {
		if s.evict(len(s.of[c.from]) + 1) {
			s.unpark(i)
			return
		}
	}
}

// each calls a function for every connection with a place.
func (s *shares) each(do func(*clientConn)) {
	for _, c := range s.all() {
		do(c)
	}
}

func (s *shares) all() []*clientConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*clientConn
	for _, conns := range s.of {
		all = slices.AppendSeq(all, maps.Keys(conns))
	}
	return all
}

// count returns the number of connections.
func (s *shares) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// close closes the connections that wait.
func (s *shares) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.waiting {
		_ = c.TCPConn.Close()
	}
	s.waiting = nil
	for {
		select {
		case c := <-s.ready:
			s.remove(c)
			_ = c.TCPConn.Close()
		default:
			return
		}
	}
}

// The states of a client's connection.
const (
	resting int32 = iota // it waits for a request or the rest of one
	reading              // data have come, which may be a request
	active               // it has a request
	evicted              // closed, see shares
)

// begin reports whether a request may begin: the connection has not been closed.
func (c *clientConn) begin() bool { return c.state.CompareAndSwap(reading, active) }

// unread reports whether the kernel has data of the client, as of a request that has just
// come (tcp(7), SIOCINQ).
func (c *clientConn) unread() bool {
	n, err := 0, error(nil)
	_ = c.raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return err == nil && n > 0
}

// remoteIP returns the address of a client. Addresses count, not networks: the pods of a
// node share a network of IPv6, and none chooses its address.
func remoteIP(conn *net.TCPConn) netip.Addr {
	return conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
}
