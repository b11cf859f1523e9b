package standby

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/spec"
)

// A brokenGate is open, and cannot be changed.
type brokenGate struct{}

func (brokenGate) Shut() error                  { return errors.New("no buffer space") }
func (brokenGate) Claim(time.Duration) error    { return errors.New("no buffer space") }
func (brokenGate) Arm(time.Duration) error      { return errors.New("no buffer space") }
func (brokenGate) Left() (time.Duration, error) { return time.Second, nil }
func (brokenGate) Number(uint32) error          { return nil }

// The gap of a take-over begins with the last heartbeat of another holder, unless this router has held
// the address since.
func TestGap(t *testing.T) {
	all, _ := between(t, "")
	r := &Runner{o: Options{Log: slog.New(slog.DiscardHandler)}, peers: all[0], status: Status{TakeOvers: map[string]uint64{}}}
	takeOver := func() time.Duration {
		r.became(election.Action{From: election.Standby, To: election.Claiming})
		r.became(election.Action{From: election.Claiming, To: election.Active})
		return r.status.Gap
	}
	r.peers.from(2, netip.MustParseAddr("10.0.0.2"))
	r.peers.note(heartbeat(2, 1), election.DefaultInterval)
	r.peers.active = r.peers.active.Add(-time.Second)
	if gap := takeOver(); gap < time.Second || gap > forgetAfter {
		t.Errorf("gap %s", gap)
	}
	if gap := takeOver(); gap != 0 {
		t.Errorf("gap %s since a holder before this router", gap)
	}
}

// A router whose hand-over no other one takes in time does not count as the holder while it drains.
func TestStandsDown(t *testing.T) {
	all, _ := between(t, "")
	var roles []election.State
	r := &Runner{
		o:     Options{Log: slog.New(slog.DiscardHandler), Changed: func(role election.State) { roles = append(roles, role) }},
		peers: all[0], status: Status{Role: election.Active},
	}
	for range 2 {
		r.standDown()
		if role := r.status.Role; role != election.Standby || len(roles) != 1 || roles[0] != election.Standby || !r.ended {
			t.Errorf("role %s, changes %v", role, roles)
		}
	}
}

// A router whose gate cannot be shut has given the addresses up all the same: it sends no ping any
// more, so that the kernel shuts it, and whoever acts on its role learns that.
func TestRoleWithoutShut(t *testing.T) {
	all, _ := between(t, "")
	var log strings.Builder
	var roles []election.State
	r := &Runner{
		o: Options{
			Sources: spec.Sources{{Prefix: netip.MustParsePrefix("192.168.12.99/24"), Gateway: netip.MustParseAddr("192.168.12.1")}},
			Gate:    func(int) Gate { return brokenGate{} }, Log: slog.New(slog.NewTextHandler(&log, nil)),
			Changed: func(role election.State) { roles = append(roles, role) },
		},
		start: time.Now(), peers: all[0], status: Status{TakeOvers: map[string]uint64{}},
		machine: election.New(election.Settings{Interval: election.DefaultInterval, ID: 1}, 0),
	}
	r.ground = newGround(r.o, r.post)
	for _, e := range []election.Event{{Kind: election.Link, OK: true}, {Kind: election.Ready, OK: true}, {Kind: election.Reference, OK: true}, {Kind: election.Tick}} {
		r.step(e)
	}
	if role := r.Status().Role; role != election.Active {
		t.Fatalf("with a permit: %s", role)
	}
	r.step(election.Event{Kind: election.Link})
	s := r.Status()
	if s.Role != election.Standby || len(roles) != 2 || roles[1] != election.Standby || s.Trouble != "no buffer space" {
		t.Errorf("role %s, changes %v, trouble %q", s.Role, roles, s.Trouble)
	}
	if n := strings.Count(log.String(), "standby action failed"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, &log)
	}
}
