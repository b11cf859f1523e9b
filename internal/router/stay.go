package router

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/rules"
)

// A Keeper watches a router's namespace, and repairs drift.
//
// It compares after each notification of the kernel, and every Interval, since the
// kernel does not notify of all changes, such as those of iptables' legacy
// flavour. It compares and repairs as Router.Apply does, but without rollback: a
// repair that fails half-way keeps its completed steps.
type Keeper struct {
	Router *Router
	// Interval is the interval of full comparisons; 0: only after events.
	Interval time.Duration
	// AnnounceInterval is the interval of announcements; 0: never.
	AnnounceInterval time.Duration
	// ProbeInterval is the interval of probes of the tcp destinations; 0: never.
	ProbeInterval time.Duration
	// ProbeFailsReady makes it not ready while no destination is reachable.
	ProbeFailsReady bool

	// Replaced is called after the destinations of Replace are loaded; may be
	// nil.
	Replaced func()
	// Rests is called after a full comparison that found no difference, with the number of
	// redirects and fallbacks; may be nil.
	Rests func(redirects int)

	// Holds reports whether the router holds its addresses, and Peer whether a hardware address
	// is that of another router that may; nil: it is the only one.
	Holds func() bool
	Peer  func(mac net.HardwareAddr) bool

	// Events subscribes to the kernel's events.
	Events func() (Events, error)
	// Neighbours watches the physical network, for one family; nil: nothing does.
	Neighbours func(arp.Options) (Neighbours, error)

	mu       sync.Mutex // guards status, reloading, reprobe, probeAll, left, wanted and Router.Want
	status   Status
	left     map[netip.AddrPort]bool // addresses that new connections do not get, since they do not answer probes
	wanted   rules.Plan              // the rules of Router.Want, with the addresses that do not answer probes
	replaced chan struct{}           // receives a value after a change of Router.Want
	// The kernel does not yet have the destinations of Router.Want.
	reloading bool
	reprobe   bool          // new destinations are not probed yet
	probeAll  bool          // the next probe is of all destinations, as after Replace
	probeNow  chan struct{} // receives a value after a change of destinations
	settled   chan struct{} // closed after the first successful comparison

	surroundings [2]surroundings // of IPv4 and IPv6
	probes       probes
	drops        drops

	pace      pace
	notBefore time.Time       // earliest time of the next comparison
	eager     time.Time       // the same after an event; zero: events do not change it
	warned    map[string]bool // warnings logged before
	failed    []string        // optional changes that failed
	logged    string          // last failure in the log
	network   plan.Network    // the router's, completed by the last comparison; zero: none yet
	plan      rules.Plan      // plan in the kernel after the last comparison; empty: unknown
	rules     Rules           // rules without drift, and without an event since; nil: read them
	announced announced
	held      bool // the interface had the address after a comparison
	// The host's addresses, which a macvlan cannot reach.
	parentAddresses []netip.Prefix
	contested       []netip.Addr // IPv6 addresses that other hosts have
	retry           time.Time    // earliest time to try them again; zero: there are none
}

// NewKeeper returns a Keeper for the configuration of r.
func NewKeeper(r *Router) *Keeper {
	now := time.Now()
	return &Keeper{Router: r, wanted: r.Want.Rules, replaced: make(chan struct{}, 1), settled: make(chan struct{}), probeNow: make(chan struct{}, 1), warned: make(map[string]bool), drops: drops{log: r.Log}, status: Status{
		Repairs: make(map[RepairKind]uint64), Since: now, Failure: "not reconciled yet",
		Destinations: r.Want.Rules.Size(), ReloadSince: now,
	}}
}

// Events notify of changes in the kernel; implemented by *events.Subscription.
type Events interface {
	Changed() <-chan struct{}
	Take() events.Kind
	Close()
}

// announced identifies the link that was announced last: after a change, the
// address is announced again.
type announced struct {
	index   int
	mac     string
	carrier bool
}

const everything = events.Network | events.Rules

// eagerPause is the least time between attempts to repair.
const eagerPause = 50 * time.Millisecond

// Status returns the current status. It may be called at any time.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	s, want, servers, left := k.status.clone(), k.Router.Want.Network, targets(k.wanted), k.left
	k.mu.Unlock()
	if held(s.contestedAt, time.Now()) {
		s.Contested = ""
	}
	for _, first := range want.Sources.Families() {
		s.Surroundings = append(s.Surroundings, k.surroundings[family(first.Gateway)].state())
	}
	s.Probes, s.ProbesSince, s.Connects = k.probes.of(servers)
	for i, p := range s.Probes {
		s.Probes[i].Out = left[p.To]
	}
	s.reasons(want, k.ProbeFailsReady)
	return s
}

