// Package standby makes a router one of several with the same reserved addresses, of which
// at most one sends. It carries out what an election decides: it speaks with the other
// routers on the cluster side, and on the physical network it claims the addresses and asks
// the gateway who has them.
//
// What keeps a second router from sending is not here, but in the kernel: a gate that only
// the answers of the gateway keep open (package nft).
package standby

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/spec"
)

// A Gate decides in the kernel whether packets with a reserved address leave; implemented by
// nft.Gate.
type Gate interface {
	Shut() error
	Claim(time.Duration) error
	Arm(time.Duration) error
	// Left returns how long the gate stays open without another answer; zero: it is shut.
	Left() (time.Duration, error)
	// Number makes the answer to a ping count, if the kernel cannot as the ping leaves.
	Number(uint32) error
}

// Options are the options of a Runner.
type Options struct {
	Settings  election.Settings // without the hardware address
	Interface string            // on the physical network
	Sources   spec.Sources
	Witness   netip.Addr           // that answers pings; of the family of the first source
	Gate      func(index int) Gate // of the interface with an index
	Mark      uint32               // of the gate
	// Answers: the kernel does not answer ARP for the addresses, since the gate could not hold that
	// back. The Runner does while the gate is open.
	Answers bool

	Listen    netip.AddrPort // own address on the cluster side, and the port of heartbeats
	Peers     Lookup
	Only      bool   // heartbeats of other addresses than those of Peers, which need no query, do not count
	Key       []byte // of heartbeats; nil: none
	Reference string // address and port on the cluster side that takes TCP connections; empty: none

	// Reach tells the kernel the hardware address of the gateway, of which it could not ask
	// while the gate was shut.
	Reach func(gateway netip.Addr, mac [6]byte) error
	// Ready reports whether the router could take over: rules and network are right.
	Ready func() bool
	// Changed is called after a change of the role.
	Changed func(role election.State)

	// Ports are the source ports of the connections that enter by this router, of which the
	// heartbeats tell. Carry is called after a change of the routers with which it exchanges
	// packets; nil: with none.
	Ports Ports
	Carry func(Carry)
	// Open returns the number of connections that enter by this router and have not ended, and how
	// many of them have had no packet for IdleAfter. After the hand-over Run goes on carrying until
	// there are none; nil: it returns at once.
	Open func() (open, idle int, err error)

	Log *slog.Logger
}

// Status is the state of a Runner.
type Status struct {
	Role  election.State
	Since time.Time // of the role
	Why   string    // reason of the last change of the role

	Own     Peer // this router; Heard is zero
	Peers   []Peer
	Missing []netip.Addr // routers of the look-up of which no heartbeat has come for 10 s
	Unkeyed Unkeyed      // last heartbeat of a router of the look-up with another key
	Carry   Carry
	// Draining: the router has handed over for good, and carries what is left.
	Draining bool
	Left     int // connections that drain, at the last count

	Echoed     time.Time     // time of the last answer of the witness; zero: none yet
	RoundTrip  time.Duration // of that answer
	Pinged     time.Time     // time of the last ping; zero: none yet
	Unanswered int           // pings since the last answer

	TakeOvers map[string]uint64 // times that this router became active, by the reason
	TakenOver time.Time         // last time; zero: never
	Gap       time.Duration     // from the last sign of the holder until then; zero: unknown
	Lost      uint64            // heartbeats of peers that did not arrive
	Refused   uint64            // packets that were no heartbeats with the key, or of a stranger
	Trouble   string            // last error of an action; empty: there was none
	TroubleAt time.Time
}

// A Peer is a router with the same addresses.
type Peer struct {
	Address  netip.Addr // on the cluster side
	State    election.State
	Priority uint8
	Healthy  bool      // it could take over
	MAC      [6]byte   // on the physical network; zero: it has no interface there
	Heard    time.Time // last time
}

// Unkeyed is a heartbeat that the own key does not authenticate.
type Unkeyed struct {
	Address netip.Addr
	Keyed   bool      // it has a key
	At      time.Time // zero: there was none
}

// Holder returns the other router that holds the addresses: the last one that was heard as the
// active router, unless that was before a time. It is false if none is known.
func (s Status) Holder(after time.Time) (holder Peer, known bool) {
	for _, p := range s.Peers {
		if p.State == election.Active && p.Heard.After(after) {
			holder, known, after = p, true, p.Heard
		}
	}
	return holder, known
}

// A Runner takes part in the election.
type Runner struct {
	o       Options
	machine *election.Machine
	start   time.Time // zero of the machine's clock
	events  chan election.Event
	peers   *peers
	ground  *ground // the physical network

	ready, ended bool
	reported     bool // Options.Carry was called
	idle         bool // all connections that drain were idle at the last count
	polls        int
	cause        string // why the current claim began
	last         election.Heartbeat
	done         chan struct{} // closed at the end of Run
	cut          chan struct{} // closed by Cut
	once         sync.Once     // of Cut
	carried      chan struct{} // receives a value after a change of status.Carry

	mu     sync.Mutex
	status Status
}

