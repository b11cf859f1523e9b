package conntrack

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

// A table is a book with a clock of its own and its audit events.
type table struct {
	*testing.T
	*book
	now   time.Time
	begun int
	ends  []Event
}

// newTable returns a book after a first dump of the given entries.
func end(address string, port uint16) endpoint {
	return endpoint{netip.MustParseAddr(address).As16(), port}
}

func newTable(t *testing.T, entries ...record) *table {
	tb := &table{T: t, now: time.Unix(1000, 0)}
	tb.book = newBook(set, true, func(e Event) {
		if e.Began {
			tb.begun++
		} else {
			tb.ends = append(tb.ends, e)
		}
	}, tb.now)
	tb.list(entries...)
	return tb
}

func (tb *table) list(entries ...record) {
	tb.beginDump(tb.now)
	for _, r := range entries {
		tb.listed(&r)
	}
	tb.endDump(tb.now)
}

func (tb *table) begin(r record) { tb.began(&r, tb.now) }
func (tb *table) end(r record)   { tb.ended(&r, tb.now) }

// want checks the counters of a line.
func (tb *table) want(line int, connections, packets uint64, open int) {
	tb.Helper()
	want := Counts{Connections: connections, Traffic: Traffic{packets, 100 * packets, packets / 2, 50 * packets}, Open: open}
	if d := cmp.Diff(want, tb.report().Lines[line].Counts); d != "" {
		tb.Errorf("line %d, want less got:\n%s", line, d)
	}
}

// entry returns an entry of a connection to port 80, with some packets.
func entry(id uint32, packets uint64) record {
	return record{
		key: key{
			id: id, protocol: rules.TCP,
			client: end("10.128.0.71", 40000), local: end("10.128.0.98", 80),
		},
		server:    endpoint{server.As16(), 8080},
		reserved:  end("192.168.12.99", 40000),
		accounted: true, status: statusSeenReply,
		Traffic: Traffic{packets, 100 * packets, packets / 2, 50 * packets},
	}
}

func dying(r record) record {
	r.status |= statusDying
	return r
}

func TestBook(t *testing.T) {
	for _, test := range []struct {
		name        string
		do          func(*table)
		connections uint64
		packets     uint64
		open        int
	}{
		{"never listed", func(b *table) { b.end(entry(1, 10)) }, 1, 10, 0},
		{"listed, then ended", func(b *table) { b.list(entry(1, 4)); b.list(entry(1, 6)); b.end(entry(1, 10)) }, 1, 10, 0},
		{"open", func(b *table) { b.begin(entry(1, 0)); b.list(entry(1, 6)) }, 1, 6, 1},
		{"listed before its new event", func(b *table) { b.list(entry(1, 4)); b.begin(entry(1, 0)); b.list(entry(1, 6)) }, 1, 6, 1},
		{"begun and ended unlisted", func(b *table) { b.begin(entry(1, 0)); b.end(entry(1, 10)) }, 1, 10, 0},
		{"listed twice at once", func(b *table) { b.list(entry(1, 4), entry(1, 6)); b.end(entry(1, 10)) }, 1, 10, 0},
		{"listed as dying after its destroy event", func(b *table) { b.list(entry(1, 4)); b.end(entry(1, 10)); b.list(dying(entry(1, 10))) }, 1, 10, 0},
		{"listed as dying before its destroy event", func(b *table) { b.list(dying(entry(1, 10))); b.end(entry(1, 10)) }, 1, 10, 0},
		{"known and dying", func(b *table) { b.list(entry(1, 4)); b.list(dying(entry(1, 10))); b.end(entry(1, 10)) }, 1, 10, 0},
		{"missing in one listing", func(b *table) { b.list(entry(1, 4)); b.list(); b.list(entry(1, 6)); b.end(entry(1, 10)) }, 1, 10, 0},
		{"gone without an event", func(b *table) { b.list(entry(1, 4)); b.list(); b.list(); b.list() }, 1, 4, 0},
		{"the same addresses", func(b *table) { b.list(entry(1, 4)); b.end(entry(1, 10)); b.list(entry(2, 2)); b.end(entry(2, 8)) }, 2, 18, 0},
		{"the same number too", func(b *table) { b.list(entry(1, 4)); b.end(entry(1, 10)); b.list(entry(1, 2)); b.end(entry(1, 8)) }, 2, 18, 0},
		{"the same number, listed before the first one's end", func(b *table) { b.list(entry(1, 4)); b.list(entry(1, 2)); b.end(entry(1, 10)); b.end(entry(1, 8)) }, 2, 18, 0},
		{"the end of the first one lost", func(b *table) { b.list(entry(1, 4)); b.list(entry(2, 2)); b.end(entry(2, 8)); b.list(); b.list() }, 2, 12, 0},
		{"the same number, the end of the first one lost, listed", func(b *table) { b.list(entry(1, 4)); b.list(entry(1, 2)); b.list(entry(1, 3)); b.end(entry(1, 8)) }, 2, 12, 0},
		{"the same number, the end of the first one lost, ended", func(b *table) { b.list(entry(1, 4)); b.end(entry(1, 3)) }, 2, 7, 0},
		{"the same number, the end of the first one lost, begun", func(b *table) {
			b.begin(entry(1, 0))
			b.list(entry(1, 4))
			b.begin(entry(1, 0))
			b.end(entry(1, 8))
		}, 2, 12, 0},
		{"not accounted", func(b *table) {
			r := entry(1, 0)
			r.accounted = false
			b.list(r)
			b.end(r)
		}, 1, 0, 0},
		{"closed, and still listed", func(b *table) {
			r := entry(1, 6)
			r.state = tcpTimeWait
			b.list(entry(1, 4))
			b.list(r)
		}, 1, 6, 0},
		{"another port", func(b *table) {
			r := entry(1, 6)
			r.local.port = 82
			b.list(r)
			b.end(r)
		}, 0, 0, 0},
		{"an older list's server", func(b *table) {
			r := entry(1, 6)
			r.server.addr[15]++
			b.begin(r)
			b.list(r)
			b.end(r)
		}, 0, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newTable(t)
			test.do(b)
			b.want(0, test.connections, test.packets, test.open)
			b.list()
			b.list()
			if len(b.open) != 0 {
				t.Errorf("%d connections are kept", len(b.open))
			}
		})
	}
}

