package tcpproxy

import (
	"sync/atomic"
	"time"
)

// A Condition is the known reachability of a destination.
type Condition int

// The conditions, from good to bad.
const (
	Usable   Condition = iota
	Impaired           // some addresses are unreachable, or the last look-up failed
	Unusable           // there is no address, or none is reachable
)

// A Status is the state of one destination, and its counters since it came onto the
// list.
type Status struct {
	Destination Destination
	Err         error // error of listening on its port

	Condition Condition
	Since     time.Time // start of the condition, or of Err
	Addresses int
	Aside     int   // number of unreachable addresses
	LookupErr error // error of the last look-up; nil before the first
	Looked    bool  // a look-up has had an answer

	Counts
}

// Counts are the counters of a destination. The bytes of a connection are counted when
// it ends.
type Counts struct {
	Connections, Open, Failed int64 // client connections; Failed: no address was reachable
	Sent, Received            int64 // bytes, to and from the destination
	Lookups, LookupFailures   int64
}

// counters are Counts for concurrent use.
type counters struct {
	connections, open, failed atomic.Int64
	sent, received            atomic.Int64
	lookups, lookupFailures   atomic.Int64
}

func (c *counters) read() Counts {
	return Counts{
		c.connections.Load(), c.open.Load(), c.failed.Load(), c.sent.Load(), c.received.Load(),
		c.lookups.Load(), c.lookupFailures.Load(),
	}
}

// A refusal is the error of listening on a port and its time.
type refusal struct {
	err   error
	since time.Time
}

// Status returns the state of each destination, in the order of the list.
func (p *Proxy) Status() []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Status, 0, len(p.list))
	for _, d := range p.list {
		s := Status{Destination: d, Condition: Unusable}
		if l := p.ports[d.Port]; l != nil {
			l.pool.Load().status(&s)
		} else if r, failed := p.refused[d.Port]; failed {
			s.Err, s.Since = r.err, r.since
		}
		list = append(list, s)
	}
	return list
}

// Open returns the number of open connections, including those to destinations that
// are no longer on the list.
func (p *Proxy) Open() int64 { return p.open.Load() }

func (p *pool) status(s *Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Condition, s.Since = p.condition, p.since
	s.Addresses, s.Aside, s.LookupErr = len(p.addrs), len(p.aside), p.err
	select {
	case <-p.known:
		s.Looked = true
	default:
	}
	s.Counts = p.count.read()
}

// judge updates the condition and its time. The lock is held.
func (p *pool) judge() {
	now := Usable
	switch {
	case len(p.addrs) == 0 || len(p.aside) >= len(p.addrs):
		now = Unusable
	case len(p.aside) > 0 || p.err != nil:
		now = Impaired
	}
	if now != p.condition || p.since.IsZero() {
		p.condition, p.since = now, time.Now()
	}
}
