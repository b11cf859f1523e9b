package election

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// A world is a simulation: routers with their kernels, the network between them, and a
// gateway. Its time is exact; each router has a clock with a rate of its own.
type world struct {
	rng   *rand.Rand
	now   time.Duration
	queue []happening
	order uint64
	// events and calls are what happenings refer to: a queue without pointers is fast.
	events []Event
	free   []int32
	calls  []func()

	routers []*router
	// owner is the router that the gateway's neighbour table has, or -1.
	owner int
	// silent: the gateway answers nothing until then. asked is its last broadcast.
	silent, asked time.Duration

	// faulty: delays, reordering and pauses happen at random.
	faulty bool
	breaks breaks

	// violation describes the first instant with two open gates.
	violation string
	became    func(r *router, a *Action)
	trace     *strings.Builder
}

// breaks are defects made on purpose: the judge has to find them.
type breaks struct {
	permit, ticket time.Duration // their life in the kernel, if not 0
	early          time.Duration // open that much too early
	stale          bool          // promise whatever the age of the last answered ping
	late           bool          // use a promise whatever its age
	resume         bool          // resume without the wait whatever the age of the last reply
	likely         int           // every second fault is this one, if not 0
	unshut         bool          // promise without shutting
}

type happeningKind uint8

const (
	hTick happeningKind = iota
	hHeard
	hEvent    // for the process
	hUp       // a frame at the gateway
	hReply    // an echo reply at a router
	hAnnounce // an announcement at a router
	hWhoHas   // a request for the address at a router
	hProceed  // a paused process goes on
	hStart    // a process starts
	hCall     // a fault begins or ends
	hSpeak    // the kernel of the holder sends ARP for its own purposes
)

type happening struct {
	at    time.Duration
	order uint64
	kind  happeningKind
	ping  bool
	to    int8
	from  int8
	gen   uint32
	num   uint32
	event int32 // its place in world.events, or in world.calls
}

// withEvent returns a happening that carries an event.
func (w *world) withEvent(h happening, e *Event) happening {
	if len(w.free) == 0 {
		w.free = append(w.free, int32(len(w.events)))
		w.events = append(w.events, Event{})
	}
	h.event = w.free[len(w.free)-1]
	w.free = w.free[:len(w.free)-1]
	w.events[h.event] = *e
	return h
}

// take returns the event of a happening, which happens now.
func (w *world) take(h *happening) Event {
	w.free = append(w.free, h.event)
	return w.events[h.event]
}

// call calls a function later.
func (w *world) call(d time.Duration, f func()) {
	w.calls = append(w.calls, f)
	w.after(d, happening{kind: hCall, event: int32(len(w.calls) - 1)})
}

func (w *world) after(d time.Duration, h happening) {
	h.at = w.now + d
	h.order = w.order
	w.order++
	w.queue = append(w.queue, h)
	q := w.queue
	i := len(q) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !h.before(&q[p]) {
			break
		}
		q[i] = q[p]
		i = p
	}
	q[i] = h
}

func (h *happening) before(o *happening) bool {
	return h.at < o.at || h.at == o.at && h.order < o.order
}

func (w *world) pop() happening {
	q := w.queue
	top := q[0]
	last := q[len(q)-1]
	q = q[:len(q)-1]
	i := 0
	for {
		c := 2*i + 1
		if c >= len(q) {
			break
		}
		if c+1 < len(q) && q[c+1].before(&q[c]) {
			c++
		}
		if !q[c].before(&last) {
			break
		}
		q[i] = q[c]
		i = c
	}
	if len(q) > 0 {
		q[i] = last
	}
	w.queue = q
	return top
}

// A router is a process, its kernel, and its paths.
type router struct {
	w        *world
	index    int8
	settings Settings

	// The process.
	m       *Machine
	gen     uint32
	alive   bool
	ended   bool
	paused  time.Duration // until then
	rest    []Action      // of a list that a pause interrupted
	inbox   []Event
	tick    time.Duration // the time of the next hTick
	busy    bool
	slow    time.Duration // each wake-up takes up to that long
	unready bool

	// The kernel.
	rate               float64 // seconds of its clock in a second of the world
	hz                 time.Duration
	permit, claim, arm time.Duration // until then, in the time of the world
	tickets            [16]struct {
		number uint32
		until  time.Duration
	}
	ticket  int
	powered bool
	link    bool

	// The paths.
	arrived          time.Duration // the last frame at the gateway
	upLoss, downLoss float64
	beatLoss         float64
	isolated         bool // from the cluster's network
	// deaf and blind are the routers whose heartbeats and whose ARP do not arrive, as bits.
	deaf, blind uint8
	// upLag and downLag are added to the delays of frames to and from the gateway.
	upLag, downLag time.Duration
}

