// Package router configures a network namespace: it orders the changes of link,
// rules and announcements, rolls them back after a failure, and reconciles the
// namespace afterwards.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A Router configures the network namespace of the process.
type Router struct {
	// Want is what the namespace shall be. Without Forward its rules have no redirects,
	// and a proxy in the pod connects to servers. Start and Announce do not matter.
	Want  plan.Want
	Mode  string        // name of the mode, for the log
	Names wording.Names // of the front end, for hints in the log
	// Stays: a Keeper follows, to which Apply leaves IPv6 addresses whose duplicate address
	// detection has not ended.
	Stays bool
	// LeavesParent: the addresses of the macvlan's NIC get no route by the cluster side.
	LeavesParent bool
	// Keeps are the reserved addresses that the egress interface had before the router, which
	// Remove leaves there.
	Keeps []netip.Prefix
	// Forwarded are the sysctls, of [plan.IPForward] and [plan.IPv6Forward], that were on
	// before the router, which Remove leaves on.
	Forwarded []string

	start start // result of Apply for a Keeper
	Log   *slog.Logger

	// Network opens the kernel's links, addresses, routes and sysctls.
	Network func() (Network, error)
	// Rules reads the kernel's rules. The plan is the desired one.
	Rules func(context.Context, rules.Plan) (Rules, error)
	// Next reads them by another backend, after the first one could not load its
	// first rules; nil: there is no other backend.
	Next func(ctx context.Context, failed Rules, why error) (Rules, error)
	// Gate is the kernel's gate; nil: it has none.
	Gate Gate
	// Tunnel is the kernel's tunnel to other routers; nil: it has none.
	Tunnel Tunnel
	// Flowtable is the kernel's shortcut for established connections; nil: it has none.
	Flowtable Flowtable
	// Strays finds rules of other backends than that of the given rules; without them,
	// those of every backend. They are removed in this order after all other changes.
	Strays func(context.Context, Rules) ([]Stray, error)
}

// A Network observes and changes the network; implemented by *link.Kernel.
type Network interface {
	Observe(plan.Network) (plan.State, error)
	Exists(name string) error
	Do(plan.Change) error
	DeleteMacvlan(name string) error
	Initial(plan.Network) (plan.Sysctls, error)
	Forget(ipv6 bool, stale func(link.Connection) bool) (int, error)
	Close()
}

// A Gate keeps packets with the reserved addresses in while the router does not hold these.
type Gate interface {
	// Differs returns the differences of the kernel's gate; want is nil if there shall be
	// none.
	Differs(want *plan.Gate) ([]string, error)
	// Load loads the gate, shut.
	Load(plan.Gate) error
	Remove() error
}

// A Tunnel carries the packets of connections between routers with the same addresses.
type Tunnel interface {
	// Differs returns the differences of the kernel's tunnel; want is nil if there shall be
	// none.
	Differs(want *plan.Carry) ([]string, error)
	// Connect sets the tunnel up.
	Connect(plan.Carry) error
	Remove(plan.Network) error
}

// A Flowtable forwards packets of established connections past the rules.
type Flowtable interface {
	// Differs returns the differences of the kernel's flowtable; want is nil if there shall be
	// none.
	Differs(want *plan.Flowtable) ([]string, error)
	Load(plan.Flowtable) error
	// Flush has the packets of all connections pass the rules again, of which those that may
	// take the shortcut anew.
	Flush(plan.Flowtable) error
	Remove() error
}

// Rules are the rules of one network namespace, as a backend reads them.
type Rules interface {
	fmt.Stringer                      // names the backend
	Notes() []string                  // warnings about them, one line each
	Redirects() bool                  // whether the kernel has redirects of ours
	Watched() bool                    // whether the kernel notifies of their changes
	Holds() bool                      // whether the kernel has rules that this backend loaded
	Differs(want rules.Plan) []string // differences from the plan, one line each
	Named() map[string][]netip.Addr   // addresses of the redirects to names, by name
	Sources() []netip.Addr            // reserved addresses of the rules
	// Apply loads the plan and returns the rollback. If it returns an error and
	// no rollback, the rules are unchanged.
	Apply(ctx context.Context, want rules.Plan) (undo func() error, err error)
	// Drops reads the counters of the plan's rules that drop. It may be called at
	// any time.
	Drops(context.Context, rules.Plan) (rules.Drops, error)
}

// A Stray is the rules that an earlier run loaded with another backend.
type Stray interface {
	fmt.Stringer
	// Remove removes them and returns the rollback; nil: there is none, and the
	// stray has to be the last one. If it returns an error and no rollback, the
	// stray is unchanged.
	Remove(context.Context) (undo func() error, err error)
}

