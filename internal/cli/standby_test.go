package cli

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/standby"
)

// The lines standby and peers of the health name the holder, the age of the permit, the last
// take-over, and what is wrong between the routers.
func TestReportStandby(t *testing.T) {
	now := time.Date(2026, 11, 30, 10, 0, 0, 0, time.UTC)
	own, other, third := netip.MustParseAddr("10.128.0.101"), netip.MustParseAddr("10.128.0.102"), netip.MustParseAddr("10.128.0.103")
	peer := func(a netip.Addr, state election.State) standby.Peer {
		return standby.Peer{Address: a, State: state, Healthy: true, MAC: [6]byte{2, 0, 0, 0, 0, a.As4()[3]}, Heard: now}
	}
	type expected struct {
		state  health.State
		fault  diagnose.Fault
		detail string // the whole one
	}
	fine := expected{detail: "10.128.0.102 standby"}
	for name, test := range map[string]struct {
		is             func(s *standby.Status, c *config.Config)
		left           time.Duration
		standby, peers expected
	}{
		"active": {func(s *standby.Status, _ *config.Config) {
			s.Role, s.Why, s.TakenOver, s.Gap = election.Active, "gateway answers", now.Add(-61*time.Second), 182400*time.Microsecond
		}, 66 * time.Millisecond, expected{detail: "active: this router holds the addresses, permit 14ms old, gate open for 66ms without another answer; reason of the role: gateway answers; last take-over 1m1s ago, 182ms after the last sign of the holder"}, fine},
		"active from the start": {func(s *standby.Status, _ *config.Config) { s.Role, s.TakenOver = election.Active, now }, 82 * time.Millisecond,
			expected{detail: "active: this router holds the addresses, permit 0s old, gate open for 82ms without another answer; last take-over 0s ago"}, fine},
		"active, shut": {func(s *standby.Status, _ *config.Config) { s.Role = election.Active }, 0, expected{detail: "active: the gate is shut, and opens with the next answer of 192.168.12.1"}, fine},
		"standby": {func(s *standby.Status, _ *config.Config) {
			s.Peers = []standby.Peer{peer(third, election.Standby), peer(other, election.Active)}
			s.Peers[0].Healthy = false
		}, 0, expected{detail: "standby: 10.128.0.102 holds the addresses"}, expected{detail: "10.128.0.102 active, 10.128.0.103 standby (could not take over)"}},
		"holder silent": {func(s *standby.Status, _ *config.Config) {
			s.Peers = []standby.Peer{peer(other, election.Active), peer(third, election.Active)}
			s.Peers[0].Heard, s.Peers[1].Heard = now.Add(-time.Second), now.Add(-40*time.Millisecond)
		}, 0, expected{detail: "standby: 10.128.0.103 holds the addresses"}, expected{detail: "10.128.0.102 active, 10.128.0.103 active"}},
		"holder lost": {func(s *standby.Status, _ *config.Config) {
			s.Peers[0].State, s.Peers[0].Heard = election.Active, now.Add(-time.Second)
		}, 0, expected{detail: "standby: no router is known to hold the addresses"}, expected{detail: "10.128.0.102 active"}},
		"nobody":         {func(*standby.Status, *config.Config) {}, 0, expected{detail: "standby: no router is known to hold the addresses"}, fine},
		"witness silent": {func(s *standby.Status, _ *config.Config) { s.Role, s.Unanswered, s.Pinged = election.Claiming, 12, now }, 0, expected{health.Failed, diagnose.WitnessSilent, "claiming: no router holds the addresses: expected 192.168.12.1 to answer pings, found 12 in a row without an answer"}, fine},
		"witness silent, another router holds": {func(s *standby.Status, _ *config.Config) {
			s.Unanswered, s.Pinged, s.Peers[0].State = 12, now, election.Active
		}, 0, expected{detail: "standby: 10.128.0.102 holds the addresses"}, expected{detail: "10.128.0.102 active"}},
		"witness silent some time ago": {func(s *standby.Status, _ *config.Config) { s.Unanswered, s.Pinged = 12, now.Add(-time.Minute) }, 0, expected{detail: "standby: no router is known to hold the addresses"}, fine},
		"few pings":                    {func(s *standby.Status, _ *config.Config) { s.Unanswered, s.Pinged = 3, now }, 0, expected{detail: "standby: no router is known to hold the addresses"}, fine},
		"trouble": {func(s *standby.Status, _ *config.Config) { s.Trouble, s.TroubleAt = "no buffer space", now }, 0,
			expected{health.Warning, "", "standby: no router is known to hold the addresses; no buffer space"}, fine},
		"same hardware address": {func(s *standby.Status, _ *config.Config) { s.Peers[0].MAC = s.Own.MAC }, 0, expected{detail: "standby: no router is known to hold the addresses"},
			expected{health.Failed, diagnose.SameMAC, "expected a hardware address of its own for each router, found 02:00:00:00:00:65 of this router for 10.128.0.102 too"}},
		"no interface": {func(s *standby.Status, _ *config.Config) { s.Own.MAC, s.Peers[0].MAC = [6]byte{}, [6]byte{} }, 0, expected{detail: "standby: no router is known to hold the addresses"}, fine},
		"missing": {func(s *standby.Status, _ *config.Config) { s.Missing = []netip.Addr{third} }, 0, expected{detail: "standby: no router is known to hold the addresses"},
			expected{health.Warning, diagnose.PeersSilent, "expected heartbeats of 10.128.0.103 by UDP port 9467, found none; others heard: 10.128.0.102 standby"}},
		"all missing": {func(s *standby.Status, _ *config.Config) { s.Peers, s.Missing = nil, []netip.Addr{other, third} }, 0, expected{detail: "standby: no router is known to hold the addresses"},
			expected{health.Warning, diagnose.PeersSilent, "expected heartbeats of 10.128.0.102, 10.128.0.103 by UDP port 9467, found none; others heard: none, no router could take over"}},
		"alone": {func(s *standby.Status, _ *config.Config) { s.Peers = nil }, 0, expected{detail: "standby: no router is known to hold the addresses"}, expected{health.Warning, "", "none heard: no router could take over"}},
		"strangers alone": {func(s *standby.Status, _ *config.Config) { s.Peers, s.Refused = nil, 3 }, 0, expected{detail: "standby: no router is known to hold the addresses"},
			expected{health.Warning, "", "none heard, 3 packets refused that were no heartbeats, had a key, or came from others than EGRESS_STANDBY_PEERS"}},
		"packets without the key": {func(s *standby.Status, c *config.Config) {
			c.Peers.Key, s.Peers, s.Refused = []byte("0123456789abcdef"), nil, 3
		}, 0, expected{detail: "standby: no router is known to hold the addresses"},
			expected{health.Warning, "", "none heard, 3 packets refused without the key of EGRESS_STANDBY_KEY_FILE"}},
		"another key": {func(s *standby.Status, c *config.Config) {
			c.Peers.Key, s.Missing, s.Unkeyed = []byte("0123456789abcdef"), []netip.Addr{third}, standby.Unkeyed{Address: third, Keyed: true, At: now}
		}, 0, expected{detail: "standby: no router is known to hold the addresses"}, expected{health.Warning, diagnose.KeysDiffer, "expected heartbeats of the key of EGRESS_STANDBY_KEY_FILE, found those of 10.128.0.103 of another key"}},
		"no key here": {func(s *standby.Status, _ *config.Config) {
			s.Missing, s.Unkeyed = []netip.Addr{third}, standby.Unkeyed{Address: third, Keyed: true, At: now}
		}, 0, expected{detail: "standby: no router is known to hold the addresses"}, expected{health.Warning, diagnose.KeysDiffer, "expected heartbeats without a key, since EGRESS_STANDBY_KEY_FILE is not set, found those of 10.128.0.103 with a key"}},
		"another key once, and heard since": {func(s *standby.Status, c *config.Config) {
			c.Peers.Key, s.Unkeyed = []byte("0123456789abcdef"), standby.Unkeyed{Address: other, At: now}
		}, 0, expected{detail: "standby: no router is known to hold the addresses"}, fine},
	} {
		t.Run(name, func(t *testing.T) {
			var c config.Config
			c.Standby = &spec.Standby{Interval: 20 * time.Millisecond, Port: 9467, Witness: netip.MustParseAddr("192.168.12.1")}
			s := standby.Status{Own: peer(own, election.Standby), Peers: []standby.Peer{peer(other, election.Standby)}}
			test.is(&s, &c)
			var r health.Report
			reportStandby(&r, c, s, test.left, now)
			for i, want := range []expected{test.standby, test.peers} {
				if got := (expected{r.Checks[i].State, diagnose.Fault(r.Checks[i].Fault), r.Checks[i].Detail}); got != want {
					t.Errorf("expected %+v\nfound    %+v", want, got)
				}
				if advice(r.Checks[i]) == "" {
					t.Errorf("no advice about %+v", r.Checks[i])
				}
			}
			holders := 0
			for _, m := range r.Routers {
				if m.Holds {
					holders++
				}
			}
			if known := strings.Contains(test.standby.detail, " holds the addresses") && !strings.Contains(test.standby.detail, "no router"); holders > 1 || known != (holders == 1) {
				t.Errorf("%d holders: %+v", holders, r.Routers)
			}
			if len(r.Routers) != 1+len(s.Peers) || !r.Routers[0].Own || r.Routers[0].Address != own {
				t.Errorf("routers %+v", r.Routers)
			}
		})
	}
}

