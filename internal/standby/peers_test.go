package standby

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/election"
)

// between returns the peers of two routers on the loopback interface, with keys.
func between(t *testing.T, keys ...string) (all []*peers, heard []chan election.Event) {
	t.Helper()
	var port uint16
	for i, key := range keys {
		o := Options{Listen: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i + 1)}), port)}
		if key != "" {
			o.Key = []byte(key)
		}
		p, err := listenPeers(o)
		if err != nil {
			t.Fatal(err)
		}
		port = p.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		p.own = netip.AddrPortFrom(p.own.Addr(), port)
		events := make(chan election.Event, 16)
		ended := make(chan struct{})
		go func() {
			p.read(func(e election.Event) { events <- e })
			close(ended)
		}()
		t.Cleanup(func() { p.close(); <-ended })
		all, heard = append(all, p), append(heard, events)
	}
	return all, heard
}

func heartbeat(id uint64, sequence uint32) election.Heartbeat {
	return election.Heartbeat{ID: id, Sequence: sequence, Interval: election.DefaultInterval, State: election.Active, MAC: [6]byte{2, 0, 0, 0, 0, byte(id)}, Priority: 7, Healthy: true}
}

// until waits until a condition holds.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waiting for: %s", what)
		}
	}
}

// A router that is heard is a peer, also if the look-up does not have it, and is answered.
func TestPeersHear(t *testing.T) {
	for _, key := range []string{"", "0123456789abcdef"} {
		all, heard := between(t, key, key)
		a, b := all[0], all[1]
		b.known = []netip.Addr{a.own.Addr(), b.own.Addr()}
		b.send(heartbeat(2, 1))
		e := <-heard[0]
		if e.Kind != election.Heard || e.Heartbeat != heartbeat(2, 1) {
			t.Fatalf("heard %+v", e)
		}
		a.note(e.Heartbeat, election.DefaultInterval)
		list := a.list()
		if len(list) != 1 || list[0].Address != b.own.Addr() || list[0].State != election.Active || list[0].Priority != 7 || !list[0].Healthy || !a.has([6]byte{2, 0, 0, 0, 0, 2}) || a.has([6]byte{2}) {
			t.Errorf("peers %+v", list)
		}
		if a.holderHeard().IsZero() || a.last().IsZero() || a.lastAble().IsZero() {
			t.Error("the time of a heartbeat is not known")
		}
		a.mu.Lock()
		a.heard[2].Heard = time.Now().Add(-2 * forgetAfter)
		a.mu.Unlock()
		if list := a.list(); len(list) > 0 {
			t.Errorf("silent peers %+v", list)
		}
		a.from(2, b.own.Addr())
		a.send(heartbeat(1, 1)) // to the sender, of which no look-up has told
		if e := <-heard[1]; e.Heartbeat.ID != 1 {
			t.Errorf("answer %+v", e)
		}
		// b has sent nothing to itself.
		select {
		case e := <-heard[1]:
			t.Errorf("heard itself: %+v", e)
		default:
		}
	}
}

// Heartbeats that are missing in between are counted, and a restart is none of them.
func TestPeersCountLost(t *testing.T) {
	p := &peers{heard: map[uint64]*heard{2: {}}, ports: map[netip.Addr]Ports{}}
	for _, step := range []struct {
		sequence uint32
		lost     uint64
	}{{10, 0}, {11, 0}, {14, 2}, {15, 2}, {1, 2}, {2, 2}, {1 << 31, 2}} {
		p.note(heartbeat(2, step.sequence), election.DefaultInterval)
		if got := p.lost.Load(); got != step.lost {
			t.Errorf("after number %d: expected %d lost, found %d", step.sequence, step.lost, got)
		}
	}
}

