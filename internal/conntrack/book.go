package conntrack

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A book keeps the counters. It processes dumps and events in the order in which
// they were read, and counts each connection and each byte once, whichever comes
// first.
//
// The book keeps the counted traffic of each open connection. The next record of
// the connection adds the difference; an end event of an unknown connection adds
// all of its traffic.
//
// These orders of events and dumps occur, all of them under load:
//
//   - A dump has a connection whose end event is pending. The event is processed
//     later, since events are read before a dump, never during one.
//   - A dump has a connection whose end event was processed: the kernel sends the
//     event, then deletes the entry (nf_ct_delete in nf_conntrack_core.c). The
//     entry is marked as dying.
//   - A dump lacks an entry, since the kernel moves entries to a larger table
//     during the dump, or since the entry has expired and its end event follows
//     (ctnetlink_dump_table in nf_conntrack_netlink.c). The connection has ended
//     if the next dump lacks it too.
//   - A connection ends without an event: events were lost, or no program was
//     subscribed when it began (nf_conntrack_events=2).
//   - A connection has the addresses and the ID of an earlier one; see key. For TCP
//     this happens if a client reuses a port during TIME_WAIT. If the end of the
//     earlier one was lost, the new counters are lower than the known ones.
type book struct {
	count bool
	audit func(Event) // nil: no audit log

	lines    []*line      // in the order of the set, the fallbacks last
	byPort   rules.Lookup // index of lines
	fallback [2]*line     // of IPv4 and IPv6; nil: none

	start time.Time
	open  map[key]*flow
	most  int    // largest size of open since it was made
	dumps uint32 // number of dumps
	waits timeouts
	first bool // the current dump is the first one
}

// A line is a destination and its counters.
type line struct {
	Line
	gone bool // no longer in the list
}

// A flow is an open connection.
type flow struct {
	line             *line         // destination that it counts for; nil: none
	counted          Traffic       // so far
	began, changed   time.Duration // changed is the time of the last change of state
	server, reserved endpoint
	seen             uint32 // number of the last dump that had it, or in which it began
	state            uint8  // of TCP or SCTP; 0: unknown
	over             bool   // it was closed or reset
	known            bool   // began is valid
	accounted        bool
	closed           bool
	before           bool // it is older than the counters
	lost             bool // another connection has its entry now
}

func newBook(set rules.Set, count bool, audit func(Event), now time.Time) *book {
	b := &book{count: count, audit: audit, start: now, open: make(map[key]*flow)}
	b.replace(set)
	return b
}

// destinations returns the redirects of a set, the fallbacks last.
func destinations(set rules.Set) []rules.Redirect {
	list := slices.Clone(set.Redirects)
	for i, r := range list {
		if r.ToPort == 0 && r.Last == 0 {
			list[i].ToPort = r.Port
		}
	}
	for _, to := range set.Fallbacks() {
		list = append(list, rules.Redirect{To: to})
	}
	return list
}

// replace sets new destinations. An open connection stays with its destination
// while that is in the list. For a destination that it comes to, it is like a
// connection older than the counters.
func (b *book) replace(set rules.Set) {
	before := make(map[rules.Redirect]*line, len(b.lines))
	for _, l := range b.lines {
		before[l.Redirect] = l
		l.gone = true
	}
	list := destinations(set)
	b.lines, b.byPort, b.fallback = make([]*line, 0, len(list)), rules.NewLookup(set.Redirects), [2]*line{}
	for _, d := range list {
		l := before[d]
		if l == nil {
			l = &line{Line: Line{Redirect: d}}
		}
		l.gone = false
		b.lines = append(b.lines, l)
		if d.Protocol == 0 {
			b.fallback[familyOf(d.To)] = l
		}
	}
	for k, f := range b.open {
		switch {
		case f.line == nil:
			// It may have begun between the loading of the rules and this call.
			if f.line = b.lineOf(k, f.server); f.line != nil && !f.before {
				f.line.add(1, f.counted)
			}
		case f.line.gone:
			f.line = b.lineOf(k, f.server)
		}
	}
}

// lineOf returns the destination that redirected a connection, nil if it is not in
// the list.
func (b *book) lineOf(k key, server endpoint) *line {
	if !b.count {
		return nil
	}
	to, local := server.address(), rules.Port(k.local.port)
	if i, ok := b.byPort.Find(rules.FamilyOf(to), k.protocol, local); ok && b.lines[i].Reaches(netip.AddrPortFrom(to, server.port), local) {
		return b.lines[i]
	}
	if f := b.fallback[familyOf(to)]; f != nil && f.To == to {
		return f
	}
	// Any other address may be one that the name of a line has, or had.
	if i, named := b.byPort.Find(0, k.protocol, local); named && b.lines[i].Server(local).Port() == server.port {
		return b.lines[i]
	}
	return nil
}