// The health names a gate that cannot hold back ARP, as a warning with an advice: the router works.
func TestReportFence(t *testing.T) {
	var whole, part health.Report
	reportFence(&whole, false)
	reportFence(&part, true)
	if len(whole.Checks) != 0 {
		t.Errorf("with the egress hook: %+v", whole.Checks)
	}
	if len(part.Checks) != 1 || part.Checks[0].State != health.Warning || !strings.Contains(part.Checks[0].Detail, "no netdev egress hook (Linux 5.16)") || !strings.Contains(advice(part.Checks[0]), "Linux 5.16") {
		t.Errorf("without the egress hook: %+v", part.Checks)
	}
}

// The table of the page names the holder, and marks a router that could not take over.
func TestMemberTable(t *testing.T) {
	now := time.Now()
	members := []health.Member{
		{Address: netip.MustParseAddr("10.128.0.101"), Own: true, Role: "standby", Priority: 100},
		{Address: netip.MustParseAddr("10.128.0.102"), Role: "active", Holds: true, Ready: true, Priority: 7, MAC: "02:00:00:00:00:66", Heard: now.Add(-2 * time.Second)},
	}
	table := memberTable(members, now)
	var rows []string
	for _, r := range table.Rows {
		rows = append(rows, r.State.String()+": "+strings.Join(r.Cells, " | "))
	}
	want := "warning: 10.128.0.101 (this one) | standby | no | 100 |  | -\nok: 10.128.0.102 | active | yes | 7 | 02:00:00:00:00:66 | 2s ago"
	if got := strings.Join(rows, "\n"); got != want || table.Note != "10.128.0.102 holds the addresses." {
		t.Errorf("note %q, expected the rows\n%s\nfound\n%s", table.Note, want, got)
	}
	if note := memberTable(members[:1], now).Note; note != "No router is known to hold the addresses." {
		t.Errorf("note %q", note)
	}
}

