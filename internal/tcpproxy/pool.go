package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A Resolver looks up hosts.
type Resolver interface {
	// Lookup returns the addresses of a host and when they expire. The answer for
	// an address is that address. An error with a method NotFound that returns true
	// means that the host has no address; after any other error its addresses are
	// unknown.
	Lookup(ctx context.Context, host string) (addrs []netip.Addr, expires time.Time, err error)
}

// The limits of connecting, as in the original.
const (
	tries          = 3                // tries for each client
	connectTimeout = 10 * time.Second // limit of one attempt, and of waiting for the first look-up of a name
	retryPause     = time.Second      // pause before a second attempt to the same address
)

const (
	// lookupPause is the shortest time between two look-ups of a name. The
	// resolver caches its answers, so a look-up is cheap.
	lookupPause = time.Second
	// The first and the longest interval of probes of an address that is set aside;
	// the interval doubles.
	probeFirst = 2 * time.Second
	probeMost  = 16 * time.Second
)

// A pool holds the addresses of one destination and chooses one for each client.
type pool struct {
	destination Destination
	resolver    Resolver
	probe       func(context.Context, netip.AddrPort) error
	local       func(netip.Addr) bool // reports whether an address is one of this pod
	listens     func(rules.Port) bool // reports whether the proxy listens on a port
	log         *slog.Logger

	ctx  context.Context // context of look-ups and probes
	stop context.CancelFunc

	mu    sync.Mutex
	addrs []netip.Addr            // addresses of the last answer
	err   error                   // error of the last look-up
	known chan struct{}           // closed after the first answer
	aside map[netip.Addr]struct{} // unreachable addresses
	turn  int

	ignored bool // the last answer had local addresses

	condition Condition
	since     time.Time // start of the condition

	count counters
}

// start starts to follow the destination's name.
func (p *pool) start(ctx context.Context) {
	p.ctx, p.stop = context.WithCancel(ctx)
	p.known, p.aside = make(chan struct{}), map[netip.Addr]struct{}{}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.judge()
	if a, ok := rules.ParseIPv4(p.destination.Host); ok {
		p.addrs = []netip.Addr{a}
		close(p.known)
		return
	}
	go p.follow()
}

