package router

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// Neighbours watch the hosts of the physical network that claim the reserved
// addresses of one family, and its gateway; implemented by *arp.Watch.
type Neighbours interface {
	Run(context.Context) error
	ProbeGateway() error
	SetCarrier(bool)
	State() arp.State
	Close()
}

// Surroundings are the state of the physical network for one family of addresses.
type Surroundings struct {
	arp.State
	Unwatched      string    // error of the watch; empty: none
	UnwatchedSince time.Time // time of the first such error
}

// surroundings is the watch of the current interface for one family, with the counts of
// earlier watches.
type surroundings struct {
	options arp.Options // options of the current watch

	mu           sync.Mutex
	now          Neighbours // nil: no watch
	before       arp.State
	startError   string    // error of the last start, logged once
	startErrorAt time.Time // time of the first one
	running      sync.WaitGroup
}

// family returns the index of an address's family.
func family(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

// follow starts the watch of each family, again if the interface has changed.
func (k *Keeper) follow(ctx context.Context, want plan.Network, have plan.State) {
	if k.Neighbours == nil || have.NoARP {
		return
	}
	for _, first := range want.Sources.Families() {
		if ipv6 := first.Prefix.Addr().Is6(); want.Usable(have, ipv6) {
			k.watch(ctx, first, want.Sources.Of(ipv6).Addresses(), have)
		}
	}
}

// watch starts the watch of a family, whose first source has its gateway.
func (k *Keeper) watch(ctx context.Context, first spec.Source, addresses []netip.Addr, have plan.State) {
	s := &k.surroundings[family(first.Gateway)]
	misses := 0
	if slices.Contains(k.Router.start.missed, first.Gateway) {
		misses = 1
	}
	o := arp.Options{
		Index: have.Index, MAC: have.MAC, Addresses: addresses, Gateway: first.Gateway,
		Conflict:       k.conflict,
		GatewayChanged: func(reachable bool, mac net.HardwareAddr) { k.gatewayChanged(first, reachable, mac) },
		Misses:         misses,
		Holds:          k.Holds,
		Peer:           k.Peer,
		Log:            k.Router.Log,
	}
	protocol := ProtocolOf(first.Gateway)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now != nil && o.Index == s.options.Index && slices.Equal(o.MAC, s.options.MAC) {
		return
	}
	s.stop()
	watch, err := k.Neighbours(o)
	if err != nil {
		if s.startError != err.Error() {
			k.Router.Log.Warn(notWatched[protocol], "error", err)
		}
		if s.startError == "" {
			s.startErrorAt = time.Now()
		}
		s.startError = err.Error()
		return
	}
	s.now, s.options, s.startError = watch, o, ""
	k.Router.start.missed = slices.DeleteFunc(k.Router.start.missed, func(g netip.Addr) bool { return g == first.Gateway })
	s.running.Go(func() {
		err := watch.Run(ctx)
		if err != nil && !errors.Is(err, arp.ErrGone) {
			k.Router.Log.Warn(protocol+" watch ended", "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.now == watch { // the next comparison starts another one
			s.stop()
		}
	})
	_ = watch.ProbeGateway() // an error is a miss
}

// setCarrier passes the state of the carrier to the current watches.
func (k *Keeper) setCarrier(carrier bool) {
	for i := range k.surroundings {
		s := &k.surroundings[i]
		s.mu.Lock()
		if s.now != nil {
			s.now.SetCarrier(carrier)
		}
		s.mu.Unlock()
	}
}

// stop closes the current watch. The caller holds the lock.
func (s *surroundings) stop() {
	if s.now == nil {
		return
	}
	s.now.Close()
	s.before = s.sum()
	s.before.Gateway = arp.GatewayState{}
	s.now = nil
}

// sum returns the state of the current watch plus the counts of earlier ones. The
// caller holds the lock.
func (s *surroundings) sum() arp.State {
	total := s.before
	if s.now == nil {
		return total
	}
	now := s.now.State()
	total.Conflicts += now.Conflicts
	total.Defences += now.Defences
	total.Gateway = now.Gateway
	if now.ConflictMAC != nil {
		total.ConflictMAC, total.Conflicting, total.ConflictAt = now.ConflictMAC, now.Conflicting, now.ConflictAt
	}
	return total
}

// state returns the state of the watch, and the error if it does not run.
func (s *surroundings) state() Surroundings {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Surroundings{s.sum(), s.startError, s.startErrorAt}
}

// note adds a holder of an address that a probe found.
func (k *Keeper) note(h holder) {
	s := &k.surroundings[family(h.address)]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before.Conflicts++
	s.before.ConflictMAC, s.before.Conflicting, s.before.ConflictAt = h.mac, h.address, h.at
}

func (k *Keeper) conflict(address netip.Addr, mac net.HardwareAddr) {
	k.Router.Log.Error("reserved address conflict", "address", address.String(), "mac", mac.String(), "hint", stopHolder.In(k.Router.Names))
}

func (k *Keeper) gatewayChanged(source spec.Source, reachable bool, mac net.HardwareAddr) {
	protocol := ProtocolOf(source.Gateway)
	if reachable {
		k.Router.Log.Info(gatewayAnswers[protocol], "gateway", source.Gateway.String(), "mac", mac.String())
		return
	}
	k.Router.Log.Error(gatewaySilent[protocol], "gateway", source.Gateway.String(), "hint", k.Router.gatewayHint(source))
}
