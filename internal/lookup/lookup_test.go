package lookup

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/rules"
)

// A zone answers look-ups.
type zone struct {
	mu      sync.Mutex
	ttl     time.Duration
	addrs   map[string][]netip.Addr // none: no such name
	silent  map[string]bool
	silent6 bool // without an answer for AAAA records
	silent4 bool // and for A records
	takes   time.Duration
	asked   map[string]int
	running int
	most    int
}

func (z *zone) lookup(ctx context.Context, name string) (resolver.Answer, error) {
	z.mu.Lock()
	z.asked[name]++
	z.running++
	z.most = max(z.most, z.running)
	takes, silent := z.takes, z.silent[name]
	z.mu.Unlock()
	if silent {
		takes = 10 * time.Second
	}
	if takes > 0 { // in a bubble, a timer that has expired at once crashes the race detector of Go 1.26
		select {
		case <-ctx.Done():
		case <-time.After(takes):
		}
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.running--
	if silent || ctx.Err() != nil {
		return resolver.Answer{}, &resolver.Error{Name: name, Err: resolver.ErrNoAnswer}
	}
	if len(z.addrs[name]) == 0 {
		return resolver.Answer{}, &resolver.Error{Name: name, Err: resolver.ErrNoName}
	}
	addrs := slices.Clone(z.addrs[name])
	if z.silent6 {
		addrs = slices.DeleteFunc(addrs, netip.Addr.Is6)
	}
	if z.silent4 {
		addrs = slices.DeleteFunc(addrs, netip.Addr.Is4)
	}
	return resolver.Answer{Addrs: addrs, Name: name, Expires: time.Now().Add(z.ttl), OnlyIPv4: z.silent6, OnlyIPv6: z.silent4}, nil
}

func (z *zone) set(name string, addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.addrs[name] = nil
	for _, a := range addrs {
		z.addrs[name] = append(z.addrs[name], netip.MustParseAddr(a))
	}
}

func (z *zone) count(name string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.asked[name]
}

// reported are the times at which changes were reported, by the follower's goroutine.
type reported struct {
	mu    sync.Mutex
	times []time.Time
}

func (r *reported) add() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, time.Now())
}

func (r *reported) all() []time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.times)
}

func (r *reported) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = nil
}

// following calls test with a follower that runs, in a bubble with its own clock.
func following(t *testing.T, test func(t *testing.T, z *zone, f *Follower, changes *reported, log *strings.Builder)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		z := &zone{ttl: 10 * time.Second, addrs: make(map[string][]netip.Addr), silent: make(map[string]bool), asked: make(map[string]int)}
		var log strings.Builder
		var changes reported
		f := &Follower{
			Lookup: z.lookup, Log: slog.New(slog.NewTextHandler(&log, nil)),
			Unusable: func(a netip.Addr) string {
				if a.IsLoopback() {
					return "a loopback address"
				}
				return ""
			},
			Changed: changes.add,
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { f.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		test(t, z, f, &changes, &log)
	})
}

// text returns the addresses of a name.
func text(f *Follower, name string) string { return join(f.Resolution(name).Addresses) }

// The addresses of a family stay while the name servers answer only for the other one.
func TestFollowerKeepsFamily(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, changes *reported, log *strings.Builder) {
		z.set("db.example.com", "203.0.113.25", "2001:db8::25")
		f.Follow([]string{"db.example.com"}, true)
		f.Await(t.Context())
		step := func(silent4, silent6 bool, want string, wantChanges int) {
			t.Helper()
			z.mu.Lock()
			z.silent4, z.silent6 = silent4, silent6
			z.mu.Unlock()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if text(f, "db.example.com") != want || len(changes.all()) != wantChanges {
				t.Errorf("%s after %d changes, want %s after %d", text(f, "db.example.com"), len(changes.all()), want, wantChanges)
			}
		}
		step(false, true, "203.0.113.25,2001:db8::25", 1)
		z.set("db.example.com", "203.0.113.26", "2001:db8::26")
		step(false, true, "203.0.113.26,2001:db8::25", 2)
		step(false, false, "203.0.113.26,2001:db8::26", 3)
		z.set("db.example.com", "203.0.113.27", "2001:db8::27")
		step(true, false, "203.0.113.26,2001:db8::27", 4)
		z.set("db.example.com", "203.0.113.27")
		step(false, false, "203.0.113.27", 5)
		for _, family := range []string{"IPv4", "IPv6"} {
			if n := strings.Count(log.String(), `msg="name lookup incomplete" name=db.example.com missing=`+family); n != 1 {
				t.Errorf("%d lines about %s, want 1:\n%s", n, family, log)
			}
		}
	})
}

