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
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/rules"
)

// A change is what one run does to a namespace, and the way back from it.
type change struct {
	router  *Router
	network Network
	want    link.Want // the router's, with what is found out on the way

	have     link.State
	socket   *arp.Socket   // nil where the interface needs no announcement
	question *arp.Question // nil where no answer is waited for
	asked    time.Time
	rules    Rules
	differs  []string // where the rules are not as planned
	strays   []Stray

	done    undoList
	changed bool     // at least one step was taken, or rules were loaded
	left    []string // optional steps that failed once and are not tried again

	// Of a router that stays: what it changes, it repairs.
	watches   bool
	repairs   []Repair
	reloads   bool                  // the rules are others because the destinations are
	held      bool                  // the address was the interface's before
	announces bool                  // also where the address and the link are as wanted
	moved     func(link.State) bool // whether neighbours have to learn of it; nil: no
	announced bool
	said      map[string]bool // notes of the rules that were logged before
	known     Rules           // known to be as planned; nil: they are to be read
	// Of the host, as they were last known.
	parentAddresses []netip.Prefix
}

// A Repair is one thing that was not as wanted, and was made so.
type Repair struct {
	Kind        RepairKind
	Found, Done string
}

// note logs one thing that was changed.
func (c *change) note(kind RepairKind, found, done string, log func()) {
	if !c.watches || c.reloads && kind == RepairRules {
		log()
		return
	}
	c.repairs = append(c.repairs, Repair{kind, found, done})
	c.router.Log.Warn("repaired", "kind", kind, "found", found, "done", done)
}

// sayOnce logs a warning; of a router that stays, once.
func (c *change) sayOnce(text string, attributes ...any) {
	key := text + fmt.Sprint(attributes...)
	if !c.said[key] {
		c.router.Log.Warn(text, attributes...)
	}
	if c.said != nil {
		c.said[key] = true
	}
}

// loadAlone makes the rules what is planned where the interface is missing that
// they are about. They match it by its name.
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
	c.note(RepairRules, why, "loaded them by "+c.rules.String(), func() {})
	return nil
}

