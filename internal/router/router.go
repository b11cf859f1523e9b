// Package router puts the parts together: in which order link, rules and
// announcements change, what is taken back when one of them fails, and what
// happens afterwards.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
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
	Close()
}

// Rules are those of one network namespace, as a backend found them.
type Rules interface {
	fmt.Stringer                      // names the backend
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
// the reserved address or another way out than the egress interface: the rules
// that set the source stand before routes change, redirects come after the
// routes, forwarding is turned on last.
func (r *Router) Apply(ctx context.Context) (err error) {
	begin := time.Now()
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
	// To be reached by the cluster side instead: link.ClusterSide.Destinations.
	r.Log.Debug("addresses of the host that the egress interface cannot reach", "addresses", parentAddresses)

	// Nothing else changes before all of this has passed.
	have, err := r.observe(network)
	if err != nil {
		return err
	}
	var socket *arp.Socket
	if !have.NoARP {
		if socket, err = arp.Open(have.Index); err != nil {
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
		r.Log.Debug("rules wanted", "backend", current.String(), "plan", r.Plan.String(), "differs", strings.Join(differs, "; "))
	}

	if len(differs) > 0 && len(link.Diff(r.Link, have)) > 0 {
		if err := done.add(current.Apply(ctx, r.Plan.Guard())); err != nil {
			return err
		}
	}
	if have, err = r.converge(ctx, network, have, &done); err != nil {
		return err
	}
	if len(differs) > 0 {
		if err := done.add(current.Apply(ctx, *r.Plan)); err != nil {
			return err
		}
		r.Log.Info("rules loaded", "backend", current.String(), "because", strings.Join(differs, "; "))
	}
	if r.Plan != nil {
		if err := r.take(ctx, network, link.Forwarding(have), &done); err != nil {
			return err
		}
	}
	if socket != nil {
		if err := socket.Announce(have.MAC, r.Link.Address.Addr()); err != nil {
			return err
		}
		r.Log.Debug("announced", "address", r.Link.Address.Addr(), "mac", have.MAC.String())
	}
	r.ready(have, current, begin)
	return nil
}

// observe reads the state of the egress interface and sees that the cluster
// interface is there too where it is needed.
func (r *Router) observe(network Network) (link.State, error) {
	have, err := network.Observe(r.Link)
	if _, missing := errors.AsType[*link.MissingError](err); missing {
		return have, &InterfaceError{"EGRESS_INTERFACE", err, fmt.Sprintf(egressHint, r.Link.Interface)}
	}
	if err != nil {
		return have, err
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

// converge takes the steps from have to what is wanted, and returns the state
// in which none is left.
func (r *Router) converge(ctx context.Context, network Network, have link.State, done *undoList) (link.State, error) {
	var optional []string // steps that failed once and are not tried again
	for range rounds {
		steps := slices.DeleteFunc(link.Diff(r.Link, have), func(s link.Step) bool { return slices.Contains(optional, s.String()) })
		if len(steps) == 0 {
			return have, nil
		}
		for _, s := range steps {
			err := r.take(ctx, network, []link.Step{s}, done)
			if err != nil && s.Optional {
				r.Log.Warn("left as it is", "step", s.String(), "error", err)
				optional = append(optional, s.String())
			} else if err != nil {
				return have, err
			}
		}
		var err error
		if have, err = network.Observe(r.Link); err != nil {
			return have, err
		}
	}
	return have, fmt.Errorf("configuring %q: after %d rounds it still needs to %s: something else changes it back", r.Link.Interface, rounds, link.Diff(r.Link, have)[0])
}

// take takes steps of the network.
func (r *Router) take(ctx context.Context, network Network, steps []link.Step, done *undoList) error {
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := network.Do(s); err != nil {
			return err
		}
		inverse := s.Inverse()
		_ = done.add(func() error { return network.Do(inverse) }, nil)
		r.Log.Info("network changed", "step", s.String())
	}
	return nil
}

// ready logs what holds now.
func (r *Router) ready(have link.State, current Rules, begin time.Time) {
	if !have.Carrier {
		r.Log.Warn("the egress interface has no carrier: the NIC it is cut from is down or unplugged", "interface", r.Link.Interface)
	}
	attrs := []any{"interface", r.Link.Interface, "address", r.Link.Address.String(), "gateway", r.Link.Gateway.String()}
	if current != nil {
		attrs = append(attrs, "redirects", r.Plan.Count(rules.DNAT), "backend", current.String())
	}
	r.Log.Info("ready", append(attrs, "took", time.Since(begin).Round(100*time.Microsecond).String())...)
}

// Stay watches over the configuration until ctx ends.
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
