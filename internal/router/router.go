// Package router puts the parts together: in which order link, rules and
// announcements change, what is taken back when one of them fails, and what
// happens afterwards.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/rules"
)

// A Router configures the network namespace that it runs in.
type Router struct {
	Link    link.Want
	Macvlan *link.Macvlan // nil: the egress interface is there already
	Plan    *rules.Plan   // nil: the network only
	Log     *slog.Logger

	// Network opens the kernel's links, addresses, routes and sysctls.
	Network func() (Network, error)
	// Rules reads the kernel's rules. It is not called without a Plan.
	Rules func(context.Context) (Rules, error)
}

// A Network observes and changes the network; it is a *link.Kernel.
type Network interface {
	Observe(link.Want) (link.State, error)
	Exists(name string) error
	Do(link.Step) error
	Forget(func(link.Connection) bool) (int, error)
	Close()
}

// Rules are those of one network namespace, as a backend found them.
type Rules interface {
	fmt.Stringer                      // names the backend
	Notes() []string                  // what a person should know about them, a line each
	Redirects() bool                  // whether there are redirects of ours
	Differs(want rules.Plan) []string // where they are not as wanted, a line each
	// Apply makes them what is wanted and returns the way back. On an error
	// they are as they were.
	Apply(ctx context.Context, want rules.Plan) (undo func() error, err error)
}

// An InterfaceError says that one of the two interfaces is not there.
type InterfaceError struct {
	Variable string // that names the interface
	Err      error
	hint     string
}

func (e *InterfaceError) Error() string { return e.Err.Error() }

// Unwrap returns what was found.
func (e *InterfaceError) Unwrap() error { return e.Err }

// Hint says how the interface is provided.
func (e *InterfaceError) Hint() string { return e.hint }

const egressHint = `the egress interface is there before the router starts, or made by it; what makes it:
  the router   EGRESS_MACVLAN_PARENT=NIC, or true for the NIC of the host's default route, in a privileged pod with hostPID: true
  Multus       the pod's annotation k8s.v1.cni.cncf.io/networks: NAME@%[1]s, NAME being a NetworkAttachmentDefinition of type macvlan
  OpenShift    the pod's annotation pod.network.openshift.io/assign-macvlan: "true" (its legacy cluster network only)
  podman       podman network create -d macvlan -o parent=NIC NAME, then --network NAME:interface_name=%[1]s
  docker       docker network create -d macvlan -o parent=NIC NAME, then --network NAME, and EGRESS_INTERFACE for the name it gets
An interface with another name is named by EGRESS_INTERFACE.`

const clusterHint = "clients reach the pod by this interface: name it in EGRESS_CLUSTER_INTERFACE"

// rounds is how often the network is compared with what is wanted until it
// holds. One is needed for the steps and one to see that they held; setting an
// interface up can add routes that take another. More means that somebody
// undoes the steps.
const rounds = 5