func (r *router) tracef(format string, args ...any) {
	if r.w.trace != nil {
		fmt.Fprintf(r.w.trace, "%12v r%d %-8v ", r.w.now, r.index, r.m.State())
		fmt.Fprintf(r.w.trace, format+"\n", args...)
	}
}

// clock returns the time of the router's clock.
func (r *router) clock() time.Duration { return time.Duration(float64(r.w.now) * r.rate) }

// real returns the time of the world for one of the router's clock, rounded up.
func (r *router) real(local time.Duration) time.Duration {
	return time.Duration(float64(local)/r.rate) + 1
}

// expiry returns when an element of a kernel's set that is added now ends: a number of
// ticks after the tick that was last.
func (r *router) expiry(life time.Duration) time.Duration {
	local := r.clock()
	return r.real(local/r.hz*r.hz + (life+r.hz-1)/r.hz*r.hz)
}

func (r *router) permits() bool { return r.powered && r.w.now < r.permit }

// wake lets the process run once it can.
func (r *router) post(e Event) {
	if !r.alive || r.ended {
		return
	}
	if r.busy || r.w.now < r.paused {
		r.inbox = append(r.inbox, e)
		return
	}
	r.step(e)
	r.drain()
}

func (r *router) drain() {
	for len(r.inbox) > 0 && r.alive && !r.ended && r.w.now >= r.paused {
		e := r.inbox[0]
		r.inbox = r.inbox[1:]
		r.step(e)
	}
	if len(r.inbox) == 0 {
		r.inbox = r.inbox[:0]
	}
	r.schedule()
}

func (r *router) schedule() {
	if !r.alive || r.ended || r.w.now < r.paused {
		return
	}
	next := r.m.Next()
	if next == never {
		return
	}
	at := max(r.real(next), r.w.now+time.Microsecond)
	if r.tick > r.w.now && r.tick <= at {
		return
	}
	r.tick = at
	late := time.Duration(0)
	if r.slow > 0 {
		late = time.Duration(r.w.rng.Int64N(int64(r.slow)))
	}
	r.w.after(at-r.w.now+late, happening{kind: hTick, to: r.index, gen: r.gen})
}

func (r *router) step(e Event) {
	actions := r.m.Step(r.clock(), e)
	if r.w.trace != nil && (e.Kind != Tick || len(actions) > 0) {
		r.tracef("<- %+v", shortEvent(e))
	}
	r.carry(actions)
	if r.alive && !r.m.pending && r.w.now >= r.paused && len(r.inbox) == 0 && r.m.started && r.m.Next() <= r.m.now {
		r.w.violation = fmt.Sprintf("at %v router %d has nothing to do, but does not wait", r.w.now, r.index)
	}
}

// carry carries actions out. In faulty times the process can pause between any two.
func (r *router) carry(actions []Action) {
	r.busy = true
	defer func() { r.busy = false }()
	for i := range actions {
		if r.w.faulty && r.w.rng.Uint32()&0x3ff == 0 {
			r.pause(r.w.duration(time.Millisecond, 300*time.Millisecond))
		}
		if r.w.now < r.paused {
			r.rest = append(r.rest[:0], actions[i:]...)
			return
		}
		a := &actions[i]
		if r.w.trace != nil {
			r.tracef("-> %v", shortAction(a))
		}
		var answer Event
		switch a.Kind {
		case Read:
			answer = Event{Kind: Permitted}
			if r.permits() {
				answer.Left = time.Duration(float64(r.permit-r.w.now) * r.rate)
			}
		case Arm:
			r.shutTickets()
			r.arm = r.expiry(a.For)
			answer = Event{Kind: Armed}
		default:
			r.carryOne(a)
			if !r.alive || r.ended {
				return
			}
			continue
		}
		// The answer is the next event, before those that waited.
		if r.w.faulty && r.w.rng.Uint32()&0x3f == 0 {
			r.pause(r.w.duration(time.Millisecond, 300*time.Millisecond))
			r.inbox = append([]Event{answer}, r.inbox...)
			return
		}
		r.step(answer)
		return
	}
}

