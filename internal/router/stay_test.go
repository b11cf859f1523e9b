package router_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A kept is a script with a keeper that watches it, and its events. Its state
// belongs to the keeper while it runs, and to the test while the keeper waits
// (synctest.Wait).
type kept struct {
	*testing.T
	*script
	keeper *router.Keeper
	logged bytes.Buffer
	turn   atomic.Int32 // orders test and keeper, which passing time does not

	attempts []time.Time             // starts of comparisons
	cost     time.Duration           // duration of each
	refuse   func(plan.Change) error // nil: no step fails
	around   neighbours
	watches  int // number of watches

	kind atomic.Uint32
	wake chan struct{}
}

// Neighbours with a state that the test sets.
type neighbours struct {
	state arp.State
	asked int // gateway probes
	cut   bool
}

func (n *neighbours) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (n *neighbours) ProbeGateway() error           { n.asked++; return nil }
func (n *neighbours) SetCarrier(carrier bool)       { n.cut = !carrier }
func (n *neighbours) State() arp.State              { return n.state }
func (n *neighbours) Close()                        {}

// The events of a kept.
type keptEvents struct{ *kept }

func (e keptEvents) Changed() <-chan struct{} { return e.wake }
func (e keptEvents) Take() events.Kind        { return events.Kind(e.kind.Swap(0)) }

// notify notifies the keeper of a change.
func (k *kept) notify(kind events.Kind) {
	k.kind.Or(uint32(kind))
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

func (k *kept) Do(s plan.Change) error {
	if k.refuse != nil {
		if err := k.refuse(s); err != nil {
			return err
		}
	}
	return k.script.Do(s)
}

func wanted(t *testing.T, destinations string) plan.Want {
	t.Helper()
	set, err := rules.Parse(destinations, nil)
	if err != nil {
		t.Fatal(err)
	}
	return plan.Want{
		Network: plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}},
		Rules:   rules.NewPlan(set, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{lab.Source}}),
		Forward: true,
	}
}

// keep runs a test, with fake time and a keeper of a namespace without drift. Call
// start to start the keeper.
func keep(t *testing.T, test func(*kept)) {
	synctest.Test(t, func(t *testing.T) {
		k := &kept{T: t, wake: make(chan struct{}, 1), script: &script{state: plan.State{
			Index: 1, Carrier: true, NoARP: true, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1},
			Routes: []plan.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: lab.NodeAddr, Index: 2, Interface: "eth0"}},
		}}}
		r := &router.Router{
			Want: wanted(t, "80 tcp 203.0.113.25\n81 udp 203.0.113.26\n"),
			Log:  slog.New(slog.NewTextHandler(&k.logged, nil)),
			Network: func() (router.Network, error) {
				k.turn.Load()
				k.attempts = append(k.attempts, time.Now())
				time.Sleep(k.cost)
				return k, nil
			},
			Rules: func(context.Context, rules.Plan) (router.Rules, error) { return k, nil },
			Next:  k.next, Strays: k.strays,
		}
		if err := r.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
		k.attempts, k.done = nil, nil
		k.logged.Reset()
		k.keeper = router.NewKeeper(r)
		k.keeper.Interval = 10 * time.Second
		k.keeper.Events = func() (router.Events, error) { return keptEvents{k}, nil }
		k.keeper.Neighbours = func(arp.Options) (router.Neighbours, error) { k.watches++; return &k.around, nil }
		test(k)
	})
}

// start starts the keeper, and waits until it is idle. The keeper is stopped when
// the test ends.
func (k *kept) start() {
	k.Helper()
	ctx, cancel := context.WithCancel(k.Context())
	ended := make(chan error)
	go func() { ended <- k.keeper.Run(ctx) }()
	k.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			k.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
}

// pass lets time pass, and waits for its consequences.
func (k *kept) pass(d time.Duration) {
	k.turn.Add(1)
	time.Sleep(d)
	synctest.Wait()
}

// since returns the comparisons since the last call.
func (k *kept) since() []time.Time {
	attempts := k.attempts
	k.attempts = nil
	return attempts
}

// logCount returns the number of occurrences of a text in the log.
func (k *kept) logCount(text string) int { return strings.Count(k.logged.String(), text) }

// withARP adds an interface on which the router announces.
func (k *kept) withARP() {
	k.Helper()
	lo, err := netlink.LinkByIndex(1)
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		k.Fatal(err)
	}
	k.state.NoARP = false
}