// A connection without an answer, and one whose first answer was a reset, are failures, if the
// counters have their begin, and with an audit log and without one.
func TestFailures(t *testing.T) {
	const synSent = 1
	for name, test := range map[string]struct {
		protocol rules.Protocol
		state    uint8
		status   uint32
		left     time.Duration
		want     Counts
	}{
		"refused":            {rules.TCP, tcpClose, 0, time.Minute, Counts{Refused: 1}},
		"unanswered":         {rules.TCP, synSent, 0, 0, Counts{Unanswered: 1}},
		"removed before":     {rules.TCP, synSent, 0, time.Second, Counts{}},
		"reset":              {rules.TCP, tcpClose, statusSeenReply, 0, Counts{}},
		"closed":             {rules.TCP, tcpTimeWait, statusSeenReply, 0, Counts{}},
		"datagrams one way":  {rules.UDP, 0, 0, 0, Counts{}},
		"another one's port": {rules.TCP, tcpClose, 0, 0, Counts{}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, audit := range []bool{false, true} {
				before := entry(9, 4)
				before.state = synSent
				b := newTable(t, before)
				if !audit {
					b.audit = nil
				}
				r := entry(1, 4)
				r.protocol, r.state, r.status, r.left = test.protocol, test.state, test.status, test.left
				if name == "another one's port" {
					r.local.port = 82
				}
				b.end(r)
				b.end(before) // not counted as a connection either
				if got := b.report().Lines[0].Counts; got.Refused != test.want.Refused || got.Unanswered != test.want.Unanswered {
					t.Errorf("audit %v: %d refused, %d unanswered, want %d and %d", audit, got.Refused, got.Unanswered, test.want.Refused, test.want.Unanswered)
				} else if got.LastRefused.IsZero() != (got.Refused == 0) {
					t.Errorf("audit %v: %d refused, the last one at %s", audit, got.Refused, got.LastRefused)
				}
			}
		})
	}
}

// A connection older than the counters is open, and its traffic counts from then.
func TestFromBefore(t *testing.T) {
	b := newTable(t, entry(1, 100), entry(2, 50))
	b.want(0, 0, 0, 2)
	b.list(entry(1, 104), entry(2, 50))
	b.end(entry(1, 110))
	b.want(0, 0, 10, 1)
	b.begin(entry(2, 0)) // it is not older, only its event is late
	b.want(0, 1, 60, 1)
}