// InSync reports whether the last comparison found no difference.
func (k *Keeper) InSync() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status.InSync
}

// update changes the status.
func (k *Keeper) update(change func(*Status)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(&k.status)
}

// Run reconciles until ctx ends, beginning with a full comparison. An error is
// an error of Events.
func (k *Keeper) Run(ctx context.Context) error {
	subscription, err := k.Events()
	if err != nil {
		return err
	}
	defer subscription.Close()
	k.failed = k.Router.start.failed
	if k.Router.start.announced {
		k.update(func(s *Status) { s.Announcements++ })
	}
	for _, h := range k.Router.start.holders {
		k.note(h)
	}
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer func() {
		cancel()
		background.Wait()
		for i := range k.surroundings {
			k.surroundings[i].running.Wait()
		}
	}()
	if k.ProbeInterval > 0 {
		background.Go(func() { k.probeEvery(ctx, k.ProbeInterval) })
	}
	clock := newClock(k.Interval, k.AnnounceInterval)
	defer clock.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()

	for pending, announces := everything, false; ; {
		var due <-chan time.Time
		if pending != 0 {
			timer.Reset(time.Until(k.notBefore))
			due = timer.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-subscription.Changed():
			pending |= subscription.Take()
			if !k.eager.IsZero() { // the missing part may exist now
				k.notBefore = k.eager
			}
		case <-clock.C:
			announces = clock.due()[1] || announces
			pending |= everything
			k.drops.refresh() // another program may delete the rules with their counters
		case <-k.replaced:
			pending |= everything
			k.notBefore = time.Now()
		case <-due:
			if k.compare(ctx, pending, announces) {
				pending, announces = 0, false
			} else {
				pending = everything
			}
		}
	}
}

// Resolve sets other addresses of the same destinations, and triggers a reconcile.
func (k *Keeper) Resolve(want plan.Want) {
	k.mu.Lock()
	same := want.Rules.Equal(k.wanted)
	if !same {
		k.reloading, k.reprobe = true, true
		k.set(want)
	}
	k.mu.Unlock()
	if !same {
		k.trigger()
	}
}

// set makes want the wanted state. k.mu is locked.
func (k *Keeper) set(want plan.Want) {
	k.wanted = want.Rules
	want.Rules, want.Gate, want.Carry = k.Router.Want.Rules, k.Router.Want.Gate, k.Router.Want.Carry
	want = want.WithRole(k.Router.Want.Role)
	k.Router.Want = want
	k.narrow()
}

// SetRole sets the role of a router that is one of several, and triggers a reconcile.
func (k *Keeper) SetRole(role plan.Role) {
	k.mu.Lock()
	k.Router.Want = k.Router.Want.WithRole(role)
	k.mu.Unlock()
	k.trigger()
}

// SetCarry sets the tunnel to other routers, and triggers a reconcile.
func (k *Keeper) SetCarry(carry plan.Carry) {
	k.mu.Lock()
	k.Router.Want.Carry = &carry
	k.mu.Unlock()
	k.trigger()
}

// Replace sets new destinations and triggers a reconcile.
func (k *Keeper) Replace(want plan.Want) {
	k.mu.Lock()
	before := k.Router.Want
	same := want.Rules.Equal(k.wanted) && slices.Equal(want.Network.Cluster.Destinations, before.Network.Cluster.Destinations)
	if !same || k.status.ReloadError != "" {
		k.status.ReloadSince = time.Now()
	}
	k.status.ReloadError = ""
	destinations := want.Rules.Size()
	if !same {
		k.status.Reloads++
		k.status.Destinations = destinations
		k.reloading, k.reprobe, k.probeAll = true, true, true
	}
	k.set(want)
	k.mu.Unlock()
	if same {
		return
	}
	k.Router.Log.Info("destinations changed", "destinations", destinations)
	k.trigger()
}

// trigger makes Run reconcile, after a change of Router.Want.
func (k *Keeper) trigger() {
	select {
	case k.replaced <- struct{}{}:
	default:
	}
}

// Rejected records that the new destinations are invalid, so that the previous
// ones stay.
func (k *Keeper) Rejected(why string) {
	k.update(func(s *Status) {
		s.ReloadFailures++
		if s.ReloadError == "" {
			s.ReloadSince = time.Now()
		}
		s.ReloadError = why
	})
}

// Failed records an error of Apply that the caller has logged. Run tries again,
// and logs only another error.
func (k *Keeper) Failed(err error) {
	k.logged = strings.ReplaceAll(err.Error(), "\n", "; ")
	k.update(func(s *Status) { s.Failure = k.logged })
}

