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

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A change is one run's changes of a namespace, with their rollback.
type change struct {
	router  *Router
	network Network
	want    plan.Want // the router's, completed during the run
	have    plan.Have

	socket    *arp.Socket     // nil: the interface needs no announcement
	questions []question      // probes whose answers are pending
	gateways  []<-chan answer // receive the answers of the gateways that were asked
	rules     Rules
	strays    []Stray // those of have.Strays

	looks   bool // only: nothing is created
	done    undoList
	skipped skipped  // optional changes that failed in this run
	set     []string // sysctls that were set and are not logged yet

	// For a router that stays, whose changes are repairs.
	watches bool
	admits  bool // the changes of IPv6 are part of the start
	repairs []Repair
	reloads bool                  // the rules changed because the destinations did
	first   bool                  // this run has loaded rules where the backend had none
	held    bool                  // the interface had the address before
	moved   func(plan.State) bool // whether the address moved; nil: it did not
	warned  map[string]bool       // warnings logged before
	known   Rules                 // rules without drift; nil: read them
	drops   *drops                // sums the counters that loading resets
	// The host's addresses of the last run.
	parentAddresses []netip.Prefix
}

// skipped are the optional changes that failed in one run.
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
	if !c.watches || c.reloads && kind == RepairRules || c.admits {
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
	current, err := c.router.Rules(ctx, c.want.Rules)
	if err != nil {
		return err
	}
	if err := c.use(ctx, current); err != nil || len(c.have.Differs) == 0 {
		return err
	}
	return c.load(ctx, plan.Load{Rules: c.want.Rules, Why: strings.Join(c.have.Differs, "; ")})
}

// observe reads the state of the network, and checks it. It changes nothing, except that
// it creates a macvlan, without which there is no state to read; with looks not even that.
func (c *change) observe(ctx context.Context) error {
	r := c.router
	parentAddresses, err := r.ensureMacvlan(ctx, c)
	if err != nil && c.watches && c.network.Exists(c.want.Network.Interface) == nil {
		// The interface exists, and works without the host's addresses.
		c.warnOnce("parent NIC not checked", "error", err)
		parentAddresses, err = c.parentAddresses, nil
	}
	if err != nil {
		return err
	}
	c.parentAddresses = parentAddresses
	if !r.LeavesParent { // a macvlan does not reach its parent's addresses
		c.want.Network.Cluster.Destinations = slices.Concat(c.want.Network.Cluster.Destinations, r.notRedirectedTo(parentAddresses))
	}
	c.have.State, err = r.observe(c.network, c.want.Network)
	if _, missing := errors.AsType[*link.MissingError](err); missing && c.have.Missing {
		err = r.checkCluster(c.network)
	}
	return err
}

// prepare reads the state that apply needs, and checks every precondition, without a
// change but that of observe.
func (c *change) prepare(ctx context.Context) error {
	r := c.router
	if err := c.observe(ctx); err != nil {
		return err
	}
	if c.moved != nil && c.moved(c.have.State) {
		c.want.Announce = true
	}
	if err := c.readGate(); err != nil {
		return err
	}
	groups := plan.Steps(c.want, c.have)
	if err := c.feasible(groups); err != nil {
		return err
	}
	if announces(groups) {
		var err error
		if c.socket, err = arp.Open(c.have.State.Index); err != nil {
			return err
		}
	}
	// The answers arrive while the rules are read.
	if len(groups) > 0 && groups[0].Stage == plan.Inquiry {
		if _, err := c.carryOut(ctx, groups[0]); err != nil {
			return err
		}
	}
	if c.known != nil {
		c.rules = c.known
		return nil
	}
	current, err := r.Rules(ctx, c.want.Rules)
	if err != nil {
		return err
	}
	return c.use(ctx, current)
}

// feasible returns an error if an announcement among the steps cannot be sent, or if the
// pod cannot forward, so that a run fails before any change.
func (c *change) feasible(groups []plan.Group) error {
	if announces(groups) && !c.have.Missing {
		if err := arp.CheckAnnouncement(c.have.State.MAC, c.want.Network.Sources[0].Prefix.Addr()); err != nil {
			return &advisedError{fmt.Errorf("check egress interface: %q is not Ethernet: %w", c.want.Network.Interface, err),
				wording.Textf("set %s to an Ethernet interface on the physical network, such as a macvlan", wording.Interface)}
		}
	}
	if c.want.Forward {
		return link.CanForward(c.want.Network, c.have.State)
	}
	return nil
}

// announces reports whether a step announces the address.
func announces(groups []plan.Group) bool {
	return slices.ContainsFunc(groups, func(g plan.Group) bool {
		return slices.ContainsFunc(g.Steps, func(s plan.Step) bool {
			_, is := s.(plan.Announce)
			return is
		})
	})
}