// Apply makes the namespace what is wanted, and does nothing where it is
// already, except that it always announces the address. On an error everything
// is as it was before.
//
// The order leaves no time at which redirected traffic has another source than
// the reserved address or another way out than the egress interface: redirects
// that are not as planned go first, the rules that set the source stand before
// routes change, redirects come after the routes, forwarding is turned on last.
// Where the kernel does not forward yet, that alone holds redirected packets
// back, and all rules come at once.
func (r *Router) Apply(ctx context.Context) (err error) {
	begin := time.Now()
	release, err := lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	network, err := r.Network()
	if err != nil {
		return err
	}
	defer network.Close()

	var done undoList
	defer func() {
		if err != nil {
			err = errors.Join(err, done.undo(r.Log))
		}
	}()
	parentAddresses, err := r.ensureMacvlan(ctx, network, &done)
	if err != nil {
		return err
	}
	// A macvlan does not reach its parent's addresses.
	want := r.Link
	want.Cluster.Destinations = slices.Concat(want.Cluster.Destinations, r.notRedirectedTo(parentAddresses))

	// Nothing else changes before all of this has passed.
	have, err := r.observe(network, want)
	if err != nil {
		return err
	}
	var socket *arp.Socket
	if !have.NoARP {
		if socket, err = r.openSocket(have); err != nil {
			return err
		}
		defer socket.Close()
	}
	var current Rules
	var differs []string
	if r.Plan != nil {
		if err := link.CanForward(have); err != nil {
			return err
		}
		if current, err = r.Rules(ctx); err != nil {
			return err
		}
		differs = current.Differs(*r.Plan)
		r.inspect(current, differs)
	}

	c := change{router: r, network: network, want: want, done: &done}
	if len(differs) > 0 && current.Redirects() {
		if err := done.add(current.Apply(ctx, r.Plan.Guard())); err != nil {
			return err
		}
	}
	// The address is announced as soon as it is there, because closing the
	// socket takes some 10 ms, in which the rest is done.
	if have, err = c.converge(ctx, link.Claim, have); err != nil {
		return err
	}
	if socket != nil {
		if err := socket.Announce(have.MAC, r.Link.Address.Addr()); err != nil {
			return err
		}
		socket.Close()
		r.Log.Debug("announced", "address", r.Link.Address.Addr(), "mac", have.MAC.String())
	}
	if len(differs) > 0 && len(link.Diff(want, have)) > 0 {
		first := *r.Plan
		if have.CanForward() { // else no redirected packet goes anywhere yet
			first = r.Plan.Guard()
		}
		if err := done.add(current.Apply(ctx, first)); err != nil {
			return err
		}
	}
	if have, err = c.converge(ctx, link.Diff, have); err != nil {
		return err
	}
	if len(differs) > 0 {
		if err := done.add(current.Apply(ctx, *r.Plan)); err != nil {
			return err
		}
		r.Log.Info("rules loaded", "backend", current.String(), "because", strings.Join(differs, "; "))
	}
	if r.Plan != nil {
		if err := c.take(ctx, link.Forwarding(have)...); err != nil {
			return err
		}
		if len(differs) > 0 || c.changed {
			r.forget(network, have)
		}
	}
	r.ready(have, current, begin)
	return nil
}

// openSocket opens the socket for the announcement. Whatever of the
// announcement can fail beforehand does so here.
func (r *Router) openSocket(have link.State) (*arp.Socket, error) {
	if _, err := arp.Announcement(arp.Request, have.MAC, r.Link.Address.Addr()); err != nil {
		return nil, err
	}
	return arp.Open(have.Index)
}

// inspect logs what a backend found.
func (r *Router) inspect(current Rules, differs []string) {
	for _, note := range current.Notes() {
		r.Log.Warn(note, "backend", current.String())
	}
	if r.Log.Enabled(context.Background(), slog.LevelDebug) { // the plan may be long
		r.Log.Debug("rules wanted", "backend", current.String(), "plan", r.Plan.String(), "differs", strings.Join(differs, "; "))
	}
}

// forget ends connections that the kernel would go on treating as before.
func (r *Router) forget(network Network, have link.State) {
	// Worked out only where a connection is there to ask for.
	stale := sync.OnceValue(func() func(rules.Connection) bool { return r.Plan.Stale(have.Cluster.Addresses) })
	n, err := network.Forget(func(c link.Connection) bool {
		return stale()(rules.Connection{Protocol: rules.Protocol(c.Protocol), To: c.To, RepliesFrom: c.RepliesFrom, RepliesTo: c.RepliesTo})
	})
	if err != nil {
		r.Log.Warn("connections that were there before keep their old destination, or get no further", "error", err)
	} else if n > 0 {
		r.Log.Info("connections ended that were redirected otherwise", "number", n)
	}
}

// notRedirectedTo returns the addresses that no redirect leads to: one that is
// a destination has to be reached by the egress interface, or not at all.
func (r *Router) notRedirectedTo(addresses []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(addresses, func(a netip.Prefix) bool {
		return r.Plan != nil && slices.ContainsFunc(r.Plan.Destinations(), a.Contains)
	})
}

