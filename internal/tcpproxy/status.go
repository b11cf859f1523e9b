package tcpproxy

import (
	"sync/atomic"
	"time"
)

// A Condition is how far a destination can be reached, as far as is known.
type Condition int

// The conditions, from good to bad.
const (
	Usable   Condition = iota
	Impaired           // some addresses do not answer, or it is not known whether they still hold
	Unusable           // there is no address, or none that answers
)

// A Status is how one destination of the list is, and what was counted since it
// came onto the list.
type Status struct {
	Destination Destination
	Err         error // why its port is not listened on; nil: it is

	Condition Condition
	Since     time.Time // of the condition, or of Err
	Addresses int
	Aside     int   // of them, those that do not answer
	LookupErr error // of the last look-up; nil also before the first
	Looked    bool  // there was an answer

	Counts
}

// Counts are what was counted of a destination. The bytes of a connection are
// counted when it ends.
type Counts struct {
	Connections, Open, Failed int64 // of clients; Failed: to none of the addresses
	Sent, Received            int64 // bytes, to and from the destination
	Lookups, LookupFailures   int64
}

// counters are Counts that many goroutines change.
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

// A refusal is a port that cannot be listened on.
type refusal struct {
	err   error
	since time.Time
}

// Status returns how each destination of the list is, in its order.
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

// Open returns how many connections there are, also those to destinations that
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

// judge notes since when the pool is as it is. The lock is held.
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