func (r *router) carryOne(a *Action) {
	w := r.w
	switch a.Kind {
	case Shut:
		if !w.breaks.unshut {
			r.permit, r.claim, r.arm = 0, 0, 0
			r.shutTickets()
		}
	case Claim:
		r.claim = r.expiry(a.For)
	case Ping:
		if w.now < r.permit || w.now < r.claim || w.now < r.arm {
			life := r.settings.Ticket()
			if w.breaks.ticket > 0 {
				life = w.breaks.ticket
			}
			r.tickets[r.ticket%len(r.tickets)].number = a.Number
			r.tickets[r.ticket%len(r.tickets)].until = r.expiry(life)
			r.ticket++
			r.up(happening{kind: hUp, ping: true, num: a.Number})
		}
	case Announce:
		if w.now < r.permit || w.now < r.claim {
			r.up(happening{kind: hUp})
			r.broadcast(hAnnounce)
		}
	case Probe:
		r.broadcast(hWhoHas)
	case Send:
		if r.isolated {
			return
		}
		for _, p := range w.routers {
			if p != r && !p.isolated && p.deaf>>r.index&1 == 0 && w.rng.Float64() >= r.beatLoss {
				beat := Event{Kind: Heard, Heartbeat: a.Heartbeat}
				w.after(w.delay(), w.withEvent(happening{kind: hHeard, to: p.index}, &beat))
				if w.faulty && w.rng.Uint32()&0x3f == 0 {
					w.after(w.delay(), w.withEvent(happening{kind: hHeard, to: p.index}, &beat))
				}
			}
		}
	case Became:
		if w.became != nil {
			w.became(r, a)
		}
	case Ended:
		r.ended = true
	}
}

func (r *router) shutTickets() {
	for i := range r.tickets {
		r.tickets[i].until = 0
	}
}

// up sends a frame to the gateway. Frames of a router keep their order.
func (r *router) up(h happening) {
	w := r.w
	if !r.link || !r.powered || w.rng.Float64() < r.upLoss {
		return
	}
	r.arrived = max(r.arrived, w.now+w.delay()+r.upLag)
	h.from = r.index
	w.after(r.arrived-w.now, h)
}

// broadcast sends a frame to the other routers.
func (r *router) broadcast(kind happeningKind) {
	if !r.link || !r.powered {
		return
	}
	for _, p := range r.w.routers {
		if p != r && p.blind>>r.index&1 == 0 && r.w.rng.Float64() >= r.upLoss && r.w.rng.Float64() >= p.downLoss {
			r.w.after(r.w.delay(), happening{kind: kind, to: p.index, from: r.index})
		}
	}
}

// delay returns how long a frame takes: 50 to 300 µs, in faulty times sometimes longer.
func (w *world) delay() time.Duration {
	x := w.rng.Uint64()
	if w.faulty && x>>58 == 0 {
		return w.duration(300*time.Microsecond, 200*time.Millisecond)
	}
	return 50*time.Microsecond + time.Duration(x&0x3ffff)
}

// duration returns a duration between from and to with an even logarithm, roughly.
func (w *world) duration(from, to time.Duration) time.Duration {
	d := from
	for d*2 < to && w.rng.Uint32()&7 != 0 {
		d *= 2
	}
	return d + time.Duration(w.rng.Int64N(int64(min(d, to-d)+1)))
}

func (r *router) pause(d time.Duration) {
	until := r.w.now + d
	if until <= r.paused {
		return
	}
	r.paused = until
	r.w.after(d, happening{kind: hProceed, to: r.index, gen: r.gen})
}

// kill ends the process. Its kernel goes on.
func (r *router) kill() {
	r.alive, r.ended, r.paused, r.inbox, r.rest = false, false, 0, nil, r.rest[:0]
	r.gen++
}

// lose turns the node off.
func (r *router) lose() {
	r.kill()
	r.powered, r.permit, r.claim, r.arm = false, 0, 0, 0
	r.shutTickets()
}

