package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A change is one run's changes of a namespace, with their rollback.
type change struct {
	router  *Router
	network Network
	want    link.Want // the router's, completed during the run

	have     link.State
	socket   *arp.Socket   // nil: the interface needs no announcement
	question *arp.Question // nil: no answer is pending
	asked    time.Time
	doubt    error         // of checkGateway
	gateway  <-chan answer // receives the gateway's answer; nil: it was not asked
	rules    Rules
	differs  []string // differences of the rules from the plan
	strays   []Stray

	done    undoList
	changed bool     // at least one step was taken, or rules were loaded
	left    []string // optional steps that failed and are not tried again
	skipped skipped  // those of this run
	set     []string // sysctls that were set and are not logged yet

	// For a router that stays, whose changes are repairs.
	watches   bool
	repairs   []Repair
	reloads   bool                  // the rules changed because the destinations did
	held      bool                  // the interface had the address before
	announces bool                  // even without a change of address or link
	moved     func(link.State) bool // whether the address moved; nil: it did not
	announced bool
	warned    map[string]bool // warnings logged before
	known     Rules           // rules without drift; nil: read them
	drops     *drops          // sums the counters that loading resets
	// The host's addresses of the last run.
	parentAddresses []netip.Prefix
}

// skipped are the optional steps that failed in one run.
type skipped struct {
	sysctls []string
	effects []string
	err     error // the first one
}

// A Repair is one repaired difference.
type Repair struct {
	Kind        RepairKind
	Found, Done string
}

// note logs one change: as a repair if the router stays, otherwise by log.
func (c *change) note(kind RepairKind, found, done string, log func()) {
	if !c.watches || c.reloads && kind == RepairRules {
		log()
		return
	}
	c.repairs = append(c.repairs, Repair{kind, found, done})
	c.router.Log.Warn("repaired", "kind", kind, "found", found, "done", done)
}

// warnOnce logs a warning. A router that stays logs it once.
func (c *change) warnOnce(text string, attributes ...any) {
	key := text + fmt.Sprint(attributes...)
	if !c.warned[key] {
		c.router.Log.Warn(text, attributes...)
	}
	if c.warned != nil {
		c.warned[key] = true
	}
}

// loadAlone loads the plan while an interface is missing. Rules match interfaces
// by name.
func (c *change) loadAlone(ctx context.Context) error {
	current, err := c.router.Rules(ctx, c.router.Plan)
	if err != nil {
		return err
	}
	if err := c.use(ctx, current); err != nil {
		return err
	}
	why := strings.Join(c.differs, "; ")
	if err := c.load(ctx, c.router.Plan); err != nil || why == "" {
		return err
	}
	c.note(RepairRules, why, "loaded by "+c.rules.String(), func() {})
	return nil
}

// prepare reads the state that apply needs, and checks every precondition. It
// changes nothing, except that it creates a macvlan, without which there is no
// state to read.
func (c *change) prepare(ctx context.Context) error {
	r := c.router
	parentAddresses, err := r.ensureMacvlan(ctx, c)
	if err != nil && c.watches && c.network.Exists(r.Link.Interface) == nil {
		// The interface exists, and works without the host's addresses.
		c.warnOnce("parent NIC not checked", "error", err)
		parentAddresses, err = c.parentAddresses, nil
	}
	if err != nil {
		return err
	}
	c.parentAddresses = parentAddresses
	// A macvlan does not reach its parent's addresses.
	c.want.Cluster.Destinations = slices.Concat(c.want.Cluster.Destinations, r.notRedirectedTo(parentAddresses))
	if c.have, err = r.observe(c.network, c.want); err != nil {
		return err
	}
	if !c.watches { // the cluster side may change while the router runs
		c.doubt = checkGateway(c.want, c.have)
		if c.have.Up { // otherwise apply asks
			if err := c.settleDoubt(ctx); err != nil {
				return err
			}
		}
	}
	if len(link.Claim(c.want, c.have)) > 0 || c.moved != nil && c.moved(c.have) {
		c.announces = true
	}
	if c.announces && !c.have.NoARP {
		// An announcement that cannot be built fails before any change.
		if _, err := arp.Announcement(arp.Request, c.have.MAC, r.Link.Address.Addr()); err != nil {
			return &advisedError{fmt.Errorf("check egress interface: %q is not Ethernet: %w", r.Link.Interface, err),
				spec.Textf("set %s to an Ethernet interface on the physical network, such as a macvlan", spec.Interface)}
		}
		if c.socket, err = arp.Open(c.have.Index); err != nil {
			return err
		}
	}
	// A probe needs an interface that is up.
	if c.inquires() && c.have.Up && r.Conflict != ConflictRefuse && !c.watches {
		c.ask()
	}
	if r.Forward {
		if err := link.CanForward(c.have); err != nil {
			return err
		}
	}
	if c.known != nil {
		c.rules = c.known
		return nil
	}
	current, err := r.Rules(ctx, r.Plan)
	if err != nil {
		return err
	}
	return c.use(ctx, current)
}

