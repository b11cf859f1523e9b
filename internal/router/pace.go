package router

import (
	"math/rand/v2"
	"slices"
	"time"
)

// How fast a router that stays goes on after something went wrong.
const (
	// firstPause follows the first repair that failed, often because something
	// else changed the same meanwhile; each later one is twice as long as that
	// before, up to longestPause.
	firstPause   = 20 * time.Millisecond
	longestPause = 30 * time.Second
	// A repair that is undone within contestWithin, contestAfter times in a
	// row, is undone by something that means to. The pauses then begin with
	// that after contestPauses failures, 320 ms.
	contestWithin = 10 * time.Second
	contestAfter  = 5
	contestPauses = 4
	// One that is done more than contestOften times within that time is, too,
	// whatever comes in between.
	contestOften = 20
	// After maxConflicts the address is asked for once in rateLimit
	// (RFC 5227, section 1.1, MAX_CONFLICTS and RATE_LIMIT_INTERVAL).
	maxConflicts = 10
	rateLimit    = time.Minute
	// restFactor is how many times the duration of a comparison lies between
	// two of them that found everything right, after restAfter within restWithin, so that
	// something else that changes the namespace without pause does not keep a
	// processor busy here too.
	restFactor = 4
	restAfter  = 5
	restWithin = time.Second
)

// A pace says when to look again.
type pace struct {
	failures int

	rights     int // comparisons that found everything right
	rightSince time.Time

	last   string       // what the last repair did
	lastAt time.Time    // when it was done
	again  int          // how often the same was done before, each soon after the other
	recent []repairDone // those of contestWithin
}

// A repairDone is what a repair did, and when.
type repairDone struct {
	what string
	at   time.Time
}

// failed returns how long to wait after a repair that failed.
func (p *pace) failed() time.Duration {
	p.failures++
	return pause(p.failures - 1)
}

// right returns how long to rest after a comparison that took some time and found
// everything right.
func (p *pace) right(took time.Duration, now time.Time) (rest time.Duration) {
	p.failures = 0
	if now.Sub(p.rightSince) > restWithin {
		p.rightSince, p.rights = now, 0
	}
	if p.rights++; p.rights <= restAfter {
		return 0
	}
	return restFactor * took
}

// repaired returns how long to wait after a repair, and whether something else
// has undone it again and again.
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

// waited returns how long the last repair may have been put off.
func (p *pace) waited() time.Duration {
	if p.again < contestAfter {
		return 0
	}
	return longestPause
}

// held reports whether a contested repair of a time has not been undone for so
// long that it will not be.
func held(repaired, now time.Time) bool { return now.Sub(repaired) >= contestWithin+longestPause }

// pause returns the nth pause, from 0, made a random part shorter, so that
// routers that fail for one reason do not go on at one time.
func pause(n int) time.Duration {
	d := longestPause
	if n < 16 {
		d = min(d, firstPause<<n)
	}
	return d - rand.N(d/4)
}

// A clock has a value when one of two intervals is over, and one value where both
// are: what they are for is then done at once.
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

// due returns which intervals are over, and begins the next. It is called for
// each value.
func (c *clock) due() (over [2]bool) {
	now := time.Now()
	for i, d := range c.every {
		if over[i] = d > 0 && !c.next[i].After(now); over[i] {
			// Those that went by unnoticed are not made up for.
			c.next[i] = c.next[i].Add(now.Sub(c.next[i])/d*d + d)
		}
	}
	c.set(now)
	return over
}

// set sets the timer to what comes first.
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