// A packet that is no heartbeat with the key is counted, and nothing else.
func TestPeersRefuse(t *testing.T) {
	all, heard := between(t, "0123456789abcdef", "another key......", "")
	all[1].known, all[2].known = []netip.Addr{all[0].own.Addr()}, []netip.Addr{all[0].own.Addr()}
	all[1].send(heartbeat(2, 1))
	all[2].send(heartbeat(3, 1))
	if _, err := all[2].conn.WriteToUDPAddrPort([]byte("x"), all[0].own); err != nil {
		t.Fatal(err)
	}
	until(t, "three packets are refused", func() bool { return all[0].refused.Load() == 3 })
	if len(heard[0]) > 0 || len(all[0].list()) > 0 || len(all[0].heard) > 0 {
		t.Errorf("heard %d, peers %v", len(heard[0]), all[0].list())
	}
}

// Without a key anybody can invent routers: they use up no memory.
func TestPeersOfMany(t *testing.T) {
	p := &peers{heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
	for id := range uint64(10000) {
		p.from(id+1, netip.AddrFrom4([4]byte{10, 0, byte(id >> 8), byte(id)}))
		p.note(heartbeat(id+1, 1), election.DefaultInterval)
	}
	if n := len(p.heard); n != mostPeers {
		t.Errorf("expected %d peers, found %d", mostPeers, n)
	}
}

// Strangers take no place from a router of the look-up, and have one for each address.
func TestPeersOfStrangers(t *testing.T) {
	address := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }
	p := &peers{detection: time.Hour, heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
	p.know([]netip.Addr{address(2), address(3)})
	from := func(want bool, id uint64, a netip.Addr) {
		t.Helper()
		if got := p.from(id, a); got != want {
			t.Errorf("router %d at %s: counts %v, want %v", id, a, got, want)
		}
		p.note(heartbeat(id, 1), election.DefaultInterval)
	}
	from(true, 2, address(2))
	from(true, 1000, address(1000))
	for id := range uint64(100) {
		from(false, 2000+id, address(1000)) // many of one address
		from(false, 3000+id, address(2))
	}
	from(false, 2, address(1000)) // a router of the look-up somewhere else
	for i := range mostPeers - 2 {
		from(true, uint64(4000+i), address(4000+i))
	}
	from(false, 5000, address(5000)) // none is lost
	from(true, 3, address(3))
	if n := len(p.heard); n != mostPeers || p.heard[1000] != nil || p.heard[2] == nil || p.heard[4000] == nil {
		t.Errorf("found %d routers, the one silent for longest: %v", n, p.heard[1000])
	}
	p.heard[2].arrived = time.Now().Add(-2 * p.detection)
	before := p.holderHeard()
	if !p.from(6000, address(2)) { // the process has started again
		t.Error("the process does not count")
	}
	if p.heard[2] != nil || p.heard[6000] == nil || !p.has([6]byte{2, 0, 0, 0, 0, 2}) || p.holderHeard() != before || time.Since(p.last()) > p.detection {
		t.Error("the process before is there, or its hardware address or last time is not")
	}
	p.heard[4001].arrived = time.Now().Add(-2 * p.detection)
	from(true, 5000, address(5000))
	if p.heard[4001] != nil {
		t.Error("a stranger that is lost keeps its place")
	}
	p.only = true
	from(false, 7000, address(7000))
	from(false, 4000, address(4000))
	from(true, 3, address(3))
	p.know(nil) // there are others, and the list has this router alone
	from(true, 4000, address(4000))
}

// A router that starts again, with a key, is another one at once.
func TestPeersRestart(t *testing.T) {
	for _, key := range []string{"", "0123456789abcdef"} {
		p := &peers{key: []byte(key), detection: time.Hour, heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
		address := netip.MustParseAddr("10.0.0.2")
		p.know([]netip.Addr{address})
		p.from(2, address)
		p.note(heartbeat(2, 7), election.DefaultInterval)
		if at := p.from(3, address); at != (key != "") || (p.heard[2] == nil) != at || len(p.heard) != 1 {
			t.Errorf("key %q: taken %v, %d routers", key, at, len(p.heard))
		}
	}
}

// If only routers of the list count, no stranger does before it is read.
func TestPeersListed(t *testing.T) {
	address := netip.MustParseAddr("10.0.0.2")
	p, err := listenPeers(Options{
		Listen: netip.MustParseAddrPort("127.0.0.1:0"), Only: true,
		Peers: func(context.Context) ([]netip.Addr, time.Time, error) { return []netip.Addr{address}, time.Time{}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if p.from(3, netip.MustParseAddr("10.0.0.3")) || !p.from(2, address) {
		t.Error("a stranger counts, or a router of the list does not")
	}
}

// A look-up that fails keeps the peers, and is logged once.
func TestPeersLookUp(t *testing.T) {
	var log strings.Builder
	calls := 0
	address := netip.MustParseAddr("10.0.0.2")
	p := &peers{heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.lookUp(ctx, Options{Log: slog.New(slog.NewTextHandler(&log, nil)), Peers: func(context.Context) ([]netip.Addr, time.Time, error) {
			calls++
			switch calls {
			case 1:
				return []netip.Addr{address}, time.Now(), nil
			case 4:
				cancel()
			}
			return nil, time.Time{}, errors.New("no answer")
		}})
	}()
	<-ended
	if n := strings.Count(log.String(), "peers not looked up"); n != 1 || len(p.known) != 1 || p.known[0] != address {
		t.Errorf("%d lines, peers %v", n, p.known)
	}
}

// The reference is reachable if it takes a connection, or refuses it.
func TestReference(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Runner{o: Options{Listen: netip.MustParseAddrPort("127.0.0.2:1"), Reference: l.Addr().String()}}
	until(t, "it takes connections: reachable", func() bool { return r.connects(t.Context()) })
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "it refuses connections: reachable", func() bool { return r.connects(t.Context()) })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r.connects(ctx) {
		t.Error("without an answer: reachable")
	}
}

// A router of the look-up is missing once it has not been heard for long enough, however long it
// has been known; the own address never is.
func TestPeersMissing(t *testing.T) {
	own, other, third := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	p := &peers{own: netip.AddrPortFrom(own, 9467), heard: map[uint64]*heard{}}
	missing := func(want ...netip.Addr) {
		t.Helper()
		if list, _ := p.missing(); !slices.Equal(list, want) {
			t.Errorf("expected %v, found %v", want, list)
		}
	}
	long := time.Now().Add(-2 * forgetAfter)
	p.know([]netip.Addr{third, own, other})
	missing()
	p.since[other], p.since[third] = long, long
	missing(other, third)
	p.know([]netip.Addr{own, other, third}) // again
	missing(other, third)
	p.from(2, other)
	p.note(heartbeat(2, 1), election.DefaultInterval)
	missing(third)
	p.know([]netip.Addr{own, other})
	missing()
}

// The last heartbeat with another key is known, of a router of the look-up only.
func TestPeersKeysDiffer(t *testing.T) {
	all, _ := between(t, "0123456789abcdef", "another key......", "")
	for _, p := range all[1:] {
		p.know([]netip.Addr{all[0].own.Addr()})
		p.send(heartbeat(9, 1))
	}
	until(t, "two packets are refused", func() bool { return all[0].refused.Load() == 2 })
	if _, u := all[0].missing(); !u.At.IsZero() {
		t.Errorf("of a stranger: %+v", u)
	}
	for i, p := range all[1:] {
		all[0].know([]netip.Addr{p.own.Addr()})
		p.send(heartbeat(9, 2))
		var u Unkeyed
		until(t, "the heartbeat is known", func() bool { _, u = all[0].missing(); return u.Address == p.own.Addr() })
		if u.Keyed != (i == 0) || u.At.IsZero() {
			t.Errorf("%+v", u)
		}
		ports := heartbeat(9, 3)
		ports.FirstPort, ports.LastPort = 1024, 2000
		before := u.At
		p.send(ports)
		until(t, "that with ports is known", func() bool { _, u = all[0].missing(); return u.At.After(before) })
		if u.Keyed != (i == 0) {
			t.Errorf("with ports: %+v", u)
		}
	}
}