// use makes current the rules of this change.
func (c *change) use(ctx context.Context, current Rules) (err error) {
	r := c.router
	if c.strays, err = r.Strays(ctx, current); err != nil {
		return err
	}
	c.rules, c.differs = current, current.Differs(r.Plan)
	for _, note := range c.rules.Notes() {
		c.warnOnce("rules warning", "backend", c.rules.String(), "warning", note)
	}
	if !c.watches && r.Log.Enabled(ctx, slog.LevelDebug) { // the plan may be long
		r.Log.Debug("desired rules", "backend", c.rules.String(), "plan", r.Plan.String(), "differs", strings.Join(c.differs, "; "))
	}
	return nil
}

// apply changes the namespace to the desired state.
//
// In the order of the steps, redirected traffic never has another source than the
// reserved address or another path than the egress interface, and the physical
// network never reaches the pod: rules come before the address and the routes;
// redirects come after these if packets could already be redirected; forwarding is
// enabled last. If the network is right, the new rules replace the old ones at
// once, so that no new connection is rejected in between. Stale rules of another
// backend work until they are removed, with the reserved address of their time.
func (c *change) apply(ctx context.Context) error {
	plan := c.router.Plan
	required := func(s link.Step) bool { return !s.Optional }
	if slices.ContainsFunc(link.Diff(c.want, c.have), required) {
		first := plan
		if c.router.Forward && (c.rules.Redirects() || c.have.ForwardsAny()) {
			first = plan.WithoutRedirects()
		}
		if err := c.load(ctx, first); err != nil {
			return err
		}
	}
	if err := c.converge(ctx, link.Up); err != nil {
		return err
	}
	if err := c.settleDoubt(ctx); err != nil {
		return err
	}
	if err := c.inquire(ctx); err != nil {
		return err
	}
	if err := c.converge(ctx, link.Claim); err != nil {
		return err
	}
	// Announce at once: closing the socket takes some 10 ms, and the other steps
	// run in that time.
	if err := c.announce(); err != nil {
		return err
	}
	c.askGateway(ctx)
	if err := c.converge(ctx, link.Diff); err != nil {
		return err
	}
	c.warnSkipped()
	if err := c.load(ctx, plan); err != nil {
		return err
	}
	if why := strings.Join(c.differs, "; "); why != "" {
		c.note(RepairRules, why, "loaded by "+c.rules.String(), func() {
			c.router.Log.Info("rules loaded", "backend", c.rules.String(), "because", why)
		})
	}
	if c.router.Forward {
		if err := c.take(ctx, link.Forwarding(c.have)...); err != nil {
			return err
		}
	}
	if err := c.removeStrays(ctx); err != nil {
		return err
	}
	if c.router.Forward && (len(c.differs) > 0 || len(c.strays) > 0 || c.changed) {
		c.forget()
	}
	return nil
}

// removeStrays removes the rules of other backends. Until then they work beside
// the rules in use.
func (c *change) removeStrays(ctx context.Context) error {
	for _, s := range c.strays {
		if err := ctx.Err(); err != nil {
			return err
		}
		undo, err := s.Remove(ctx)
		if undo != nil {
			c.done.add(undo)
		}
		if err != nil {
			return err
		}
		c.note(RepairStrays, s.String(), "removed", func() {
			c.router.Log.Info("stale rules removed", "backend", c.rules.String(), "removed", s.String())
		})
	}
	return nil
}

// load loads plan if the rules differ from the router's. If the backend fails,
// another one replaces it, unless the first one holds rules of ours: they would
// keep working beside the new ones.
func (c *change) load(ctx context.Context, plan rules.Plan) error {
	if len(c.differs) == 0 {
		return nil
	}
	held := c.rules.Holds()
	if c.drops != nil {
		c.drops.read(ctx, c.rules, c.router.Plan)
		defer func() { c.drops.read(ctx, c.rules, c.router.Plan) }()
	}
	undo, err := c.rules.Apply(ctx, plan)
	c.changed = c.changed || undo != nil
	if err == nil {
		c.done.add(undo)
		return nil
	}
	// A router that stays keeps a partial repair.
	if undo != nil && !c.watches {
		if undoErr := undo(); undoErr != nil {
			c.done.add(undo) // try again in the final rollback
			return errors.Join(err, undoErr)
		}
	}
	if ctx.Err() != nil || errors.Is(err, os.ErrPermission) || held {
		return err
	}
	next, nextErr := c.router.Next(ctx, c.rules, err)
	if next == nil || nextErr != nil {
		return errors.Join(err, nextErr)
	}
	if err := c.use(ctx, next); err != nil {
		return err
	}
	return c.load(ctx, plan)
}

// announce announces the reserved address to the physical network.
func (c *change) announce() error {
	if c.socket == nil {
		return nil
	}
	address := c.want.Address.Addr()
	if err := c.socket.Announce(c.have.MAC, address); err != nil {
		return err
	}
	c.socket.Close()
	c.announced = true
	c.router.Log.Debug("address announced", "address", address, "mac", c.have.MAC.String())
	return nil
}

