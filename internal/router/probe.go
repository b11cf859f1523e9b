package router

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egress-router/egress-router/rules"
)

const (
	// probeTimeout is the time for a server to accept a connection.
	probeTimeout = 5 * time.Second
	// probesAtOnce is the number of concurrent probes.
	probesAtOnce = 16
)

// A Probe is the last result for one destination.
type Probe struct {
	To  netip.AddrPort
	Err string // empty: reachable
}

// probes are the last results of all tcp destinations.
type probes struct {
	mu    sync.Mutex
	last  []Probe
	since time.Time // time of the last change between all reachable and some not
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
	for {
		k.probeAll(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-k.probeNow:
		}
	}
}

func (k *Keeper) probeAll(ctx context.Context) {
	k.mu.Lock()
	inSync, source, targets := k.status.InSync, k.Router.Want.Network.Address.Addr(), targets(k.Router.Want.Rules)
	k.mu.Unlock()
	if !inSync { // there may be no source address
		return
	}
	before := make(map[netip.AddrPort]string)
	for _, p := range k.probes.state() {
		before[p.To] = p.Err
	}
	found := make([]Probe, len(targets))
	room := make(chan struct{}, probesAtOnce)
	var all sync.WaitGroup
	for i, to := range targets {
		room <- struct{}{}
		all.Go(func() {
			found[i] = Probe{To: to, Err: probe(ctx, source, to)}
			<-room
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return
	}
	for _, p := range found {
		why, known := before[p.To]
		switch {
		case p.Err != "" && (!known || why == ""):
			k.Router.Log.Warn("destination unreachable", "destination", p.To.String(), "error", p.Err)
		case p.Err == "" && why != "":
			k.Router.Log.Info("destination reachable again", "destination", p.To.String())
		}
	}
	k.probes.set(found, time.Now())
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

// of returns the results of the given servers, and the time since which all are
// reachable, or some are not.
func (p *probes) of(targets []netip.AddrPort) ([]Probe, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.last), func(p Probe) bool { return !slices.Contains(targets, p.To) }), p.since
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

// probe connects once and returns the error; empty: none.
func probe(ctx context.Context, source netip.Addr, to netip.AddrPort) string {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
	conn, err := d.DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return err.Error()
	}
	_ = conn.Close()
	return ""
}