// compare reconciles the parts that may have changed. It reports whether it
// succeeded, and sets the time of the next comparison.
func (k *Keeper) compare(ctx context.Context, what events.Kind, announces bool) bool {
	begin := time.Now()
	c, err := k.repair(ctx, what, announces)
	if ctx.Err() != nil {
		return true // the end of Run
	}
	now := time.Now()
	k.eager = time.Time{}
	k.record(c, what, err, now)
	k.recordLink(c, err, now)
	if err != nil {
		k.notBefore = now.Add(k.pace.failed())
		taken, conflict := errors.AsType[*ConflictError](err)
		if conflict {
			k.note(holder{taken.Address, taken.MAC, now})
		}
		if conflict && k.pace.failures > maxConflicts {
			k.notBefore = now.Add(rateLimit)
		}
		// An attempt that changed nothing caused no event: the next event has
		// another cause, maybe the missing part.
		if !c.have.Changed && len(c.repairs) == 0 && !conflict {
			k.eager = now.Add(eagerPause)
		}
		k.logFailure(err)
		return false
	}
	k.logged = ""
	if len(c.repairs) == 0 {
		k.notBefore = now.Add(k.pace.inSync(now.Sub(begin), now))
		if k.Rests != nil && what == everything {
			k.Rests(k.plan.Size())
		}
		return true
	}
	k.Router.Log.Info("reconciled", "repairs", len(c.repairs), "took", now.Sub(begin).Round(100*time.Microsecond).String())
	wait, contested := k.pace.repaired(doneBy(c.repairs), now)
	k.notBefore = now.Add(wait)
	if contested {
		k.update(func(s *Status) {
			if s.Contested == "" || held(s.contestedAt, now) {
				s.ContestedSince = now
			}
			s.Contested, s.contestedAt = c.repairs[0].Done, now
		})
		k.Router.Log.Error("repair contested, backing off",
			"repair", c.repairs[0].Done, "times", k.pace.again, "wait", wait.Round(time.Millisecond).String())
	}
	return true
}

// doneBy describes repairs, in a fixed order.
func doneBy(repairs []Repair) string {
	var done []string
	for _, r := range repairs {
		done = append(done, r.Done+" because "+r.Found)
	}
	slices.Sort(done)
	return strings.Join(done, "\n")
}

// logFailure logs a failure, once while it stays the same. The first one is logged
// at level debug, since another program may be in the middle of a change.
func (k *Keeper) logFailure(err error) {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if text == k.logged || k.pace.failures == 1 {
		k.Router.Log.Debug("reconcile still failing", "error", text)
		return
	}
	k.logged = text
	attributes := []any{"error", text, "again", time.Until(k.notBefore).Round(time.Millisecond).String()}
	if h := Hint(err, k.Router.Names); h != "" {
		h = strings.ReplaceAll(strings.ReplaceAll(h, ":\n", ": "), "\n", "; ")
		attributes = append(attributes, "hint", strings.Join(strings.Fields(h), " "))
	}
	k.Router.Log.Error("reconcile failed", attributes...)
}

