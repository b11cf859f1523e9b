package resolver

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// maxQueries is the maximum number of concurrent queries, each of which has a
	// socket. A container may be limited to 1024 descriptors.
	maxQueries = 256
	// maxWaiting is the maximum number of queries of one client that wait for a
	// socket. A look-up has two at a time.
	maxWaiting = 1024
	// slowQuery is how long a query is left alone if others wait for its socket.
	// Name servers answer most names within a tenth of it.
	slowQuery = 500 * time.Millisecond
)

// The causes with which slots end a query.
var (
	errSlow = &overload{"no answer within " + slowQuery.String() + ", and other look-ups of this client wait"}
	errBusy = &overload{"too many look-ups of this client wait"}
)

// An overload is the error of a query that ends in favour of others. It is a time-out, a
// net.Error.
type overload struct{ text string }

func (e *overload) Error() string { return e.text }

// Timeout reports true.
func (e *overload) Timeout() bool { return true }

// Temporary reports true.
func (e *overload) Temporary() bool { return true }

// Overloaded reports true: the error is the client's fault, not that of the name.
func (e *overload) Overloaded() bool { return true }

// slots distribute a number of sockets among the queries of clients, so that names
// without an answer delay nobody else.
//
// A client has at most twice as many slots as are free: one client alone gets two
// thirds of all, and another one finds free slots at once (dynamic thresholds,
// Choudhury and Hahne 1998). Beyond that its queries wait, and the newest starts first,
// since under load the oldest ones are those whose askers give up. While some wait, the
// slow queries of the same client are ended.
type slots struct {
	max, maxWaiting int
	slow            time.Duration

	mu      sync.Mutex
	running []*query // in the order of their start
	shares  map[netip.Addr]*share
	turns   []*share // the shares with waiting queries, in turn
	timer   *time.Timer
}

// A share has the queries of one client.
type share struct {
	client  netip.Addr
	running int
	waiting []*query // the last one starts first
}

// callers are the clients that wait for one look-up, which concern all of its queries.
// The lock of the slots guards them.
type callers struct {
	clients []netip.Addr
	waiting []*query
}

// callersKey is the context key of a look-up's *callers.
type callersKey struct{}

// A query is one query that has or waits for a slot.
type query struct {
	callers *callers
	share   *share // the one that pays; nil: it waits
	ready   chan struct{}
	end     context.CancelCauseFunc
	started time.Time
	hurried bool // it was ended as a slow one
}

func newSlots() *slots {
	return &slots{max: maxQueries, maxWaiting: maxWaiting, slow: slowQuery, shares: map[netip.Addr]*share{}}
}

// join adds a client to those that wait for a look-up, whose queries then also wait
// among those of this client. Addresses count, not networks: the pods of a node share a
// network of IPv6, and none chooses its address.
func (s *slots) join(c *callers, client netip.Addr) {
	client = client.Unmap().WithZone("")
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(c.clients, client) {
		return
	}
	c.clients = append(c.clients, client)
	for _, q := range c.waiting {
		s.enqueue(client, q, false)
	}
	s.dispatch()
}

// acquire waits for a slot for a query of the look-up of ctx. A query with the flag last
// waits behind all others of its clients. The query has to use the returned context,
// which ends with errSlow if the slot is needed, and call done.
func (s *slots) acquire(ctx context.Context, last bool) (_ context.Context, done func(), _ error) {
	c, _ := ctx.Value(callersKey{}).(*callers)
	if c == nil {
		c = &callers{clients: []netip.Addr{{}}}
	}
	q := &query{callers: c, ready: make(chan struct{})}
	ctx, q.end = context.WithCancelCause(ctx)
	s.mu.Lock()
	c.waiting = append(c.waiting, q)
	for _, client := range c.clients {
		s.enqueue(client, q, last)
	}
	s.dispatch()
	s.mu.Unlock()
	select {
	case <-q.ready:
		return ctx, func() { s.release(q) }, nil
	case <-ctx.Done():
		s.release(q)
		return nil, nil, context.Cause(ctx)
	}
}

// release ends a query, whether it has a slot or waits for one.
func (s *slots) release(q *query) {
	q.end(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.share == nil {
		s.dequeue(q)
		return
	}
	i := slices.Index(s.running, q)
	s.running = slices.Delete(s.running, i, i+1)
	q.share.running--
	s.tidy(q.share)
	s.dispatch()
}

// enqueue adds a query to those of a client that wait. If there are too many, the oldest
// one ends, unless another client waits for it too. The lock is held.
func (s *slots) enqueue(client netip.Addr, q *query, last bool) {
	h := s.shares[client]
	if h == nil {
		h = &share{client: client}
		s.shares[client] = h
	}
	if len(h.waiting) == 0 {
		s.turns = append(s.turns, h)
	}
	if last {
		h.waiting = slices.Insert(h.waiting, 0, q)
	} else {
		h.waiting = append(h.waiting, q)
	}
	if len(h.waiting) > s.maxWaiting {
		oldest := h.waiting[0]
		h.waiting = slices.Delete(h.waiting, 0, 1)
		if !slices.ContainsFunc(oldest.callers.clients, func(client netip.Addr) bool {
			return s.shares[client] != nil && slices.Contains(s.shares[client].waiting, oldest)
		}) {
			oldest.end(errBusy)
		}
	}
}

// dequeue removes a query from those that wait. The lock is held.
func (s *slots) dequeue(q *query) {
	is := func(other *query) bool { return other == q }
	q.callers.waiting = slices.DeleteFunc(q.callers.waiting, is)
	for _, client := range q.callers.clients {
		if h := s.shares[client]; h != nil {
			h.waiting = slices.DeleteFunc(h.waiting, is)
			s.tidy(h)
		}
	}
}

// tidy removes a share without queries. The lock is held.
func (s *slots) tidy(h *share) {
	if len(h.waiting) > 0 {
		return
	}
	s.turns = slices.DeleteFunc(s.turns, func(other *share) bool { return other == h })
	if h.running == 0 {
		delete(s.shares, h.client)
	}
}

// dispatch starts the queries for which there is a slot, the shares in turn, and ends
// slow ones for the rest. The lock is held.
func (s *slots) dispatch() {
	for passed := 0; passed < len(s.turns); {
		h := s.turns[0]
		s.turns = append(s.turns[1:], h)
		if passed++; h.running < 2*(s.max-len(s.running)) {
			s.begin(h, h.waiting[len(h.waiting)-1])
			passed = 0
		}
	}
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	for _, h := range s.turns {
		s.hurry(h)
	}
}

func (s *slots) begin(h *share, q *query) {
	q.share, q.started = h, time.Now()
	h.running++
	s.running = append(s.running, q)
	close(q.ready)
	s.dequeue(q)
}

// hurry ends as many slow queries of a share as wait, those first that started first. A
// share without a slot takes those of others. A query for which several clients wait
// may go on. The lock is held.
func (s *slots) hurry(h *share) {
	left := len(h.waiting)
	for _, q := range s.running {
		switch {
		case left == 0:
			return
		case h.running > 0 && q.share != h || len(q.callers.clients) > 1:
			continue
		case q.hurried:
			left--
			continue
		}
		if rest := s.slow - time.Since(q.started); rest > 0 {
			if s.timer == nil {
				s.timer = time.AfterFunc(rest, func() {
					s.mu.Lock()
					defer s.mu.Unlock()
					s.dispatch()
				})
			}
			return // the others started later
		}
		q.hurried = true
		q.end(errSlow)
		left--
	}
}
