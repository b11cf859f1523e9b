package resolver

import (
	"context"
	"errors"
	"sync"
	"time"
)

// A cache keeps the results of look-ups, also the failed ones, and concurrent callers
// share one look-up of a key. Its size is bounded, since names come from clients too.
type cache[K comparable, V any] struct {
	max     int
	mu      sync.Mutex
	entries map[K]*entry[V]
}

// An entry is the result for one key. The cache's lock guards it.
type entry[V any] struct {
	value   V         // the last valid one, which may be old
	expires time.Time // expiry of value; zero: no value
	err     error     // error of the last look-up
	until   time.Time // the time of the next look-up
	done    chan struct{}
}

func newCache[K comparable, V any](limit int) *cache[K, V] {
	return &cache[K, V]{max: limit, entries: map[K]*entry[V]{}}
}

// get returns the value of a key and when it expires. It calls lookUp if the entry has
// expired. Beside an ErrNoAnswer, or an error of the context, it returns the old
// value, if there is one that is not older than MaxStale.
//
// lookUp runs with a context that does not end with ctx, since other callers may wait
// for it too. It returns the value and how long the value or the error is kept.
func (c *cache[K, V]) get(ctx context.Context, key K, lookUp func(context.Context) (V, time.Duration, error)) (V, time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[key]
	if e == nil {
		c.makeRoom()
		e = new(entry[V])
		c.entries[key] = e
	}
	if time.Now().Before(e.until) {
		return e.value, e.expires, e.err
	}
	if e.done == nil {
		e.done = make(chan struct{})
		go c.fill(context.WithoutCancel(ctx), e, lookUp)
	}
	done := e.done
	c.mu.Unlock()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	if err == nil {
		err = e.err
	}
	return e.value, e.expires, err
}

// fill looks up the value of an entry.
func (c *cache[K, V]) fill(ctx context.Context, e *entry[V], lookUp func(context.Context) (V, time.Duration, error)) {
	value, ttl, err := lookUp(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	e.err, e.until = err, now.Add(ttl)
	switch {
	case err == nil:
		e.value, e.expires = value, e.until
	case !errors.Is(err, ErrNoAnswer) || now.After(e.expires.Add(MaxStale)):
		var none V
		e.value, e.expires = none, time.Time{}
	}
	close(e.done)
	e.done = nil
}

// expire makes all entries expire.
func (c *cache[K, V]) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.until = time.Time{}
	}
}

// makeRoom removes an entry if the cache is full: the one that expires first of a few
// that the map's random order yields. A search through all entries would let a client
// that always requests new names slow down all others.
func (c *cache[K, V]) makeRoom() {
	if len(c.entries) < c.max {
		return
	}
	const few = 16
	var victim K
	var oldest *entry[V]
	seen := 0
	for key, e := range c.entries {
		if e.done == nil && (oldest == nil || e.until.Before(oldest.until)) {
			victim, oldest = key, e
		}
		if seen++; seen >= few && oldest != nil {
			break
		}
	}
	if oldest != nil {
		delete(c.entries, victim)
	}
}