// familyOf returns 0 for IPv4, and 1 for IPv6.
func familyOf(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

func (l *line) add(connections uint64, t Traffic) {
	if l != nil {
		l.Connections += connections
		l.Traffic.add(t)
	}
}

// fail counts a connection that has ended without being accepted. An entry that was deleted
// before its timeout had no time for an answer.
func (l *line) fail(r *record, outcome Outcome, now time.Time) {
	if l == nil || r.protocol != rules.TCP && r.protocol != sctp {
		return
	}
	switch {
	case outcome == Refused:
		l.Refused++
		l.LastRefused = now
	case outcome == Unanswered && r.left == 0:
		l.Unanswered++
	}
}

// began processes a begin event.
func (b *book) began(r *record, now time.Time) {
	f := b.open[r.key]
	if f != nil && f.known {
		b.lose(r.key, f, now)
		f = nil
	}
	if f == nil {
		f = b.add(r)
	}
	if f.before { // the first dump came before the event
		f.before = false
		f.line.add(1, f.counted)
	}
	f.began, f.known = b.at(r, now), true
	f.state, f.over, f.changed = r.state, false, f.began
	b.emit(Event{Began: true}, r.key, f)
}

// at returns the time of an event: the kernel's, or that of its arrival.
func (b *book) at(r *record, now time.Time) time.Duration {
	if r.at != 0 {
		now = time.Unix(0, r.at)
	}
	return now.Sub(b.start)
}

// changed processes the event of a change, for the audit log.
func (b *book) changed(r *record, now time.Time) {
	if f := b.open[r.key]; f != nil && f.known && !f.over && r.state != 0 && r.state != f.state {
		f.state, f.over, f.changed = r.state, over(r.protocol, r.state), b.at(r, now)
	}
}

// ended processes an end event.
func (b *book) ended(r *record, now time.Time) {
	f := b.open[r.key]
	if f != nil && r.less(f.counted) {
		b.lose(r.key, f, now)
		f = nil
	}
	if f == nil {
		// Unknown connection: count it without keeping it.
		f = newFlow(b.lineOf(r.key, r.server), r)
		f.line.add(1, r.Traffic)
	} else {
		f.update(r)
		b.remove(r.key)
	}
	if !f.over && r.state != 0 {
		f.state = r.state
	}
	at, timeout := b.at(r, now), func(name string) time.Duration { return b.waits.get(name, now) }
	outcome := f.outcome(r.protocol, r, at, timeout)
	if !f.before {
		f.line.fail(r, outcome, now)
	}
	if b.audit == nil {
		return
	}
	e := f.end()
	e.Outcome = outcome
	if e.Timed = f.known; f.known {
		last := f.last(r.protocol, r, at, timeout)
		e.Duration = max(last-f.began, 0)
	}
	b.emit(e, r.key, f)
}

// beginDump begins a dump, after all pending events were processed.
func (b *book) beginDump(now time.Time) {
	b.first = b.dumps == 0
	b.dumps++
	for k, f := range b.open {
		if f.lost {
			b.lose(k, f, now)
		}
	}
}

// listed processes an entry of a dump.
func (b *book) listed(r *record) {
	f := b.open[r.key]
	switch {
	case f == nil && r.status&statusDying != 0:
		return
	case f == nil:
		f = b.add(r)
	case r.less(f.counted):
		// Another connection than the known one, whose end event may be pending.
		f.lost = true
		return
	default:
		f.update(r)
	}
	f.seen, f.closed = b.dumps, r.closed()
}

// endDump ends a complete dump.
func (b *book) endDump(now time.Time) {
	for k, f := range b.open {
		if f.seen+1 < b.dumps {
			b.lose(k, f, now)
		}
	}
	b.first = false
}

func newFlow(l *line, r *record) *flow {
	return &flow{line: l, counted: r.Traffic, accounted: r.accounted, closed: r.closed(), server: r.server, reserved: r.reserved}
}

// add begins to keep a connection, and counts its traffic so far.
func (b *book) add(r *record) *flow {
	f := newFlow(b.lineOf(r.key, r.server), r)
	f.seen, f.before = b.dumps, b.first
	if !f.before {
		f.line.add(1, r.Traffic)
	}
	b.open[r.key] = f
	b.most = max(b.most, len(b.open))
	return f
}

// update counts a connection's traffic since its last record.
func (f *flow) update(r *record) {
	f.line.add(0, r.minus(f.counted))
	f.counted, f.accounted = r.Traffic, f.accounted || r.accounted
}

// lose removes a connection whose end was not seen.
func (b *book) lose(k key, f *flow, now time.Time) {
	b.remove(k)
	if f.known { // the audit log has its begin, so it gets its end
		e := f.end()
		e.Lost, e.Timed = true, true
		if e.Duration = now.Sub(b.start) - f.began; f.over {
			e.Duration = f.changed - f.began
		}
		b.emit(e, k, f)
	}
}

// remove forgets a connection. It shrinks a map that has become nearly empty,
// since Go's maps do not shrink.
func (b *book) remove(k key) {
	const worthwhile, nearlyEmpty = 1024, 8
	delete(b.open, k)
	if b.most > worthwhile && len(b.open) < b.most/nearlyEmpty {
		open := make(map[key]*flow, len(b.open))
		maps.Copy(open, b.open)
		b.open, b.most = open, len(open)
	}
}

// end returns the end event of a connection, without its time.
func (f *flow) end() Event { return Event{Traffic: f.counted, Accounted: f.accounted} }

// emit passes an event to the audit function.
func (b *book) emit(e Event, k key, f *flow) {
	if b.audit == nil {
		return
	}
	e.Protocol = k.protocol
	e.Client = k.client.addrPort()
	e.Local = k.local.addrPort()
	e.Port = rules.Port(k.local.port)
	e.Server = f.server.addrPort()
	e.Reserved = f.reserved.addrPort()
	b.audit(e)
}

// report returns the counters, with the open connections of the last dump.
func (b *book) report() Report {
	open := make(map[*line]int)
	ports := make(map[Ports]int)
	for k, f := range b.open {
		if f.seen != b.dumps {
			continue // maybe it ended without an event
		}
		if !f.closed {
			open[f.line]++
		}
		if f.reserved.port != 0 {
			ports[Ports{Protocol: k.protocol, Server: f.server.addrPort(), Reserved: f.reserved.address()}]++
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
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), a.Server.Compare(b.Server), a.Reserved.Compare(b.Reserved))
	})
	return r
}