// record updates the status after a comparison.
func (k *Keeper) record(c *change, what events.Kind, err error, now time.Time) {
	k.update(func(s *Status) {
		s.Comparisons++
		if what&everything == everything {
			s.Compared = now
		}
		if c.rules != nil {
			s.Backend = c.rules.String()
		}
		for _, r := range c.repairs {
			s.Repairs[r.Kind]++
		}
		if c.have.Announced != [2]bool{} {
			s.Announcements++
		}
		if err != nil {
			s.RepairFailures++
		}
		failure := ""
		if err != nil {
			failure = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if inSync := err == nil; inSync != s.InSync || failure != s.Failure {
			if inSync != s.InSync {
				s.Since = now
			}
			s.InSync, s.Failure = inSync, failure
		}
		select {
		case <-k.settled:
		default:
			if err == nil {
				close(k.settled)
			}
		}
	})
}

// recordLink updates the state of the egress interface after a comparison, and logs
// changes of its carrier.
func (k *Keeper) recordLink(c *change, err error, now time.Time) {
	var before, is LinkStatus
	k.update(func(s *Status) {
		before, is = s.Link, s.Link
		missing, _ := errors.AsType[*InterfaceError](err)
		switch {
		case c.have.State.Index != 0:
			is.Found, is.MAC = true, c.have.State.MAC
			if c.have.State.Up { // otherwise its carrier is unknown
				is.Carrier = c.have.State.Carrier
			}
		case missing != nil:
			is = LinkStatus{Since: is.Since}
		}
		if is.Found != before.Found || is.Carrier != before.Carrier || is.Since.IsZero() {
			is.Since = now
		}
		s.Link = is
	})
	if is.Found && !is.Carrier { // before the log has it, which then lacks the gateway
		k.setCarrier(false)
	}
	switch {
	case is.Found && !is.Carrier && (before.Carrier || !before.Found) && !k.Router.start.noCarrier:
		k.Router.Log.Error(noCarrier, "interface", c.want.Network.Interface, "hint", noCarrierHint)
	case is.Carrier && (before.Found && !before.Carrier || k.Router.start.noCarrier):
		k.Router.Log.Info("egress interface carrier restored", "interface", c.want.Network.Interface)
	}
	if is.Carrier {
		k.setCarrier(true)
	}
	k.Router.start.noCarrier = false
}

// repair compares the parts of the namespace that may have changed, and repairs
// differences. It returns the change also with an error.
func (k *Keeper) repair(ctx context.Context, what events.Kind, announces bool) (*change, error) {
	k.mu.Lock()
	r := new(Router)
	*r = *k.Router // a copy of the current one
	reloading := k.reloading
	k.mu.Unlock()
	c := &change{
		router: r, want: r.Want, have: plan.Have{Failed: k.failed}, watches: true, admits: r.start.waits, reloads: reloading, held: k.held, moved: k.moved,
		warned: k.warned, parentAddresses: k.parentAddresses, drops: &k.drops,
	}
	c.want.Announce = announces
	if now := time.Now(); !k.retry.IsZero() && now.After(k.retry) {
		c.want.Retry, k.retry = true, now.Add(rateLimit)
	}
	release, err := lock(ctx)
	if err != nil {
		return c, err
	}
	defer release()
	if c.network, err = r.Network(); err != nil {
		return c, err
	}
	defer c.network.Close()
	defer c.close()
	if what == events.Network && k.plan.Equal(r.Want.Rules) {
		if !announces && k.networkInSync(c) {
			k.recordContested(ctx, c)
			return c, nil
		}
		c.want.Network, c.known = r.Want.Network, k.rules
	}
	k.plan, k.rules = rules.Plan{}, nil
	if err := c.prepare(ctx); err != nil {
		if _, missing := errors.AsType[*InterfaceError](err); missing {
			err = errors.Join(err, c.loadAlone(ctx))
		}
		return c, err
	}
	c.remember(k.network)
	k.network, k.parentAddresses = c.want.Network, c.parentAddresses
	if err := c.apply(ctx); err != nil {
		return c, err
	}
	k.failed, k.held = c.have.Failed, true
	k.plan = r.Want.Rules
	k.drops.use(c.rules, r.Want.Rules)
	if reloading {
		k.reloaded(r.Want.Rules)
	}
	if c.rules.Watched() {
		k.rules = c.rules
	}
	k.follow(ctx, c.want.Network, c.have.State)
	k.recordContested(ctx, c)
	k.admitted(c)
	if c.have.Announced != [2]bool{} {
		k.announced = announcement(c.have.State)
	}
	return c, nil
}

// reloaded records that the kernel has the new destinations, unless these have
// been replaced in the meantime.
func (k *Keeper) reloaded(loaded rules.Plan) {
	k.mu.Lock()
	still := loaded.Equal(k.Router.Want.Rules)
	k.reloading = k.reloading && !still
	reprobe := k.reprobe
	k.reprobe = false
	k.mu.Unlock()
	if still && k.Replaced != nil {
		k.Replaced()
	}
	if !reprobe {
		return
	}
	select {
	case k.probeNow <- struct{}{}:
	default:
	}
}

func announcement(have plan.State) announced {
	return announced{have.Index, have.MAC.String(), have.Carrier}
}

// moved reports whether neighbours need an announcement: the interface has another
// hardware address, or its carrier came back, maybe at another port of a switch.
func (k *Keeper) moved(have plan.State) bool {
	now := announcement(have)
	switch {
	case k.announced == announced{}: // announced by the run that configured the address
		k.announced = now
	case !have.Carrier:
		k.announced.carrier = false
	}
	return have.Carrier && now != k.announced
}

// remember keeps the cluster side's default route from the last comparison, or
// finds it, since another program may delete or change every copy.
func (c *change) remember(before plan.Network) {
	side := &c.want.Network.Cluster
	side.Default = before.Cluster.Default
	if route, known := side.ClusterDefault(c.have.State); known {
		side.Default = &route
	}
}

// networkInSync reports whether the network has no drift and needs no announcement.
// Then the rules are not read, which can start processes.
func (k *Keeper) networkInSync(c *change) bool {
	c.want.Network = k.network
	have, err := c.router.observe(c.network, c.want.Network)
	if err != nil {
		return false // the full comparison returns the error
	}
	c.have.State = have
	return !k.moved(have) && len(plan.Steps(c.want, c.have)) == 0
}
