// Package lookup follows the addresses of names: it looks each up again when its answer
// expires, and keeps the last addresses while there is no better answer.
package lookup

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/rules"
)

const (
	// atOnce is the number of concurrent look-ups: more than the resolver sends at a time, so
	// that it ends those without an answer in favour of the others.
	atOnce = 128
	// Look-ups that fail are repeated after firstPause, then after twice the time, up to
	// longestPause: a name server that is back is noticed soon.
	firstPause   = time.Second
	longestPause = 5 * time.Second
	// gather is how long a change waits for those of look-ups in progress. Without any, it
	// does not wait.
	gather = 250 * time.Millisecond
	// pace is the shortest time between two changes: among thousands of names, some may get
	// other addresses all the time, and each change loads rules.
	pace = 500 * time.Millisecond
	// mostFormer is the number of addresses of a name that are known to be former ones: a
	// name server may answer with others each time.
	mostFormer = 1024
)

// A Follower follows names. Its methods may be called from any goroutine.
type Follower struct {
	// Lookup returns the addresses of a name, and when they expire.
	Lookup func(ctx context.Context, name string) (resolver.Answer, error)
	// Unusable returns why no line could have an address, empty if one could. It is
	// called for new addresses.
	Unusable func(netip.Addr) string
	// Changed is called after a name has got other addresses. It is not called
	// concurrently.
	Changed func()
	Log     *slog.Logger

	mu      sync.Mutex // guards the fields below
	names   map[string]*entry
	queue   queue
	running int
	wake    chan struct{}   // receives a value after a change of names
	first   []chan struct{} // closed when each name has been looked up
	untried int
	lookups uint64
	failed  uint64
}

// A State is what is known of a name.
type State struct {
	Name      string
	Addresses []netip.Addr // sorted; none: no answer yet
	Since     time.Time    // of these addresses; without any, of the first look-up
	Failure   string       // error of the last look-up; empty: none
	Failing   time.Time    // time of the first look-up that failed since the last success
}

type entry struct {
	State
	former   []netip.Addr
	any      bool // it may have had other addresses before the start of the program
	failures int
	refused  string // addresses that are not used, for the log
	missing  string // family without an answer, for the log
	due      time.Time
	index    int  // in the queue
	gone     bool // no longer in the list
	tried    bool
}

// Follow sets the names. Those of a start may have had addresses before.
func (f *Follower) Follow(list []string, start bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.init()
	in := make(map[string]bool, len(list))
	for _, name := range list {
		in[name] = true
		if f.names[name] == nil {
			e := &entry{State: State{Name: name, Since: time.Now()}, any: start, due: time.Now()}
			f.names[name] = e
			f.untried++
			heap.Push(&f.queue, e)
		}
	}
	for name, e := range f.names {
		if !in[name] {
			if e.gone = true; !e.tried {
				f.untried--
			}
			if e.index >= 0 {
				heap.Remove(&f.queue, e.index)
			}
			delete(f.names, name)
		}
	}
	f.tried()
	f.signal()
}

// Distinct records that a name has had no addresses before the start of the program, as on
// a line that had something else: connections of that line to another server end.
func (f *Follower) Distinct(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := f.names[name]; e != nil {
		e.any = false
	}
}

// Without returns the names that have no address yet, or none of a family for which no name
// server has answered, sorted.
func (f *Follower) Without() (names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(f.names)) {
		if e := f.names[name]; len(e.Addresses) == 0 || e.missing != "" {
			names = append(names, name)
		}
	}
	return names
}

// Adopt gives a name without an address, or without one of a family, those that it had before
// the start of the program, until the first answer. It calls Unusable, and not Changed.
func (f *Follower) Adopt(name string, former []netip.Addr) {
	usable, _ := f.usable(former)
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.names[name]
	if e == nil {
		return
	}
	usable = slices.DeleteFunc(usable, func(a netip.Addr) bool {
		same := func(has netip.Addr) bool { return has.Is4() == a.Is4() }
		return slices.ContainsFunc(e.Addresses, same) || len(e.Addresses) > 0 && e.missing != rules.FamilyOf(a).String()
	})
	if len(usable) > 0 {
		e.Addresses, e.Since = byFamily(e.Addresses, usable), time.Now()
		f.Log.Info("name keeps addresses of an earlier run", "name", name, "addresses", join(usable))
	}
}

