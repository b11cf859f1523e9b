package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// patience is the time for an answer to a single request. A host on the same
// network answers within 30 ms.
const patience = 50 * time.Millisecond

// A ConflictError reports another host with the reserved address.
type ConflictError struct {
	Address netip.Addr
	MAC     net.HardwareAddr // the other host's
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("take reserved address %s: already in use by %s", e.Address, e.MAC)
}

// Hint returns advice for the user.
func (e *ConflictError) Hint(names spec.Names) string {
	return spec.Textf("%s, or set %s to take the address anyway", stopHolder, spec.Set(spec.Conflict, "warn")).In(names)
}

// stopHolder is the advice for an address that both hosts have.
var stopHolder = spec.Textf("stop the host with that hardware address (an older pod that still runs, or another pod with the same %s)", spec.Source)

// ask sends the probe whose answer is read at the end of the run. A failure to
// send it does not prevent taking the address.
func (c *change) ask() {
	r := c.router
	question, err := arp.Ask(c.have.State.Index, c.have.State.MAC, c.want.Network.Sources[0].Prefix.Addr())
	if err != nil {
		r.Log.Warn("address conflict probe failed", "error", err)
		return
	}
	c.question, c.asked = question, time.Now()
}

// probe looks for another host with the address, as far as the router needs the result
// before it takes the address.
func (c *change) probe(ctx context.Context) error {
	c.have.Probed = true
	switch {
	case c.want.Conflict != plan.ConflictRefuse:
		c.ask()
		return nil
	case c.held:
		// The address was this router's, after a full probe. Traffic stops for the
		// time of another full one.
		c.ask()
		return c.refuse(ctx)
	}
	address := c.want.Network.Sources[0].Prefix.Addr()
	holder, err := arp.Acquire(ctx, c.have.State.Index, c.have.State.MAC, address)
	if err == nil && holder != nil {
		err = &ConflictError{address, holder}
	}
	return err
}

// refuse waits for the answer to the probe, and returns it as an error.
func (c *change) refuse(ctx context.Context) error {
	question := c.question
	c.question = nil
	if question == nil {
		return nil
	}
	holder, err := question.Answer(ctx, c.asked.Add(patience))
	if err == nil && holder != nil {
		err = &ConflictError{c.want.Network.Sources[0].Prefix.Addr(), holder}
	}
	return err
}

// answer waits for the answer to a probe that was sent, and logs it.
func (c *change) answer(ctx context.Context) error {
	if c.question == nil {
		return nil
	}
	r := c.router
	holder, err := c.question.Answer(ctx, c.asked.Add(patience))
	if err != nil && !errors.Is(err, ctx.Err()) {
		r.Log.Warn("address conflict probe failed", "error", err)
	}
	if holder == nil {
		return nil
	}
	r.start.holder, r.start.asked = holder, c.asked
	r.Log.Warn("reserved address already in use", "address", c.want.Network.Sources[0].Prefix.Addr().String(), "mac", holder.String(), "hint", stopHolder.In(r.Names))
	if c.want.Conflict != plan.ConflictDefend {
		return nil
	}
	return c.announce()
}
