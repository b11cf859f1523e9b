package election

import (
	"testing"
	"time"
)

// actions counts the actions of a router, by kind.
type actions map[ActionKind]int

// stepper is a machine that is alone with its test. Arm and Read are answered at once.
type stepper struct {
	t    *testing.T
	m    *Machine
	now  time.Duration
	left time.Duration // the answer to Read
	// echo: pings are answered, after the delay.
	echo   bool
	done   actions
	last   Heartbeat
	reason string
}

func newStepper(t *testing.T, s Settings) *stepper {
	t.Helper()
	if s.Interval == 0 {
		s.Interval = DefaultInterval
	}
	if s.ID == 0 {
		s.ID = 1000
	}
	s.MAC = [6]byte{2, 0, 0, 0, 0, 1}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	st := &stepper{t: t, m: New(s, 0), echo: true, done: make(actions)}
	for _, kind := range []EventKind{Link, Reference, Ready} {
		st.step(Event{Kind: kind, OK: true})
	}
	return st
}

func (st *stepper) step(e Event) {
	var pings []uint32
	for e, more := e, true; more; {
		more = false
		for _, a := range st.m.Step(st.now, e) {
			st.done[a.Kind]++
			switch a.Kind {
			case Send:
				st.last = a.Heartbeat
			case Became:
				st.reason = a.Reason
			case Ping:
				pings = append(pings, a.Number)
			case Shut:
				st.left = 0
			case Arm:
				e, more = Event{Kind: Armed}, true
			case Read:
				e, more = Event{Kind: Permitted, Left: st.left}, true
			}
		}
	}
	if st.echo {
		for _, number := range pings {
			if st.m.phase == opening || st.m.phase == quick || st.m.State() == Active {
				st.left = st.m.s.Permit()
			}
			st.step(Event{Kind: Echoed, Number: number})
		}
	}
}

// run steps the machine for a time, with heartbeats of the peers every interval.
func (st *stepper) run(d time.Duration, peers ...*Heartbeat) {
	end := st.now + d
	beat := st.now
	for st.now < end && !st.m.ended {
		for _, p := range peers {
			if st.now >= beat {
				p.Sequence++
				st.step(Event{Kind: Heard, Heartbeat: *p})
			}
		}
		if st.now >= beat {
			beat += st.m.s.Interval
		}
		next := min(st.m.Next(), end)
		if len(peers) > 0 {
			next = min(next, beat)
		}
		st.now = max(next, st.now+100*time.Microsecond)
		st.step(Event{Kind: Tick})
	}
}

func (st *stepper) want(s State, reason string) {
	st.t.Helper()
	if st.m.State() != s || reason != "" && st.reason != reason {
		st.t.Fatalf("at %v: %v, %q; want %v, %q", st.now, st.m.State(), st.reason, s, reason)
	}
}

func peerBeat(id uint64, s State) *Heartbeat {
	return &Heartbeat{ID: id, MAC: [6]byte{2, 0, 0, 0, 1, byte(id)}, State: s, Priority: DefaultPriority, Healthy: true, Interval: DefaultInterval}
}

// A router alone opens after detection, probe and wait.
func TestAlone(t *testing.T) {
	st := newStepper(t, Settings{Alone: true})
	s := st.m.s
	start := s.Detection() + (probes-1)*claimGap + probeEnd
	st.run(start + s.Opening() - time.Millisecond)
	st.want(Claiming, "no router holds the address")
	st.run(2 * time.Millisecond)
	st.want(Active, "gateway answers")
	if st.done[Probe] != probes {
		t.Errorf("%d probes", st.done[Probe])
	}
	// Without peers and reference nothing says that this router is isolated.
	st.step(Event{Kind: Reference})
	st.run(10 * time.Second)
	st.want(Active, "gateway answers")
}

func TestNoPreemption(t *testing.T) {
	st := newStepper(t, Settings{Priority: 255})
	st.run(time.Second, peerBeat(1, Active))
	st.want(Standby, "")
	if st.done[Probe]+st.done[Claim]+st.done[Ping] > 0 {
		t.Errorf("actions: %v", st.done)
	}
}

func TestStandbyWithoutReady(t *testing.T) {
	for _, kind := range []EventKind{Ready, Link} {
		st := newStepper(t, Settings{})
		st.step(Event{Kind: kind})
		st.run(time.Second)
		st.want(Standby, "")
		if st.last.Healthy {
			t.Errorf("event %d: healthy", kind)
		}
	}
}

func TestIsolation(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	st.run(time.Second, p)
	st.want(Active, "")
	st.step(Event{Kind: Reference})
	st.run(st.m.s.GiveUp() - 2*DefaultInterval)
	st.want(Active, "")
	st.run(2 * DefaultInterval)
	st.want(Standby, "no peer and no reference")
	st.run(5 * time.Second)
	st.want(Standby, "")
	// A peer is heard: clients reach this router.
	st.run(time.Second, p)
	st.want(Active, "gateway answers")
}