// A name is looked up when its answer expires, and at no other time, and a change is
// reported at once.
func TestFollowerKeepsToTheTTL(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, changes *reported, _ *strings.Builder) {
		z.set("db.example.com", "203.0.113.26", "203.0.113.25")
		begin := time.Now()
		f.Follow([]string{"db.example.com"}, true)
		f.Await(t.Context())
		synctest.Wait()
		if text(f, "db.example.com") != "203.0.113.25,203.0.113.26" || len(changes.all()) != 1 || time.Since(begin) != 0 {
			t.Errorf("%s after %v and %d changes", text(f, "db.example.com"), time.Since(begin), len(changes.all()))
		}
		z.set("db.example.com", "203.0.113.27")
		time.Sleep(10*time.Second - 1)
		synctest.Wait()
		if z.count("db.example.com") != 1 {
			t.Errorf("%d look-ups before the answer expires", z.count("db.example.com"))
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if text(f, "db.example.com") != "203.0.113.27" || len(changes.all()) != 2 || changes.all()[1].Sub(begin) != 10*time.Second {
			t.Errorf("%s, changes at %v, want one when the answer expires", text(f, "db.example.com"), changes.all())
		}
		r := f.Resolution("db.example.com")
		if join(r.Former) != "203.0.113.25,203.0.113.26" || !r.AnyFormer {
			t.Errorf("former addresses %v", r)
		}
		z.set("db.example.com", "203.0.113.25", "203.0.113.27") // one of them again
		time.Sleep(100 * time.Second)
		synctest.Wait()
		if r := f.Resolution("db.example.com"); join(r.Former) != "203.0.113.26" || z.count("db.example.com") != 12 || len(changes.all()) != 3 {
			t.Errorf("%v after %d look-ups and %d changes", r, z.count("db.example.com"), len(changes.all()))
		}
	})
}

// Without a usable answer the addresses stay, and the failure is logged once. A name server
// that is back is noticed within five seconds.
func TestFollowerKeepsAddresses(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, changes *reported, log *strings.Builder) {
		z.set("db.example.com", "203.0.113.25")
		f.Follow([]string{"db.example.com", "none.example.com"}, false)
		f.Await(t.Context())
		for _, answer := range [][]string{nil, {"127.0.0.1"}} {
			z.set("db.example.com", answer...)
			time.Sleep(time.Hour)
			if text(f, "db.example.com") != "203.0.113.25" {
				t.Errorf("answer %v: %s", answer, text(f, "db.example.com"))
			}
		}
		z.mu.Lock()
		z.silent["db.example.com"] = true
		z.mu.Unlock()
		time.Sleep(time.Hour)
		z.mu.Lock()
		z.silent["db.example.com"] = false
		z.mu.Unlock()
		z.set("db.example.com", "203.0.113.26")
		time.Sleep(10*time.Second + longestPause)
		synctest.Wait()
		if text(f, "db.example.com") != "203.0.113.26" || len(changes.all()) != 2 {
			t.Errorf("%s, %d changes", text(f, "db.example.com"), len(changes.all()))
		}
		for text, want := range map[string]int{
			`msg="name lookup failed" name=db.example.com error="no such name" addresses=203.0.113.25`:              1,
			`msg="addresses of a name ignored" name=db.example.com addresses="127.0.0.1 is a loopback address"`:     1,
			`msg="name lookup failed" name=db.example.com error="no usable address" addresses=203.0.113.25`:         1,
			`msg="name lookup failed" name=db.example.com error="no answer from the name servers" addresses=203.0.`: 1,
			`msg="name lookup succeeded again" name=db.example.com`:                                                 1,
			`msg="name has other addresses" name=db.example.com addresses=203.0.113.26 before=203.0.113.25`:         1,
			`msg="name lookup failed" name=none.example.com error="no such name" addresses=""`:                      1,
		} {
			if n := strings.Count(log.String(), text); n != want {
				t.Errorf("%d lines %s:\n%s", n, text, log)
			}
		}
		states, lookups, failed := f.States()
		if len(states) != 2 || states[0].Failure != "" || states[1].Failure != "no such name" || states[1].Failing.IsZero() || failed == 0 || lookups <= failed {
			t.Errorf("%+v, %d look-ups, %d failed", states, lookups, failed)
		}
	})
}

// Names that get other addresses all the time are reported at intervals, and none late.
func TestFollowerPacesChanges(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, changes *reported, _ *strings.Builder) {
		var names []string
		for i := range 50 {
			names = append(names, fmt.Sprintf("n%d.test", i))
		}
		set := func(n int) {
			for i, name := range names {
				z.set(name, fmt.Sprintf("192.0.%d.%d", i, n%250+1))
			}
		}
		set(0)
		z.mu.Lock()
		z.ttl = time.Second
		z.mu.Unlock()
		for i := range names { // each at another time
			f.Follow(names[:i+1], false)
			time.Sleep(17 * time.Millisecond)
		}
		for n := range 100 {
			set(n)
			time.Sleep(100 * time.Millisecond)
		}
		all := changes.all()
		for i := range all[1:] {
			if gap := all[i+1].Sub(all[i]); gap < pace || gap > pace+gather {
				t.Errorf("%v between two changes", gap)
			}
		}
		if len(all) < 15 {
			t.Errorf("%d changes", len(all))
		}
	})
}