// Without drift, there is one full comparison in each interval, and announcements
// need no comparisons of their own.
func TestKeeperIdle(t *testing.T) {
	for _, test := range []struct {
		interval, announce         time.Duration
		comparisons, announcements uint64
	}{
		{10 * time.Second, time.Minute, 61, 10},
		{10 * time.Second, 0, 61, 0},
		{0, time.Minute, 11, 10},
		{0, 0, 1, 0},
		{time.Minute, 10 * time.Second, 61, 60},
	} {
		t.Run(fmt.Sprintf("%s, %s", test.interval, test.announce), func(t *testing.T) {
			keep(t, func(k *kept) {
				k.withARP()
				k.keeper.Interval, k.keeper.AnnounceInterval = test.interval, test.announce
				k.start()
				k.pass(10*time.Minute + time.Second)
				s := k.keeper.Status()
				if s.Comparisons != test.comparisons || len(k.attempts) != int(test.comparisons) {
					k.Errorf("%d comparisons in ten minutes, %d attempts; want %d", s.Comparisons, len(k.attempts), test.comparisons)
				}
				if s.Announcements != test.announcements {
					k.Errorf("%d announcements in ten minutes, want %d", s.Announcements, test.announcements)
				}
				if k.around.asked != 1 || k.watches != 1 {
					k.Errorf("the requests for the gateway began %d times in %d watches, want 1 in 1", k.around.asked, k.watches)
				}
				if len(k.done) > 0 || len(s.NotReady) > 0 || !s.InSync || k.logged.Len() > 0 {
					k.Errorf("done %v, not ready %v, log:\n%s", k.done, s.NotReady, &k.logged)
				}
			})
		})
	}
}

// Comparisons take a limited share of the time, however many events there are.
func TestKeeperBurst(t *testing.T) {
	for _, kind := range []events.Kind{events.Network, events.Rules} {
		keep(t, func(k *kept) {
			k.cost = 5 * time.Millisecond
			k.start()
			k.pass(time.Second)
			k.since()
			begin := time.Now()
			for range 10000 {
				k.notify(kind)
				time.Sleep(100 * time.Microsecond)
			}
			took := time.Since(begin)
			k.pass(time.Second)
			most := int(took/(5*k.cost)) + 10 // the first ones follow each other at once
			if n := len(k.since()); n > most || n < most/2 {
				k.Errorf("%d comparisons in %s of events, want %d at most, and half of that", n, took, most)
			}
		})
	}
}

// A damage is repaired at once after its event, and logged once.
func TestKeeperRepairs(t *testing.T) {
	keep(t, func(k *kept) {
		k.start()
		k.pass(time.Minute)
		k.since()
		k.state.Up = false
		k.notify(events.Network)
		now := time.Now()
		synctest.Wait()
		if !k.state.Up || !time.Now().Equal(now) {
			k.Error("not repaired at once")
		}
		s := k.keeper.Status()
		if s.Repairs[router.RepairLink] != 1 || s.RepairFailures != 0 || k.logCount("msg=repaired kind=link") != 1 {
			k.Errorf("repairs %v, failures %d, log:\n%s", s.Repairs, s.RepairFailures, &k.logged)
		}
		// A damage without an event is repaired within the interval.
		k.state.Up = false
		k.pass(k.keeper.Interval)
		if s := k.keeper.Status(); !k.state.Up || s.Repairs[router.RepairLink] != 2 {
			k.Errorf("repairs %v after an interval", s.Repairs)
		}
	})
}

// firstPause and longestPause are the keeper's.
const (
	firstPause   = router.FirstPause
	longestPause = router.LongestPause
)

