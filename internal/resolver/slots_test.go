package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func client(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }

// A flood begins to look up names without an answer for client 1, and returns when so many
// of their queries wait. It ends when its clients leave.
func flood(t *testing.T, names, waiting int, slow time.Duration) (r *Resolver, leave func()) {
	t.Helper()
	s := serve(t)
	s.set("good.example. 60 IN A 192.0.2.1")
	s.otherwise(silence)
	// Each query for a dead name would have its slot for longer than the test runs.
	r, _ = newResolver(t, "options timeout:30 attempts:5\n", s)
	r.slots.slow = slow
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	leave = func() {
		cancel()
		asking.Wait()
	}
	t.Cleanup(leave)
	for i := range names {
		asking.Go(func() {
			_, err := r.Lookup(ctx, client(1), fmt.Sprintf("dead%d.example", i))
			if timeout, ok := errors.AsType[net.Error](err); !ok && ctx.Err() == nil || ok && !timeout.Timeout() {
				t.Errorf("dead%d: %v, want a timeout", i, err)
			}
		})
	}
	if !eventually(func() bool { return r.slots.count(client(1)) >= waiting }) {
		t.Fatal("the look-ups of the dead names do not wait")
	}
	return r, leave
}

// Names without an answer do not delay other clients, and nothing is left of look-ups
// that nobody waits for.
func TestDeadNamesDelayNoOtherClient(t *testing.T) {
	t.Parallel()
	r, leave := flood(t, 3000, maxWaiting/2, time.Hour)
	wantOf(t, r, client(2), "good.example", "192.0.2.1")
	leave()
	if !eventually(func() bool {
		r.slots.mu.Lock()
		defer r.slots.mu.Unlock()
		return len(r.slots.running)+len(r.slots.shares)+len(r.slots.turns) == 0
	}) {
		t.Errorf("%d queries of names that nobody waits for still run", len(r.slots.running))
	}
}

// They delay a name of the same client only until one of them is slow.
func TestDeadNamesOfSameClient(t *testing.T) {
	t.Parallel()
	const names = maxWaiting / 4 // the queue has room
	r, _ := flood(t, names, names, 5*time.Second)
	wantOf(t, r, client(1), "good.example", "192.0.2.1")
}

// A client that joins a look-up takes its queries out of the queue of another.
func TestJoinedLookUpDoesNotWait(t *testing.T) {
	t.Parallel()
	const running = 2*maxQueries/3 + 1
	r, _ := flood(t, maxQueries, 2*maxQueries-running, time.Hour)
	before := r.slots.count(client(1))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { _, _ = r.Lookup(ctx, client(1), "good.example") }()
	if !eventually(func() bool { return r.slots.count(client(1)) >= before+2 }) {
		t.Fatal("the look-up of the good name does not wait")
	}
	wantOf(t, r, client(2), "good.example", "192.0.2.1")
}

// count returns the number of waiting queries of a client.
func (s *slots) count(client netip.Addr) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.shares[client]; h != nil {
		return len(h.waiting)
	}
	return 0
}

// eventually polls a condition until it holds, and reports whether it does.
func eventually(condition func() bool) bool {
	for end := time.Now().Add(limit); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// A take is a query of TestSlots.
type take struct {
	s    *slots
	done func()
	ctx  context.Context
	err  error
	over chan struct{}
}

func (s *slots) take(client netip.Addr, last bool) *take {
	q := &take{s: s, over: make(chan struct{})}
	c := &callers{}
	s.join(c, client)
	go func() {
		defer close(q.over)
		q.ctx, q.done, q.err = s.acquire(context.WithValue(context.Background(), callersKey{}, c), last)
	}()
	synctest.Wait()
	return q
}

func (q *take) has() bool {
	select {
	case <-q.over:
		return q.err == nil
	default:
		return false
	}
}

func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots()
		s.max, s.maxWaiting = 6, 3
		want := func(what string, got, want bool) {
			t.Helper()
			if got != want {
				t.Errorf("%s: %v", what, got)
			}
		}
		var first []*take
		for i := range 4 {
			first = append(first, s.take(client(1), false))
			want(fmt.Sprintf("query %d of the first client runs", i), first[i].has(), true)
		}
		fifth, last, sixth := s.take(client(1), false), s.take(client(1), true), s.take(client(1), false)
		want("a query beyond two thirds runs", fifth.has() || last.has() || sixth.has(), false)
		other := s.take(client(2), false)
		want("a query of another client runs", other.has(), true)

		// The newest first; those with the flag last.
		first[0].done()
		other.done()
		synctest.Wait()
		want("the newest runs", sixth.has(), true)
		want("the older one runs", fifth.has(), false)
		first[1].done()
		synctest.Wait()
		want("the older one runs", fifth.has(), true)
		want("the last one runs", last.has(), false)

		// Slow ones end when others wait, those of one client for that client.
		time.Sleep(slowQuery - time.Millisecond)
		synctest.Wait()
		want("a query that is not slow yet ended", first[2].ctx.Err() != nil, false)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		want("the first query is slow", context.Cause(first[2].ctx) == errSlow, true)
		want("a second one ended for one that waits", first[3].ctx.Err() != nil, false)
		first[2].done()
		synctest.Wait()
		want("the last one runs", last.has(), true)

		// The queue has an end, at which the oldest one leaves.
		var queue []*take
		for range 4 {
			queue = append(queue, s.take(client(1), false))
		}
		<-queue[0].over
		want("the oldest one was refused", errors.Is(queue[0].err, errBusy), true)
		for _, q := range append(queue[:0:0], queue[1:]...) {
			want("the others wait", q.has(), false)
		}
		for _, q := range []*take{first[3], fifth, sixth, last} {
			q.done()
		}
		synctest.Wait()
		for _, q := range queue[1:] {
			want("the others run", q.has(), true)
			q.done()
		}
		if len(s.running)+len(s.shares)+len(s.turns) > 0 || s.timer != nil {
			t.Errorf("something is left: %+v", s)
		}
	})
}

// Each address is a client, and IPv4 clients on an IPv6 socket are IPv4 ones.
func TestClientAddresses(t *testing.T) {
	s, c := newSlots(), callers{}
	for _, a := range []string{"2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "fe80::1"} {
		s.join(&c, netip.MustParseAddr(a))
	}
	if len(c.clients) != 5 {
		t.Errorf("clients: %v", c.clients)
	}
}