// An InterfaceError reports that one of the two interfaces is missing.
type InterfaceError struct {
	Err  error
	hint wording.Text
}

func (e *InterfaceError) Error() string { return e.Err.Error() }

// Unwrap returns the underlying error.
func (e *InterfaceError) Unwrap() error { return e.Err }

// Hint returns ways to provide the interface.
func (e *InterfaceError) Hint(names wording.Names) string { return e.hint.In(names) }

const egressHint = `the egress interface must exist before the router starts, or be created by it; ways to create it:
  the router   %[2]s, or true for the NIC of the host's default route, in a privileged pod with hostPID: true
  Multus       the pod's annotation k8s.v1.cni.cncf.io/networks: NAME@%[1]s, NAME being a NetworkAttachmentDefinition of type macvlan
  OpenShift    the pod's annotation pod.network.openshift.io/assign-macvlan: "true" (its legacy cluster network only)
  podman       podman network create -d macvlan -o parent=NIC NAME, then --network NAME:interface_name=%[1]s
  docker       docker network create -d macvlan -o parent=NIC NAME, then --network NAME, and %[3]s for the name it gets
If the interface has another name, set %[3]s.`

var clusterHint = wording.Textf("set %s to the interface by which clients reach the pod", wording.ClusterInterface)

// begin returns a change of the namespace, which is locked until the end.
func (r *Router) begin(ctx context.Context) (c *change, end func(), err error) {
	release, err := lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	network, err := r.Network()
	if err != nil {
		release()
		return nil, nil, err
	}
	return &change{router: r, network: network, want: r.Want}, func() { network.Close(); release() }, nil
}

// Apply configures the namespace. If there is no drift, it changes nothing and
// only announces the address. After an error everything is as it was before.
func (r *Router) Apply(ctx context.Context) (err error) {
	begin := time.Now()
	c, end, err := r.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	c.want.Start = true
	defer c.close()
	defer func() {
		if err != nil {
			err = errors.Join(err, c.done.undo(r.Log))
		}
	}()
	if err := c.prepare(ctx); err != nil {
		return err
	}
	if err := c.apply(ctx); err != nil {
		return err
	}
	r.warn(c.have.State)
	if !c.mayRefuse() {
		r.logReady(c.have.State, c.rules, begin, r.Want.Network.Sources)
	}
	if err := c.answer(ctx); err != nil {
		return err
	}
	c.awaitGateways(ctx)
	if r.Stays && !c.want.Network.Usable(c.have.State, true) {
		r.start.waits, r.start.begin = len(c.want.Network.Sources.Of(true)) > 0, begin
	} else {
		err = c.admit(ctx, begin)
	}
	r.start.announced, r.start.failed = c.have.Announced != [2]bool{}, c.have.Failed
	return err
}

// Named returns the addresses that the kernel's redirects to names have, by name: those of
// an earlier run. It changes nothing.
func (r *Router) Named(ctx context.Context) (map[string][]netip.Addr, error) {
	release, err := lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	current, err := r.Rules(ctx, rules.Plan{}) // nothing is compared
	if err != nil {
		return nil, err
	}
	return current.Named(), nil
}

// A Missing is what a run would do now.
type Missing struct {
	Steps   []plan.Group // none if it would change nothing
	Backend string
	// Drops reads the counters of the rules that drop, as of the plan.
	Drops func(context.Context) (rules.Drops, error)
}

// Check returns the steps that are missing to what the namespace shall be. It changes
// nothing that a packet reaches: to compare rules that iptables prints in another form, it
// loads them into chains without a jump.
func (r *Router) Check(ctx context.Context) (Missing, error) {
	c, end, err := r.begin(ctx)
	if err != nil {
		return Missing{}, err
	}
	defer end()
	c.looks = true
	c.want.Start = true
	if err := c.observe(ctx); err != nil {
		return Missing{}, err
	}
	if err := c.readGate(); err != nil {
		return Missing{}, err
	}
	current, err := r.Rules(ctx, c.want.Rules)
	if err != nil {
		return Missing{}, err
	}
	if err := c.use(ctx, current); err != nil {
		return Missing{}, err
	}
	found := Missing{Backend: current.String(), Drops: func(ctx context.Context) (rules.Drops, error) { return current.Drops(ctx, c.want.Rules) }}
	if steps := plan.Steps(c.want, c.have); slices.ContainsFunc(steps, plan.Group.Changes) {
		found.Steps = steps
	}
	return found, c.feasible(found.Steps)
}

