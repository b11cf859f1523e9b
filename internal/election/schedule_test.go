package election

import (
	"flag"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// TestSchedules by hand: go test ./internal/election -run 'TestSchedules$' -v -seed 42
var (
	seedFlag      = flag.Uint64("seed", 0, "replay this seed of TestSchedules with a trace")
	firstFlag     = flag.Uint64("first", 1, "first seed of TestSchedules")
	schedulesFlag = flag.Int("schedules", 0, "number of schedules of TestSchedules")
)

// bound is the time from the end of the last fault to a holder that stays. In the worst case
// a router lost to one whose heartbeats it did not hear, and stays away.
const bound = 8 * time.Second

// rounds is the number of schedules in one world, one after the other.
const rounds = 10

// play runs the schedules of a seed. It returns what went wrong, the number of schedules
// and the longest time to settle.
func play(seed uint64, b breaks, trace bool) (w *world, failure string, longest time.Duration) {
	interval := DefaultInterval
	if seed%4 == 0 {
		interval = []time.Duration{MinInterval, 15 * time.Millisecond, 50 * time.Millisecond}[seed/4%3]
	}
	w = newWorld(seed, 2+int(seed%3), interval, b, trace)
	if _, ok := w.settle(w.now + bound); !ok && w.violation == "" {
		return w, "no holder after the start", 0
	}
	for range rounds {
		if w.violation != "" {
			break
		}
		w.schedule()
		ended := w.now
		since, ok := w.settle(w.now + bound)
		if !ok && w.violation == "" {
			return w, fmt.Sprintf("no holder %v after the last fault", bound), longest
		}
		longest = max(longest, since-ended)
	}
	return w, w.violation, longest
}

// schedule runs random faults until they have ended.
func (w *world) schedule() {
	w.faulty = true
	for _, r := range w.routers {
		w.after(w.duration(20*time.Millisecond, 500*time.Millisecond), happening{kind: hSpeak, to: r.index})
	}
	n := 1
	for n < 4 && w.rng.IntN(10) < 4 {
		n++
	}
	end := w.now
	for range n {
		start := time.Duration(w.rng.Int64N(int64(150 * time.Millisecond)))
		w.call(start, func() { end = max(end, w.now+w.fault()) })
	}
	w.run(w.now + 150*time.Millisecond)
	for w.now < end && w.violation == "" {
		w.run(end)
	}
	w.faulty = false
	for _, r := range w.routers {
		r.upLoss, r.downLoss, r.beatLoss, r.isolated, r.slow = 0, 0, 0, false, 0
		r.deaf, r.blind, r.upLag, r.downLag = 0, 0, 0, 0
	}
	w.run(w.now + time.Millisecond)
	// Everything that was paused or delayed ends too.
	for _, r := range w.routers {
		end = max(end, r.paused, r.arrived)
	}
	w.run(max(end, w.now))
	for _, r := range w.routers {
		if r.ended || !r.alive {
			r.start()
		}
		if r.unready {
			r.unready = false
			r.post(Event{Kind: Ready, OK: true})
		}
		if !r.link {
			r.link = true
			r.post(Event{Kind: Link, OK: true})
		}
		r.post(Event{Kind: Reference, OK: true})
	}
}

// Faults by number, as far as a test names them.
const (
	deaf    = 19
	lagUp   = 22
	lagDown = 23
	upgrade = 24
	faults  = 26
)

// fault begins a random fault, and returns how long it lasts.
func (w *world) fault() time.Duration {
	r := w.routers[w.rng.IntN(len(w.routers))]
	if h := w.holder(); h != nil && w.rng.IntN(3) > 0 {
		r = h
	}
	d := w.duration(10*time.Millisecond, 600*time.Millisecond)
	restart := func(r *router, d time.Duration) {
		w.after(d, happening{kind: hStart, to: r.index, gen: r.gen})
	}
	if w.trace != nil {
		fmt.Fprintf(w.trace, "%12v fault on r%d for %v\n", w.now, r.index, d)
	}
	kind := w.rng.IntN(faults)
	if w.breaks.likely > 0 && w.rng.IntN(2) == 0 {
		kind = w.breaks.likely
	}
	switch kind {
	case 0:
		r.kill()
		restart(r, d)
	case 1:
		r.lose()
		restart(r, d)
	case 2, 3:
		if w.rng.IntN(4) == 0 {
			d = w.duration(20*time.Millisecond, 2*time.Second)
		}
		r.pause(d)
	case 4, 5:
		r.post(Event{Kind: Leave})
	case 6:
		r.link = false
		w.after(time.Duration(w.rng.Int64N(int64(5*time.Millisecond))), w.withEvent(happening{kind: hEvent, to: r.index, gen: r.gen}, &Event{Kind: Link}))
		w.call(d, func() {
			r.link = true
			r.post(Event{Kind: Link, OK: true})
		})
	case 7:
		r.isolated = true
		w.after(w.duration(time.Millisecond, 500*time.Millisecond), w.withEvent(happening{kind: hEvent, to: r.index, gen: r.gen}, &Event{Kind: Reference}))
	case 8:
		r.upLoss, r.downLoss = 1, 1
		w.call(d, func() { r.upLoss, r.downLoss = 0, 0 })
	case 9:
		r.upLoss, r.downLoss, r.isolated = 1, 1, true
		w.call(d, func() { r.upLoss, r.downLoss, r.isolated = 0, 0, false })
	case 10:
		r.upLoss = 0.3 + 0.7*w.rng.Float64()
	case 11:
		r.downLoss = 0.3 + 0.7*w.rng.Float64()
	case 12, 13:
		r.beatLoss = 0.3 + 0.9*w.rng.Float64()
	case 14:
		w.owner = -1
	case 15:
		w.silent = w.now + d
	case 16:
		for _, r := range w.routers {
			r.kill()
			restart(r, d+time.Duration(w.rng.Int64N(int64(5*time.Millisecond))))
		}
	case 17:
		r.unready = true
		r.post(Event{Kind: Ready})
	case 18:
		for _, r := range w.routers {
			r.slow = 40 * time.Millisecond
		}
	case deaf, deaf + 1, deaf + 2:
		// Two routers do not reach each other, or only one of the other.
		except := uint8(w.rng.Uint32())
		for _, p := range w.routers {
			if p != r && except>>p.index&1 == 0 {
				p.deaf |= 1 << r.index
				p.blind |= 1 << r.index
			}
		}
		if except>>7 == 0 {
			r.deaf, r.blind = ^except, ^except
		}
	case lagUp:
		r.upLag = w.duration(time.Millisecond, 150*time.Millisecond)
		w.call(d, func() { r.upLag = 0 })
	case lagDown:
		r.downLag = w.duration(time.Millisecond, 150*time.Millisecond)
		if w.rng.IntN(2) == 0 {
			// Just fast enough for the permit, while the others claim. Its process freezes
			// then: only replies under way extend the permit.
			w.became = func(o *router, a *Action) {
				if o != r && a.To == Claiming {
					w.became = nil
					r.pause(200 * time.Millisecond)
				}
			}
			w.call(d, func() { w.became = nil })
			r.downLag = time.Duration(15+w.rng.IntN(65)) * time.Millisecond
			for _, p := range w.routers {
				p.deaf |= 1 << r.index
				p.blind |= 1 << r.index
			}
		}
		w.call(d, func() { r.downLag = 0 })
	case upgrade, upgrade + 1:
		w.upgrade(w.routers[w.rng.IntN(len(w.routers))])
	}
	return d
}

// upgrade is a hand-over while another router does not hear the rest: it claims at the same
// time, and the router that takes over may be slow.
func (w *world) upgrade(other *router) {
	h := w.holder()
	if h == nil || h == other {
		return
	}
	other.deaf, other.blind = 0xff, 0xff
	between := func(from, to int) time.Duration { return time.Duration(from+w.rng.IntN(to-from)) * time.Millisecond }
	if w.rng.IntN(3) == 0 {
		// The other router has claimed, and the holder loses its link shortly before its
		// permit ends. The frames of the next one get lost until the other one opens.
		w.became = func(r *router, a *Action) {
			if r != other || a.To != Claiming {
				return
			}
			w.became = nil
			h.upLoss = 1
			w.call(between(60, 80), func() {
				h.link = false
				h.post(Event{Kind: Link})
				for _, r := range w.routers {
					if r != h && r != other {
						r.upLoss = 1
					}
				}
			})
			w.call(between(110, 130), func() {
				for _, r := range w.routers {
					r.upLoss = 0
				}
			})
		}
		w.call(150*time.Millisecond, func() { w.became = nil })
		return
	}
	w.call(50*time.Millisecond+time.Duration(w.rng.Int64N(int64(150*time.Millisecond))), func() {
		if w.rng.IntN(2) == 0 {
			h.post(Event{Kind: Leave})
		} else {
			h.link = false
			h.post(Event{Kind: Link})
		}
		if w.rng.IntN(2) == 0 {
			h.beatLoss = 0.8
		}
		for _, r := range w.routers {
			if r != h && r != other && w.rng.IntN(2) == 0 {
				loss := 0.5 + 0.6*w.rng.Float64()
				r.upLoss = loss
				w.call(w.duration(20*time.Millisecond, 300*time.Millisecond), func() { r.upLoss = 0 })
			}
		}
	})
}

// count returns the number of schedules.
func count() int {
	if *schedulesFlag > 0 {
		return *schedulesFlag
	}
	if nstest.Long() {
		return 1_000_000
	}
	return 5_000
}

// TestSchedules runs random faults: at no instant are two gates open, and when the faults
// have ended one router holds the address within the bound.
func TestSchedules(t *testing.T) {
	if *seedFlag != 0 {
		w, failure, _ := play(*seedFlag, breaks{}, true)
		t.Logf("seed %d: %s\n%s", *seedFlag, failure, w.trace)
		return
	}
	begin := time.Now()
	seed, failure, longest := search((count()+rounds-1)/rounds, breaks{}, "")
	t.Logf("%d schedules in %v, longest time without a holder after the last fault %v", count(), time.Since(begin).Round(time.Millisecond), longest)
	if failure != "" {
		w, failure, _ := play(seed, breaks{}, true)
		t.Fatalf("seed %d: %s\n%s", seed, failure, tail(w.trace.String(), 150))
	}
}

// search plays n seeds on all processors, and returns the first failure with a text.
func search(n int, b breaks, want string) (seed uint64, failure string, longest time.Duration) {
	var next atomic.Uint64
	next.Store(*firstFlag - 1)
	var mu sync.Mutex
	var group sync.WaitGroup
	var found atomic.Bool
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for !found.Load() {
				s := next.Add(1)
				if s >= *firstFlag+uint64(n) {
					return
				}
				_, f, l := play(s, b, false)
				mu.Lock()
				longest = max(longest, l)
				if f != "" && failure == "" && strings.Contains(f, want) {
					seed, failure = s, f
					found.Store(true)
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	return seed, failure, longest
}

func tail(s string, n int) string {
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
