package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
)

// A Conflict is what to do where another host has the reserved address when it
// is to be taken (RFC 5227, section 2.1). The original did not look.
type Conflict uint8

// The ways to deal with a conflict.
const (
	ConflictWarn   Conflict = iota // take the address, and say who has it
	ConflictRefuse                 // ask in full before, and do not take it
	ConflictDefend                 // take it, and announce it once more where another answers
)

// conflictPatience is how long the answer to a single probe is waited for. A
// holder on the same network answers within 30 ms.
const conflictPatience = 50 * time.Millisecond

// A ConflictError says that another host has the reserved address.
type ConflictError struct {
	Address netip.Addr
	MAC     net.HardwareAddr // of the other
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("take reserved address %s: already in use by %s", e.Address, e.MAC)
}

// Hint says what to do.
func (e *ConflictError) Hint() string {
	return "stop the host with that hardware address (an older pod that still runs, or another pod with the same EGRESS_SOURCE), or set EGRESS_CONFLICT=warn to take the address anyway"
}

// inquires reports whether the address is to be asked for before it is taken.
func (c *change) inquires() bool { return !c.have.NoARP && !c.want.HasAddress(c.have) }

// ask sends the probe whose answer is waited for when all else is done. That it
// cannot be sent keeps nobody from taking the address.
func (c *change) ask() {
	r := c.router
	question, err := arp.Ask(c.have.Index, c.have.MAC, r.Link.Address.Addr())
	if err != nil {
		r.Log.Warn("address conflict probe failed", "error", err)
		return
	}
	c.question, c.asked = question, time.Now()
}

// inquire finds out whether another host has the address, as far as that has to
// be known before it is taken.
func (c *change) inquire(ctx context.Context) error {
	r := c.router
	switch {
	case !c.inquires() || c.question != nil:
	case r.Conflict == ConflictRefuse && c.held:
		// It was this router's, which has asked in full before: what that would
		// take, nothing gets out for.
		c.ask()
		return c.refuse(ctx)
	case r.Conflict == ConflictRefuse:
		holder, err := arp.Acquire(ctx, c.have.Index, c.have.MAC, r.Link.Address.Addr())
		if err == nil && holder != nil {
			err = &ConflictError{r.Link.Address.Addr(), holder}
		}
		return err
	case !c.watches: // a router that stays hears the other
		c.ask()
	}
	return nil
}

// refuse waits for the answer to the probe, and makes one an error.
func (c *change) refuse(ctx context.Context) error {
	question := c.question
	c.question = nil
	if question == nil {
		return nil
	}
	holder, err := question.Answer(ctx, c.asked.Add(conflictPatience))
	if err == nil && holder != nil {
		err = &ConflictError{c.router.Link.Address.Addr(), holder}
	}
	return err
}

// answer waits for the answer to the probe, if one was sent, and says what it is.
func (c *change) answer(ctx context.Context) error {
	if c.question == nil {
		return nil
	}
	r := c.router
	holder, err := c.question.Answer(ctx, c.asked.Add(conflictPatience))
	if err != nil && !errors.Is(err, ctx.Err()) {
		r.Log.Warn("address conflict probe failed", "error", err)
	}
	if holder == nil {
		return nil
	}
	r.start.holder, r.start.asked = holder, c.asked
	e := &ConflictError{r.Link.Address.Addr(), holder}
	r.Log.Warn("reserved address already in use", "address", e.Address.String(), "mac", holder.String(), "hint", e.Hint())
	if r.Conflict != ConflictDefend {
		return nil
	}
	if c.socket, err = arp.Open(c.have.Index); err != nil {
		return err
	}
	return c.announce()
}
