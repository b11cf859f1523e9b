package router

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/spec"
)

const (
	// detectionPatience is the time for duplicate address detection: up to a second
	// before the first probe, and one for each probe, of which there is one by default
	// (RFC 4862, section 5.4.2; ip-sysctl.rst, dad_transmits). A loaded host takes longer.
	detectionPatience = 10 * time.Second
	// holderPatience is the time for the holder of an address to answer.
	holderPatience = time.Second
	// detectionPoll is the time between two looks at it.
	detectionPoll = 20 * time.Millisecond
)

// admit waits for the IPv6 addresses, and then lets IPv6 packets cross. IPv4 works before.
func (c *change) admit(ctx context.Context, begin time.Time) error {
	before := c.want.Network.Usable(c.have.State, true)
	c.have.Opened = true
	if before || len(c.want.Network.Sources.Of(true)) == 0 {
		return nil
	}
	ready := c.want.Network.Sources
	if !c.mayRefuse() { // IPv4 is ready
		ready = ready.Of(true)
	}
	if err := c.apply(ctx); err != nil {
		return err
	}
	c.router.logReady(c.have.State, c.rules, begin, ready)
	c.awaitGateways(ctx)
	return nil
}

// await waits until the kernel knows whether another host has an IPv6 address.
func (c *change) await(ctx context.Context) (err error) {
	c.have.Awaited = true
	ticker := time.NewTicker(detectionPoll)
	defer ticker.Stop()
	for end := time.Now().Add(detectionPatience); len(c.want.Network.Unsettled(c.have.State)) > 0 && time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if c.have.State, err = c.network.Observe(c.want.Network); err != nil {
			return err
		}
	}
	network, r := c.want.Network, c.router
	for _, a := range network.Contested(c.have.State).Addresses() {
		h := holder{a, c.holderOf(ctx, a), time.Now()}
		if c.want.Conflict == spec.ConflictRefuse {
			return &ConflictError{a, h.mac}
		}
		r.start.holders = append(r.start.holders, h)
		r.logContested(h)
	}
	if left := network.Unsettled(c.have.State); len(left) > 0 {
		r.Log.Warn("IPv6 addresses still tentative", "addresses", left.String(), "after", detectionPatience.String())
	}
	return nil
}

// holderOf returns the hardware address of the host that has an address; nil: it does not
// answer.
func (c *change) holderOf(ctx context.Context, a netip.Addr) net.HardwareAddr {
	question, err := arp.Ask(c.have.State.Index, c.have.State.MAC, a)
	if err != nil {
		return nil
	}
	mac, _ := question.Answer(ctx, time.Now().Add(holderPatience)) // without an answer it is unknown
	return mac
}

// logContested logs an IPv6 address that another host has. It is never taken then: the
// kernel does not use it.
func (r *Router) logContested(h holder) {
	r.Log.Error("reserved address conflict", "address", h.address.String(), "mac", h.mac.String(), "effect", "IPv6 is closed", "hint", stopHolder.In(r.Names))
}

// recordContested updates the state of IPv6 after a comparison, and logs the addresses that
// other hosts have now.
func (k *Keeper) recordContested(ctx context.Context, c *change) {
	closed, now := c.want.Network.Closed(c.have.State), time.Now()
	k.update(func(s *Status) {
		if s.Closed != closed {
			s.Closed, s.ClosedSince = closed, now
		}
	})
	contested := c.want.Network.Contested(c.have.State).Addresses()
	for _, a := range contested {
		if !slices.Contains(k.contested, a) && !slices.ContainsFunc(k.Router.start.holders, func(h holder) bool { return h.address == a }) {
			h := holder{a, c.holderOf(ctx, a), now}
			k.note(h)
			k.Router.logContested(h)
		}
	}
	switch k.Router.start.holders = nil; {
	case len(contested) == 0:
		k.retry = time.Time{}
	case k.retry.IsZero():
		k.retry = now.Add(rateLimit)
	}
	// While an address is tried again, what is known of it is not forgotten.
	if len(c.want.Network.Unsettled(c.have.State)) == 0 {
		k.contested = contested
	}
}

// admitted logs the end of a start that Apply has left to the Keeper: IPv6 is open.
func (k *Keeper) admitted(c *change) {
	start := &k.Router.start
	if start.waits && c.want.Network.Usable(c.have.State, true) {
		start.waits = false
		c.router.logReady(c.have.State, c.rules, start.begin, c.want.Network.Sources.Of(true))
	}
}
