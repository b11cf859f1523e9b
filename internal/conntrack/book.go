package conntrack

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A book keeps the counters: it is told what listings and events say, in the
// order in which they were read, and counts each connection and each byte once,
// whichever it hears of first.
//
// What has been counted of a connection is kept while it is open and known. The
// next that is heard of it adds the difference; an event that it ended, of a
// connection that was never heard of, adds all of it.
//
// These orders of events and listings occur, all of them under load:
//
//   - A listing has a connection whose end is already on its way. The end comes
//     later then, since events are read before a listing, never during one.
//   - A listing has a connection whose end was already told: the kernel tells of
//     the end, then takes the entry out (nf_ct_delete in nf_conntrack_core.c).
//     Such an entry is marked as dying.
//   - A listing lacks an entry, since the kernel moves entries to a larger table
//     meanwhile, or the entry has timed out and its end is about to be told
//     (ctnetlink_dump_table in nf_conntrack_netlink.c). It is gone if the next
//     lacks it too.
//   - A connection ends without an event: events were lost, or nobody listened
//     when it began (nf_conntrack_events=2).
//   - A connection has the addresses and the number of an earlier one; see key.
//     TCP does that whenever a client uses a port again before TIME_WAIT is over.
//     If the end of the earlier one was lost, counters are lower than before.
type book struct {
	count bool
	audit func(Event) // nil: nobody wants to know

	lines    []*line // in the order of the set, the fallback last
	byPort   map[service]*line
	fallback *line

	start time.Time
	open  map[key]*flow
	most  int    // that open has held since it was made
	looks uint32 // listings so far
	first bool   // this is the first one
}

// A service is a port of the pod.
type service struct {
	protocol rules.Protocol
	port     rules.Port
}

// A line is a destination and its counters.
type line struct {
	Line
	gone bool // from the list
}

// A flow is what is known of an open connection.
type flow struct {
	line             *line   // that it counts for; nil: none
	counted          Traffic // so far
	began            time.Duration
	server, reserved endpoint
	seen             uint32 // the last listing that had it, or during which it began
	known            bool   // began is
	accounted        bool
	closed           bool
	before           bool // it began before the counters did
	lost             bool // the entry is another connection's now
}

func newBook(set rules.Set, count bool, audit func(Event), now time.Time) *book {
	b := &book{count: count, audit: audit, start: now, open: make(map[key]*flow)}
	b.replace(set)
	return b
}

// destinations returns the lines of a set.
func destinations(set rules.Set) []Destination {
	list := make([]Destination, 0, len(set.Redirects)+1)
	for _, r := range set.Redirects {
		if r.ToPort == 0 {
			r.ToPort = r.Port
		}
		list = append(list, Destination(r))
	}
	if set.Fallback.IsValid() {
		list = append(list, Destination{To: set.Fallback})
	}
	return list
}

// replace counts for another set from now on. An open connection stays with its
// line while that is there; to a line that it comes to it is as one that was
// there before the counters.
func (b *book) replace(set rules.Set) {
	before := make(map[Destination]*line, len(b.lines))
	for _, l := range b.lines {
		before[l.Destination] = l
		l.gone = true
	}
	list := destinations(set)
	b.lines, b.byPort, b.fallback = make([]*line, 0, len(list)), make(map[service]*line, len(list)), nil
	for _, d := range list {
		l := before[d]
		if l == nil {
			l = &line{Line: Line{Destination: d}}
		}
		l.gone = false
		b.lines = append(b.lines, l)
		if d.Protocol == 0 {
			b.fallback = l
		} else {
			b.byPort[service{d.Protocol, d.Port}] = l
		}
	}
	for k, f := range b.open {
		switch {
		case f.line == nil:
			// It may have begun under the new rules, before this.
			if f.line = b.lineOf(k, f.server); f.line != nil && !f.before {
				f.line.add(1, f.counted)
			}
		case f.line.gone:
			f.line = b.lineOf(k, f.server)
		}
	}
}

// lineOf returns the line that redirected a connection, nil where it is an older
// list's.
func (b *book) lineOf(k key, server endpoint) *line {
	if !b.count {
		return nil
	}
	to := netip.AddrFrom4(server.addr)
	if l := b.byPort[service{k.protocol, rules.Port(k.local.port)}]; l != nil && l.To == to && l.ToPort == rules.Port(server.port) {
		return l
	}
	if b.fallback != nil && b.fallback.To == to {
		return b.fallback
	}
	return nil
}

func (l *line) add(connections uint64, t Traffic) {
	if l != nil {
		l.Connections += connections
		l.Traffic.add(t)
	}
}

