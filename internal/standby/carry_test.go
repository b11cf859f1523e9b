package standby

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/election"
)

// Only routers of the look-up that have sent their ports are peers, and none whose ports are
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
	sequence -= 3 // overtaken on its way, or sent again
	say(4, election.Standby, 0, Ports{4001, 4500})
	sequence += 3
	want("an old heartbeat", false, Carry{Peers: []CarryPeer{{address(3), third}, {address(4), Ports{4001, 5000}}}, Toward: address(4), Clash: []CarryPeer{{address(2), Ports{1500, 3000}}}})
	p.known = p.known[:1]
	want("looked up again", false, Carry{Peers: []CarryPeer{{address(4), Ports{4001, 5000}}}, Toward: address(4)})
}

// An answer of the look-up that lacks a router does not end what is exchanged with it while its
// heartbeats arrive: those of the same process, or of any with the key. A router that is silent for
// long is no peer any more then, and another pod with its address is none.
func TestPeerOfFormerAnswerStays(t *testing.T) {
	holder, other := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	for _, key := range []string{"", "0123456789abcdef"} {
		synctest.Test(t, func(t *testing.T) {
			p := &peers{own: netip.MustParseAddrPort("10.0.0.1:9467"), key: []byte(key), detection: 3 * election.DefaultInterval, heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
			sequence := uint32(0)
			hear := func(id uint64) {
				sequence++
				if p.from(id, holder) {
					p.note(election.Heartbeat{ID: id, Sequence: sequence, State: election.Active, Healthy: true, FirstPort: 2000, LastPort: 3000}, election.DefaultInterval)
				}
			}
			carries := func(when string, want bool) {
				t.Helper()
				c := p.carry(Ports{1024, 1999}, false, p.detection, Carry{})
				if is := slices.Equal(c.Peers, []CarryPeer{{holder, Ports{2000, 3000}}}) && c.Toward == holder; is != want || !want && len(c.Peers) > 0 {
					t.Errorf("key %q, %s: %+v", key, when, c)
				}
			}
			hear(2)
			p.know([]netip.Addr{other})
			carries("it never was in an answer", false)
			p.know([]netip.Addr{holder, other})
			hear(2)
			carries("it is in the answer", true)
			for _, answer := range [][]netip.Addr{{other}, {}, {other}} {
				p.know(answer)
				carries("an answer lacks it", true)
				hear(2)
				carries("it is heard", true)
			}
			p.know([]netip.Addr{other, holder})
			time.Sleep(time.Hour)
			carries("silent, in the answer", true)
			hear(2)
			p.know([]netip.Addr{other})
			time.Sleep(forgetAfter)
			carries("silent for a while", true)
			hear(2)
			time.Sleep(forgetAfter / 2)
			hear(9)
			carries("another process has its address", key != "")
			p.know([]netip.Addr{other})
			hear(9)
			carries("another answer", key != "")
			time.Sleep(forgetAfter + 1)
			carries("silent", false)
			p.know([]netip.Addr{other})
			hear(9)
			carries("heard again", false)
			if missing, _ := p.missing(); slices.Contains(missing, holder) {
				t.Errorf("missing %v", missing)
			}
		})
	}
}

// A pod that replaces another one has its ports, from another address, which an answer of the look-up
// can have for a while: the silent one gives way. Two that are heard are a fault.
func TestFormerPodGivesWay(t *testing.T) {
	former, next := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	synctest.Test(t, func(t *testing.T) {
		p := &peers{own: netip.MustParseAddrPort("10.0.0.1:9467"), detection: 3 * election.DefaultInterval, heard: map[uint64]*heard{}, ports: map[netip.Addr]Ports{}}
		p.know([]netip.Addr{former, next})
		ports, sequence := Ports{2000, 3000}, uint32(0)
		hear := func(a netip.Addr) {
			sequence++
			id := uint64(a.As4()[3])
			p.from(id, a)
			p.note(election.Heartbeat{ID: id, Sequence: sequence, FirstPort: ports.First, LastPort: ports.Last}, election.DefaultInterval)
		}
		carries := func(when string, own Ports, clash int, want ...netip.Addr) {
			t.Helper()
			c := p.carry(own, false, p.detection, Carry{})
			var got []netip.Addr
			for _, peer := range c.Peers {
				got = append(got, peer.Address)
			}
			if !slices.Equal(got, want) || len(c.Clash) != clash {
				t.Errorf("%s: %+v", when, c)
			}
		}
		own := Ports{1024, 1999}
		hear(former)
		carries("one", own, 0, former)
		time.Sleep(time.Millisecond)
		hear(next)
		carries("both are heard", own, 2)
		time.Sleep(formerAfter + 1)
		carries("both are silent", own, 0, next)
		hear(next)
		carries("the next one is heard", own, 0, next)
		p.know([]netip.Addr{next})
		carries("the answer lacks the former", own, 0, next)
		carries("the ports of this router, heard", ports, 1)
		time.Sleep(formerAfter + 1)
		carries("the ports of this router, silent", ports, 0)
		carries("silent", own, 0, next)
	})
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
				p, hear := onePeer(t)
				defer p.close()
				hear(election.Active)
				var log strings.Builder
				counted := 0
				r := &Runner{
					peers: p, machine: election.New(election.Settings{Interval: election.DefaultInterval, ID: 1}, 0), start: time.Now(),
					events: make(chan election.Event), carried: make(chan struct{}, 1), cut: make(chan struct{}),
				}
				r.o = Options{
					Settings: election.Settings{Interval: election.DefaultInterval, ID: 1}, Ports: Ports{1024, 1999}, Carry: func(Carry) {},
					Open: func() (int, int, error) {
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
						return test.left(counted), 0, nil
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

// onePeer returns peers of which one is known, and a function that notes a heartbeat of it. A read
// from the network would keep the time of a test from passing.
func onePeer(t *testing.T) (p *peers, hear func(election.State)) {
	t.Helper()
	p, err := listenPeers(Options{Listen: netip.MustParseAddrPort("127.0.0.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	p.own = p.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	peer := netip.MustParseAddr("127.0.0.2")
	p.know([]netip.Addr{peer})
	sequence := uint32(0)
	return p, func(state election.State) {
		sequence++
		p.from(2, peer)
		p.note(election.Heartbeat{ID: 2, Sequence: sequence, State: state, Healthy: state == election.Active, FirstPort: 2000, LastPort: 3000}, election.DefaultInterval)
	}
}

// The log has the number of idle connections at the begin of a drain, and a line when only such ones
// are left, again after one was not idle. It waits for them.
func TestDrainOfIdleConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, hear := onePeer(t)
		defer p.close()
		var log strings.Builder
		counts := [][2]int{{3, 1}, {3, 2}, {2, 2}, {2, 2}, {2, 1}, {2, 2}, {1, 1}, {0, 0}}
		r := &Runner{
			peers: p, machine: election.New(election.Settings{Interval: election.DefaultInterval, ID: 1}, 0), start: time.Now(),
			events: make(chan election.Event), carried: make(chan struct{}, 1), cut: make(chan struct{}),
		}
		r.o = Options{
			Settings: election.Settings{Interval: election.DefaultInterval, ID: 1}, Ports: Ports{1024, 1999}, Carry: func(Carry) {},
			Open: func() (int, int, error) {
				hear(election.Active)
				now := counts[0]
				counts = counts[1:]
				return now[0], now[1], nil
			},
			Log: slog.New(slog.NewTextHandler(&log, nil)),
		}
		hear(election.Active)
		r.drain()
		if len(counts) > 0 || !strings.Contains(log.String(), `msg="draining connections" connections=3 idle=1`) || !strings.Contains(log.String(), "connections drained") {
			t.Errorf("%d counts left, log:\n%s", len(counts), &log)
		}
		if n := strings.Count(log.String(), `msg="draining idle connections" connections=2 idle_for=5m0s`); n != 2 {
			t.Errorf("%d lines of idle connections, want 2:\n%s", n, &log)
		}
	})
}