func (f *Follower) init() {
	if f.names == nil {
		f.names, f.wake = make(map[string]*entry), make(chan struct{}, 1)
	}
}

func (f *Follower) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Resolution returns the addresses of a name.
func (f *Follower) Resolution(name string) rules.Resolution {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := f.names[name]; e != nil {
		return rules.Resolution{Addresses: slices.Clone(e.Addresses), Former: slices.Clone(e.former), AnyFormer: e.any}
	}
	return rules.Resolution{}
}

// States returns what is known of each name, sorted by name, and the number of look-ups
// and of those that failed.
func (f *Follower) States() (states []State, lookups, failed uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(f.names)) {
		s := f.names[name].State
		s.Addresses = slices.Clone(s.Addresses)
		states = append(states, s)
	}
	return states, f.lookups, f.failed
}

// Await waits until each name has been looked up once, or the context ends.
func (f *Follower) Await(ctx context.Context) {
	f.mu.Lock()
	f.init()
	done := make(chan struct{})
	f.first = append(f.first, done)
	f.tried()
	f.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// tried ends every Await if each name has been looked up.
func (f *Follower) tried() {
	if f.untried > 0 {
		return
	}
	for _, done := range f.first {
		close(done)
	}
	f.first = nil
}

// Run looks names up until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	f.mu.Lock()
	f.init()
	f.mu.Unlock()
	var background sync.WaitGroup
	defer background.Wait()
	finished := make(chan bool, atOnce) // whether the name has changed
	timer := time.NewTimer(0)
	defer timer.Stop()
	var changed, last time.Time // of the first change that is not reported; of the last report; zero: none
	for {
		f.mu.Lock()
		now := time.Now()
		wait := time.Hour
		for f.running < atOnce && len(f.queue) > 0 {
			e := f.queue[0]
			if wait = e.due.Sub(now); wait > 0 {
				break
			}
			heap.Pop(&f.queue)
			wait = time.Hour
			f.running++
			background.Go(func() {
				answer, err := f.Lookup(ctx, e.Name)
				finished <- ctx.Err() == nil && f.finish(e, answer, err)
			})
		}
		if f.running == atOnce {
			wait = time.Hour // until one ends
		}
		idle := f.running == 0
		f.mu.Unlock()
		if !changed.IsZero() {
			left := gather - now.Sub(changed)
			if idle {
				left = 0
			}
			if left = max(left, pace-now.Sub(last)); left <= 0 {
				changed, last = time.Time{}, now
				f.Changed()
				continue
			}
			wait = min(wait, left)
		}
		timer.Reset(max(wait, 0))
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		case other := <-finished:
			f.mu.Lock()
			f.running--
			f.mu.Unlock()
			if other && changed.IsZero() {
				changed = time.Now()
			}
		}
	}
}

// finish records the result of a look-up, and reports whether the name has other
// addresses.
func (f *Follower) finish(e *entry, answer resolver.Answer, err error) (changed bool) {
	now := time.Now()
	usable, refused := f.usable(answer.Addrs)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lookups++
	if e.gone {
		return false
	}
	if err == nil && refused != e.refused {
		if e.refused = refused; refused != "" {
			f.Log.Warn("addresses of a name ignored", "name", e.Name, "addresses", refused)
		}
	}
	if err == nil && len(usable) == 0 {
		err = errors.New("no usable address")
	}
	f.incomplete(e, answer, err)
	if answer.OnlyIPv4 || answer.OnlyIPv6 { // those of the other family stay
		usable = byFamily(usable, slices.DeleteFunc(slices.Clone(e.Addresses), func(a netip.Addr) bool { return a.Is4() == answer.OnlyIPv4 }))
	}
	switch {
	case err != nil:
		f.failed++
		f.fail(e, err, now)
	default:
		changed = f.succeed(e, usable, now)
		if e.due = answer.Expires; !e.due.After(now) {
			e.due = now.Add(resolver.MinTTL)
		}
	}
	if !e.tried {
		e.tried = true
		f.untried--
		f.tried()
	}
	heap.Push(&f.queue, e)
	return changed
}