// pollInterval is the interval at which a Runner looks whether the router is ready.
const pollInterval = 100 * time.Millisecond

// permitPolls is the number of such intervals after which an active router looks whether its gate
// is open.
const permitPolls = 10

// handOverLimit ends a hand-over that no other router takes.
const handOverLimit = 2 * time.Second

// New returns a Runner that listens for heartbeats, in the network namespace of the calling
// thread.
func New(o Options) (*Runner, error) {
	r := &Runner{o: o, start: time.Now(), events: make(chan election.Event, 1024), done: make(chan struct{}), cut: make(chan struct{}), carried: make(chan struct{}, 1)}
	r.status = Status{Role: election.Standby, Since: r.start, TakeOvers: map[string]uint64{}}
	r.machine = election.New(o.Settings, 0)
	var err error
	if r.peers, err = listenPeers(o); err != nil {
		return nil, err
	}
	r.ground = newGround(o, r.post)
	return r, nil
}

// now returns the time of the machine's clock, which no change of the time of day affects.
func (r *Runner) now() time.Duration { return time.Since(r.start) }

// Status returns the current status. It may be called at any time.
func (r *Runner) Status() Status {
	r.mu.Lock()
	s := r.status
	s.TakeOvers = maps.Clone(r.status.TakeOvers)
	r.mu.Unlock()
	s.Own.Address, s.Own.State, s.Own.Priority, s.Own.MAC = r.o.Listen.Addr(), s.Role, r.o.Settings.Priority, r.ground.hardware()
	s.Peers = r.peers.list()
	s.Missing, s.Unkeyed = r.peers.missing()
	s.Refused = r.peers.refused.Load()
	s.Lost = r.peers.lost.Load()
	return s
}

// PermitLeft returns how long the gate stays open without another answer of the witness; zero:
// it is shut. It asks the kernel.
func (r *Runner) PermitLeft() (time.Duration, error) { return r.gate().Left() }

// PeerMAC reports whether a hardware address is that of another router with the addresses.
func (r *Runner) PeerMAC(mac [6]byte) bool { return r.peers.has(mac) }

// Run takes part until ctx ends, and then hands over. The gate is shut then. A router that
// carries goes on with the connections that enter by it, until the last one has ended.
func (r *Runner) Run(ctx context.Context) {
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var background sync.WaitGroup
	defer background.Wait()
	defer r.peers.close()
	defer cancel()
	defer close(r.done)
	background.Go(func() { r.ground.follow(inner, r.trouble) })
	background.Go(func() { r.ground.tell(inner, r.trouble) })
	background.Go(func() { r.peers.read(r.post) })
	background.Go(func() { r.peers.lookUp(inner, r.o) })
	background.Go(func() { r.refer(inner) })
	if r.o.Carry != nil {
		background.Go(func() { r.watchCarry(inner) })
	}

	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	r.step(election.Event{Kind: election.Reference, OK: true}) // until refer knows better
	r.poll()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var limit <-chan time.Time
	for done := ctx.Done(); !r.ended; {
		timer.Reset(max(0, r.machine.Next()-r.now()))
		select {
		case e := <-r.events:
			r.step(e)
		case <-timer.C:
			r.step(election.Event{Kind: election.Tick})
		case <-poll.C:
			r.poll()
		case <-done:
			done = nil
			after := time.NewTimer(handOverLimit)
			defer after.Stop()
			limit = after.C
			r.step(election.Event{Kind: election.Leave})
		case <-limit:
			r.ended = true
		}
	}
	if err := r.shut(); err != nil {
		r.trouble(err)
	}
	r.standDown()
	r.drain()
}

// standDown ends the role, which a hand-over leaves that no other router has taken in time.
func (r *Runner) standDown() {
	r.mu.Lock()
	role := r.status.Role
	r.mu.Unlock()
	if r.ended = true; role != election.Standby {
		r.became(election.Action{From: role, To: election.Standby, Reason: "leaving"})
	}
}

// Cut makes Run return after the hand-over, although connections are left.
func (r *Runner) Cut() { r.once.Do(func() { close(r.cut) }) }

// post passes an event to Run, unless that has ended.
func (r *Runner) post(e election.Event) {
	select {
	case r.events <- e:
	case <-r.done:
	}
}

// poll looks whether the router could take over.
func (r *Runner) poll() {
	if ready := r.o.Ready(); ready != r.ready {
		r.ready = ready
		r.mu.Lock()
		r.status.Own.Healthy = ready
		r.mu.Unlock()
		r.step(election.Event{Kind: election.Ready, OK: ready})
	}
	r.carry() // routers may be silent, or looked up
	if r.polls++; r.machine.State() != election.Active || r.polls%permitPolls != 0 {
		return
	}
	// A repair has loaded the gate again, which is shut then, and without the egress hook pings
	// leave and are answered all the same.
	if left, err := r.gate().Left(); err == nil && left == 0 {
		r.step(election.Event{Kind: election.Permitted})
	}
}