func TestNotReadyStaysWithoutCandidate(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	p.Healthy = false
	st.run(time.Second, p)
	st.step(Event{Kind: Ready})
	st.run(time.Second, p)
	st.want(Active, "")
	if st.last.Resigned {
		t.Error("resigned")
	}
	p.Healthy = true
	st.run(time.Second, p)
	st.want(Active, "")
	if !st.last.Resigned {
		t.Error("not resigned")
	}
	p.Ask = 7
	st.run(DefaultInterval, p)
	st.want(Standby, "handed over")
	if st.last.Promise != 7 || st.last.PromiseTo != p.ID {
		t.Errorf("promise %d to %d", st.last.Promise, st.last.PromiseTo)
	}
	// One promise, and only one.
	other := peerBeat(2, Standby)
	other.Ask = 8
	st.run(DefaultInterval, other)
	if st.last.Promise != 7 || st.last.PromiseTo != p.ID {
		t.Errorf("promise %d to %d", st.last.Promise, st.last.PromiseTo)
	}
}

func TestLeave(t *testing.T) {
	st := newStepper(t, Settings{})
	st.run(time.Second)
	st.want(Active, "")
	st.step(Event{Kind: Leave})
	st.want(Standby, "leaving")
	if st.done[Ended] != 1 || st.last.State != Standby || st.last.Healthy {
		t.Errorf("actions %v, last heartbeat %+v", st.done, st.last)
	}

	st = newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	st.run(time.Second, p)
	st.step(Event{Kind: Leave})
	st.want(Active, "")
	st.run(st.m.s.Promise(), p) // It does not ask.
	st.want(Standby, "leaving")
	if st.done[Ended] != 1 {
		t.Errorf("actions: %v", st.done)
	}
}

// A promise is of use for a permit after the ask, for the number asked for.
func TestPromise(t *testing.T) {
	for _, test := range []struct {
		name  string
		after time.Duration
		other uint32 // is added to the number
		to    uint64
		want  State
	}{
		{"at once", time.Millisecond, 0, 1000, Active},
		{"late", 75 * time.Millisecond, 0, 1000, Standby},
		{"of another ask", time.Millisecond, 1, 1000, Standby},
		{"for another router", time.Millisecond, 0, 1001, Standby},
	} {
		t.Run(test.name, func(t *testing.T) {
			st := newStepper(t, Settings{})
			p := peerBeat(1, Active)
			st.run(time.Second, p)
			p.Resigned, p.Healthy = true, false
			p.Sequence++
			st.step(Event{Kind: Heard, Heartbeat: *p})
			ask := st.last.Ask
			if ask == 0 {
				t.Fatal("no ask")
			}
			st.now += test.after
			p.State, p.Resigned, p.Promise, p.PromiseTo = Standby, false, ask+test.other, test.to
			p.Sequence++
			st.step(Event{Kind: Heard, Heartbeat: *p})
			st.want(test.want, "")
		})
	}
}

// Routers with different intervals wait for the longest one, and do not hand over fast.
func TestMixedIntervals(t *testing.T) {
	st := newStepper(t, Settings{})
	slow := peerBeat(1, Active)
	slow.Interval = 10 * DefaultInterval
	slow.Resigned = true
	st.run(time.Second, slow)
	if st.last.Ask != 0 {
		t.Error("asked")
	}
	slow.State = Standby
	st.run(slowOpening(slow.Interval), slow)
	st.want(Claiming, "")
	st.run(200*time.Millisecond, slow)
	st.want(Active, "")
}

// Without a fast hand-over a router shuts at once.
func TestMixedHandOver(t *testing.T) {
	for kind, reason := range map[EventKind]string{Leave: "leaving", Ready: "not ready"} {
		st := newStepper(t, Settings{})
		slow := peerBeat(1, Standby)
		slow.Interval = 2 * DefaultInterval
		st.run(time.Second, slow)
		st.want(Active, "gateway answers")
		st.step(Event{Kind: kind})
		st.want(Standby, reason)
	}
}

func slowOpening(interval time.Duration) time.Duration {
	return Settings{Interval: interval}.Opening()
}

// Duplicates and heartbeats that others overtook have no effect.
func TestOldHeartbeats(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	st.run(time.Second, p)
	st.want(Active, "")
	old := *p
	old.State, old.Resigned = Active, true
	for _, back := range []uint32{0, 1, 10} {
		old.Sequence = p.Sequence - back
		st.step(Event{Kind: Heard, Heartbeat: old})
	}
	if got := st.m.peers[0].State; got != Standby || len(st.m.peers) != 1 {
		t.Errorf("%d peers, state %v", len(st.m.peers), got)
	}
	// The same router after a restart.
	p.ID, p.Sequence = 55, 0
	st.run(DefaultInterval, p)
	if len(st.m.peers) != 1 || st.m.peers[0].ID != 55 {
		t.Errorf("peers: %+v", st.m.peers)
	}
	// Heartbeats of this process, and of more routers than fit.
	st.step(Event{Kind: Heard, Heartbeat: *peerBeat(1000, Active)})
	for id := range uint64(3 * maxPeers) {
		b := peerBeat(2000+id, Standby)
		b.MAC[3] = 9
		st.step(Event{Kind: Heard, Heartbeat: *b})
	}
	if len(st.m.peers) != maxPeers {
		t.Errorf("%d peers", len(st.m.peers))
	}
}