// close closes the sockets of prepare.
func (c *change) close() {
	if c.socket != nil {
		c.socket.Close()
	}
	if c.question != nil {
		c.question.Close()
	}
}

// forget deletes the conntrack entries of stale connections.
func (c *change) forget() {
	// Computed only if there is a connection to check.
	stale := sync.OnceValue(func() func(rules.Connection) bool { return c.router.Plan.Stale(c.have.Cluster.Addresses) })
	masters := sync.OnceValues(conntrack.Masters)
	n, err := c.network.Forget(func(f link.Connection) bool {
		found := rules.Connection{Protocol: rules.Protocol(f.Protocol), From: f.From, To: f.To, RepliesFrom: f.RepliesFrom, RepliesTo: f.RepliesTo}
		if !stale()(found) {
			return false
		}
		// One that a helper expected has no redirect of its own, and ends with its master.
		if of, err := masters(); err == nil {
			if master, expected := of[found]; expected {
				return master.To.IsValid() && stale()(master)
			}
		}
		return true
	})
	if err != nil {
		c.router.Log.Warn("stale connections not deleted", "error", err)
	} else if n > 0 {
		c.router.Log.Info("stale connections deleted", "number", n)
	}
}

// rounds is the largest number of rounds of steps and observation. One is needed
// for the steps and one for the check; setting an interface up can add routes that
// need another. If more are needed, another program reverts the steps.
const rounds = 5

// converge takes the steps of diff until it returns none.
func (c *change) converge(ctx context.Context, diff func(link.Want, link.State) []link.Step) error {
	var steps []link.Step
	for range rounds {
		steps = slices.DeleteFunc(diff(c.want, c.have), func(s link.Step) bool { return slices.Contains(c.left, s.String()) })
		if len(steps) == 0 {
			return nil
		}
		for _, s := range steps {
			err := c.take(ctx, s)
			if err != nil && s.Optional {
				c.skip(s, err)
			} else if err != nil {
				return err
			}
		}
		c.logSet()
		var err error
		if c.have, err = c.network.Observe(c.want); err != nil {
			return err
		}
	}
	return fmt.Errorf("configure %q: no convergence after %d rounds, another program reverts the step %q", c.want.Interface, rounds, steps[0].String())
}

// sysctl describes a step that sets a sysctl.
func sysctl(s link.Step) string { return fmt.Sprintf("%s = %s", s.Sysctl, s.Value) }

// skip records an optional step that failed.
func (c *change) skip(s link.Step, err error) {
	c.left = append(c.left, s.String())
	c.skipped.sysctls = append(c.skipped.sysctls, sysctl(s))
	if !slices.Contains(c.skipped.effects, s.Effect) {
		c.skipped.effects = append(c.skipped.effects, s.Effect)
	}
	if c.skipped.err == nil {
		c.skipped.err = err
	}
}

// warnSkipped logs the optional steps that failed, usually because /proc/sys is
// read-only, and their effect.
func (c *change) warnSkipped() {
	if s := c.skipped; s.err != nil {
		c.router.Log.Warn("sysctls not set", "sysctls", strings.Join(s.sysctls, ", "), "error", s.err, "effect", strings.Join(s.effects, "; "),
			"hint", "run the container privileged")
	}
}

// logSet logs the sysctls that were set, in one line.
func (c *change) logSet() {
	if len(c.set) > 0 {
		c.router.Log.Info("network changed", "step", "set "+strings.Join(c.set, ", "))
	}
	c.set = nil
}

// take takes network steps, and records their rollback.
func (c *change) take(ctx context.Context, steps ...link.Step) error {
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.network.Do(s); err != nil {
			return err
		}
		c.changed = true
		inverse := s.Inverse()
		c.done.add(func() error { return c.network.Do(inverse) })
		c.note(kindOf(s, c.want), s.Found(), s.String(), func() {
			if s.Optional {
				c.set = append(c.set, sysctl(s))
				return
			}
			c.logSet()
			c.router.Log.Info("network changed", "step", s.String())
		})
	}
	return nil
}

// An UndoError reports that a run failed and that its rollback failed too.
type UndoError struct{ Err error }

func (e *UndoError) Error() string { return fmt.Sprintf("roll back changes: %v", e.Err) }

// Unwrap returns the errors of the rollback.
func (e *UndoError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *UndoError) Hint(spec.Names) string {
	return "the pod is partly configured: restart the router, which repairs every part, or delete the pod"
}

// An undoList is a list of rollback functions, in the order of the changes.
type undoList []func() error

// add appends a rollback function.
func (l *undoList) add(undo func() error) { *l = append(*l, undo) }

// undo calls all rollback functions, the last one first, even after an error.
func (l *undoList) undo(log *slog.Logger) error {
	if len(*l) == 0 {
		return nil
	}
	var failed []error
	for _, step := range slices.Backward(*l) {
		if err := step(); err != nil {
			failed = append(failed, err)
		}
	}
	*l = nil
	if len(failed) > 0 {
		return &UndoError{errors.Join(failed...)}
	}
	log.Info("changes rolled back")
	return nil
}
