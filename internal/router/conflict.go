package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
)

// patience is the time for an answer to a single request. A host on the same
// network answers within 30 ms.
const patience = 50 * time.Millisecond

// A ConflictError reports another host with the reserved address.
type ConflictError struct {
	Address netip.Addr
	MAC     net.HardwareAddr // the other host's; nil: unknown
}

func (e *ConflictError) Error() string {
	if e.MAC == nil { // it has not answered
		return fmt.Sprintf("take reserved address %s: already in use", e.Address)
	}
	return fmt.Sprintf("take reserved address %s: already in use by %s", e.Address, e.MAC)
}

// Hint returns advice for the user.
func (e *ConflictError) Hint(names wording.Names) string {
	if e.Address.Is6() {
		return wording.Textf("%s, or set %s to begin with IPv4 alone", stopHolder, wording.Set(wording.Conflict, "warn")).In(names)
	}
	return wording.Textf("%s, or set %s to take the address anyway", stopHolder, wording.Set(wording.Conflict, "warn")).In(names)
}

// stopHolder is the advice for an address that both hosts have.
var stopHolder = wording.Textf("stop the host with that hardware address (an older pod that still runs, or another pod with the same %s)", wording.Source)

// A question is a probe for an address whose answer is not read yet.
type question struct {
	*arp.Question
	address netip.Addr
	asked   time.Time
}

// A holder is another host with a reserved address.
type holder struct {
	address netip.Addr
	mac     net.HardwareAddr
	at      time.Time
}

// ask sends a probe whose answer is read at the end of the run. A failure to
// send it does not prevent taking the address.
func (c *change) ask(address netip.Addr) {
	q, err := arp.Ask(c.have.State.Index, c.have.State.MAC, address)
	if err != nil {
		c.router.Log.Warn("address conflict probe failed", "error", err)
		return
	}
	c.questions = append(c.questions, question{q, address, time.Now()})
}

// probe looks for other hosts with addresses, as far as the router needs the result
// before it takes them.
func (c *change) probe(ctx context.Context, addresses []netip.Addr) error {
	c.have.Probed = true
	if c.want.Conflict == spec.ConflictRefuse && !c.held {
		return c.acquire(ctx, addresses)
	}
	for _, a := range addresses {
		c.ask(a)
	}
	if c.want.Conflict != spec.ConflictRefuse {
		return nil
	}
	// The addresses were this router's, after a full probe. Traffic stops for the
	// time of another full one.
	return c.refuse(ctx)
}

// acquire makes the full probe for all addresses at a time.
func (c *change) acquire(ctx context.Context, addresses []netip.Addr) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ns, err := netns.Current() // other goroutines may be in another one
	if err != nil {
		return err
	}
	defer ns.Close()
	var all sync.WaitGroup
	for _, a := range addresses {
		all.Go(func() {
			if err := ns.Do(func() error {
				holder, err := arp.Acquire(ctx, c.have.State.Index, c.have.State.MAC, a)
				if err == nil && holder != nil {
					err = &ConflictError{a, holder}
				}
				return err
			}); err != nil {
				cancel(err) // the first one counts
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// refuse waits for the answers to the probes, and returns one as an error.
func (c *change) refuse(ctx context.Context) (err error) {
	for _, q := range c.questions {
		holder, failed := q.Answer(ctx, q.asked.Add(patience))
		if failed == nil && holder != nil {
			failed = &ConflictError{q.address, holder}
		}
		err = cmp.Or(err, failed)
	}
	c.questions = nil
	return err
}

// answer waits for the answers to the probes that were sent, and logs them.
func (c *change) answer(ctx context.Context) error {
	r := c.router
	var contested []netip.Addr
	for _, q := range c.questions {
		mac, err := q.Answer(ctx, q.asked.Add(patience))
		if err != nil && !errors.Is(err, ctx.Err()) {
			r.Log.Warn("address conflict probe failed", "error", err)
		}
		if mac == nil {
			continue
		}
		r.start.holders = append(r.start.holders, holder{q.address, mac, q.asked})
		r.Log.Warn("reserved address already in use", "address", q.address.String(), "mac", mac.String(), "hint", stopHolder.In(r.Names))
		contested = append(contested, q.address)
	}
	c.questions = nil
	if c.want.Conflict != spec.ConflictDefend || len(contested) == 0 {
		return nil
	}
	return c.announce(contested)
}
