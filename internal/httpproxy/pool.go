package httpproxy

import (
	"container/list"
	"sync"
	"sync/atomic"
	"time"
)

// A pool holds the idle connections to servers. It closes those that are idle for
// longer than keptFor, those that their server has closed, and the oldest ones beyond
// its limits.
type pool struct {
	most   int          // limit of idle connections
	open   atomic.Int64 // all connections, with those in use and those of tunnels
	parked atomic.Int64 // idle ones

	mu     sync.Mutex
	idle   map[serverKey][]*list.Element // the last one was idle for the shortest time
	order  list.List                     // of *serverConn, the oldest one first
	timer  *time.Timer                   // while there are connections
	closed bool
}

// sweepPause is the time between two looks at all idle connections.
const sweepPause = time.Second

// evict closes the connection that was idle for the longest time, and reports whether
// there was one.
func (p *pool) evict() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.order.Front()
	if e != nil {
		_ = p.remove(e).Close()
	}
	return e != nil
}

// inUse returns the number of connections that are not idle. It takes no lock, since the
// end of a connection asks for it.
func (p *pool) inUse() int { return int(p.open.Load() - p.parked.Load()) }

// get returns an idle connection that is alive, or nil.
func (p *pool) get(key serverKey) *serverConn {
	for {
		p.mu.Lock()
		of := p.idle[key]
		if len(of) == 0 {
			p.mu.Unlock()
			return nil
		}
		c := p.remove(of[len(of)-1])
		p.mu.Unlock()
		if c.alive() {
			return c
		}
		_ = c.Close()
	}
}

// put adds a connection.
func (p *pool) put(c *serverConn) {
	c.parked = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle[c.key]) >= keptPerServer {
		_ = c.Close()
		return
	}
	if p.order.Len() >= p.most {
		if p.most == 0 {
			_ = c.Close()
			return
		}
		_ = p.remove(p.order.Front()).Close()
	}
	if p.idle == nil {
		p.idle = map[serverKey][]*list.Element{}
	}
	p.idle[c.key] = append(p.idle[c.key], p.order.PushBack(c))
	p.parked.Add(1)
	if p.timer == nil {
		p.timer = time.AfterFunc(sweepPause, p.sweep)
	}
}

// remove takes a connection out of the pool.
func (p *pool) remove(e *list.Element) *serverConn {
	c := p.order.Remove(e).(*serverConn)
	p.parked.Add(-1)
	of := p.idle[c.key]
	last := len(of) - 1
	for i := last; i >= 0; i-- { // often the last one
		if of[i] == e {
			copy(of[i:], of[i+1:])
			of[last] = nil
			break
		}
	}
	if last == 0 {
		delete(p.idle, c.key)
	} else {
		p.idle[c.key] = of[:last]
	}
	return c
}

// sweep closes connections that nobody will use. A connection that its server has
// closed would otherwise occupy a descriptor for keptFor.
func (p *pool) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for e := p.order.Front(); e != nil; {
		next := e.Next()
		if c := e.Value.(*serverConn); time.Since(c.parked) > keptFor || !c.alive() {
			_ = p.remove(e).Close()
		}
		e = next
	}
	p.timer = nil
	if p.order.Len() > 0 {
		p.timer = time.AfterFunc(sweepPause, p.sweep)
	}
}

// close closes all connections.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for e := p.order.Front(); e != nil; e = p.order.Front() {
		_ = p.remove(e).Close()
	}
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
}
