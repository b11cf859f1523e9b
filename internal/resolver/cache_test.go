package resolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// Values and errors are kept for their time, and an old value comes with an error.
func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache[string](10, func(int) int { return 0 }, newSlots())
		calls := 0
		var err error
		get := func(wantValue, wantCalls int, wantErr error) {
			t.Helper()
			value, _, got := c.get(t.Context(), netip.Addr{}, "a", func(context.Context) (int, time.Duration, error) {
				time.Sleep(time.Second)
				calls++
				return calls, time.Minute, err
			})
			if value != wantValue || calls != wantCalls || !errors.Is(got, wantErr) {
				t.Errorf("%d, %v after %d calls; want %d, %v after %d", value, got, calls, wantValue, wantErr, wantCalls)
			}
		}
		get(1, 1, nil)
		time.Sleep(59 * time.Second)
		get(1, 1, nil)
		time.Sleep(time.Second)
		get(2, 2, nil)

		err = ErrNoAnswer
		time.Sleep(time.Minute)
		get(2, 3, ErrNoAnswer)
		get(2, 3, ErrNoAnswer) // a failed look-up is kept too
		time.Sleep(MaxStale - 5*time.Minute)
		get(2, 4, ErrNoAnswer)
		time.Sleep(10 * time.Minute)
		get(0, 5, ErrNoAnswer) // too old

		err = nil
		time.Sleep(time.Minute)
		get(6, 6, nil)
		err = ErrNoName
		time.Sleep(time.Minute)
		get(0, 7, ErrNoName) // it replaces the value
		err = ErrNoAnswer
		time.Sleep(time.Minute)
		get(0, 8, ErrNoAnswer)
	})
}

// The cache does not grow beyond its bound, keeps the entry that expires last, and
// never removes an entry with a look-up in progress.
func TestCacheIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache[string](8, func(int) int { return 0 }, newSlots())
		block := make(chan struct{})
		fetch := func(ttl time.Duration) func(context.Context) (int, time.Duration, error) {
			return func(context.Context) (int, time.Duration, error) { return 1, ttl, nil }
		}
		go func() {
			_, _, _ = c.get(t.Context(), netip.Addr{}, "waited for", func(context.Context) (int, time.Duration, error) {
				<-block
				return 1, time.Minute, nil
			})
		}()
		synctest.Wait()
		if _, _, err := c.get(t.Context(), netip.Addr{}, "long", fetch(time.Hour)); err != nil {
			t.Error(err)
		}
		for i := range 1000 {
			if _, _, err := c.get(t.Context(), netip.Addr{}, fmt.Sprint(i), fetch(time.Second)); err != nil {
				t.Error(err)
			}
			if len(c.entries) > 8 {
				t.Fatalf("%d entries", len(c.entries))
			}
		}
		for _, key := range []string{"waited for", "long"} {
			if c.entries[key] == nil {
				t.Errorf("%q evicted", key)
			}
		}
		close(block)
		synctest.Wait()
	})
}

// Large values count by their size.
func TestCacheIsBoundedInBytes(t *testing.T) {
	const size = maxBytes / 10
	c := newCache[string](1000, func(n int) int { return n }, newSlots())
	for i := range 100 {
		if n, _, err := c.get(t.Context(), netip.Addr{}, fmt.Sprint(i), func(context.Context) (int, time.Duration, error) {
			return size, time.Minute, nil
		}); n != size || err != nil {
			t.Error(n, err)
		}
		if want := min(i+1, 10); len(c.entries) != want || c.bytes != want*size {
			t.Fatalf("after %d: %d entries of %d bytes", i+1, len(c.entries), c.bytes)
		}
	}
	// Also the values of entries that are looked up again.
	c.expire()
	for key := range c.entries {
		if _, _, err := c.get(t.Context(), netip.Addr{}, key, func(context.Context) (int, time.Duration, error) { return 1, time.Minute, nil }); err != nil {
			t.Error(err)
		}
	}
	if c.bytes != len(c.entries) {
		t.Errorf("%d entries of %d bytes", len(c.entries), c.bytes)
	}
}