// start starts a process.
func (r *router) start() {
	r.kill()
	r.powered, r.alive, r.tick = true, true, 0
	r.settings.ID = r.w.rng.Uint64() | 1
	r.m = New(r.settings, r.clock())
	r.m.wait = max(0, r.m.wait-r.w.breaks.early)
	if r.w.breaks.resume {
		r.m.safe = time.Hour
	}
	if r.w.breaks.late {
		r.m.promiseLife = time.Hour
	}
	if r.w.breaks.stale {
		r.m.fresh = time.Hour
	}
	r.post(Event{Kind: Link, OK: r.link})
	r.post(Event{Kind: Reference, OK: !r.isolated})
	r.post(Event{Kind: Ready, OK: !r.unready})
}

// run processes everything until the time to, or until a violation.
func (w *world) run(to time.Duration) {
	for len(w.queue) > 0 && w.queue[0].at <= to && w.violation == "" {
		h := w.pop()
		w.now = h.at
		w.happen(&h)
	}
	w.now = max(w.now, to)
}

func (w *world) happen(h *happening) {
	r := w.routers[h.to]
	switch h.kind {
	case hTick:
		if h.gen != r.gen || !r.alive {
			return
		}
		r.tick = 0
		if r.clock() >= r.m.Next() {
			r.post(Event{Kind: Tick})
		} else {
			r.schedule()
		}
	case hHeard:
		if e := w.take(h); !r.isolated {
			r.post(e)
		}
	case hEvent:
		if e := w.take(h); h.gen == r.gen {
			r.post(e)
		}
	case hUp:
		w.gateway(h)
	case hReply:
		w.reply(r, h.num)
	case hAnnounce:
		if r.link && r.powered {
			r.post(Event{Kind: Defended, MAC: w.routers[h.from].settings.MAC})
		}
	case hWhoHas:
		// The kernel answers, if its gate lets the answer out.
		if r.link && r.permits() && w.rng.Float64() >= r.upLoss {
			if h.from < 0 {
				r.up(happening{kind: hUp})
			} else if asker := w.routers[h.from]; asker.link && asker.blind>>r.index&1 == 0 && w.rng.Float64() >= asker.downLoss {
				w.after(w.delay(), w.withEvent(happening{kind: hEvent, to: h.from, gen: asker.gen}, &Event{Kind: Defended, MAC: r.settings.MAC}))
			}
		}
	case hProceed:
		if h.gen != r.gen || w.now < r.paused || !r.alive {
			return
		}
		if len(r.rest) > 0 {
			r.carry(append([]Action(nil), r.rest...))
			if w.now < r.paused {
				return
			}
			r.rest = r.rest[:0]
		}
		r.drain()
	case hStart:
		if h.gen == r.gen && (!r.alive || r.ended) {
			r.start()
		}
	case hCall:
		w.calls[h.event]()
	case hSpeak:
		if r.permits() {
			r.up(happening{kind: hUp})
			r.broadcast(hAnnounce)
		}
		if w.faulty {
			w.after(w.duration(20*time.Millisecond, 500*time.Millisecond), happening{kind: hSpeak, to: r.index})
		}
	}
}

// gateway receives a frame: ARP with the address changes its table, an echo request is
// answered to whom the table has.
func (w *world) gateway(h *happening) {
	if w.now < w.silent {
		return
	}
	if !h.ping {
		if w.trace != nil && w.owner != int(h.from) {
			fmt.Fprintf(w.trace, "%12v gateway has r%d\n", w.now, h.from)
		}
		w.owner = int(h.from)
		return
	}
	if w.owner < 0 {
		if w.now-w.asked > 10*time.Millisecond {
			w.asked = w.now
			for _, r := range w.routers {
				if w.rng.Float64() >= r.downLoss {
					w.after(w.delay(), happening{kind: hWhoHas, to: r.index, from: -1})
				}
			}
		}
		return
	}
	r := w.routers[w.owner]
	if w.rng.Float64() < r.downLoss {
		return
	}
	w.after(w.delay()+r.downLag, happening{kind: hReply, to: r.index, num: h.num})
}

// reply is the ingress hook of a router, which also gives the reply to its process.
func (w *world) reply(r *router, number uint32) {
	if !r.link || !r.powered {
		return
	}
	for i := range r.tickets {
		if t := &r.tickets[i]; t.number == number && w.now < t.until && (w.now < r.permit || w.now < r.arm) {
			w.open(r)
			break
		}
	}
	r.post(Event{Kind: Echoed, Number: number})
}

