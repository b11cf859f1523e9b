package standby

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/spec"
)

// A Ports is a range of source ports. The zero Ports is none.
type Ports struct{ First, Last uint16 }

func (p Ports) String() string { return fmt.Sprintf("%d-%d", p.First, p.Last) }

// Meets reports whether both ranges have a port.
func (p Ports) Meets(other Ports) bool {
	return p.Last != 0 && other.Last != 0 && p.First <= other.Last && other.First <= p.Last
}

// A Carry is with whom a router exchanges the packets of connections.
type Carry struct {
	// Peers are the routers of the look-up whose heartbeats have a range of ports, by
	// their addresses. A router that is not heard any more stays one: it may carry on without its
	// process. So does one that the look-up lacks, while it is heard.
	Peers []CarryPeer
	// Toward is the one of Peers that holds the addresses, or would take them next; the zero
	// Addr: there is none.
	Toward netip.Addr
	// Clash are routers whose ranges have ports of this router or of another one: nothing is
	// exchanged with them.
	Clash []CarryPeer
}

// A CarryPeer is another router.
type CarryPeer struct {
	Address netip.Addr
	Ports   Ports
}

func (c Carry) equal(other Carry) bool {
	return c.Toward == other.Toward && slices.Equal(c.Peers, other.Peers) && slices.Equal(c.Clash, other.Clash)
}

// carry returns with whom a router with ports exchanges packets, while its own gate is open or
// not. before is the last one.
func (p *peers) carry(own Ports, active bool, fresh time.Duration, before Carry) (c Carry) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []CarryPeer
	for _, a := range slices.AppendSeq(slices.Clone(p.known), maps.Keys(p.kept)) {
		if !p.isPeer(a) {
			continue
		}
		if ports := p.ports[a]; ports.Last != 0 && a.Is4() && a != p.own.Addr() {
			all = append(all, CarryPeer{a, ports})
		}
	}
	slices.SortFunc(all, func(a, b CarryPeer) int { return a.Address.Compare(b.Address) })
	all = p.withoutFormer(slices.Compact(all), own)
	for _, peer := range all {
		clashes := own.Meets(peer.Ports) || slices.ContainsFunc(all, func(o CarryPeer) bool { return o.Address != peer.Address && o.Ports.Meets(peer.Ports) })
		switch {
		case clashes:
			c.Clash = append(c.Clash, peer)
		case len(c.Peers) < spec.MostCarryPeers:
			c.Peers = append(c.Peers, peer)
		}
	}
	// Who holds: the active router, otherwise the one that is about to be, otherwise the last
	// one, unless this router has held since. Then the next one is that with the highest priority.
	rank := func(peer CarryPeer) (rank int) {
		rank = -1
		for _, h := range p.heard {
			if h.Address != peer.Address || now.Sub(h.Heard) > fresh {
				continue
			}
			switch {
			case h.State == election.Active:
				rank = max(rank, 2000)
			case h.State != election.Standby:
				rank = max(rank, 1000)
			case h.Healthy:
				rank = max(rank, int(h.Priority))
			}
		}
		if peer.Address == before.Toward && !active {
			rank = max(rank, 500) // not before the heartbeats of another one
		}
		return rank
	}
	if len(c.Peers) > 0 {
		c.Toward = slices.MaxFunc(c.Peers, func(a, b CarryPeer) int { return cmp.Compare(rank(a), rank(b)) }).Address
	}
	return c
}

// formerAfter is the time without heartbeats after which a router gives way to one with its ports: a
// pod that replaces another one has them too, from another address.
const formerAfter = time.Second

// withoutFormer returns the routers without those that are silent and whose ports are those of one that
// was heard later, or of this router. p.mu is locked.
func (p *peers) withoutFormer(all []CarryPeer, own Ports) (left []CarryPeer) {
	last := make(map[netip.Addr]time.Time, len(all))
	for _, h := range p.heard {
		last[h.Address] = h.Heard
	}
	for _, peer := range all {
		replaced := own.Meets(peer.Ports) || slices.ContainsFunc(all, func(o CarryPeer) bool { return o.Ports.Meets(peer.Ports) && last[o.Address].After(last[peer.Address]) })
		if !replaced || time.Since(last[peer.Address]) <= formerAfter {
			left = append(left, peer)
		}
	}
	return left
}

