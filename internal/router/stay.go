package router

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/rules"
)

// A Keeper watches over what a router configured, and repairs it.
//
// It looks when the kernel tells of a change, and every Interval, since not all
// changes are told of: rules of iptables' legacy flavour, for one. What it
// compares and how it repairs is what Router.Apply does; only the way back is
// missing, since a repair that fails half-way is to leave what it has repaired.
type Keeper struct {
	Router *Router
	// Interval is how often everything is compared; 0: only when events say so.
	Interval time.Duration
	// AnnounceInterval is how often the address is announced again; 0: never.
	AnnounceInterval time.Duration
	// ProbeInterval is how often each tcp destination is connected to; 0: never.
	ProbeInterval time.Duration
	// ProbeFailsReady: it is not ready while none of them can be.
	ProbeFailsReady bool

	// Replaced is called when the kernel holds what Replace brought; nil: nobody
	// is told.
	Replaced func()

	// Events subscribes to the kernel's.
	Events func() (Events, error)
	// Neighbours watches the physical network.
	Neighbours func(arp.Options) (Neighbours, error)

	mu       sync.Mutex // for what follows, and what is wanted of the router
	status   Status
	replaced chan struct{} // has a value after Replace
	// The destinations are others than those that the kernel holds.
	reloading bool
	probeNow  chan struct{} // has a value when there are others to connect to
	settled   chan struct{} // closed once all has been as wanted

	surroundings surroundings
	probes       probes

	pace      pace
	notBefore time.Time       // of the next comparison
	eager     time.Time       // to when an event may bring it forward; zero: it may not
	said      map[string]bool // notes of the rules that were logged
	left      []string        // optional steps that failed
	told      string          // the failure that was logged last
	want      link.Want       // the router's, with what was found out on the way; zero: nothing yet
	plan      rules.Plan      // that the kernel held after the last comparison; empty: another
	rules     Rules           // found as planned, and nothing told of a change since; nil: they are to be read
	announced announced
	held      bool // the interface had the address after a comparison
	// Addresses of the host that the interface cannot reach.
	parentAddresses []netip.Prefix
}

// NewKeeper returns the keeper of what r configures.
func NewKeeper(r *Router) *Keeper {
	return &Keeper{Router: r, replaced: make(chan struct{}, 1), settled: make(chan struct{}), probeNow: make(chan struct{}, 1), said: make(map[string]bool), status: Status{
		Repairs: make(map[RepairKind]uint64), Since: time.Now(), Wrong: "not reconciled yet",
		Destinations: len(r.Plan.Destinations()),
	}}
}

// Events tell of changes in the kernel; they are an *events.Subscription.
type Events interface {
	Changed() <-chan struct{}
	Take() events.Kind
	Close()
}

// What was announced last: another of these is to be announced again.
type announced struct {
	index   int
	mac     string
	carrier bool
}

const everything = events.Network | events.Rules

// eagerPause is what at least lies between attempts to repair.
const eagerPause = 50 * time.Millisecond

// Status returns what is known now. It may be called at any time.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	s, gateway, wanted := k.status.clone(), k.Router.Link.Gateway, targets(k.Router.Plan)
	k.mu.Unlock()
	if held(s.contestedAt, time.Now()) {
		s.Contested = ""
	}
	s.State, s.Unwatched = k.surroundings.state()
	s.Probes = k.probes.of(wanted)
	s.reasons(gateway, k.ProbeFailsReady)
	return s
}

// update changes the status.
func (k *Keeper) update(change func(*Status)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(&k.status)
}