// open extends the permit of a router, and judges: no other gate may be open.
func (w *world) open(r *router) {
	life := r.settings.Permit()
	if w.breaks.permit > 0 {
		life = w.breaks.permit
	}
	r.permit = r.expiry(life)
	for _, o := range w.routers {
		if o != r && o.permits() && w.violation == "" {
			w.violation = fmt.Sprintf("at %v the gates of routers %d and %d are open", w.now, r.index, o.index)
			if w.trace != nil {
				fmt.Fprintln(w.trace, w.violation)
			}
		}
	}
}

// newWorld returns a world of n routers, which all start within a few milliseconds.
func newWorld(seed uint64, n int, interval time.Duration, b breaks, trace bool) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 1)), owner: -1, breaks: b}
	if trace {
		w.trace = &strings.Builder{}
	}
	w.now = time.Second
	for i := range n {
		r := &router{
			w: w, index: int8(i), powered: true, link: true,
			settings: Settings{Interval: interval, Priority: DefaultPriority, MAC: [6]byte{2, 0, 0, 0, 0, byte(i)}},
			rate:     0.995 + 0.01*w.rng.Float64(),
			hz:       []time.Duration{time.Millisecond, 4 * time.Millisecond, 10 * time.Millisecond}[w.rng.IntN(3)],
		}
		if w.rng.IntN(4) == 0 {
			r.settings.Priority += uint8(w.rng.IntN(3))
		}
		w.routers = append(w.routers, r)
		w.after(time.Duration(w.rng.Int64N(int64(2*interval))), happening{kind: hStart, to: r.index})
	}
	return w
}

// holder returns the only router that is active with an open gate while no other one is
// claiming or resuming, or nil.
func (w *world) holder() *router {
	var holder *router
	for _, r := range w.routers {
		switch {
		case !r.powered:
		case r.permits() && holder == nil && r.alive && r.m.State() == Active:
			holder = r
		case r.permits(), r.alive && !r.ended && r.m.State() != Standby:
			return nil
		}
	}
	return holder
}

// settle runs until one router has held for 5 intervals, and returns since when. It gives
// up at the time limit.
func (w *world) settle(limit time.Duration) (time.Duration, bool) {
	var held *router
	since := w.now
	for w.now < limit && w.violation == "" {
		h := w.holder()
		if h == nil || h != held {
			held, since = h, w.now
		}
		if held != nil && w.now-since >= 5*held.settings.Interval {
			return since, true
		}
		w.run(w.now + 2*time.Millisecond)
	}
	return since, false
}

func shortEvent(e Event) string {
	switch e.Kind {
	case Tick:
		return "tick"
	case Heard:
		h := e.Heartbeat
		return fmt.Sprintf("heard r%d %v #%d healthy=%t resigned=%t ask=%d promise=%d", h.MAC[5], h.State, h.Sequence, h.Healthy, h.Resigned, h.Ask, h.Promise)
	case Echoed:
		return fmt.Sprintf("echo %d", e.Number)
	case Defended:
		return fmt.Sprintf("defended by r%d", e.MAC[5])
	case Permitted:
		return fmt.Sprintf("permit %v", e.Left)
	}
	return fmt.Sprintf("%s %t", [...]string{"tick", "heard", "echoed", "defended", "link", "reference", "ready", "permitted", "armed", "failed", "leave"}[e.Kind], e.OK)
}

func shortAction(a *Action) string {
	name := [...]string{"", "shut", "claim", "arm", "ping", "probe", "announce", "read", "send", "became", "ended"}[a.Kind]
	switch a.Kind {
	case Ping:
		return fmt.Sprintf("ping %d", a.Number)
	case Arm, Claim:
		return fmt.Sprintf("%s for %v", name, a.For)
	case Became:
		return fmt.Sprintf("%v -> %v: %s", a.From, a.To, a.Reason)
	case Send:
		return fmt.Sprintf("send %v #%d ask=%d promise=%d", a.Heartbeat.State, a.Heartbeat.Sequence, a.Heartbeat.Ask, a.Heartbeat.Promise)
	}
	return name
}