// use makes current the rules of this change.
func (c *change) use(ctx context.Context, current Rules) (err error) {
	r := c.router
	if c.strays, err = r.Strays(ctx, current); err != nil {
		return err
	}
	c.have.Strays = nil
	for _, s := range c.strays {
		c.have.Strays = append(c.have.Strays, s.String())
	}
	c.rules, c.have.Differs, c.have.Redirects = current, current.Differs(c.want.Rules), current.Redirects()
	c.have.Former = append(c.have.Former, current.Sources()...)
	for _, note := range c.rules.Notes() {
		c.warnOnce("rules warning", "backend", c.rules.String(), "warning", note)
	}
	if !c.watches && r.Log.Enabled(ctx, slog.LevelDebug) { // the plan may be long
		r.Log.Debug("desired rules", "backend", c.rules.String(), "plan", c.want.Rules.String(), "differs", strings.Join(c.have.Differs, "; "))
	}
	return nil
}

// rounds is the largest number of times that a stage is carried out. One is needed for
// the steps; setting an interface up can add routes that need another. If more are
// needed, another program reverts the steps.
const rounds = 5

// apply carries out the plan.
func (c *change) apply(ctx context.Context) error {
	done := make(map[plan.Stage]int)
	for {
		groups := plan.Steps(c.want, c.have)
		if len(groups) == 0 {
			break
		}
		g := groups[0]
		if g.Stage >= plan.Detection && !c.have.Opened {
			break
		}
		if done[g.Stage]++; done[g.Stage] > rounds {
			return fmt.Errorf("configure %q: no convergence after %d rounds, another program reverts the step %q", c.want.Network.Interface, rounds, g.Steps[0].String())
		}
		if g.Stage > plan.Routing {
			c.warnSkipped()
		}
		changed, err := c.carryOut(ctx, g)
		if err != nil {
			return err
		}
		if g.Stage == plan.Opening {
			break
		}
		if changed {
			if c.have.State, err = c.network.Observe(c.want.Network); err != nil {
				return err
			}
		}
	}
	c.warnSkipped()
	return nil
}

// carryOut takes the steps of a stage. It reports whether the network has changed.
func (c *change) carryOut(ctx context.Context, g plan.Group) (changed bool, err error) {
	defer c.logSet()
	for _, s := range g.Steps {
		switch s := s.(type) {
		case plan.Change:
			err = c.take(ctx, s)
			if changed = true; err != nil && s.Optional {
				c.skip(s, err)
				err = nil
			}
		case plan.Destroy:
			if err = c.network.DeleteMacvlan(s.Interface); err == nil {
				c.router.Log.Info("network changed", "step", s.String())
			}
		case plan.Settle:
			err = c.settle(ctx, s.Doubt)
		case plan.Probe:
			err = c.probe(ctx, s.Addresses)
		case plan.Load:
			err = c.load(ctx, s)
		case plan.Announce:
			// Closing the socket takes some 10 ms, and the other steps run in that time.
			err = c.announce(s.Addresses)
			c.have.Announced[family(s.Addresses[0])] = true
		case plan.Ask:
			c.have.Asked[family(s.Gateway)] = true
			c.askGateway(ctx, s.Source)
		case plan.Await:
			err = c.await(ctx)
		case plan.RemoveStray:
			err = c.removeStray(ctx)
		case plan.Forget:
			err = c.forget()
		case plan.Fence:
			err = c.fence(s)
		case plan.RemoveGate:
			err = c.removeGate(s)
		case plan.Connect:
			c.connect(s)
		case plan.RemoveCarry:
			err = c.removeCarry(s)
		case plan.Offload:
			err = c.offload(s)
		case plan.RemoveFlowtable:
			err = c.removeFlowtable(s)
		}
		if err != nil {
			return changed, err
		}
	}
	c.have.Claimed = c.have.Claimed || g.Stage == plan.Claim
	return changed, nil
}

// removeStray removes the first of the rules of other backends. Until then they work
// beside the rules in use.
func (c *change) removeStray(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s := c.strays[0]
	c.strays, c.have.Strays = c.strays[1:], c.have.Strays[1:]
	undo, err := s.Remove(ctx)
	if undo != nil {
		c.done.add(undo)
	}
	if err != nil {
		return err
	}
	c.note(RepairStrays, s.String(), "removed", func() {
		if c.rules == nil { // no backend is in use
			c.router.Log.Info("rules removed", "removed", s.String())
			return
		}
		c.router.Log.Info("stale rules removed", "backend", c.rules.String(), "removed", s.String())
	})
	return nil
}