// Run watches until ctx ends, beginning with a comparison of everything. An error
// is one of subscribing to events.
func (k *Keeper) Run(ctx context.Context) error {
	subscription, err := k.Events()
	if err != nil {
		return err
	}
	defer subscription.Close()
	k.surroundings.watch = k.Neighbours
	if k.Router.start.announced {
		k.update(func(s *Status) { s.Announcements++ })
	}
	if holder := k.Router.start.holder; holder != nil {
		k.surroundings.note(holder, k.Router.start.asked)
	}
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer func() { cancel(); background.Wait(); k.surroundings.running.Wait() }()
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
			if !k.eager.IsZero() { // what was missing may be there now
				k.notBefore = k.eager
			}
		case <-clock.C:
			due := clock.due()
			pending |= everything
			announces = announces || due[1]
			if due[0] || k.Interval == 0 {
				k.surroundings.probe()
			}
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

// Replace gives the router other destinations, and what else they make of it.
// What is wanted then is what the next comparison makes of the kernel, at once.
func (k *Keeper) Replace(want link.Want, plan rules.Plan) {
	k.mu.Lock()
	same := plan.Equal(k.Router.Plan) && slices.Equal(want.Cluster.Destinations, k.Router.Link.Cluster.Destinations)
	k.status.ReloadError = ""
	if !same {
		k.status.Reloads++
		k.status.Destinations = len(plan.Destinations())
		k.reloading = true
	}
	k.Router.Link, k.Router.Plan = want, plan
	k.mu.Unlock()
	if same {
		return
	}
	k.Router.Log.Info("destinations changed", "destinations", len(plan.Destinations()))
	select {
	case k.replaced <- struct{}{}:
	default:
	}
}

// Rejected notes that the destinations are not right, so that those of before
// stay.
func (k *Keeper) Rejected(why string) {
	k.update(func(s *Status) {
		s.ReloadFailures++
		s.ReloadError = why
	})
}

// Failed notes why what is wanted does not hold, which its caller has logged:
// Run tries again, and says so only of something else.
func (k *Keeper) Failed(err error) {
	k.told = strings.ReplaceAll(err.Error(), "\n", "; ")
	k.update(func(s *Status) { s.Wrong = k.told })
}

// compare compares what may have changed and repairs what is not as wanted. It
// reports whether all is as wanted then, and sets when to look again.
func (k *Keeper) compare(ctx context.Context, what events.Kind, announces bool) bool {
	begin := time.Now()
	c, err := k.repair(ctx, what, announces)
	if ctx.Err() != nil {
		return true // it is over
	}
	now := time.Now()
	k.eager = time.Time{}
	k.record(c, what, err, now)
	if err != nil {
		k.notBefore = now.Add(k.pace.failed())
		taken, conflict := errors.AsType[*ConflictError](err)
		if conflict {
			k.surroundings.note(taken.MAC, now)
		}
		if conflict && k.pace.failures > maxConflicts {
			k.notBefore = now.Add(rateLimit)
		}
		// An attempt that changed nothing caused no event either: an event is
		// of something else, maybe of what was missing.
		if !c.changed && len(c.repairs) == 0 && !conflict {
			k.eager = now.Add(eagerPause)
		}
		k.complain(err)
		return false
	}
	k.told = ""
	if len(c.repairs) == 0 {
		k.notBefore = now.Add(k.pace.right(now.Sub(begin), now))
		return true
	}
	k.Router.Log.Info("reconciled", "repairs", len(c.repairs), "took", now.Sub(begin).Round(100*time.Microsecond).String())
	wait, contested := k.pace.repaired(doneBy(c.repairs), now)
	k.notBefore = now.Add(wait)
	if contested {
		k.update(func(s *Status) { s.Contested, s.contestedAt = c.repairs[0].Done, now })
		k.Router.Log.Error("repair contested, backing off",
			"repair", c.repairs[0].Done, "times", k.pace.again, "wait", wait.Round(time.Millisecond).String())
	}
	return true
}

// doneBy describes repairs, whatever their order.
func doneBy(repairs []Repair) string {
	var done []string
	for _, r := range repairs {
		done = append(done, r.Done+" because "+r.Found)
	}
	slices.Sort(done)
	return strings.Join(done, "\n")
}

// complain logs a failure, once as long as it is the same. The first says little:
// something else may be at work.
func (k *Keeper) complain(err error) {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if text == k.told || k.pace.failures == 1 {
		k.Router.Log.Debug("reconcile still failing", "error", text)
		return
	}
	k.told = text
	attributes := []any{"error", text, "again", time.Until(k.notBefore).Round(time.Millisecond).String()}
	var hinter interface{ Hint() string }
	if errors.As(err, &hinter) && hinter.Hint() != "" {
		attributes = append(attributes, "hint", hinter.Hint())
	}
	k.Router.Log.Error("reconcile failed", attributes...)
}

// record brings the status up to date.
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
		if c.announced {
			s.Announcements++
		}
		if err != nil {
			s.RepairFailures++
		}
		wrong := ""
		if err != nil {
			wrong = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if right := err == nil; right != s.Right || wrong != s.Wrong {
			if right != s.Right {
				s.Since = now
			}
			s.Right, s.Wrong = right, wrong
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

// repair compares what of the namespace may have changed, and changes what is not
// as wanted. It returns what it did also with an error.
func (k *Keeper) repair(ctx context.Context, what events.Kind, announces bool) (*change, error) {
	k.mu.Lock()
	r := new(Router)
	*r = *k.Router // as it is now
	reloading := k.reloading
	k.mu.Unlock()
	c := &change{
		router: r, want: r.Link, watches: true, reloads: reloading, held: k.held, announces: announces, moved: k.moved,
		said: k.said, left: k.left, parentAddresses: k.parentAddresses,
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
	if what == events.Network && k.plan.Equal(r.Plan) {
		if !announces && k.networkRight(c) {
			return c, nil
		}
		c.want, c.known = r.Link, k.rules
	}
	k.plan, k.rules = rules.Plan{}, nil
	if err := c.prepare(ctx); err != nil {
		if _, missing := errors.AsType[*InterfaceError](err); missing {
			err = errors.Join(err, c.loadAlone(ctx))
		}
		return c, err
	}
	c.remember(k.want)
	k.want, k.parentAddresses = c.want, c.parentAddresses
	if err := c.apply(ctx); err != nil {
		return c, err
	}
	k.left, k.held = c.left, true
	k.plan = r.Plan
	if reloading {
		k.reloaded(r.Plan)
	}
	if c.rules.Watched() {
		k.rules = c.rules
	}
	k.follow(ctx, c.want, c.have)
	if c.announced {
		k.announced = announcement(c.have)
	}
	return c, nil
}

// reloaded notes that the kernel holds other destinations, if they are still
// those that are wanted.
func (k *Keeper) reloaded(plan rules.Plan) {
	k.mu.Lock()
	still := plan.Equal(k.Router.Plan)
	k.reloading = k.reloading && !still
	k.mu.Unlock()
	if still && k.Replaced != nil {
		k.Replaced()
	}
	select {
	case k.probeNow <- struct{}{}:
	default:
	}
}

func announcement(have link.State) announced {
	return announced{have.Index, have.MAC.String(), have.Carrier}
}

// moved reports whether neighbours have to learn where the address is: it has
// another hardware address, or is behind another port of a switch.
func (k *Keeper) moved(have link.State) bool {
	now := announcement(have)
	switch {
	case k.announced == announced{}: // whoever configured the address announced it
		k.announced = now
	case !have.Carrier:
		k.announced.carrier = false
	}
	return have.Carrier && now != k.announced
}

// remember takes over, or finds out, what is lost where somebody deletes or
// changes all copies of it.
func (c *change) remember(before link.Want) {
	c.want.Cluster.Default = before.Cluster.Default
	if standard, known := c.want.Cluster.ClusterDefault(c.have); known {
		c.want.Cluster.Default = &standard
	}
}

// networkRight reports whether the network is as wanted, and nothing is to be
// announced, so that the rules need not be read, which may take programs.
func (k *Keeper) networkRight(c *change) bool {
	c.want = k.want
	have, err := c.router.observe(c.network, c.want)
	if err != nil {
		return false // the full comparison has the error
	}
	if k.moved(have) {
		return false
	}
	left := func(s link.Step) bool { return slices.Contains(c.left, s.String()) }
	if len(slices.DeleteFunc(link.Diff(c.want, have), left)) > 0 {
		return false
	}
	return !c.router.Forward || len(link.Forwarding(have)) == 0
}