// prepare finds out all that apply needs, and sees that nothing stands in its
// way. It changes nothing, but for making the egress interface where the router
// is to: without it there is nothing to look at.
func (c *change) prepare(ctx context.Context) error {
	r := c.router
	parentAddresses, err := r.ensureMacvlan(ctx, c)
	if err != nil && c.watches && c.network.Exists(r.Link.Interface) == nil {
		// It is there, and works without what its host says.
		c.sayOnce("parent NIC not checked", "error", err)
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
	if len(link.Claim(c.want, c.have)) > 0 || c.moved != nil && c.moved(c.have) {
		c.announces = true
	}
	if c.announces && !c.have.NoARP {
		// What of the announcement can fail beforehand does so here.
		if _, err := arp.Announcement(arp.Request, c.have.MAC, r.Link.Address.Addr()); err != nil {
			return err
		}
		if c.socket, err = arp.Open(c.have.Index); err != nil {
			return err
		}
	}
	// One that is down cannot be asked on.
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

// use makes the backend of the given rules the one in use.
func (c *change) use(ctx context.Context, current Rules) (err error) {
	r := c.router
	if c.strays, err = r.Strays(ctx, current); err != nil {
		return err
	}
	c.rules, c.differs = current, current.Differs(r.Plan)
	for _, note := range c.rules.Notes() {
		c.sayOnce("rules warning", "backend", c.rules.String(), "warning", note)
	}
	if !c.watches && r.Log.Enabled(ctx, slog.LevelDebug) { // the plan may be long
		r.Log.Debug("desired rules", "backend", c.rules.String(), "plan", r.Plan.String(), "differs", strings.Join(c.differs, "; "))
	}
	return nil
}

// apply changes what is not as wanted.
//
// The order leaves no time at which redirected traffic has another source than
// the reserved address or another way out than the egress interface, nor one at
// which the physical network reaches the pod: rules come before the address and
// the routes; redirects after them, where packets could be redirected before;
// forwarding is turned on last. Where the network is right, rules change from
// what they are to what is planned at once, so that no new connection is refused
// meanwhile. Rules that another backend holds work until they are removed, with
// the source that was the reserved address when they were loaded.
func (c *change) apply(ctx context.Context) error {
	plan := c.router.Plan
	if len(link.Diff(c.want, c.have)) > 0 {
		first := plan
		if c.router.Forward && (c.rules.Redirects() || c.have.ForwardsAny()) {
			first = plan.Guard()
		}
		if err := c.load(ctx, first); err != nil {
			return err
		}
	}
	if err := c.converge(ctx, link.Up); err != nil {
		return err
	}
	if err := c.inquire(ctx); err != nil {
		return err
	}
	if err := c.converge(ctx, link.Claim); err != nil {
		return err
	}
	// The address is announced as soon as it is there, because closing the
	// socket takes some 10 ms, in which the rest is done.
	if err := c.announce(); err != nil {
		return err
	}
	if err := c.converge(ctx, link.Diff); err != nil {
		return err
	}
	if err := c.load(ctx, plan); err != nil {
		return err
	}
	if why := strings.Join(c.differs, "; "); why != "" {
		c.note(RepairRules, why, "loaded them by "+c.rules.String(), func() {
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

// removeStrays removes what other backends hold. Until then it works as before,
// beside the rules in use.
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
		c.note(RepairStrays, s.String(), "removed it", func() {
			c.router.Log.Info("stale rules removed", "backend", c.rules.String(), "removed", s.String())
		})
	}
	return nil
}

// load makes the kernel hold plan, where it was found not to hold the router's.
// Another backend takes the place of one that cannot do it, unless that holds
// rules of ours: they would go on working beside the other's.
func (c *change) load(ctx context.Context, plan rules.Plan) error {
	if len(c.differs) == 0 {
		return nil
	}
	held := c.rules.Holds()
	undo, err := c.rules.Apply(ctx, plan)
	c.changed = c.changed || undo != nil
	if err == nil {
		c.done.add(undo)
		return nil
	}
	// Of a router that watches, what of it is loaded is better than what was there.
	if undo != nil && !c.watches {
		if undoErr := undo(); undoErr != nil {
			c.done.add(undo) // once more, and then it is said
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

// announce tells the physical network who has the reserved address.
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

// close gives back what prepare opened.
func (c *change) close() {
	if c.socket != nil {
		c.socket.Close()
	}
	if c.question != nil {
		c.question.Close()
	}
}

// forget ends connections that the kernel would go on treating as before.
func (c *change) forget() {
	// Worked out only where a connection is there to ask for.
	stale := sync.OnceValue(func() func(rules.Connection) bool { return c.router.Plan.Stale(c.have.Cluster.Addresses) })
	n, err := c.network.Forget(func(f link.Connection) bool {
		return stale()(rules.Connection{Protocol: rules.Protocol(f.Protocol), From: f.From, To: f.To, RepliesFrom: f.RepliesFrom, RepliesTo: f.RepliesTo})
	})
	if err != nil {
		c.router.Log.Warn("stale connections not deleted", "error", err)
	} else if n > 0 {
		c.router.Log.Info("stale connections deleted", "number", n)
	}
}

// rounds is how often the network is compared with what is wanted until it
// holds. One is needed for the steps and one to see that they held; setting an
// interface up can add routes that take another. More means that somebody
// undoes the steps.
const rounds = 5

// converge takes the steps that diff returns until it returns none.
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
				c.router.Log.Warn("optional step failed", "step", s.String(), "error", err)
				c.left = append(c.left, s.String())
			} else if err != nil {
				return err
			}
		}
		var err error
		if c.have, err = c.network.Observe(c.want); err != nil {
			return err
		}
	}
	return fmt.Errorf("configure %q: no convergence after %d rounds, another program reverts the step %q", c.want.Interface, rounds, steps[0].String())
}

// take takes steps of the network, and remembers the way back.
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
		c.note(kindOf(s, c.want), s.Found(), s.String(), func() { c.router.Log.Info("network changed", "step", s.String()) })
	}
	return nil
}

// An UndoError says that a run failed and that not all of what it had changed
// could be put back.
type UndoError struct{ Err error }

func (e *UndoError) Error() string { return fmt.Sprintf("roll back changes: %v", e.Err) }

// Unwrap returns what could not be put back, and why.
func (e *UndoError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *UndoError) Hint() string {
	return "the pod is partly configured: restart the router, which repairs every part, or delete the pod"
}

// An undoList holds the ways back from what was done, in the order done.
type undoList []func() error

// add appends a way back.
func (l *undoList) add(undo func() error) { *l = append(*l, undo) }

// undo goes all ways back, the last one first, and on after a failure.
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