// readGate compares the gate, the flowtable and the tunnel. Its interface may not exist yet.
func (c *change) readGate() (err error) {
	if c.router.Gate != nil {
		c.have.Gate, err = c.router.Gate.Differs(c.want.Gate)
	}
	if c.router.Flowtable != nil && err == nil {
		c.have.Flowtable, err = c.router.Flowtable.Differs(c.want.Flowtable)
	}
	if c.router.Tunnel == nil || c.looks || err != nil { // another process knows the peers
		return err
	}
	if c.have.Carry, err = c.router.Tunnel.Differs(c.want.Carry); err != nil && c.want.Carry != nil {
		c.noTunnel(err)
		return nil
	}
	return err
}

// noTunnel logs an error of the tunnel, without which a router works.
func (c *change) noTunnel(err error) {
	c.warnOnce("tunnel not set up", "error", err, "effect", "connections end if another router takes the addresses over")
}

// connect sets the tunnel up.
func (c *change) connect(s plan.Connect) {
	c.have.Connected = true
	if !c.watches {
		c.done.add(func() error { return c.router.Tunnel.Remove(c.want.Network) })
	}
	if err := c.router.Tunnel.Connect(s.Carry); err != nil {
		c.noTunnel(err)
		return
	}
	c.have.Changed = true
	c.router.Log.Info("tunnel set up", "interface", s.Interface, "step", s.String(), "because", s.Why)
}

// removeCarry removes the tunnel of an earlier configuration, or of the router that is removed.
func (c *change) removeCarry(s plan.RemoveCarry) error {
	if err := c.router.Tunnel.Remove(c.want.Network); err != nil {
		return err
	}
	c.have.Connected = true
	c.note(RepairStrays, "a tunnel of an earlier configuration", "removed", func() {
		c.router.Log.Info("network changed", "step", s.String())
	})
	return nil
}

// fence loads the gate.
func (c *change) fence(s plan.Fence) error {
	if err := c.router.Gate.Load(s.Gate); err != nil {
		return err
	}
	c.have.Fenced, c.have.Changed = true, true
	// An address from before the run stays after a rollback, and so does its gate.
	if !slices.ContainsFunc(c.have.State.Addresses, func(a netip.Prefix) bool { return slices.Contains(s.Sources, a.Addr()) }) {
		c.done.add(c.router.Gate.Remove)
	}
	c.note(RepairRules, s.Why, "loaded the gate, shut", func() {
		c.router.Log.Info("gate loaded", "interface", s.Interface, "because", s.Why)
	})
	return nil
}

// removeGate removes the gate of an earlier configuration, or of the router that is removed.
func (c *change) removeGate(s plan.RemoveGate) error {
	if err := c.router.Gate.Remove(); err != nil {
		return err
	}
	c.have.Fenced = true
	c.note(RepairStrays, "a gate of an earlier configuration", "removed", func() {
		c.router.Log.Info("rules removed", "removed", s.String())
	})
	return nil
}

// offload loads the flowtable.
func (c *change) offload(s plan.Offload) error {
	if err := c.router.Flowtable.Load(s.Flowtable); err != nil {
		return err
	}
	c.have.Offloads, c.have.Changed = true, true
	if !c.watches {
		c.done.add(c.router.Flowtable.Remove)
	}
	c.note(RepairRules, s.Why, "loaded the flowtable", func() {
		c.router.Log.Info("flowtable loaded", "interfaces", s.Cluster+" "+s.Egress, "because", s.Why)
	})
	return nil
}

// removeFlowtable removes the flowtable of an earlier configuration, or of the router that is removed.
func (c *change) removeFlowtable(s plan.RemoveFlowtable) error {
	if err := c.router.Flowtable.Remove(); err != nil {
		return err
	}
	c.have.Offloads = true
	c.note(RepairStrays, "a flowtable of an earlier configuration", "removed", func() {
		c.router.Log.Info("rules removed", "removed", s.String())
	})
	return nil
}