// A repair that fails is repeated at growing intervals, is logged once, and keeps
// the router from being ready until it succeeds.
func TestKeeperBacksOff(t *testing.T) {
	keep(t, func(k *kept) {
		k.keeper.Interval = time.Second
		k.start()
		k.pass(time.Minute)
		k.since()
		k.refuse = func(plan.Change) error { return errInjected }
		k.state.Up = false
		k.notify(events.Network)
		k.pass(10 * time.Minute)
		attempts := k.since()
		want := firstPause
		for i := range attempts[1:] {
			if d := attempts[i+1].Sub(attempts[i]); d > want || d < want*3/4 {
				k.Errorf("pause %d is %s, want at most %s and a quarter less", i+1, d, want)
			}
			want = min(2*want, longestPause)
		}
		if want != longestPause {
			k.Errorf("only %d attempts", len(attempts))
		}
		s := k.keeper.Status()
		if s.InSync || !strings.Contains(s.Failure, errInjected.Error()) || !slices.Equal(s.NotReady, []string{s.Failure}) {
			k.Errorf("in sync %v, failure %q, not ready %q", s.InSync, s.Failure, s.NotReady)
		}
		if s.RepairFailures != uint64(len(attempts)) || k.logCount(errInjected.Error()) != 1 {
			k.Errorf("%d failures of %d attempts, log:\n%s", s.RepairFailures, len(attempts), &k.logged)
		}

		k.refuse = nil
		k.pass(longestPause)
		if s := k.keeper.Status(); !s.InSync || s.Failure != "" || len(s.NotReady) > 0 || !k.state.Up {
			k.Errorf("in sync %v, failure %q, not ready %q; want it repaired", s.InSync, s.Failure, s.NotReady)
		}
		// The next failure starts with the first pause.
		k.refuse = func(plan.Change) error { return errInjected }
		k.state.Up = false
		k.since()
		k.notify(events.Network)
		k.pass(2 * firstPause)
		if n := len(k.since()); n < 2 {
			k.Errorf("%d attempts in %s", n, 2*firstPause)
		}
	})
}

// An event triggers the next try if the last one changed nothing, since the event
// then has another cause.
func TestKeeperEager(t *testing.T) {
	forwarding := func(s plan.Change) error {
		if s.Op == plan.WriteSysctl {
			return errInjected
		}
		return nil
	}
	everything := func(plan.Change) error { return errInjected }
	for name, test := range map[string]struct {
		refuse func(plan.Change) error
		damage func(*kept)
		eager  bool
	}{
		"nothing was changed":   {everything, func(k *kept) { k.state.Up = false }, true},
		"the link was set up":   {forwarding, func(k *kept) { k.state.Up, k.state.Forwards = false, false }, false},
		"the rules were loaded": {everything, func(k *kept) { k.state.Up, k.loaded = false, rules.Plan{} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			keep(t, func(k *kept) {
				k.keeper.Interval = 0
				k.start()
				k.refuse = test.refuse
				for k.keeper.Status().RepairFailures < 12 { // with long pauses by then
					test.damage(k)
					k.notify(events.Network | events.Rules)
					k.pass(longestPause)
				}
				k.pass(longestPause)
				test.damage(k)
				for n := len(k.attempts); len(k.attempts) == n; { // just after a failed try
					k.pass(time.Millisecond)
				}
				k.since()
				k.notify(events.Network | events.Rules)
				k.pass(time.Second)
				if n := len(k.since()); (n == 1) != test.eager || n > 1 {
					k.Errorf("%d attempts in the second after an event", n)
				}
			})
		})
	}
}

// A program that reverts each repair at once is reported, and the repairs slow down
// until it stops.
func TestKeeperContested(t *testing.T) {
	keep(t, func(k *kept) {
		k.start()
		k.pass(time.Minute)
		const contested = "repair contested, backing off"
		begin, undone := time.Now(), 0
		for time.Since(begin) < 10*time.Minute {
			if k.state.Up {
				if reported := k.keeper.Status().Contested != ""; reported != (k.logCount(contested) > 0) {
					k.Fatalf("undone %d times: reported: %v, logged %d times", undone, reported, k.logCount(contested))
				}
				k.state.Up = false
				undone++
				k.notify(events.Network)
			}
			k.pass(10 * time.Millisecond)
		}
		// Five at full speed, some ten until the longest pause, and then one in
		// each pause, which may be a quarter shorter.
		if most := 5 + 12 + int(10*time.Minute/(longestPause*3/4)); undone > most || undone < 20 {
			k.Errorf("repaired %d times in ten minutes, want %d at most", undone, most)
		}
		if s := k.keeper.Status(); s.Contested != "set macvlan0 up" {
			k.Errorf("contested: %q", s.Contested)
		}

		k.pass(longestPause + 50*time.Second) // the repair lasts
		if s := k.keeper.Status(); s.Contested != "" || !s.InSync {
			k.Errorf("contested: %q, want none", s.Contested)
		}
		k.state.Up = false
		k.notify(events.Network)
		synctest.Wait()
		if !k.state.Up {
			k.Error("a later damage is not repaired at once")
		}
	})
}