// A start is the result of Apply for a Keeper.
type start struct {
	announced bool
	holders   []holder     // hosts that answered for an address
	missed    []netip.Addr // gateways that did not answer a request
	waits     bool         // for IPv6 addresses
	begin     time.Time
	noCarrier bool     // the log has it
	failed    []string // optional changes that failed
}

// notRedirectedTo returns the addresses that are no destination: a destination is
// reached by the egress interface, or not at all.
func (r *Router) notRedirectedTo(addresses []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(addresses, func(a netip.Prefix) bool {
		return slices.ContainsFunc(r.Want.Rules.Destinations(), a.Contains)
	})
}

// observe reads the state for want, and checks that the cluster interface exists
// if it is needed.
func (r *Router) observe(network Network, want plan.Network) (plan.State, error) {
	have, err := network.Observe(want)
	if _, missing := errors.AsType[*link.MissingError](err); missing {
		return have, &InterfaceError{err, wording.Textf(egressHint, want.Interface, wording.Set(wording.MacvlanParent, "NIC"), wording.Interface)}
	}
	if err != nil {
		return have, err
	}
	if err := want.Refuse(have); err != nil {
		return have, err
	}
	return have, r.checkCluster(network)
}

// checkCluster checks that the cluster interface exists if it is needed.
func (r *Router) checkCluster(network Network) error {
	if !r.Want.Forward {
		return nil
	}
	err := network.Exists(r.Want.Network.Cluster.Interface)
	if _, missing := errors.AsType[*link.MissingError](err); missing {
		return &InterfaceError{err, clusterHint}
	}
	return err
}

// mayRefuse reports whether the kernel may still find another host with an IPv6 address, which
// ends the run: nothing is ready before.
func (c *change) mayRefuse() bool {
	return c.want.Conflict == spec.ConflictRefuse && !c.router.Stays && !c.want.Network.Usable(c.have.State, true) && len(c.want.Network.Sources.Of(true)) > 0
}

// warn logs what is odd in the state after Apply.
func (r *Router) warn(have plan.State) {
	if r.start.noCarrier = !have.Carrier; r.start.noCarrier {
		r.Log.Warn(noCarrier, "interface", r.Want.Network.Interface, "hint", noCarrierHint)
	}
	if r.Want.Forward {
		r.warnOfOtherRoutes(have)
	}
	for _, a := range have.Addresses {
		if a.Addr().Is6() && a.Addr().IsLinkLocalUnicast() {
			continue // every interface has one
		}
		if !slices.ContainsFunc(r.Want.Network.Sources, func(s spec.Source) bool { return s.Prefix == a }) {
			r.Log.Warn("unused address on egress interface", "address", a.String())
		}
	}
}

// logReady logs those of the sources whose family packets can cross by.
func (r *Router) logReady(have plan.State, current Rules, begin time.Time, sources spec.Sources) {
	sources = slices.DeleteFunc(slices.Clone(sources), func(s spec.Source) bool {
		return !r.Want.Network.Usable(have, s.Prefix.Addr().Is6())
	})
	if len(sources) == 0 {
		return
	}
	attrs := []any{"mode", r.Mode, "interface", r.Want.Network.Interface, "address", sources.String(), "gateway", sources.Gateways()}
	if r.Want.Forward {
		attrs = append(attrs, "redirects", r.Want.Rules.Size())
	}
	r.Log.Info("ready", append(attrs, "backend", current.String(), "took", time.Since(begin).Round(100*time.Microsecond).String())...)
}

// warnOfOtherRoutes logs the destinations that a route leads to another interface,
// by which redirected packets are dropped.
func (r *Router) warnOfOtherRoutes(have plan.State) {
	if _, known := have.ClusterDefault(); !known && have.Cluster.Index != 0 {
		r.Log.Warn("no default route on cluster interface", "interface", r.Want.Network.Cluster.Interface, "effect", "clients in other subnets get no replies")
	}
	destinations := r.Want.Rules.Destinations()
	for _, other := range have.AllRoutes() {
		if other.Index == have.Index || other.IsDefault() {
			continue
		}
		for _, to := range destinations {
			if other.Destination.Contains(to) && !have.EgressHas(to, other.Destination.Bits()) {
				r.Log.Warn("destination routed by another interface",
					"destination", to.String(), "route", other.String(), "effect", "connections redirected to it are dropped")
				break // one destination for each route is enough
			}
		}
	}
}