func TestFallback(t *testing.T) {
	b := newTable(t)
	r := entry(1, 8)
	r.server.addr = fallback.As16()
	for _, port := range []uint16{80, 90} { // including a port that has a line now
		r.local.port, r.server.port = port, port
		b.end(r)
	}
	r.protocol, r.local.port, r.client.port, r.server.port, r.reserved.port = rules.ICMP, 0, 0, 0, 0
	b.list(r)
	b.want(3, 3, 24, 1)
	if p := b.report().Ports; len(p) != 0 {
		t.Errorf("ICMP takes ports: %+v", p)
	}
}

func TestReplace(t *testing.T) {
	b := newTable(t)
	stays, moves, goes, comes := entry(1, 4), entry(2, 4), entry(3, 4), entry(4, 4)
	moves.local.port, moves.server.addr, moves.server.port = 7000, fallback.As16(), 7000 // first the fallback's, then a line's
	goes.protocol, goes.local.port, goes.server.port = rules.UDP, 53, 5353
	comes.local.port, comes.server = 82, endpoint{server.As16(), 82} // begun under rules that are newer than the book's
	b.list(stays, moves, goes, comes)
	b.replace(rules.Set{Redirects: []rules.Redirect{
		{Protocol: rules.TCP, Port: 7000, To: fallback},
		{Protocol: rules.TCP, Port: 82, To: server},
		{Protocol: rules.TCP, Port: 80, To: server, ToPort: 8080},
	}})
	b.want(0, 0, 0, 1)
	b.want(1, 1, 4, 1)
	b.want(2, 1, 4, 1)
	for _, r := range []*record{&stays, &moves, &goes, &comes} {
		r.Traffic = entry(0, 10).Traffic
		b.end(*r)
	}
	b.want(0, 0, 6, 0)
	b.want(1, 1, 10, 0)
	b.want(2, 1, 10, 0)

	// A destination that is removed begins at 0 when it comes back. A connection
	// stays with the fallback while that is in the list.
	b.replace(set)
	b.list(moves)
	b.want(1, 0, 0, 0)
	b.want(3, 1, 10, 1)
	with := set
	with.Redirects = append([]rules.Redirect{{Protocol: rules.TCP, Port: 7000, To: fallback}}, set.Redirects...)
	b.replace(with)
	b.want(0, 0, 0, 0)
	b.want(4, 1, 10, 1)
}

func TestAuditOfBook(t *testing.T) {
	b := newTable(t)
	r := entry(1, 0)
	b.begin(r)
	b.now = b.now.Add(3 * time.Second)
	r.Traffic = entry(0, 10).Traffic
	r.status |= statusSeenReply
	b.end(r)
	want := Event{
		Protocol: rules.TCP, Client: netip.MustParseAddrPort("10.128.0.71:40000"), Port: 80, Local: netip.MustParseAddrPort("10.128.0.98:80"),
		Server: netip.MustParseAddrPort("127.0.0.25:8080"), Reserved: netip.MustParseAddrPort("192.168.12.99:40000"),
		Traffic: r.Traffic, Accounted: true, Timed: true, Duration: 3 * time.Second, // its state is unknown
	}
	if b.begun != 1 || len(b.ends) != 1 || b.ends[0] != want {
		t.Errorf("%d began; ended:\n got %+v\nwant %+v", b.begun, b.ends, want)
	}
	// A connection without a begin event has no duration. Without an end event it
	// is not reported.
	b.end(r)
	b.list(r)
	b.list()
	b.list()
	if want.Timed, want.Duration = false, 0; len(b.ends) != 2 || b.ends[1] != want {
		t.Errorf("ended:\n got %+v\nwant %+v", b.ends[1:], want)
	}
	// A connection that disappears after its begin event.
	b.begin(entry(2, 0))
	b.list(entry(2, 4))
	b.now = b.now.Add(time.Second)
	b.list()
	b.list()
	want.Traffic, want.Timed, want.Duration, want.Lost = entry(0, 4).Traffic, true, time.Second, true
	if len(b.ends) != 3 || b.ends[2] != want {
		t.Errorf("ended:\n got %+v\nwant %+v", b.ends[2:], want)
	}
}

// decode does not panic on malformed data.
func FuzzDecode(f *testing.F) {
	f.Add(request(messageGet, 0, 1, [2]uint32{ctaMark, 1}))
	f.Add([]byte{2, 0, 0, 0, 8, 0, 1, 0x80, 3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for m, rest, ok := split(b); ok; m, rest, ok = split(rest) {
			decode(m.data)
		}
		if r, ok := decode(b); ok && r.protocol == 0 {
			t.Errorf("%x: a connection without a protocol", b)
		}
	})
}