// New destinations are loaded at once, even during the pause after a failed repair;
// the same ones change nothing.
func TestKeeperReplace(t *testing.T) {
	keep(t, func(k *kept) {
		k.start()
		k.pass(time.Minute)
		k.since()
		same := wanted(t, "80 tcp 203.0.113.25\n81 udp 203.0.113.26\n")
		k.keeper.Replace(same)
		synctest.Wait()
		if n := len(k.since()); n > 0 {
			k.Errorf("%d comparisons for the same destinations", n)
		}

		other := wanted(t, "80 tcp 203.0.113.25\n")
		now := time.Now()
		k.keeper.Replace(other)
		synctest.Wait()
		if !k.loaded.Equal(other.Rules) || !time.Now().Equal(now) {
			k.Error("new destinations are not applied at once")
		}
		if s := k.keeper.Status(); s.Reloads != 1 || s.Destinations != 1 || len(s.NotReady) > 0 {
			k.Errorf("%d reloads, %d destinations, not ready %q", s.Reloads, s.Destinations, s.NotReady)
		}

		k.refuse = func(plan.Change) error { return errInjected }
		k.state.Up = false
		k.notify(events.Network)
		k.pass(10 * time.Minute) // it retries slowly
		k.refuse = nil
		now = time.Now()
		k.keeper.Replace(same)
		synctest.Wait()
		if !k.loaded.Equal(same.Rules) || !k.state.Up || !time.Now().Equal(now) {
			k.Error("new destinations are not applied at once before a repair")
		}
	})
}

// Invalid destinations are reported, and do not affect readiness.
func TestKeeperRejected(t *testing.T) {
	keep(t, func(k *kept) {
		k.start()
		k.keeper.Rejected("line 1; is wrong")
		synctest.Wait()
		s := k.keeper.Status()
		if s.ReloadFailures != 1 || s.Reloads != 0 || s.ReloadError != "line 1; is wrong" || len(s.NotReady) > 0 || s.Destinations != 2 {
			k.Errorf("%d failures, %d reloads, error %q, not ready %q, %d destinations", s.ReloadFailures, s.Reloads, s.ReloadError, s.NotReady, s.Destinations)
		}
		k.keeper.Replace(wanted(t, "80 tcp 203.0.113.25\n"))
		synctest.Wait()
		if s := k.keeper.Status(); s.ReloadFailures != 1 || s.Reloads != 1 || s.ReloadError != "" {
			k.Errorf("after a valid reload: %d failures, %d reloads, error %q", s.ReloadFailures, s.Reloads, s.ReloadError)
		}
	})
}

// A failure logged before Run is not logged again; another failure is.
func TestKeeperFailed(t *testing.T) {
	keep(t, func(k *kept) {
		k.keeper.Interval = time.Second
		why := fmt.Errorf("taking it: %w", errInjected)
		k.refuse = func(plan.Change) error { return why }
		k.state.Up = false
		k.keeper.Failed(why)
		if s := k.keeper.Status(); s.Failure != why.Error() || !slices.Equal(s.NotReady, []string{why.Error()}) {
			k.Errorf("failure %q, not ready %q", s.Failure, s.NotReady)
		}
		k.start()
		k.pass(time.Minute)
		if n := k.logCount(why.Error()); n > 0 {
			k.Errorf("known failure logged %d times, want none", n)
		}
		why = errors.New("another reason")
		k.pass(10 * time.Minute)
		if n := k.logCount(why.Error()); n != 1 {
			k.Errorf("logged %d times, want once:\n%s", n, &k.logged)
		}
	})
}