// A name gets the addresses of an earlier run if it has none, until its first answer.
func TestFollowerAdopts(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, _ *reported, log *strings.Builder) {
		z.set("db.test", "192.0.2.1")
		z.silent["late.test"] = true
		f.Follow([]string{"db.test", "late.test", "never.test"}, true)
		time.Sleep(time.Minute)
		if got := fmt.Sprint(f.Without()); got != "[late.test never.test]" {
			t.Errorf("names without address: %s", got)
		}
		former := []netip.Addr{netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("127.0.0.1")}
		for _, name := range []string{"db.test", "late.test", "other.test"} {
			f.Adopt(name, former)
		}
		f.Adopt("never.test", nil)
		want := func(name, addresses string) {
			t.Helper()
			r := f.Resolution(name)
			if got := join(r.Addresses); got != addresses || !r.AnyFormer {
				t.Errorf("%s has %q (%+v), want %q", name, got, r, addresses)
			}
		}
		want("db.test", "192.0.2.1")
		want("late.test", "192.0.2.7,192.0.2.8")
		want("never.test", "")
		if !strings.Contains(log.String(), `msg="name keeps addresses of an earlier run" name=late.test addresses=192.0.2.7,192.0.2.8`) {
			t.Errorf("log:\n%s", log)
		}
		z.mu.Lock()
		z.silent["late.test"] = false
		z.mu.Unlock()
		z.set("late.test", "192.0.2.9")
		time.Sleep(time.Minute)
		want("late.test", "192.0.2.9")
	})
}

// If the first answer lacks a family, a name gets the addresses of that family alone.
func TestFollowerAdoptsAFamily(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, _ *reported, _ *strings.Builder) {
		z.set("db.test", "192.0.2.1", "2001:db8::1")
		z.silent6 = true
		f.Follow([]string{"db.test"}, true)
		f.Await(t.Context())
		if got := fmt.Sprint(f.Without()); got != "[db.test]" {
			t.Errorf("names without address of a family: %s", got)
		}
		for range 2 { // the second time it has one
			f.Adopt("db.test", []netip.Addr{netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("2001:db8::8")})
			time.Sleep(time.Minute)
			if got := text(f, "db.test"); got != "192.0.2.1,2001:db8::8" {
				t.Errorf("addresses %s", got)
			}
		}
		z.mu.Lock()
		z.silent6 = false
		z.mu.Unlock()
		time.Sleep(time.Minute)
		if got := text(f, "db.test"); got != "192.0.2.1,2001:db8::1" || len(f.Without()) != 0 {
			t.Errorf("addresses %s after the answer, without: %v", got, f.Without())
		}
	})
}

// Thousands of names are looked up with limited concurrency, and some without an answer do
// not delay the others for long. Changes are reported together.
func TestFollowerWithManyNames(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, changes *reported, _ *strings.Builder) {
		const many = 10_000
		z.ttl, z.takes = time.Minute, 10*time.Millisecond
		var names []string
		for i := range many {
			name := fmt.Sprintf("n%d.example.com", i)
			names = append(names, name)
			z.set(name, fmt.Sprintf("10.%d.%d.1", i>>8, i&255))
		}
		slices.Sort(names)
		begin := time.Now()
		f.Follow(names, false)
		f.Await(t.Context())
		synctest.Wait()
		if took := time.Since(begin); took > 2*time.Second || z.most != atOnce {
			t.Errorf("the first look-ups took %v, %d at once", took, z.most)
		}
		if n := len(changes.all()); n > 10 {
			t.Errorf("%d changes reported", n)
		}
		time.Sleep(time.Second)
		changes.reset()
		for i := range 10 {
			z.set(names[i*100], "10.99.99.99")
		}
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if n := len(changes.all()); n == 0 || n > 10 || text(f, names[900]) != "10.99.99.99" || text(f, names[901]) == "10.99.99.99" {
			t.Errorf("%d changes reported, %s", n, text(f, names[900]))
		}
		f.Follow(names[:1], false)
		asked := z.count(names[1])
		time.Sleep(time.Hour)
		if z.count(names[1]) > asked+1 || z.count(names[0]) < 50 { // one may be in progress
			t.Error("a name that is gone is looked up, or one that stays is not")
		}
		if r := f.Resolution(names[1]); len(r.Addresses) > 0 {
			t.Errorf("a name that is gone has %v", r)
		}
	})
}

// A name server is trusted with at most so many addresses.
func TestFollowerLimitsAddresses(t *testing.T) {
	following(t, func(t *testing.T, z *zone, f *Follower, _ *reported, log *strings.Builder) {
		var all []string
		for i := range 70 {
			all = append(all, fmt.Sprintf("10.0.0.%d", 100-i))
		}
		z.set("big.example.com", all...)
		f.Follow([]string{"big.example.com"}, false)
		f.Await(t.Context())
		r := f.Resolution("big.example.com")
		if len(r.Addresses) != rules.MaxAddresses || r.Addresses[0] != netip.MustParseAddr("10.0.0.31") || r.Addresses[63] != netip.MustParseAddr("10.0.0.94") {
			t.Errorf("%d addresses, from %s to %s", len(r.Addresses), r.Addresses[0], r.Addresses[len(r.Addresses)-1])
		}
		if !strings.Contains(log.String(), `addresses="6 of 70 of IPv4"`) {
			t.Errorf("no warning:\n%s", log)
		}
	})
}