// step has the machine take an event, and carries out its actions in their order: after one
// that fails it leaves out the rest, and tells the machine.
func (r *Runner) step(e election.Event) {
	heard := e.Kind == election.Heard
	for again := true; again; {
		now := r.now()
		switch e.Kind {
		case election.Heard:
			r.peers.note(e.Heartbeat, r.o.Settings.Interval)
		case election.Echoed:
			r.echoed(e.Number, now)
		}
		again = false
		for _, a := range r.machine.Step(now, e) {
			answer, err := r.carryOut(a)
			if err != nil {
				r.trouble(err)
				answer = &election.Event{Kind: election.Failed}
			}
			if answer != nil { // always of the last action
				e, again = *answer, true
				break
			}
		}
	}
	// An action that failed has left out the news of the role, which others act on.
	r.mu.Lock()
	role := r.status.Role
	r.mu.Unlock()
	if is := r.machine.State(); is != role {
		r.became(election.Action{From: role, To: is, Reason: "gate failed"})
	}
	if heard {
		r.carry()
	}
}

// carryOut carries out an action. The event is the machine's next one.
func (r *Runner) carryOut(a election.Action) (*election.Event, error) {
	switch a.Kind {
	case election.Shut:
		return nil, r.shut()
	case election.Claim:
		r.ground.reach()
		return nil, r.gate().Claim(a.For)
	case election.Arm:
		r.ground.reach()
		if err := r.gate().Arm(a.For); err != nil {
			return nil, err
		}
		return &election.Event{Kind: election.Armed}, nil
	case election.Ping:
		if err := r.gate().Number(a.Number); err != nil {
			return nil, err
		}
		r.said(r.ground.ping(a.Number, r.now()))
		r.pinged(a.Number)
	case election.Probe:
		r.said(r.ground.probe())
	case election.Announce:
		r.said(r.ground.announce())
	case election.Read:
		left, err := r.gate().Left()
		return &election.Event{Kind: election.Permitted, Left: left}, err
	case election.Send:
		a.Heartbeat.MAC = r.ground.hardware()
		a.Heartbeat.FirstPort, a.Heartbeat.LastPort = r.o.Ports.First, r.o.Ports.Last
		r.last = a.Heartbeat
		r.peers.send(a.Heartbeat)
	case election.Became:
		r.became(a)
	case election.Ended:
		r.ended = true
	}
	return nil, nil //nolint:nilnil // most actions have no answer
}

// gate returns the gate of the current interface.
func (r *Runner) gate() Gate { return r.o.Gate(r.ground.index()) }

// said records that a frame could not be sent: it is lost, as others are on the network.
func (r *Runner) said(err error) {
	if err != nil {
		r.trouble(err)
	}
}

// shutAttempts is the number of times that a failing shut is tried at once. The kernel shuts
// by itself, since a router that shuts sends no ping any more.
const shutAttempts = 3

func (r *Runner) shut() (err error) {
	for range shutAttempts {
		if err = r.gate().Shut(); err == nil {
			return nil
		}
	}
	return err
}

// became records a change of the role.
func (r *Runner) became(a election.Action) {
	now := time.Now()
	r.mu.Lock()
	s := &r.status
	s.Role, s.Why, s.Since = a.To, a.Reason, now
	var gap time.Duration
	if a.To == election.Claiming {
		r.cause = a.Reason
	}
	if a.To == election.Active && a.From == election.Claiming {
		s.TakeOvers[r.cause]++
		s.TakenOver, s.Gap = now, 0
		if last := r.peers.holderHeard(); !last.IsZero() {
			s.Gap = now.Sub(last)
		}
		gap = s.Gap
	}
	if a.To == election.Active {
		r.peers.held() // the next gap does not begin before
	}
	r.mu.Unlock()
	attributes := []any{"role", a.To.String(), "before", a.From.String(), "reason", a.Reason}
	if gap > 0 {
		attributes = append(attributes, "gap", gap.Round(time.Millisecond).String())
	}
	r.o.Log.Info("role changed", attributes...)
	if r.o.Changed != nil {
		r.o.Changed(a.To)
	}
}

// pinged records a ping, unless it could not be sent.
func (r *Runner) pinged(number uint32) {
	if _, sent := r.ground.sent(number); !sent {
		return
	}
	r.mu.Lock()
	r.status.Pinged = time.Now()
	r.status.Unanswered++
	r.mu.Unlock()
}

// echoed records an answer of the witness.
func (r *Runner) echoed(number uint32, now time.Duration) {
	sent, known := r.ground.sent(number)
	if !known {
		return
	}
	r.mu.Lock()
	r.status.Echoed, r.status.RoundTrip, r.status.Unanswered = time.Now(), now-sent, 0
	r.mu.Unlock()
}

// troubleAgain is the time after which the same error is logged again.
const troubleAgain = time.Minute

// trouble records an error, and logs it unless it has just been logged.
func (r *Runner) trouble(err error) {
	now := time.Now()
	r.mu.Lock()
	same := r.status.Trouble == err.Error() && now.Sub(r.status.TroubleAt) < troubleAgain
	r.status.Trouble = err.Error()
	if !same {
		r.status.TroubleAt = now
	}
	r.mu.Unlock()
	if !same {
		r.o.Log.Warn("standby action failed", "error", err)
	}
}
