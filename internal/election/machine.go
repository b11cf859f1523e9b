package election

import "time"

// An EventKind is the kind of an [Event].
type EventKind uint8

// The events.
const (
	// Tick means that time has passed, see [Machine.Next].
	Tick EventKind = iota
	// Heard is a heartbeat of a peer.
	Heard
	// Echoed is the reply of a witness to the ping Number, as a socket received it. Replies
	// that the kernel does not count any more are reported too.
	Echoed
	// Defended means that another host uses the reserved address: it answered the probe, or
	// announced the address. MAC is its address.
	Defended
	// Link means that the interface with the reserved address has carrier, or lost it (OK).
	Link
	// Reference means that the reference is reachable or not (OK).
	Reference
	// Ready means that rules, network and gateway are right or not (OK): without it a router
	// does not claim.
	Ready
	// Permitted is the answer to Read: the rest of the permit, 0 if the gate is shut (Left).
	// It is the next event after the action.
	Permitted
	// Armed means that the action Arm has been carried out. It is the next event after it.
	Armed
	// Failed means that an action failed; those after it were not carried out.
	Failed
	// Leave asks the router to hand over. The action Ended follows.
	Leave
)

// An Event is what the machine learns. Fields that the kind does not name are zero.
type Event struct {
	Kind      EventKind
	Heartbeat Heartbeat
	Number    uint32
	MAC       [6]byte
	OK        bool
	Left      time.Duration
}

// An ActionKind is the kind of an [Action].
type ActionKind uint8

// The actions.
const (
	// Shut removes permit, claim, arm and all tickets in one transaction.
	Shut ActionKind = iota + 1
	// Claim lets claims and pings out of the gate for the time For.
	Claim
	// Arm lets the reply to a later ping open the gate within the time For. It removes all
	// tickets in the same transaction. The event Armed is the next one.
	Arm
	// Ping sends an echo request with Number to the witness.
	Ping
	// Probe sends an ARP request for the reserved address from 0.0.0.0 (RFC 5227, section
	// 2.1.1), or a neighbour solicitation from :: (RFC 4862).
	Probe
	// Announce claims the address: an ARP reply and an ARP request for it, and a request
	// for the gateway's address from it; unsolicited neighbour advertisements.
	Announce
	// Read asks the kernel for the rest of the permit. The event Permitted is the next one.
	Read
	// Send sends Heartbeat to all peers.
	Send
	// Became reports that the state changed From, To, and the Reason.
	Became
	// Ended reports that the hand-over is over: the process can end.
	Ended
)

// An Action is what the machine wants done. Actions are carried out in order and at once;
// after one that fails the rest is dropped and the event Failed is next.
type Action struct {
	Kind      ActionKind
	For       time.Duration
	Number    uint32
	Heartbeat Heartbeat
	From, To  State
	Reason    string
}

// A phase is the part of a state.
type phase uint8

const (
	idle phase = iota
	// probing: who has the address? (Standby)
	probing
	// quick: armed without the wait, until the deadline. (Claiming after a promise, Resuming)
	quick
	// seeking: no echo reply since the claim, or since the permit ended. (Claiming, Resuming)
	seeking
	// waiting: no ARP, until the gates of all others are shut.
	waiting
	// opening: armed, the reply to a ping opens.
	opening
)

// maxPeers bounds the memory for peers; a new one replaces the one silent for longest.
const maxPeers = 32

// A peer is another router: its last heartbeat, when that was heard, and when it resigned.
type peer struct {
	Heartbeat
	heard, resigned time.Duration
}

// sentPings is the number of pings whose time of sending is known: more than are sent in
// the life of a ticket.
const sentPings = 64