// load loads rules. If the backend fails, another one replaces it, unless the first one
// holds rules of an earlier run: they would keep working beside the new ones. Those of this
// run, without redirects, drop what the new ones drop until they are removed.
func (c *change) load(ctx context.Context, s plan.Load) error {
	held := c.rules.Holds() && !c.first
	if c.drops != nil {
		c.drops.read(ctx, c.rules, c.want.Rules)
		defer func() { c.drops.read(ctx, c.rules, c.want.Rules) }()
	}
	undo, err := c.rules.Apply(ctx, s.Rules)
	c.have.Changed = c.have.Changed || undo != nil
	if err == nil && !c.watches { // a router that stays keeps what works
		if err = checkTranslators(s.Rules.Helpers); err != nil {
			c.done.add(undo)
			return err
		}
	}
	if err == nil {
		c.done.add(undo)
		c.have.Loaded, c.first = &s.Rules, !held
		if !s.Part {
			c.note(RepairRules, s.Why, "loaded by "+c.rules.String(), func() {
				c.router.Log.Info("rules loaded", "backend", c.rules.String(), "because", s.Why)
			})
		}
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
	if err := c.use(ctx, next); err != nil || len(c.have.Differs) == 0 {
		return err
	}
	if s.Why != "" {
		s.Why = strings.Join(c.have.Differs, "; ")
	}
	return c.load(ctx, s)
}

// announce announces reserved addresses to the physical network. prepare has opened the
// socket, unless the reason to announce came later.
func (c *change) announce(addresses []netip.Addr) (err error) {
	if c.socket == nil {
		if c.socket, err = arp.Open(c.have.State.Index); err != nil {
			return err
		}
	}
	for _, a := range addresses {
		if err := c.socket.Announce(c.have.State.MAC, a); err != nil {
			return err
		}
		c.router.Log.Debug("address announced", "address", a, "mac", c.have.State.MAC.String())
	}
	c.socket.Close()
	c.socket = nil
	return nil
}

// close closes the sockets of prepare.
func (c *change) close() {
	if c.socket != nil {
		c.socket.Close()
	}
	for _, q := range c.questions {
		q.Close()
	}
}

// forget deletes the conntrack entries of stale connections. It is an error if their packets go on
// by the flowtable.
func (c *change) forget() error {
	// Computed only if there is a connection to check.
	stale := sync.OnceValue(func() func(rules.Connection) bool { return c.want.Rules.Stale(c.have.State.ClusterAddresses()) })
	masters := sync.OnceValues(conntrack.Masters)
	n, err := c.network.Forget(c.have.State.IPv6 != nil, func(f link.Connection) bool {
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
		attributes := []any{"error", err, "effect", "connections of former rules go on"}
		if errors.Is(err, unix.EINVAL) { // of the subsystem that is missing (nfnetlink_rcv_msg in net/netfilter/nfnetlink.c)
			attributes = append(attributes, "hint", (&conntrack.KernelError{Err: err}).Hint(c.router.Names))
		}
		c.router.Log.Warn("stale connections not deleted", attributes...)
	} else if n > 0 {
		if c.router.Flowtable != nil && c.want.Flowtable != nil {
			if err := c.router.Flowtable.Flush(*c.want.Flowtable); err != nil {
				return err
			}
		}
		c.router.Log.Info("stale connections deleted", "number", n)
	}
	return nil
}

// sysctl describes a change that sets a sysctl.
func sysctl(s plan.Change) string { return fmt.Sprintf("%s = %s", s.Sysctl, s.Value) }

// skip records an optional change that failed.
func (c *change) skip(s plan.Change, err error) {
	c.have.Failed = append(c.have.Failed, s.String())
	c.skipped.sysctls = append(c.skipped.sysctls, sysctl(s))
	if !slices.Contains(c.skipped.effects, s.Effect) {
		c.skipped.effects = append(c.skipped.effects, s.Effect)
	}
	if c.skipped.err == nil {
		c.skipped.err = err
	}
}

// warnSkipped logs the optional changes that failed, usually because /proc/sys is
// read-only, and their effect.
func (c *change) warnSkipped() {
	if s := c.skipped; s.err != nil {
		c.router.Log.Warn("sysctls not set", "sysctls", strings.Join(s.sysctls, ", "), "error", s.err, "effect", strings.Join(s.effects, "; "),
			"hint", "run the container privileged")
	}
	c.skipped = skipped{}
}

// logSet logs the sysctls that were set, in one line.
func (c *change) logSet() {
	if len(c.set) > 0 {
		c.router.Log.Info("network changed", "step", "set "+strings.Join(c.set, ", "))
	}
	c.set = nil
}

// take changes the network, and records the rollback.
func (c *change) take(ctx context.Context, s plan.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.network.Do(s); err != nil {
		return err
	}
	c.have.Changed = true
	inverse := s.Inverse()
	c.done.add(func() error { return c.network.Do(inverse) })
	defer func(admits bool) { c.admits = admits }(c.admits)
	c.admits = c.admits && s.OfIPv6()
	c.note(kindOf(s, c.want.Network), s.Found(), s.String(), func() {
		if s.Optional {
			c.set = append(c.set, sysctl(s))
			return
		}
		c.logSet()
		c.router.Log.Info("network changed", "step", s.String())
	})
	return nil
}

// An UndoError reports that a run failed and that its rollback failed too.
type UndoError struct{ Err error }

func (e *UndoError) Error() string { return fmt.Sprintf("roll back changes: %v", e.Err) }

// Unwrap returns the errors of the rollback.
func (e *UndoError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *UndoError) Hint(wording.Names) string {
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
