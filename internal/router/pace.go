package router

import (
	"math/rand/v2"
	"slices"
	"time"
)

// The pauses of a router that stays, after failures and contested repairs.
const (
	// firstPause follows the first failed repair, whose cause often is a
	// concurrent change; each later pause is twice the one before, up to
	// longestPause.
	firstPause   = 20 * time.Millisecond
	longestPause = 30 * time.Second
	// A repair is contested if it is reverted within contestWithin,
	// contestAfter times in a row. Its pauses begin with the one after
	// contestPauses failures, 320 ms.
	contestWithin = 10 * time.Second
	contestAfter  = 5
	contestPauses = 4
	// A repair is also contested if it is done more than contestOften times
	// within contestWithin, even with other repairs in between.
	contestOften = 20
	// After maxConflicts the address is probed once in rateLimit
	// (RFC 5227, section 1.1, MAX_CONFLICTS and RATE_LIMIT_INTERVAL).
	maxConflicts = 10
	rateLimit    = time.Minute
	// After restAfter comparisons without drift within restWithin, the pause
	// between two of them is restFactor times the duration of one, so that a
	// program that changes the namespace continuously does not keep a processor
	// busy here too.
	restFactor = 4
	restAfter  = 5
	restWithin = time.Second
)

// A pace computes the time of the next comparison.
type pace struct {
	failures int

	syncs      int // comparisons without drift
	syncsSince time.Time

	last   string       // the last repair
	lastAt time.Time    // its time
	again  int          // number of the same repairs before it, each soon after the other
	recent []repairDone // repairs within contestWithin
}

// A repairDone is a repair and its time.
type repairDone struct {
	what string
	at   time.Time
}

// failed returns the pause after a failed repair.
func (p *pace) failed() time.Duration {
	p.failures++
	return pause(p.failures - 1)
}

// inSync returns the pause after a comparison without drift that took some time.
func (p *pace) inSync(took time.Duration, now time.Time) (rest time.Duration) {
	p.failures = 0
	if now.Sub(p.syncsSince) > restWithin {
		p.syncsSince, p.syncs = now, 0
	}
	if p.syncs++; p.syncs <= restAfter {
		return 0
	}
	return restFactor * took
}

// repaired returns the pause after a repair, and whether the repair is contested.
func (p *pace) repaired(done string, now time.Time) (wait time.Duration, contested bool) {
	p.failures = 0
	if done == p.last && now.Sub(p.lastAt) < contestWithin+p.waited() {
		p.again++
	} else {
		p.again = 0
	}
	p.last, p.lastAt = done, now
	p.recent = slices.DeleteFunc(p.recent, func(r repairDone) bool { return now.Sub(r.at) >= contestWithin })
	p.recent = append(p.recent, repairDone{done, now})
	often := 0
	for _, r := range p.recent {
		if r.what == done {
			often++
		}
	}
	if often > contestOften {
		p.again = max(p.again, contestAfter+often-contestOften-1)
	}
	if p.again < contestAfter {
		return 0, false
	}
	return pause(p.again - contestAfter + contestPauses), true
}

// waited returns the longest delay of the last repair.
func (p *pace) waited() time.Duration {
	if p.again < contestAfter {
		return 0
	}
	return longestPause
}

// held reports whether a contested repair has lasted longer than any interval
// between its reverts.
func held(repaired, now time.Time) bool { return now.Sub(repaired) >= contestWithin+longestPause }

// pause returns the nth pause, from 0, shortened at random, so that routers that
// fail for the same reason do not retry at the same time.
func pause(n int) time.Duration {
	d := longestPause
	if n < 16 {
		d = min(d, firstPause<<n)
	}
	return d - rand.N(d/4)
}

// A clock fires when one of two intervals ends, and once if both end, so that both
// actions run together.
type clock struct {
	*time.Timer
	every [2]time.Duration // 0: never
	next  [2]time.Time
}

func newClock(every ...time.Duration) *clock {
	c := &clock{Timer: time.NewTimer(0), every: [2]time.Duration(every)}
	now := time.Now()
	for i, d := range c.every {
		c.next[i] = now.Add(d)
	}
	c.set(now)
	return c
}

// due returns the intervals that ended, and begins the next ones. It is called
// each time the clock fires.
func (c *clock) due() (over [2]bool) {
	now := time.Now()
	for i, d := range c.every {
		if over[i] = d > 0 && !c.next[i].After(now); over[i] {
			// Missed intervals are skipped.
			c.next[i] = c.next[i].Add(now.Sub(c.next[i])/d*d + d)
		}
	}
	c.set(now)
	return over
}

// set sets the timer to the earliest end.
func (c *clock) set(now time.Time) {
	c.Stop()
	first := time.Duration(-1)
	for i, d := range c.every {
		if wait := c.next[i].Sub(now); d > 0 && (first < 0 || wait < first) {
			first = wait
		}
	}
	if first >= 0 {
		c.Reset(first)
	}
}