// follow looks up the name again when its answer has expired, so that no client has to
// wait for a look-up.
func (p *pool) follow() {
	for {
		addrs, expires, err := p.resolver.Lookup(p.ctx, p.destination.Host)
		if p.ctx.Err() != nil {
			return
		}
		p.count.lookups.Add(1)
		if err != nil {
			p.count.lookupFailures.Add(1)
		}
		p.learn(addrs, err)
		pause := lookupPause
		if err == nil {
			pause = max(time.Until(expires), lookupPause)
		}
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// learn applies the result of a look-up. If the look-up fails the addresses stay; a
// name that does not exist has none, and local addresses do not count.
func (p *pool) learn(addrs []netip.Addr, err error) {
	all := addrs
	addrs = slices.DeleteFunc(slices.Clone(addrs), p.local)
	if err == nil && len(addrs) == 0 {
		err = &localError{p.destination.Host, all}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.judge()
	before, failed := p.addrs, p.err
	p.err = err
	switch {
	case err == nil:
		p.addrs = addrs
	case notFound(err):
		p.addrs = nil
	default:
		if failed == nil || notFound(failed) {
			p.log.Warn("lookup failed, keeping addresses", "destination", p.destination.Target(), "addresses", p.addrs, "error", err)
		}
		return
	}
	select {
	case <-p.known:
	default:
		close(p.known)
	}
	for a := range p.aside {
		if !slices.Contains(p.addrs, a) {
			delete(p.aside, a)
		}
	}
	ignored := p.ignored
	if p.ignored = len(addrs) < len(all); p.ignored && !ignored && err == nil {
		p.log.Warn("local addresses ignored", "destination", p.destination.Target(), "addresses", all)
	}
	switch {
	case err != nil && (failed == nil || !notFound(failed)):
		p.log.Warn("destination has no address", "destination", p.destination.Target(), "error", err)
	case err == nil && len(before) == 0:
		p.log.Info("destination resolved", "destination", p.destination.Target(), "addresses", p.addrs)
	case err == nil && !sameSet(before, addrs):
		// Some names have other addresses in every answer.
		p.log.Debug("addresses changed", "destination", p.destination.Target(), "addresses", p.addrs)
	}
}

func notFound(err error) bool {
	e, ok := errors.AsType[interface {
		error
		NotFound() bool
	}](err)
	return ok && e.NotFound()
}

// sameSet compares addresses without their order, which name servers rotate.
func sameSet(a, b []netip.Addr) bool {
	sorted := func(s []netip.Addr) []netip.Addr { return slices.SortedFunc(slices.Values(s), netip.Addr.Compare) }
	return slices.Equal(sorted(a), sorted(b))
}

// An attempt is the search for a server of one client, of up to three tries.
type attempt struct {
	pool   *pool
	to     netip.AddrPort // server of the last try
	tried  []netip.Addr
	failed error // error of the last try
}

// waits reports whether next may block.
func (a *attempt) waits() bool {
	select {
	case <-a.pool.known:
		return len(a.tried) > 0
	default:
		return true
	}
}

// next sets the address of the next try, or returns why there is none.
func (a *attempt) next(ctx context.Context) error {
	if len(a.tried) == tries || len(a.tried) > 0 && ctx.Err() != nil {
		return a.failed
	}
	addr, err := a.pool.next(ctx, a.tried)
	if err != nil {
		return errors.Join(a.failed, err)
	}
	if slices.Contains(a.tried, addr) && !pause(ctx, retryPause) {
		return a.failed
	}
	a.to = netip.AddrPortFrom(addr, uint16(a.pool.destination.ToPort))
	return nil
}

// succeeds records a connection.
func (a *attempt) succeeds() { a.pool.answers(a.to.Addr()) }

// fails records a failed try.
func (a *attempt) fails(ctx context.Context, err error) {
	a.failed = err
	a.tried = append(a.tried, a.to.Addr())
	if ctx.Err() == nil && !ours(err) {
		a.pool.putAside(a.to.Addr(), err)
	}
}

// ours reports whether a connection failed since this process lacks resources, which
// is no fault of the address: descriptors, memory, local ports, watches
// (fs.epoll.max_user_watches).
func ours(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.EAGAIN, syscall.ENOSPC} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// next returns the address of the next try: untried addresses before tried ones,
// reachable before unreachable ones, IPv4 before IPv6; equal ones take turns. It waits
// for the first answer of the name servers.
func (p *pool) next(ctx context.Context, tried []netip.Addr) (netip.Addr, error) {
	select {
	case <-p.known:
	default:
		p.awaitKnown(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.addrs) == 0 {
		if p.err == nil {
			return netip.Addr{}, fmt.Errorf("looking up %q: no answer in time", p.destination.Host)
		}
		return netip.Addr{}, p.err
	}
	var best []netip.Addr
	least := -1
	for _, a := range p.addrs {
		rank := 0
		for _, t := range tried {
			if t == a {
				rank += 4
			}
		}
		if _, aside := p.aside[a]; aside {
			rank += 2
		}
		if !a.Is4() {
			rank++
		}
		if least < 0 || rank < least {
			best, least = nil, rank
		}
		if rank == least {
			best = append(best, a)
		}
	}
	a := best[p.turn%len(best)]
	p.turn++
	if p.listens(p.destination.ToPort) && p.local(a) {
		return netip.Addr{}, fmt.Errorf("connecting to %s: this proxy listens on it", p.destination.Target())
	}
	return a, nil
}

// awaitKnown waits for the first answer of the name servers, for connectTimeout at
// most.
func (p *pool) awaitKnown(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	select {
	case <-p.known:
	case <-ctx.Done():
	}
}

// answers ends the setting aside of an address.
func (p *pool) answers(a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, aside := p.aside[a]; aside {
		delete(p.aside, a)
		p.judge()
		p.log.Info("address reachable again", "destination", p.destination.Target(), "address", a)
	}
}

// putAside sets an unreachable address aside: it is used only if all are unreachable,
// until a probe or a client connects to it.
func (p *pool) putAside(a netip.Addr, why error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, aside := p.aside[a]; aside || p.ctx.Err() != nil || !slices.Contains(p.addrs, a) {
		return
	}
	p.aside[a] = struct{}{}
	p.judge()
	p.log.Warn("address unreachable", "destination", p.destination.Target(), "address", a, "error", why)
	go p.probeUntilBack(a)
}

// probeUntilBack probes an address until it is no longer set aside.
func (p *pool) probeUntilBack(a netip.Addr) {
	for wait := probeFirst; pause(p.ctx, wait); wait = min(2*wait, probeMost) {
		p.mu.Lock()
		_, aside := p.aside[a]
		p.mu.Unlock()
		if !aside {
			return
		}
		attempt, cancel := context.WithTimeout(p.ctx, connectTimeout)
		err := p.probe(attempt, netip.AddrPortFrom(a, uint16(p.destination.ToPort)))
		cancel()
		if err == nil {
			p.answers(a)
			return
		}
	}
}

// pause waits, and reports whether ctx has not ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