// began takes in the event that a connection begins.
func (b *book) began(r *record, now time.Time) {
	f := b.open[r.key]
	if f != nil && f.known {
		b.lose(r.key, f, now)
		f = nil
	}
	if f == nil {
		f = b.add(r)
	}
	if f.before { // the first listing came before the event
		f.before = false
		f.line.add(1, f.counted)
	}
	f.began, f.known = now.Sub(b.start), true
	b.tell(Event{Began: true}, r.key, f)
}

// ended takes in the event that a connection has ended.
func (b *book) ended(r *record, now time.Time) {
	f := b.open[r.key]
	if f != nil && r.less(f.counted) {
		b.lose(r.key, f, now)
		f = nil
	}
	if f == nil {
		// Not worth keeping for a moment.
		f = newFlow(b.lineOf(r.key, r.server), r)
		f.line.add(1, r.Traffic)
	} else {
		f.update(r)
		b.remove(r.key)
	}
	b.tell(f.end(b.start, now), r.key, f)
}

// look begins a listing. All events that there were have been taken in.
func (b *book) look(now time.Time) {
	b.first = b.looks == 0
	b.looks++
	for k, f := range b.open {
		if f.lost {
			b.lose(k, f, now)
		}
	}
}

// listed takes in an entry of the listing.
func (b *book) listed(r *record) {
	f := b.open[r.key]
	switch {
	case f == nil && r.status&statusDying != 0:
		return
	case f == nil:
		f = b.add(r)
	case r.less(f.counted):
		// Not the one that is known. Its end may still be on its way.
		f.lost = true
		return
	default:
		f.update(r)
	}
	f.seen, f.closed = b.looks, r.closed
}

// looked ends a listing that was complete.
func (b *book) looked(now time.Time) {
	for k, f := range b.open {
		if f.seen+1 < b.looks {
			b.lose(k, f, now)
		}
	}
	b.first = false
}

func newFlow(l *line, r *record) *flow {
	return &flow{line: l, counted: r.Traffic, accounted: r.accounted, closed: r.closed, server: r.server, reserved: r.reserved}
}

// add begins to keep a connection, and counts what it has had so far.
func (b *book) add(r *record) *flow {
	f := newFlow(b.lineOf(r.key, r.server), r)
	f.seen, f.before = b.looks, b.first
	if !f.before {
		f.line.add(1, r.Traffic)
	}
	b.open[r.key] = f
	b.most = max(b.most, len(b.open))
	return f
}

// update counts what a connection has had since it was heard of last.
func (f *flow) update(r *record) {
	f.line.add(0, r.minus(f.counted))
	f.counted, f.accounted = r.Traffic, f.accounted || r.accounted
}

// lose takes out a connection whose end was not seen.
func (b *book) lose(k key, f *flow, now time.Time) {
	b.remove(k)
	if f.known { // who was told of its begin is told of its end
		e := f.end(b.start, now)
		e.Lost = true
		b.tell(e, k, f)
	}
}

// remove forgets a connection. A map keeps the size it once had, so one that is
// nearly empty is made again.
func (b *book) remove(k key) {
	const worthwhile, nearlyEmpty = 1024, 8
	delete(b.open, k)
	if b.most > worthwhile && len(b.open) < b.most/nearlyEmpty {
		open := make(map[key]*flow, len(b.open))
		maps.Copy(open, b.open)
		b.open, b.most = open, len(open)
	}
}

// end returns the event of a connection's end.
func (f *flow) end(start, now time.Time) Event {
	e := Event{Traffic: f.counted, Accounted: f.accounted}
	if f.known {
		e.Duration = now.Sub(start) - f.began
	}
	return e
}

// tell tells the auditor of a connection.
func (b *book) tell(e Event, k key, f *flow) {
	if b.audit == nil {
		return
	}
	e.Protocol = k.protocol
	e.Client = k.client.addrPort()
	e.Port = rules.Port(k.local.port)
	e.Server = f.server.addrPort()
	e.Reserved = f.reserved.addrPort()
	b.audit(e)
}

// report returns what has been counted, and what is open by the last listing.
func (b *book) report() Report {
	open := make(map[*line]int)
	ports := make(map[Ports]int)
	for k, f := range b.open {
		if f.seen != b.looks {
			continue // perhaps it is over, and nobody was told
		}
		if !f.closed {
			open[f.line]++
		}
		if f.reserved.port != 0 {
			ports[Ports{Protocol: k.protocol, Server: f.server.addrPort()}]++
		}
	}
	r := Report{Lines: make([]Line, 0, len(b.lines)), Ports: make([]Ports, 0, len(ports))}
	for _, l := range b.lines {
		l.Open = open[l]
		r.Lines = append(r.Lines, l.Line)
	}
	for p, n := range ports {
		p.InUse = n
		r.Ports = append(r.Ports, p)
	}
	slices.SortFunc(r.Ports, func(a, b Ports) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), a.Server.Compare(b.Server))
	})
	return r
}