// The reasons that keep a router from being ready.
func TestKeeperNotReady(t *testing.T) {
	const (
		gateway     = "gateway 192.168.12.1 does not answer ARP"
		destination = "no destination reachable: 1 unsent" // the test has no reserved address
		compared    = "not reconciled yet"
	)
	for name, test := range map[string]struct {
		prepare func(*kept)
		idle    bool
		want    []string
	}{
		"ready":                              {prepare: func(*kept) {}},
		"not started":                        {prepare: func(*kept) {}, idle: true, want: []string{compared}},
		"the gateway answers":                {prepare: func(k *kept) { k.around.state.Gateway = arp.GatewayState{Known: true, Reachable: true} }},
		"the gateway is not known":           {prepare: func(*kept) {}},
		"the gateway has not answered yet":   {prepare: func(k *kept) { k.around.state.Gateway.Misses = 1 }, want: []string{gateway}},
		"the gateway does not answer":        {prepare: func(k *kept) { k.around.state.Gateway.Known = true }, want: []string{gateway}},
		"a conflict":                         {prepare: func(k *kept) { k.around.state.Conflicts = 1 }},
		"no destination, which is all right": {prepare: func(k *kept) { k.keeper.ProbeInterval = time.Minute }},
		"no destination": {
			prepare: func(k *kept) { k.keeper.ProbeInterval, k.keeper.ProbeFailsReady = time.Minute, true },
			want:    []string{destination},
		},
		"neither gateway nor destination": {
			prepare: func(k *kept) {
				k.around.state.Gateway.Known = true
				k.keeper.ProbeInterval, k.keeper.ProbeFailsReady = time.Minute, true
			},
			want: []string{gateway, destination},
		},
	} {
		t.Run(name, func(t *testing.T) {
			keep(t, func(k *kept) {
				k.withARP()
				test.prepare(k)
				if !test.idle {
					k.start()
					k.pass(time.Second)
				}
				s := k.keeper.Status()
				if diff := cmp.Diff(test.want, s.NotReady); diff != "" {
					k.Errorf("- want, + is:\n%s", diff)
				}
				if probed := k.keeper.ProbeInterval > 0; probed != (len(s.Probes) == 1 && s.Probes[0].Err != "") {
					k.Errorf("probes: %v", s.Probes)
				}
			})
		})
	}
}

// The state of the egress interface is that of the last comparison, and a lost carrier
// is logged once.
func TestKeeperCarrier(t *testing.T) {
	keep(t, func(k *kept) {
		k.keeper.Interval = 0
		begin := time.Now()
		if l := k.keeper.Status().Link; !l.Since.IsZero() {
			k.Errorf("before the start: %+v", l)
		}
		k.start()
		want := router.LinkStatus{Found: true, MAC: k.state.MAC, Carrier: true, Since: begin}
		check := func(reasons ...string) {
			k.Helper()
			synctest.Wait()
			s := k.keeper.Status()
			if diff := cmp.Diff(want, s.Link); diff != "" {
				k.Errorf("- want, + is:\n%s", diff)
			}
			if !slices.Equal(s.NotReady, reasons) {
				k.Errorf("not ready %q, want %q", s.NotReady, reasons)
			}
		}
		check()
		k.pass(time.Minute)
		k.state.Carrier = false
		k.notify(events.Network)
		want.Carrier, want.Since = false, time.Now()
		const lost = "egress interface macvlan0 without carrier"
		check(lost)
		k.pass(time.Minute)
		k.notify(events.Network | events.Rules)
		check(lost)
		k.state.Carrier = true
		k.notify(events.Network)
		want.Carrier, want.Since = true, time.Now()
		check()
		if k.logCount("egress interface without carrier") != 1 || k.logCount("egress interface carrier restored") != 1 {
			k.Errorf("log:\n%s", &k.logged)
		}
	})
}

// Each state of the report has the time of its start.
func TestKeeperStatusTimes(t *testing.T) {
	keep(t, func(k *kept) {
		begin := time.Now()
		k.withARP()
		k.keeper.ProbeInterval = time.Minute // without an address in the namespace, no destination is reachable
		k.keeper.Neighbours = func(arp.Options) (router.Neighbours, error) { return nil, errInjected }
		k.start()
		k.pass(time.Minute)
		at := time.Now()
		k.keeper.Rejected("line 1")
		k.pass(time.Minute)
		k.keeper.Rejected("line 2")
		s := k.keeper.Status()
		for what, times := range map[string][2]time.Time{
			"reload":    {s.ReloadSince, at},
			"ARP watch": {s.Surroundings[0].UnwatchedSince, begin},
			"probes":    {s.ProbesSince, begin},
		} {
			if !times[0].Equal(times[1]) {
				k.Errorf("%s since %s, want %s", what, times[0], times[1])
			}
		}
		k.keeper.Replace(wanted(t, "80 tcp 203.0.113.25\n81 udp 203.0.113.26\n")) // the file is valid again
		if s := k.keeper.Status(); !s.ReloadSince.Equal(time.Now()) || s.ReloadError != "" {
			k.Errorf("reload since %s, error %q", s.ReloadSince, s.ReloadError)
		}
	})
}
