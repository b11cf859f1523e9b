package router

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/rules"
)

const (
	// probeTimeout is the time for a server to accept a connection.
	probeTimeout = 5 * time.Second
	// probesAtOnce is the number of concurrent probes.
	probesAtOnce = 16
	// outAfter is the number of failed probes in a row after which new connections no
	// longer get an address of a destination with several, inAfter the number of answered
	// ones after which they get it again. So a server that flaps changes the rules at most
	// twice in five intervals.
	outAfter = 3
	inAfter  = 2
)

// A Probe is the last result for one destination.
type Probe struct {
	To       netip.AddrPort
	Err      string // empty: reachable
	Outcome  diagnose.Outcome
	Failures map[diagnose.Outcome]uint64 // since the destination has been probed; not changed after
	Out      bool                        // new connections to a destination with several addresses do not get it

	silent bool // it failed outAfter times in a row, and has not answered inAfter times since
	streak int  // results in a row that are the opposite
}

// after returns the result of a probe after the previous one.
func (p Probe) after(before Probe) Probe {
	p.silent, p.streak, p.Failures = before.silent, before.streak, before.Failures
	if p.unreachable() {
		p.Failures = make(map[diagnose.Outcome]uint64, len(before.Failures)+1)
		maps.Copy(p.Failures, before.Failures)
		p.Failures[p.Outcome]++
	}
	if p.unreachable() == p.silent {
		p.streak = 0
		return p
	}
	if p.streak++; !p.silent && p.streak == outAfter || p.silent && p.streak == inAfter {
		p.silent, p.streak = !p.silent, 0
	}
	return p
}

// ConnectBounds are the upper bounds of the times in Connects: those of a LAN and of a WAN,
// and those above one second, in which a SYN segment was lost (RFC 6298, section 2.1).
var ConnectBounds = [...]time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, probeTimeout,
}

// Connects is the distribution of the times in which destinations accepted the connections
// of probes, since the start of the process.
type Connects struct {
	Counts [len(ConnectBounds)]uint64 // by the first bound that is not less
	Sum    time.Duration
}

// add counts a connection.
func (c *Connects) add(took time.Duration) {
	took = min(took, probeTimeout) // the deadline may be read late
	i, _ := slices.BinarySearch(ConnectBounds[:], took)
	c.Counts[i]++
	c.Sum += took
}

// probes are the last results of all tcp destinations.
type probes struct {
	mu       sync.Mutex
	last     []Probe
	since    time.Time // time of the last change between all reachable and some not
	connects Connects
}

// probeEvery probes each tcp destination from the reserved address, until ctx
// ends.
func (k *Keeper) probeEvery(ctx context.Context, interval time.Duration) {
	select {
	case <-ctx.Done():
		return
	case <-k.settled:
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for all := true; ; {
		k.probe(ctx, all)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			all = true
		case <-k.probeNow:
			k.mu.Lock()
			all, k.probeAll = k.probeAll, false
			k.mu.Unlock()
		}
	}
}