// Clients may enter by a standby while a router to which its tunnel leads holds the addresses.
func TestCarriesNow(t *testing.T) {
	now := time.Date(2026, 11, 30, 10, 0, 0, 0, time.UTC)
	holder := netip.MustParseAddr("10.128.0.102")
	is := func(state election.State, heard time.Duration, peers ...netip.Addr) (s standby.Status) {
		s.Peers = []standby.Peer{{Address: holder, State: state, Heard: now.Add(-heard)}}
		s.Carry.Toward = holder
		for _, a := range peers {
			s.Carry.Peers = append(s.Carry.Peers, standby.CarryPeer{Address: a})
		}
		return s
	}
	for name, test := range map[string]struct {
		s      standby.Status
		failed error
		want   bool
	}{
		"a holder":       {is(election.Active, time.Millisecond, holder), nil, true},
		"no tunnel":      {is(election.Active, time.Millisecond, holder), errors.New("not supported"), false},
		"no holder":      {is(election.Standby, time.Millisecond, holder), nil, false},
		"holder silent":  {is(election.Active, time.Minute, holder), nil, false},
		"another tunnel": {is(election.Active, time.Millisecond, netip.MustParseAddr("10.128.0.103")), nil, false},
	} {
		if got := carriesNow(test.s, test.failed, now.Add(-time.Second)); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A router is not ready for clients if it carries nothing by a fault of its own: it has no tunnel, or
// its ports are another one's. It is if only the others carry nothing, or not yet.
func TestCannotCarry(t *testing.T) {
	own, other, third := standby.Ports{First: 1024, Last: 2000}, standby.Ports{First: 2001, Last: 3000}, standby.Ports{First: 1500, Last: 2500}
	address := netip.MustParseAddr("10.128.0.102")
	for name, test := range map[string]struct {
		c      standby.Carry
		failed error
		want   []string
	}{
		"carries":                      {standby.Carry{Peers: []standby.CarryPeer{{Address: address, Ports: other}}, Toward: address}, nil, nil},
		"no other router carries":      {standby.Carry{}, nil, nil},
		"the ports of two others meet": {standby.Carry{Clash: []standby.CarryPeer{{Address: address, Ports: other}}}, nil, nil},
		"own ports": {standby.Carry{Clash: []standby.CarryPeer{{Address: address, Ports: third}}}, nil,
			[]string{"connections are not carried: expected source ports of its own, found 1024-2000 here and 1500-2500 of 10.128.0.102"}},
		"no tunnel": {standby.Carry{Peers: []standby.CarryPeer{{Address: address, Ports: other}}, Toward: address}, errors.New("create link: not supported"),
			[]string{"connections are not carried: create link: not supported"}},
	} {
		if got := cannotCarry(own, test.c, test.failed); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}
