package election

import (
	"slices"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// settled returns a world without faults in which a router holds the address, some time
// after it began to.
func settled(t *testing.T, seed uint64, n int) (*world, *router) {
	t.Helper()
	w := newWorld(seed, n, DefaultInterval, breaks{}, true)
	if _, ok := w.settle(w.now + time.Second); !ok {
		t.Fatalf("no holder after a second:\n%s", w.trace)
	}
	w.run(w.now + time.Duration(w.rng.Int64N(int64(time.Second))))
	h := w.holder()
	if h == nil {
		t.Fatalf("no holder:\n%s", w.trace)
	}
	return w, h
}

// TestTakeover measures how long no gate is open, for each cause. The limits follow from
// the interval I = 20 ms; the holder's last ping left up to I before the event.
func TestTakeover(t *testing.T) {
	s := Settings{Interval: DefaultInterval}
	const (
		slack = 5 * time.Millisecond // network, ticks of the kernel
		probe = (probes-1)*claimGap + probeEnd
	)
	claim := s.Detection() + probe + s.Opening() + slack
	for _, test := range []struct {
		name  string
		event func(w *world, h *router)
		// limit: detection, probe and wait, from the last heartbeat.
		limit time.Duration
		// design is what a prototype measured with real kernels.
		design string
	}{
		// No heartbeats, and no answer to the probe.
		{"power loss", func(_ *world, h *router) { h.lose() }, claim, "189 to 196 ms"},
		// The kernel answers probes until the permit ends; the next one follows after I. It
		// ended L2 - I after the event at the earliest.
		{"process killed", func(_ *world, h *router) { h.kill() }, claim - s.Permit() + 3*s.Interval, "145 to 181 ms"},
		{"process frozen", func(_ *world, h *router) { h.pause(time.Hour) }, claim - s.Permit() + 3*s.Interval, "140 ms"},
		{"link lost", func(_ *world, h *router) {
			h.link = false
			h.post(Event{Kind: Link})
		}, slack, "12 ms"},
		{"not ready", func(_ *world, h *router) {
			h.post(Event{Kind: Ready})
		}, slack, ""},
		{"planned", func(_ *world, h *router) { h.post(Event{Kind: Leave}) }, slack, "12 ms"},
		// The holder stays open as long as its permit lives, and asks the gateway for as
		// long as the detection takes; its heartbeats go on meanwhile.
		{"gateway not reached", func(_ *world, h *router) { h.upLoss = 1 }, claim + 2*s.Detection(), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var gaps []time.Duration
			for seed := range uint64(101) {
				w, h := settled(t, seed+1, 2+int(seed%3))
				w.trace.Reset()
				test.event(w, h)
				begin := w.now
				taken := func() bool {
					return slices.ContainsFunc(w.routers, func(r *router) bool { return r != h && r.permits() })
				}
				for !taken() {
					if h.permits() {
						begin = w.now
					}
					if w.now-begin > time.Second {
						t.Fatalf("seed %d: no holder after a second:\n%s", seed+1, w.trace)
					}
					w.run(w.now + 100*time.Microsecond)
				}
				gaps = append(gaps, w.now-begin)
				if w.now-begin > test.limit {
					t.Errorf("seed %d: taken over after %v, limit %v:\n%s", seed+1, w.now-begin, test.limit, w.trace)
					break
				}
			}
			slices.Sort(gaps)
			t.Logf("no gate open for %v to %v, median %v (limit %v, measured with a prototype: %s)", round(gaps[0]), round(gaps[len(gaps)-1]), round(gaps[len(gaps)/2]), test.limit, test.design)
		})
	}
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// TestRestart kills the holder's process and starts another one within the permit: it goes
// on with the permit, and no peer takes over.
func TestRestart(t *testing.T) {
	for seed := range uint64(100) {
		w, h := settled(t, seed+1, 2+int(seed%3))
		h.kill()
		w.after(time.Duration(w.rng.Int64N(int64(2*DefaultInterval))), happening{kind: hStart, to: h.index, gen: h.gen})
		for end := w.now + time.Second; w.now < end; w.run(w.now + 100*time.Microsecond) {
			if !h.permits() {
				t.Fatalf("seed %d: gate shut:\n%s", seed+1, w.trace)
			}
		}
		if w.holder() != h || h.m.now-h.m.held > 2*DefaultInterval {
			t.Fatalf("seed %d: not active, or its replies do not count:\n%s", seed+1, w.trace)
		}
	}
}

// TestNoFalseTakeover runs routers for hours without faults: the first takeover is the
// only one.
func TestNoFalseTakeover(t *testing.T) {
	duration := 10 * time.Minute
	if nstest.Long() {
		duration = 12 * time.Hour
	}
	for n := 1; n <= 4; n++ {
		w, h := settled(t, uint64(n), n)
		w.trace = nil
		w.became = func(r *router, a *Action) {
			t.Errorf("%d routers: router %d became %v from %v after %v: %s", n, r.index, a.To, a.From, w.now, a.Reason)
		}
		for range duration / time.Second {
			// One heartbeat in a hundred is lost.
			for _, r := range w.routers {
				r.beatLoss = 0.01
			}
			w.run(w.now + time.Second)
			if !h.permits() {
				t.Fatalf("%d routers: gate shut at %v", n, w.now)
			}
		}
	}
}