// probe probes the destinations, all of them or those without a result: name servers must
// not set the interval of the others.
func (k *Keeper) probe(ctx context.Context, every bool) {
	k.mu.Lock()
	inSync, closed, targets := k.status.InSync, k.status.Closed != "", targets(k.wanted)
	var sources [2]netip.Addr // by family
	for _, first := range k.Router.Want.Network.Sources.Families() {
		a := first.Prefix.Addr()
		sources[family(a)] = a
	}
	k.mu.Unlock()
	if !inSync { // there may be no source address
		return
	}
	before := make(map[netip.AddrPort]Probe)
	for _, p := range k.probes.state() {
		before[p.To] = p
	}
	found := make([]Probe, len(targets))
	room := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	for i, to := range targets {
		if last, known := before[to]; known && !every {
			found[i] = last
			continue
		}
		room <- struct{}{}
		all.Go(func() {
			p := Probe{To: to, Err: "IPv6 is closed", Outcome: diagnose.Unsent} // its source address is not usable yet
			if to.Addr().Is4() || !closed {
				p = k.probes.probe(ctx, sources[family(to.Addr())], to)
			}
			found[i] = p.after(before[to])
			<-room
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return
	}
	for _, p := range found {
		last, known := before[p.To]
		switch {
		case p.unreachable() && (!known || !last.unreachable()):
			k.Router.Log.Warn("destination unreachable", "destination", p.To.String(), "outcome", string(p.Outcome), "error", p.Err)
		case !p.unreachable() && last.unreachable():
			k.Router.Log.Info("destination reachable again", "destination", p.To.String())
		}
	}
	k.probes.set(found, time.Now())
	k.leaveOut()
}

// leaveOut makes the rules those for the last probes: an address of a destination with
// several that does not answer gets no new connections.
func (k *Keeper) leaveOut() {
	k.mu.Lock()
	changed := k.narrow()
	k.mu.Unlock()
	if changed {
		k.trigger()
	}
}

// narrow sets the rules of the router to the wanted ones without the addresses that do not
// answer probes. It reports whether they have changed. k.mu is locked.
func (k *Keeper) narrow() bool {
	before := k.Router.Want.Rules
	last, silent, left := k.probes.state(), make(map[netip.AddrPort]bool), make(map[netip.AddrPort]bool)
	for _, p := range last {
		if p.silent {
			silent[p.To] = true
		}
	}
	k.Router.Want.Rules = k.wanted
	if len(silent) > 0 {
		k.Router.Want.Rules = k.wanted.WithoutServers(func(to netip.AddrPort) bool { return silent[to] }, func(to netip.AddrPort) { left[to] = true })
	}
	for _, p := range last {
		switch to := p.To.String(); {
		case left[p.To] && !k.left[p.To]:
			k.Router.Log.Warn("address left out", "destination", to, "probes", outAfter, "error", p.Err)
		case !left[p.To] && k.left[p.To] && p.silent:
			k.Router.Log.Warn("address used again", "destination", to, "because", "no other address answers")
		case !left[p.To] && k.left[p.To]:
			k.Router.Log.Info("address used again", "destination", to, "because", "it answers")
		}
	}
	k.left = left
	if k.Router.Want.Rules.Equal(before) {
		return false
	}
	k.reloading = true
	return true
}

// unreachable reports whether p failed.
func (p Probe) unreachable() bool { return p.Err != "" }

func (p *probes) set(found []Probe, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() || slices.ContainsFunc(found, Probe.unreachable) != slices.ContainsFunc(p.last, Probe.unreachable) {
		p.since = now
	}
	p.last = found
}

func (p *probes) state() []Probe {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// of returns the results of the given servers, the time since which all are reachable, or
// some are not, and the times of the connections.
func (p *probes) of(targets []netip.AddrPort) ([]Probe, time.Time, Connects) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wanted := make(map[netip.AddrPort]bool, len(targets))
	for _, to := range targets {
		wanted[to] = true
	}
	return slices.DeleteFunc(slices.Clone(p.last), func(p Probe) bool { return !wanted[p.To] }), p.since, p.connects
}

// targets returns the servers of the plan's TCP redirects, each once, in its
// order. The ports of a range on a server are not probed: which are open is unknown.
func targets(plan rules.Plan) []netip.AddrPort {
	var all []netip.AddrPort
	seen := make(map[netip.AddrPort]bool)
	for _, r := range plan.Redirects {
		if r.Protocol != rules.TCP || !r.ToOnePort() {
			continue
		}
		for a := range r.All() {
			if to := netip.AddrPortFrom(a, r.Server(r.Port).Port()); !seen[to] {
				seen[to] = true
				all = append(all, to)
			}
		}
	}
	return all
}

// probe connects once.
func (p *probes) probe(ctx context.Context, source netip.Addr, to netip.AddrPort) Probe {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
	begin := time.Now()
	conn, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		outcome := diagnose.OutcomeOf(err)
		if op := (*net.OpError)(nil); errors.As(err, &op) {
			err = op.Err // the addresses are known, and port 0 of the own one is none
		}
		return Probe{To: to, Err: err.Error(), Outcome: outcome}
	}
	took := time.Since(begin)
	_ = conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.connects.add(took)
	return Probe{To: to, Outcome: diagnose.Connected}
}
