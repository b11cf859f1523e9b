package standby

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/election"
)

// Only routers of the look-up that have said their ports are peers, and none whose ports are
// another one's. Who holds is the way; without a holder it is the last one.
func TestCarryPeers(t *testing.T) {
	address := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, n}) }
	p := &peers{own: netip.AddrPortFrom(address(1), 9467), heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}, known: []netip.Addr{address(4), address(3), address(2), address(1)}}
	sequence := uint32(0)
	say := func(n byte, state election.State, priority uint8, ports Ports) {
		sequence++
		p.from(uint64(n), address(n))
		p.note(election.Heartbeat{ID: uint64(n), Sequence: sequence, State: state, Priority: priority, Healthy: true, FirstPort: ports.First, LastPort: ports.Last}, election.DefaultInterval)
	}
	own, second, third := Ports{1024, 2000}, Ports{2001, 3000}, Ports{3001, 4000}
	var c Carry
	want := func(when string, active bool, want Carry) {
		t.Helper()
		c = p.carry(own, active, time.Hour, c)
		if diff := cmp.Diff(want, c, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: - want, + got:\n%s", when, diff)
		}
	}
	want("nobody heard", false, Carry{})
	say(2, election.Standby, 100, Ports{})
	say(9, election.Active, 100, third)
	want("one without ports, and one that is not known", false, Carry{})
	say(2, election.Active, 100, second)
	two := []CarryPeer{{address(2), second}}
	want("a holder", false, Carry{Peers: two, Toward: address(2)})
	say(3, election.Standby, 200, third)
	both := []CarryPeer{{address(2), second}, {address(3), third}}
	want("another one", false, Carry{Peers: both, Toward: address(2)})
	say(2, election.Standby, 100, second)
	want("no holder", false, Carry{Peers: both, Toward: address(2)})
	say(3, election.Claiming, 200, third)
	want("it claims", false, Carry{Peers: both, Toward: address(3)})
	say(3, election.Standby, 50, third)
	want("this one holds", true, Carry{Peers: both, Toward: address(2)})
	say(4, election.Active, 100, Ports{3500, 5000})
	want("ports of another one", false, Carry{Peers: two, Toward: address(2), Clash: []CarryPeer{{address(3), third}, {address(4), Ports{3500, 5000}}}})
	say(4, election.Active, 100, Ports{4001, 5000})
	say(2, election.Standby, 100, Ports{1500, 3000})
	want("own ports", false, Carry{Peers: []CarryPeer{{address(3), third}, {address(4), Ports{4001, 5000}}}, Toward: address(4), Clash: []CarryPeer{{address(2), Ports{1500, 3000}}}})
	p.known = p.known[:1]
	want("looked up again", false, Carry{Peers: []CarryPeer{{address(4), Ports{4001, 5000}}}, Toward: address(4)})
}

// A change is passed on, the latest one, and once.
func TestCarryIsPassedOn(t *testing.T) {
	peer := netip.MustParseAddr("10.0.0.2")
	p := &peers{own: netip.MustParseAddrPort("10.0.0.1:9467"), heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{peer: {2000, 3000}}, known: []netip.Addr{peer}}
	found := make(chan Carry)
	r := &Runner{
		o:     Options{Ports: Ports{1024, 1999}, Carry: func(c Carry) { found <- c }, Log: slog.New(slog.DiscardHandler)},
		peers: p, machine: election.New(election.Settings{Interval: election.DefaultInterval, ID: 1}, 0), carried: make(chan struct{}, 1), start: time.Now(),
	}
	for range 3 {
		r.carry()
	}
	go r.watchCarry(t.Context())
	if c := <-found; c.Toward != peer || len(c.Peers) != 1 {
		t.Errorf("found %+v", c)
	}
	r.carry()
	if len(r.carried) > 0 {
		t.Error("passed on without a change")
	}
}
