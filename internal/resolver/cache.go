package resolver

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"
)

// A cache keeps the results of look-ups, also the failed ones, and concurrent callers
// share one look-up of a key. Its size is bounded, since names and answers come from
// anybody.
type cache[K comparable, V any] struct {
	max     int         // number of entries
	size    func(V) int // of a value, in bytes
	slots   *slots      // of the queries of look-ups
	mu      sync.Mutex
	entries map[K]*entry[V]
	bytes   int // size of all values
}

// maxBytes is the maximum size of the values of a cache.
const maxBytes = 4 << 20

// An entry is the result for one key. The cache's lock guards it.
type entry[V any] struct {
	value   V         // the last valid one, which may be old
	expires time.Time // expiry of value; zero: no value
	err     error     // error of the last look-up
	until   time.Time // the time of the next look-up
	flight  *flight   // the look-up in progress; nil: none
}

// A flight is a look-up in progress. The cache's lock guards the number of waiters.
type flight struct {
	callers callers
	waiters int
	done    chan struct{}
	cancel  context.CancelFunc
}

func newCache[K comparable, V any](limit int, size func(V) int, s *slots) *cache[K, V] {
	return &cache[K, V]{max: limit, size: size, slots: s, entries: map[K]*entry[V]{}}
}

// get returns the value of a key and when it expires. It calls lookUp if the entry has
// expired. Beside an ErrNoAnswer, or an error of the context, it returns the old
// value, if there is one that is not older than MaxStale.
//
// lookUp runs with a context that does not end with ctx, since other callers may wait
// for it too, but with the last of them: a name that nobody waits for costs nothing. It
// returns the value and how long the value or the error is kept.
func (c *cache[K, V]) get(ctx context.Context, client netip.Addr, key K, lookUp func(context.Context) (V, time.Duration, error)) (V, time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[key]
	if e == nil {
		c.makeRoom(1)
		e = new(entry[V])
		c.entries[key] = e
	}
	if time.Now().Before(e.until) {
		return e.value, e.expires, e.err
	}
	f := e.flight
	if f == nil {
		f = &flight{done: make(chan struct{})}
		e.flight = f
		c.slots.join(&f.callers, client)
		var alive context.Context
		alive, f.cancel = context.WithCancel(context.WithValue(context.WithoutCancel(ctx), callersKey{}, &f.callers))
		go c.fill(alive, e, f, lookUp)
	} else {
		c.slots.join(&f.callers, client)
	}
	f.waiters++
	c.mu.Unlock()
	var err error
	select {
	case <-f.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	if err == nil {
		return e.value, e.expires, e.err
	}
	if f.waiters--; f.waiters == 0 && e.flight == f {
		f.cancel()
		e.flight = nil
		if e.until.IsZero() && e.expires.IsZero() && c.entries[key] == e {
			delete(c.entries, key) // it has no value
		}
	}
	return e.value, e.expires, err
}

// fill looks up the value of an entry.
func (c *cache[K, V]) fill(ctx context.Context, e *entry[V], f *flight, lookUp func(context.Context) (V, time.Duration, error)) {
	defer f.cancel()
	value, ttl, err := lookUp(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.flight != f {
		return // nobody waits for it
	}
	c.bytes -= c.size(e.value)
	now := time.Now()
	e.err, e.until = err, now.Add(ttl)
	switch {
	case err == nil:
		e.value, e.expires = value, e.until
	case !errors.Is(err, ErrNoAnswer) || now.After(e.expires.Add(MaxStale)):
		var none V
		e.value, e.expires = none, time.Time{}
	}
	c.bytes += c.size(e.value)
	close(f.done)
	e.flight = nil
	c.makeRoom(0)
}

// expire makes all entries expire.
func (c *cache[K, V]) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.until = time.Time{}
	}
}

// makeRoom removes entries until there is room for some more: each time the one that
// expires first of a few that the map's random order yields. A search through all
// entries would let a client that always requests new names slow down all others.
func (c *cache[K, V]) makeRoom(more int) {
	for len(c.entries)+more > c.max || c.bytes > maxBytes {
		const few = 16
		var victim K
		var oldest *entry[V]
		seen := 0
		for key, e := range c.entries {
			if e.flight == nil && (oldest == nil || e.until.Before(oldest.until)) {
				victim, oldest = key, e
			}
			if seen++; seen >= few && oldest != nil {
				break
			}
		}
		if oldest == nil {
			return
		}
		c.bytes -= c.size(oldest.value)
		delete(c.entries, victim)
	}
}
