package standby

import (
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
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

// A drain ends with the last connection, if it is cut, and if no other router is heard any more by
// which the connections would go: all are silent, or are drained, too.
func TestDrainEnds(t *testing.T) {
	const first = 5 // connections
	for name, test := range map[string]struct {
		left func(counted int) int
		ends string
		want string
	}{
		"drained":    {func(counted int) int { return first - counted }, "", "connections drained"},
		"none":       {func(int) int { return 0 }, "", ""},
		"cut":        {func(int) int { return first }, "cut", "asked to end at once"},
		"cut before": {func(counted int) int { return first }, "cut before", "asked to end at once"},
		"silent":     {func(int) int { return first }, "silent", "for 10s no other router has held"},
		"all drain":  {func(int) int { return first }, "all drain", "for 10s no other router has held"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// Nobody reads here: a read from the network would keep the time of the test from passing.
				p, err := listenPeers(Options{Listen: netip.MustParseAddrPort("127.0.0.1:0")})
				if err != nil {
					t.Fatal(err)
				}
				defer p.close()
				p.own = p.conn.LocalAddr().(*net.UDPAddr).AddrPort()
				peer := netip.MustParseAddr("127.0.0.2")
				p.know([]netip.Addr{peer})
				hear := func(state election.State) {
					p.from(2, peer)
					p.note(election.Heartbeat{ID: 2, Sequence: 1, State: state, Healthy: state == election.Active, FirstPort: 2000, LastPort: 3000}, election.DefaultInterval)
				}
				hear(election.Active)
				var log strings.Builder
				counted := 0
				r := &Runner{
					peers: p, machine: election.New(election.Settings{Interval: election.DefaultInterval, ID: 1}, 0), start: time.Now(),
					events: make(chan election.Event), carried: make(chan struct{}, 1), cut: make(chan struct{}),
				}
				r.o = Options{
					Settings: election.Settings{Interval: election.DefaultInterval, ID: 1}, Ports: Ports{1024, 1999}, Carry: func(Carry) {},
					Open: func() (int, error) {
						switch test.ends {
						case "silent":
						case "all drain":
							hear(election.Standby)
						default:
							hear(election.Active)
						}
						if counted++; counted == first && test.ends == "cut" {
							r.Cut()
						}
						return test.left(counted), nil
					},
					Log: slog.New(slog.NewTextHandler(&log, nil)),
				}
				if test.ends == "cut before" {
					r.Cut()
					r.Cut()
				}
				r.drain()
				if (test.want == "") != (log.String() == "") || !strings.Contains(log.String(), test.want) {
					t.Errorf("log %q, want %q", &log, test.want)
				}
				if n := strings.Count(log.String(), "draining connections"); n > 1 {
					t.Errorf("logged %d times: %q", n, &log)
				}
				if test.ends == "cut before" && counted != 1 {
					t.Errorf("counted %d times", counted)
				}
				if (test.ends == "" || test.ends == "cut") && test.want != "" && counted != first {
					t.Errorf("counted %d times", counted)
				}
				if want := test.left(max(1, counted)); r.status.Left != want {
					t.Errorf("%d connections left, want %d", r.status.Left, want)
				}
				if r.status.Draining != (test.want != "") {
					t.Errorf("draining %v", r.status.Draining)
				}
			})
		})
	}
}
