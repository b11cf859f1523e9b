package router

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// Remove takes everything of the router out of the namespace, which is then as before. It
// needs no interface, no destinations and no earlier run, and changes nothing the second
// time. before is the state from before the router; nil: see [plan.Network.Before].
//
// An error ends no removal: the other steps are taken, and the errors are joined.
func (r *Router) Remove(ctx context.Context, before *plan.State) error {
	c, end, err := r.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	c.want.Rules = rules.Plan{}
	if want := withIPv6(c.want.Network); link.HasIPv6() {
		if have, _ := c.network.Observe(want); want.Traces(have) { // an error comes again
			c.want.Network = want
		}
	}
	c.have.State, err = c.network.Observe(c.want.Network)
	if _, missing := errors.AsType[*link.MissingError](err); err != nil && !missing {
		return err
	}
	if before == nil {
		initial, err := c.network.Initial(c.want.Network)
		if err != nil {
			return err
		}
		state := c.want.Network.Before(c.have.State, initial)
		state.Addresses = r.Keeps
		before = &state
	}
	var failed []error
	if c.strays, err = r.Strays(ctx, nil); err != nil {
		failed = append(failed, err)
	}
	for _, s := range c.strays {
		c.have.Strays = append(c.have.Strays, s.String())
	}
	c.want.Gate, c.want.Carry, c.want.Flowtable = nil, nil, nil
	if err := c.readGate(); err != nil {
		failed = append(failed, err)
	}
	steps := r.withoutForwarded(plan.Remove(c.want, c.have, *before))
	for rest := steps; len(rest) > 0; {
		n := 1
		for n < len(rest) && optional(rest[n-1]) && optional(rest[n]) { // their log is one line
			n++
		}
		if _, err := c.carryOut(ctx, plan.Group{Stage: plan.Opening, Steps: rest[:n]}); err != nil {
			failed = append(failed, err)
		}
		rest = rest[n:]
	}
	c.warnSkipped()
	if err := errors.Join(failed...); err != nil {
		return err
	}
	if len(steps) == 0 {
		r.Log.Info("nothing to remove")
	} else {
		r.Log.Info("removed", "interface", r.Want.Network.Interface, "address", r.Want.Network.Sources.String())
	}
	return nil
}

// withIPv6 returns the network with an IPv6 source: an address that no host has (RFC 6666),
// if there is no other. An earlier run may have had one.
func withIPv6(n plan.Network) plan.Network {
	if len(n.Sources.Of(true)) == 0 {
		none := netip.MustParseAddr("100::1")
		n.Sources = append(slices.Clone(n.Sources), spec.Source{Prefix: netip.PrefixFrom(none, 128), Gateway: none})
	}
	return n
}

// optional reports whether a failure of a step is no error.
func optional(s plan.Step) bool {
	c, is := s.(plan.Change)
	return is && c.Optional
}

// withoutForwarded removes the steps that change what was on before the router.
func (r *Router) withoutForwarded(steps []plan.Step) []plan.Step {
	stay := slices.Clone(r.Forwarded)
	if slices.Contains(stay, plan.IPForward) { // it then begins with 0 (net/ipv4/devinet.c, inet_forward_change)
		stay = append(stay, "net/ipv4/conf/all/accept_redirects")
	}
	return slices.DeleteFunc(steps, func(s plan.Step) bool {
		change, is := s.(plan.Change)
		return is && change.Op == plan.WriteSysctl && slices.Contains(stay, change.Sysctl)
	})
}
