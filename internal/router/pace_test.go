package router

import (
	"testing"
	"testing/synctest"
	"time"
)

// Each pause is twice the one before, up to the longest, and shortened at random by
// up to a quarter.
func TestPause(t *testing.T) {
	for n := range 40 {
		want := longestPause
		if n < 20 && firstPause<<n < longestPause {
			want = firstPause << n
		}
		shortest, longest := longestPause, time.Duration(0)
		for range 1000 {
			d := pause(n)
			shortest, longest = min(shortest, d), max(longest, d)
		}
		if longest > want || shortest < want-want/4 {
			t.Errorf("pause %d is from %s to %s, want at most %s and a quarter less", n, shortest, longest, want)
		}
		if longest-shortest < want/8 {
			t.Errorf("pause %d is from %s to %s: all routers would go on at one time", n, shortest, longest)
		}
	}
}

// A comparison without failure resets the failures.
func TestPaceFailed(t *testing.T) {
	var p pace
	now := time.Now()
	for name, succeed := range map[string]func(){"in sync": func() { p.inSync(time.Millisecond, time.Now()) }, "repaired": func() { p.repaired("this", now) }} {
		for n := range 3 {
			if d := p.failed(); d > firstPause<<n || d < firstPause<<n*3/4 {
				t.Errorf("%s: after failure %d: %s", name, n+1, d)
			}
		}
		succeed()
	}
	if d := p.failed(); d > firstPause {
		t.Errorf("%s after the first failure", d)
	}
}

// The same repair, repeatedly and soon after the last one, is contested. Another
// repair, or the same one later, is not.
func TestPaceRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		contest := func(p *pace, times int) (wait time.Duration, contested bool) {
			for range times {
				time.Sleep(wait + contestWithin - 1)
				wait, contested = p.repaired("this", time.Now())
			}
			return wait, contested
		}
		var p pace
		if wait, contested := contest(&p, contestAfter); wait > 0 || contested {
			t.Errorf("repaired %d times: wait %s, contested %v", contestAfter, wait, contested)
		}
		last := time.Duration(0)
		for n := range 12 {
			wait, contested := contest(&p, 1)
			if !contested || held(p.lastAt, time.Now()) {
				t.Errorf("repair %d: not contested", contestAfter+1+n)
			}
			if wait > longestPause || wait < min(last, longestPause*3/4) {
				t.Errorf("repair %d: wait %s after one of %s", contestAfter+1+n, wait, last)
			}
			last = wait
		}
		if last < longestPause*3/4 {
			t.Errorf("the wait does not get longer than %s", last)
		}
		// It must last longer than the longest delay of the next repair.
		time.Sleep(contestWithin + longestPause - 1)
		if held(p.lastAt, time.Now()) {
			t.Error("it holds already")
		}
		time.Sleep(time.Nanosecond)
		if !held(p.lastAt, time.Now()) {
			t.Error("it does not hold")
		}
		if wait, contested := p.repaired("this", time.Now()); wait > 0 || contested {
			t.Errorf("after it held: wait %s, contested %v", wait, contested)
		}

		contest(&p, contestAfter+1)
		if wait, contested := p.repaired("that", time.Now()); wait > 0 || contested {
			t.Errorf("another repair: wait %s, contested %v", wait, contested)
		}
	})
}

// Two repairs that are undone in turn, without pause, are contested after
// contestOften of each within contestWithin, and wait longer each time; less often
// they are not.
func TestPaceRepairedInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const often = contestWithin / (2*contestOften + 2) // each contestOften+1 times
		for _, every := range []time.Duration{often, 2 * often} {
			var p pace
			waits := 0
			for n := range 8 * contestOften {
				wait, contested := p.repaired([]string{"this", "that"}[n%2], time.Now())
				if contested != (wait > 0) {
					t.Errorf("repair %d: wait %s, contested %v", n+1, wait, contested)
				}
				if contested {
					waits++
				}
				if want := every == often && n == 2*contestOften; contested && waits == 1 && !want {
					t.Errorf("every %s: repair %d is contested", every, n+1)
				}
				time.Sleep(max(wait, every))
			}
			if (waits > 0) != (every == often) {
				t.Errorf("every %s: %d repairs are contested", every, waits)
			}
		}
	})
}

// Intervals that end together fire once, and missed ones are skipped.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClock(10*time.Second, 30*time.Second)
		defer c.Stop()
		begin := time.Now()
		for _, want := range []struct {
			after time.Duration
			over  [2]bool
		}{
			{10 * time.Second, [2]bool{true, false}},
			{20 * time.Second, [2]bool{true, false}},
			{30 * time.Second, [2]bool{true, true}},
			{40 * time.Second, [2]bool{true, false}},
		} {
			<-c.C
			if over := c.due(); over != want.over || time.Since(begin) != want.after {
				t.Errorf("after %s: %v, want %v after %s", time.Since(begin), over, want.over, want.after)
			}
		}
		time.Sleep(85 * time.Second) // to 125 s
		<-c.C
		if over := c.due(); over != [2]bool{true, true} {
			t.Errorf("after a pause: %v", over)
		}
		if <-c.C; time.Since(begin) != 130*time.Second || c.due() != [2]bool{true, false} {
			t.Errorf("then after %s", time.Since(begin))
		}
		never := newClock(0, 0)
		defer never.Stop()
		select {
		case <-never.C:
			t.Error("0 is not never")
		case <-time.After(time.Hour):
		}
	})
}

// The first comparisons without drift follow each other at once; then there is a
// rest between them.
func TestPaceRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 2 {
			for n := range 2 * restAfter {
				if rest := p.inSync(time.Millisecond, time.Now()); (rest > 0) != (n >= restAfter) || rest > restFactor*time.Millisecond {
					t.Errorf("comparison %d: a rest of %s", n+1, rest)
				}
			}
			time.Sleep(restWithin + 1)
		}
	})
}
