package router

import (
	"context"
	"errors"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/rules"
)

// Remove takes everything of the router out of the namespace, which is then as before. It
// needs no interface, no destinations and no earlier run, and changes nothing the second
// time. before is the state from before the router; nil: see [plan.Network.Before].
//
// An error ends no removal: the other steps are taken, and the errors are joined.
func (r *Router) Remove(ctx context.Context, before *plan.State) error {
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

	c := &change{router: r, network: network, want: r.Want}
	c.want.Rules = rules.Plan{}
	c.have.State, err = network.Observe(r.Want.Network)
	if _, missing := errors.AsType[*link.MissingError](err); err != nil && !missing {
		return err
	}
	if before == nil {
		initial, err := network.Initial(r.Want.Network)
		if err != nil {
			return err
		}
		state := r.Want.Network.Before(c.have.State, initial)
		before = &state
	}
	var failed []error
	if c.strays, err = r.Strays(ctx, nil); err != nil {
		failed = append(failed, err)
	}
	for _, s := range c.strays {
		c.have.Strays = append(c.have.Strays, s.String())
	}
	steps := plan.Remove(c.want, c.have, *before)
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

// optional reports whether a failure of a step is no error.
func optional(s plan.Step) bool {
	c, is := s.(plan.Change)
	return is && c.Optional
}