// byFamily returns the addresses of two lists, IPv4 first.
func byFamily(a, b []netip.Addr) []netip.Addr {
	all := slices.Concat(a, b)
	slices.SortStableFunc(all, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return all
}

// incomplete logs that the addresses of one family are not known, once.
func (f *Follower) incomplete(e *entry, answer resolver.Answer, err error) {
	missing := ""
	switch {
	case err != nil:
		return
	case answer.OnlyIPv4:
		missing = rules.IPv6.String()
	case answer.OnlyIPv6:
		missing = rules.IPv4.String()
	}
	if e.missing != missing && missing != "" {
		f.Log.Warn("name lookup incomplete", "name", e.Name, "missing", missing)
	}
	e.missing = missing
}

// fail records a look-up that failed. The addresses stay, also if the name server answers
// that there is none: most often that is a fault, or an interval between two states.
func (f *Follower) fail(e *entry, err error, now time.Time) {
	pause := longestPause
	if e.failures < 3 {
		pause = firstPause << e.failures
	}
	e.failures++
	e.due = now.Add(min(pause, longestPause))
	text := reason(err)
	if e.Failure == "" {
		e.Failing = now
	}
	if e.Failure != text {
		f.Log.Warn("name lookup failed", "name", e.Name, "error", text, "addresses", join(e.Addresses))
	}
	e.Failure = text
}

// reason returns an error without the name, which may be in it.
func reason(err error) string {
	if e, ok := errors.AsType[*resolver.Error](err); ok {
		if e.Cause != nil {
			return fmt.Sprintf("%v: %v", e.Err, e.Cause)
		}
		return e.Err.Error()
	}
	return err.Error()
}

func (f *Follower) succeed(e *entry, usable []netip.Addr, now time.Time) (changed bool) {
	level := slog.LevelInfo
	if len(e.Addresses) == 0 && e.failures == 0 {
		level = slog.LevelDebug // there may be thousands at the start
	}
	if e.failures > 0 {
		f.Log.Info("name lookup succeeded again", "name", e.Name)
	}
	e.failures, e.Failure, e.Failing = 0, "", time.Time{}
	if slices.Equal(usable, e.Addresses) {
		return false
	}
	f.Log.Log(context.Background(), level, "name has other addresses", "name", e.Name, "addresses", join(usable), "before", join(e.Addresses))
	for _, a := range e.Addresses {
		if !slices.Contains(usable, a) {
			e.former = append(e.former, a)
		}
	}
	e.former = slices.DeleteFunc(e.former, func(a netip.Addr) bool { return slices.Contains(usable, a) })
	e.former = slices.Delete(e.former, 0, max(0, len(e.former)-mostFormer))
	e.Addresses, e.Since = usable, now
	return true
}

// usable returns the addresses of an answer that a line could have, sorted, and describes
// the others.
func (f *Follower) usable(found []netip.Addr) (usable []netip.Addr, refused string) {
	var reasons []string
	found = slices.Clone(found)
	slices.SortFunc(found, netip.Addr.Compare)
	per := make(map[rules.Family]int)
	for _, a := range slices.Compact(found) {
		family := rules.FamilyOf(a)
		if why := f.Unusable(a); why != "" {
			reasons = append(reasons, fmt.Sprintf("%s is %s", a, why))
			continue
		}
		if per[family]++; per[family] > rules.MaxAddresses {
			continue
		}
		usable = append(usable, a)
	}
	for family, n := range per {
		if n > rules.MaxAddresses {
			reasons = append(reasons, fmt.Sprintf("%d of %d of %s", n-rules.MaxAddresses, n, family))
		}
	}
	slices.Sort(reasons)
	const most = 5
	if len(reasons) > most {
		reasons = append(reasons[:most], fmt.Sprintf("%d more", len(reasons)-most))
	}
	return usable, strings.Join(reasons, ", ")
}

func join(all []netip.Addr) string {
	var b []byte
	for _, a := range all {
		b = append(a.AppendTo(b), ',')
	}
	return strings.TrimSuffix(string(b), ",")
}

// A queue has entries by the time of their next look-up (container/heap).
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return cmp.Compare(q[i].due.UnixNano(), q[j].due.UnixNano()) < 0 }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push appends an entry.
func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(*q)
	*q = append(*q, e)
}

// Pop removes the last entry.
func (q *queue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	e.index = -1
	return e
}