// A Machine decides who holds the address. It has no clock and does no input or output.
// It is not safe for concurrent use.
type Machine struct {
	s       Settings
	actions []Action

	now     time.Duration
	started bool
	// starting: the answer to the first Read is the permit of a process before.
	starting bool
	state    State
	phase    phase
	peers    []peer

	link, ready, reference bool
	leaving, ended         bool
	// pending: the answer to Arm or Read is the next event.
	pending bool
	// reading is the time of the last Read.
	reading time.Duration
	// wait is the opening time for the largest interval of all routers, mixed whether
	// they differ.
	wait  time.Duration
	mixed bool
	// fresh is the largest age of the last answered ping at a promise.
	fresh time.Duration
	// safe is how long after an answered ping no other gate opens.
	safe time.Duration
	// promiseLife is how long after the ask a promise is of use.
	promiseLife time.Duration

	// due is when the state has something to do, beat when the next heartbeat is.
	due, beat time.Duration
	sequence  uint32

	// awake is the end of the last sleep longer than a permit, or the start.
	awake time.Duration
	// notBefore is when the next claim may start, away the same for a router that lost to
	// a claimant without heartbeats or promised to stay shut.
	notBefore, away time.Duration
	// defences counts the probes answered in a row, failures the claims without a reply.
	defences, failures int
	// unreachable is when the reference was lost.
	unreachable time.Duration

	// step is when the phase has its next action, count the number of actions of its kind.
	step  time.Duration
	count int
	// begun is when the phase seeking or opening began, replied when the last echo reply was seen.
	begun, replied time.Duration
	// stable is the first reply to a ping after the last claim, the begin of the wait.
	stable time.Duration
	// deadline is when others can open, for the phase quick.
	deadline time.Duration
	// claimed is until when the gate lets claims out.
	claimed time.Duration
	// contested is when a host without heartbeats claimed the address.
	contested time.Duration

	// held is the sending time of the last ping whose reply shows that no other gate is
	// open, nor opens within [Settings.Quiet] of it.
	held time.Duration
	// announce, takeBack, pinging and leaveBy are times of the active router.
	announce, takeBack, pinging, leaveBy time.Duration

	// first is the number of the first ping that counts, number that of the last one.
	// pings is their count.
	first, number, pings uint32
	sent                 [sentPings]time.Duration

	// ask is the number asked for at the time asked.
	ask   uint32
	asked time.Duration
	// mayPromise: this router held the address and shut its gate, and no peer has a
	// promise of it yet. shutAt is the time.
	mayPromise bool
	shutAt     time.Duration
	// reshut is when Shut is tried again.
	reshut time.Duration
	// promise is the ask that was promised, to the router promisedTo, until promised.
	promise    uint32
	promisedTo uint64
	promised   time.Duration
}

// New returns a machine in standby at the time now. The events Link, Ready and Reference
// come before the first Tick; without them a router stays in standby. If the kernel holds a
// permit of a process before this one, the machine goes on with it.
func New(s Settings, now time.Duration) *Machine {
	return &Machine{
		s: s, wait: s.Opening(), fresh: s.Ticket(), safe: s.Quiet(), promiseLife: s.Permit(), now: now, awake: now, due: now, beat: now, unreachable: now, reshut: never,
		notBefore: past, away: past, replied: past, contested: past, held: past, asked: past, promised: past,
		number: uint32(s.ID), first: uint32(s.ID) + 1, ask: uint32(s.ID >> 32), actions: make([]Action, 0, 16),
	}
}

// State returns the state.
func (m *Machine) State() State { return m.state }

// Next returns when a Tick is due.
func (m *Machine) Next() time.Duration { return min(m.due, m.beat) }

// Step processes an event at the time now, a monotonic time with any zero, and returns the
// actions to carry out. They are valid until the next call.
func (m *Machine) Step(now time.Duration, e Event) []Action {
	m.actions = m.actions[:0]
	if m.ended {
		return nil
	}
	m.pending = false
	m.wake(now)
	m.event(e)
	if !m.started && e.Kind == Tick {
		m.started, m.starting = true, true
		m.read()
	}
	m.work()
	if m.now >= m.beat && m.started && !m.pending && !m.ended {
		m.send()
	}
	return m.actions
}

// wake looks at the clock before the event is processed. After a sleep the events that
// waited are old: a router that believed them first would go on as if it held the address,
// and two of them could send each other back without end.
func (m *Machine) wake(now time.Duration) {
	slept := now-m.now > m.s.Permit()
	m.now = max(m.now, now)
	if !slept {
		return
	}
	m.awake = m.now
	switch m.state {
	case Standby:
		m.phase = idle
	case Claiming, Resuming:
		m.retreat("process was not running", 0)
	case Active:
		m.resume("process was not running")
	}
}