// A host without heartbeats claims the address, and the gateway answers it.
func TestForeignClaimant(t *testing.T) {
	st := newStepper(t, Settings{})
	st.run(time.Second)
	st.want(Active, "")
	st.echo, st.left = false, 0
	st.step(Event{Kind: Defended, MAC: [6]byte{2, 9, 9, 9, 9, 9}})
	st.run(500 * time.Millisecond)
	st.want(Standby, "another host claimed the address")
	st.done = make(actions)
	st.echo = true
	st.run(awayTime - 500*time.Millisecond)
	if st.done[Probe] > 0 {
		t.Errorf("actions: %v", st.done)
	}
	st.run(time.Second)
	st.want(Active, "")
}

// A gateway that answers nobody sees claims ever less often: switches that inspect ARP close
// a port at 15 frames a second, and a claim is three.
func TestSilentGateway(t *testing.T) {
	st := newStepper(t, Settings{})
	st.echo = false
	st.run(20 * time.Second)
	st.done = make(actions)
	st.run(time.Minute)
	if n := 3*st.done[Announce] + st.done[Probe]; n > 15*60 || n < 60 {
		t.Errorf("%d ARP frames in a minute: %v", n, st.done)
	}
	st.echo = true
	st.run(3 * time.Second)
	st.want(Active, "")
}

// The probe is answered: the holder is alive, only its heartbeats are lost.
func TestDefendedProbe(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Active)
	st.run(time.Second, p)
	seen := 0
	for end := st.now + 10*time.Second; st.now < end; {
		st.run(time.Millisecond)
		if st.done[Probe] > seen {
			seen = st.done[Probe]
			st.step(Event{Kind: Defended, MAC: p.MAC})
		}
	}
	st.want(Standby, "")
	if seen < 15 || seen > 40 {
		t.Errorf("%d probes in 10 s", seen)
	}
}

// An action failed: the gate is shut, again if that is what failed, and nothing is promised.
func TestFailed(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	st.run(time.Second, p)
	st.step(Event{Kind: Link})
	p.Ask = 3
	st.run(DefaultInterval, p)
	if st.last.Promise != 3 {
		t.Fatalf("promise %d", st.last.Promise)
	}
	st.done = make(actions)
	st.step(Event{Kind: Failed})
	st.run(3*DefaultInterval, p)
	if st.last.Promise != 0 || st.done[Shut] != 1 {
		t.Errorf("promise %d, actions %v", st.last.Promise, st.done)
	}

	st = newStepper(t, Settings{})
	st.run(time.Second)
	st.step(Event{Kind: Failed})
	st.want(Standby, "gate failed")
	st.run(time.Second)
	st.want(Active, "gateway answers")
}

// A router with permit that steps with events all the time allocates nothing.
func TestAllocations(t *testing.T) {
	st := newStepper(t, Settings{})
	p := peerBeat(1, Standby)
	st.run(time.Second, p)
	m, now := st.m, st.now
	if n := testing.AllocsPerRun(1000, func() {
		now = max(m.Next(), now)
		p.Sequence++
		m.Step(now, Event{Kind: Heard, Heartbeat: *p})
		for _, a := range m.Step(now, Event{Kind: Tick}) {
			if a.Kind == Ping {
				m.Step(now, Event{Kind: Echoed, Number: a.Number})
				break
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations a step", n)
	}
	if m.State() != Active {
		t.Errorf("state %v", m.State())
	}
}

func TestSettings(t *testing.T) {
	for _, test := range []struct {
		s  Settings
		ok bool
	}{
		{Settings{Interval: DefaultInterval, ID: 1}, true},
		{Settings{Interval: MinInterval, ID: 1}, true},
		{Settings{Interval: MaxInterval, ID: 1}, true},
		{Settings{Interval: DefaultInterval}, false},
		{Settings{Interval: MinInterval - 1, ID: 1}, false},
		{Settings{Interval: MaxInterval + time.Millisecond, ID: 1}, false},
		{Settings{Interval: DefaultInterval + time.Microsecond, ID: 1}, false},
	} {
		if err := test.s.Validate(); (err == nil) != test.ok {
			t.Errorf("%+v: %v", test.s, err)
		}
	}
	// The proof needs each of these, at every interval.
	for i := MinInterval; i <= MaxInterval; i += time.Millisecond {
		s := Settings{Interval: i, ID: 1}
		fast := func(d time.Duration) float64 { return float64(d) / 1.01 }
		for _, hz := range []time.Duration{100, 250, 300, 1000} {
			kernel := func(d time.Duration) time.Duration {
				ticks := (d*hz + time.Second - 1) / time.Second
				return ticks * time.Second / hz
			}
			if k := kernel(s.Ticket()) + kernel(s.Permit()); fast(s.Opening()) < float64(k) {
				t.Errorf("interval %v, HZ=%d: gates are open for %v, opening after %v", i, hz, k, s.Opening())
			}
		}
		if s.Ticket()+s.Permit() >= s.Quiet() {
			t.Errorf("interval %v: promise", i)
		}
	}
}