// watchCarry tells Options.Carry of the latest change, in an order of its own: the kernel's
// lock of all interfaces can be held for long.
func (r *Runner) watchCarry(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.carried:
		}
		r.mu.Lock()
		c := r.status.Carry
		r.mu.Unlock()
		r.o.Carry(c)
	}
}

// carry looks whether the packets of connections have another way.
func (r *Runner) carry() {
	if r.o.Carry == nil {
		return
	}
	r.mu.Lock()
	before := r.status.Carry
	r.mu.Unlock()
	c := r.peers.carry(r.o.Ports, r.machine.State() == election.Active && !r.ended, r.o.Settings.Detection(), before)
	// Those of an earlier run stay for as long as a router that is not heard.
	if c.equal(before) && (r.reported || time.Since(r.start) < forgetAfter) {
		return
	}
	r.reported = true
	for _, p := range c.Clash {
		if !slices.Contains(before.Clash, p) {
			r.o.Log.Warn("connections not carried", "peer", p.Address.String(), "ports", p.Ports.String(), "own", r.o.Ports.String(),
				"hint", "give each router another range of source ports")
		}
	}
	r.mu.Lock()
	r.status.Carry = c
	r.mu.Unlock()
	select {
	case r.carried <- struct{}{}:
	default: // the goroutine takes the latest
	}
}

// drainPolls is the number of poll intervals after which a router that carries what is left
// counts it: a count reads the connections of all network namespaces.
const drainPolls = 10

// IdleAfter is the time without a packet after which the log names a connection that drains as idle. Its
// client may have vanished, or be a session that goes on later: the kernel cannot know which, and a
// drain waits for either.
const IdleAfter = 5 * time.Minute

// drain carries until the connections that enter by this router have ended, no other router holds
// the addresses or could take them over any more, as if all of them are drained, or Cut. Its
// heartbeats show that it does not take over; a router that starts meanwhile learns its ports from
// them.
func (r *Runner) drain() {
	r.carry()
	r.mu.Lock()
	toward := r.status.Carry.Toward
	r.mu.Unlock()
	if r.o.Open == nil || !toward.IsValid() {
		return
	}
	beat := time.NewTicker(r.o.Settings.Interval)
	defer beat.Stop()
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	begin := time.Now()
	if r.drained(true, begin) {
		return
	}
	for polls := 0; ; {
		select {
		case <-r.cut:
			r.o.Log.Warn("connections not drained", "reason", "asked to end at once")
			return
		case e := <-r.events:
			if e.Kind == election.Heard {
				r.peers.note(e.Heartbeat, r.o.Settings.Interval)
				r.carry()
			}
		case <-beat.C:
			r.last.Sequence++
			r.last.State, r.last.Healthy, r.last.Resigned, r.last.Ask = election.Standby, false, false, 0
			r.peers.send(r.last)
		case <-poll.C:
			r.carry()
			if polls++; polls%drainPolls == 0 && r.drained(false, begin) {
				return
			}
		}
	}
}

// drained reports whether no connection is left. An error is none: there is no reason to wait
// for what is not known.
func (r *Runner) drained(first bool, begin time.Time) bool {
	n, idle, err := r.o.Open()
	r.mu.Lock()
	r.status.Left = n
	r.mu.Unlock()
	switch {
	case err != nil:
		r.trouble(err)
		return true
	case n == 0:
		if !first {
			r.o.Log.Info("connections drained", "took", time.Since(begin).Round(time.Millisecond).String())
		}
		return true
	case time.Since(r.peers.lastAble()) > forgetAfter:
		r.o.Log.Warn("connections not drained", "connections", n, "reason", fmt.Sprintf("for %s no other router has held the addresses or could take them over", forgetAfter))
		return true
	case first:
		r.mu.Lock()
		r.status.Draining = true
		r.mu.Unlock()
		r.o.Log.Info("draining connections", "connections", n, "idle", idle)
	case idle == n && !r.idle:
		r.o.Log.Warn("draining idle connections", "connections", n, "idle_for", IdleAfter.String(),
			"effect", "their clients may have vanished: the router waits until they end, or the grace period does", "hint", "a second SIGTERM ends the router at once")
	}
	r.idle = idle == n
	return false
}