func (m *Machine) event(e Event) {
	switch e.Kind {
	case Heard:
		m.heard(e.Heartbeat)
	case Echoed:
		m.echoed(e.Number)
	case Defended:
		m.defended(e.MAC)
	case Link:
		m.setLink(e.OK)
	case Reference:
		if m.reference && !e.OK {
			m.unreachable = m.now
		}
		m.reference = e.OK
	case Ready:
		m.ready = e.OK
	case Permitted:
		m.permitted(e.Left)
	case Armed:
		m.armed()
	case Failed:
		m.failed()
	case Leave:
		m.leave()
	}
}

// work does what is due, and sets when the next work is.
func (m *Machine) work() {
	if m.pending || m.ended || !m.started {
		return
	}
	if m.now >= m.reshut {
		m.reshut = never
		m.do(Shut)
	}
	switch m.state {
	case Standby:
		m.standby()
	case Claiming, Resuming:
		m.open()
	case Active:
		m.hold()
	}
	m.due = min(m.due, m.reshut)
}

// failed shuts the gate, and again after a while if that is what failed. The permit ends
// anyway: no pings are sent.
func (m *Machine) failed() {
	m.promised, m.mayPromise = past, false
	if m.state == Standby {
		m.reshut = m.now + m.s.Interval
		return
	}
	m.retreat("gate failed", m.s.GiveUp())
}

func (m *Machine) do(kind ActionKind) { m.actions = append(m.actions, Action{Kind: kind}) }

func (m *Machine) read() {
	m.do(Read)
	m.pending, m.reading = true, m.now
}

// ping sends a ping with the next number.
func (m *Machine) ping() {
	m.number++
	m.pings++
	m.sent[m.number%sentPings] = m.now
	m.actions = append(m.actions, Action{Kind: Ping, Number: m.number})
}

// pinged returns when this process sent a ping, or past, and whether the ping is one of
// those that count.
func (m *Machine) pinged(number uint32) (sent time.Duration, counts bool) {
	if m.number-number >= min(m.pings, sentPings) {
		return past, false
	}
	return m.sent[number%sentPings], int32(number-m.first) >= 0
}

// become changes the state. The peers get to know it at once.
func (m *Machine) become(to State, reason string) {
	m.actions = append(m.actions, Action{Kind: Became, From: m.state, To: to, Reason: reason})
	m.state, m.phase, m.beat = to, idle, m.now
}

// retreat shuts the gate and returns to standby. The next claim starts after the time
// apart at the earliest.
func (m *Machine) retreat(reason string, apart time.Duration) {
	m.do(Shut)
	m.notBefore = m.now + apart
	if m.state != Standby {
		m.become(Standby, reason)
	}
}

// fit reports whether this router could take over.
func (m *Machine) fit() bool { return m.ready && m.link && !m.leaving && !m.isolated() }

// isolated reports whether neither a peer nor the reference was heard for so long that
// clients do not reach this router either. Without known peers silence means nothing.
func (m *Machine) isolated() bool { return m.now >= m.isolatedAt() }

func (m *Machine) isolatedAt() time.Duration {
	if m.s.Alone || m.reference || len(m.peers) == 0 {
		return never
	}
	since := max(m.unreachable, m.awake)
	for i := range m.peers {
		since = max(since, m.peers[i].heard)
	}
	return since + m.s.GiveUp()
}

// send sends a heartbeat.
func (m *Machine) send() {
	m.sequence++
	h := Heartbeat{
		ID: m.s.ID, MAC: m.s.MAC, State: m.state, Priority: m.s.Priority, Sequence: m.sequence, Interval: m.s.Interval,
		Healthy: m.fit(), Resigned: m.resigned(),
	}
	if m.asking() {
		h.Ask = m.ask
	}
	if m.now < m.promised {
		h.Promise, h.PromiseTo = m.promise, m.promisedTo
	}
	m.actions = append(m.actions, Action{Kind: Send, Heartbeat: h})
	m.beat = m.now + m.s.Interval
}
