package election

import (
	"errors"
	"fmt"
	"time"
)

// The bounds of an interval. Below 10 ms the timers of kernels with 100 ticks a second are
// too coarse; above a second a takeover is no faster than by other means.
const (
	MinInterval     = 10 * time.Millisecond
	MaxInterval     = time.Second
	DefaultInterval = 20 * time.Millisecond
)

// DefaultPriority is the priority of a router without one, as in VRRP (RFC 9568, section
// 5.2.4).
const DefaultPriority = 100

const (
	// tick is the length of a kernel tick at CONFIG_HZ=100, the coarsest configuration.
	// Timeouts of nftables sets are rounded up to ticks.
	tick = 10 * time.Millisecond
	// shortTick is how much the ticks of CONFIG_HZ=250 (4 ms) exceed a multiple of 10 ms.
	shortTick = 2 * time.Millisecond
	// rate is the largest ratio of the rates of two clocks, in percent above 100. Crystal
	// oscillators are within 0.01 %; virtual machines correct theirs by up to 0.05 %.
	rate = 1

	// claimGap is the time between two probes and between the first claims.
	claimGap = 4 * time.Millisecond
	// maxClaimGap bounds the growing time between claims that no echo reply follows: a
	// claim is three ARP frames, and switches that inspect ARP close a port at 15 a second.
	maxClaimGap = 250 * time.Millisecond
	// maxApart bounds the growing time between attempts to claim while the gateway answers
	// nobody.
	maxApart = 2 * time.Second
	// quickClaims is the number of claims at claimGap; the gap doubles after each later one.
	quickClaims = 4
	// probes is the number of unanswered probes before a claim, as in RFC 5227, section 1.1.
	probes = 3
	// probeEnd is the time from the last probe to the claim. A live kernel answers within
	// a round trip.
	probeEnd = 2 * time.Millisecond

	// awayTime is how long a router that lost to a claimant without heartbeats does not
	// claim.
	awayTime = 5 * time.Second
	// announceEvery is the time between two announcements of the active router, for
	// gateways and switches that lost their entry without asking.
	announceEvery = time.Minute

	// never is a time that does not come.
	never = time.Duration(1<<63 - 1)
	// past is a time before all others. Differences to it do not overflow.
	past = -never / 2
)

// Settings describe a router to its peers.
type Settings struct {
	// Interval is the time between two heartbeats, and between two pings of the active
	// router. All other times follow from it. It is the same on all routers: the largest
	// that was heard counts for the wait, and no fast hand-over takes place between
	// routers that differ.
	Interval time.Duration
	// ID identifies this process. It is drawn at random at each start, not 0: a peer with
	// the same MAC address and another ID is the same router after a restart.
	ID uint64
	// Priority decides between routers that could take over at the same time. A router
	// with a higher one does not preempt the active router.
	Priority uint8
	// MAC is the address of the interface that has the reserved address.
	MAC [6]byte
	// Alone means that no peers are configured: silence is no sign of isolation.
	Alone bool
}

// Validate returns an error that names the field out of range.
func (s Settings) Validate() error {
	if s.Interval < MinInterval || s.Interval > MaxInterval || s.Interval%time.Millisecond != 0 {
		return fmt.Errorf("interval %v is not a number of milliseconds from %v to %v", s.Interval, MinInterval, MaxInterval)
	}
	if s.ID == 0 {
		return errors.New("ID 0")
	}
	return nil
}

// Ticket is the time within which an echo reply has to arrive after its request has left:
// one and a half intervals.
func (s Settings) Ticket() time.Duration { return s.Interval * 3 / 2 }

// Permit is the time for which the kernel lets data out after an echo reply: four
// intervals, so that three lost pings do not shut the gate.
func (s Settings) Permit() time.Duration { return 4 * s.Interval }

// Detection is the time without heartbeats after which the active router counts as lost:
// three intervals, as Master_Down_Interval in VRRP (RFC 9568, section 6.1).
func (s Settings) Detection() time.Duration { return 3 * s.Interval }

// Quiet is the longest time for which the gate of another router can stay open once the
// gateway has stopped answering it: the life of a ticket and of a permit in the kernel.
func (s Settings) Quiet() time.Duration { return lives(s.Ticket()) + lives(s.Permit()) }

// Opening is the time between the echo reply to the first ping after the last claim and
// the ping whose reply opens the gate: [Settings.Quiet] by the clock of another router,
// which may run slower.
func (s Settings) Opening() time.Duration { return s.Quiet() * (100 + rate) / 100 }

// Promise is the time for which a router that handed over does not claim.
func (s Settings) Promise() time.Duration { return 20 * s.Interval }

// GiveUp is the time without a peer and without the reference after which a router counts
// as isolated.
func (s Settings) GiveUp() time.Duration { return 25 * s.Interval }

// quickArm is the life of an arm that opens without the wait. It is short: it has to end
// before others can open. It is two ticks at least, since the kernel counts whole ticks and
// the first one has begun.
func (s Settings) quickArm() time.Duration { return max(s.Interval/2, 2*tick) }

// lives returns the longest life of an element with a timeout in a set of the kernel.
func lives(timeout time.Duration) time.Duration {
	return (timeout+tick-1)/tick*tick + shortTick
}