// observe reads the state that want is about, and sees that the cluster
// interface is there too where it is needed.
func (r *Router) observe(network Network, want link.Want) (link.State, error) {
	have, err := network.Observe(want)
	if _, missing := errors.AsType[*link.MissingError](err); missing {
		return have, &InterfaceError{"EGRESS_INTERFACE", err, fmt.Sprintf(egressHint, want.Interface)}
	}
	if err != nil {
		return have, err
	}
	isGateway := func(p netip.Prefix) bool { return p.Addr() == want.Gateway }
	if slices.ContainsFunc(have.Addresses, isGateway) || slices.Contains(have.Cluster.Addresses, want.Gateway) {
		return have, fmt.Errorf("EGRESS_GATEWAY is %s, which is an address of the pod itself: give it the router of the physical network", want.Gateway)
	}
	return have, r.checkCluster(network)
}

// checkCluster sees that the cluster interface is there where it is needed.
func (r *Router) checkCluster(network Network) error {
	if r.Plan == nil {
		return nil
	}
	err := network.Exists(r.Link.Cluster.Interface)
	if _, missing := errors.AsType[*link.MissingError](err); missing {
		return &InterfaceError{"EGRESS_CLUSTER_INTERFACE", err, clusterHint}
	}
	return err
}

// A change is what one run does to the network.
type change struct {
	router  *Router
	network Network
	want    link.Want
	done    *undoList
	changed bool     // at least one step was taken
	left    []string // optional steps that failed once and are not tried again
}

// converge takes the steps from have to what is wanted, and returns the state
// in which none is left.
func (c *change) converge(ctx context.Context, diff func(link.Want, link.State) []link.Step, have link.State) (link.State, error) {
	var steps []link.Step
	for range rounds {
		steps = slices.DeleteFunc(diff(c.want, have), func(s link.Step) bool { return slices.Contains(c.left, s.String()) })
		if len(steps) == 0 {
			return have, nil
		}
		for _, s := range steps {
			err := c.take(ctx, s)
			if err != nil && s.Optional {
				c.router.Log.Warn("left as it is", "step", s.String(), "error", err)
				c.left = append(c.left, s.String())
			} else if err != nil {
				return have, err
			}
		}
		var err error
		if have, err = c.network.Observe(c.want); err != nil {
			return have, err
		}
	}
	return have, fmt.Errorf("configuring %q: after %d rounds it still needs to %s: something else changes it back", c.want.Interface, rounds, steps[0])
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
		_ = c.done.add(func() error { return c.network.Do(inverse) }, nil)
		c.router.Log.Info("network changed", "step", s.String())
	}
	return nil
}

// ready logs what holds now.
func (r *Router) ready(have link.State, current Rules, begin time.Time) {
	if !have.Carrier {
		r.Log.Warn("the egress interface has no carrier: the NIC it is cut from is down or unplugged", "interface", r.Link.Interface)
	}
	for _, a := range have.Addresses {
		if a != r.Link.Address {
			r.Log.Warn("the egress interface has another address, which is never used as a source", "address", a.String())
		}
	}
	attrs := []any{"interface", r.Link.Interface, "address", r.Link.Address.String(), "gateway", r.Link.Gateway.String()}
	if current != nil {
		attrs = append(attrs, "redirects", r.Plan.Count(rules.DNAT), "backend", current.String())
	}
	r.Log.Info("ready", append(attrs, "took", time.Since(begin).Round(100*time.Microsecond).String())...)
}

// Stay returns when ctx ends. It is the place of what watches over the
// configuration meanwhile.
func (r *Router) Stay(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// An undoList holds the ways back from what was done, in the order done.
type undoList []func() error

// add appends a way back, unless there was an error, which it returns.
func (l *undoList) add(undo func() error, err error) error {
	if err == nil {
		*l = append(*l, undo)
	}
	return err
}

// undo goes all ways back, the last one first, and on after a failure.
func (l *undoList) undo(log *slog.Logger) error {
	if len(*l) == 0 {
		return nil
	}
	var failed []error
	for _, step := range slices.Backward(*l) {
		if err := step(); err != nil {
			failed = append(failed, fmt.Errorf("putting back what was there: %w", err))
		}
	}
	*l = nil
	if len(failed) == 0 {
		log.Info("everything is put back as it was")
	}
	return errors.Join(failed...)
}
