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
)

// Neighbours watch the hosts of the physical network that claim the reserved
// address, and the gateway; implemented by *arp.Watch.
type Neighbours interface {
	Run(context.Context) error
	ProbeGateway() error
	SetCarrier(bool)
	State() arp.State
	Close()
}

// surroundings is the ARP watch of the current interface, with the counts of
// earlier watches.
type surroundings struct {
	watch   func(arp.Options) (Neighbours, error)
	options arp.Options // options of the current watch

	mu           sync.Mutex
	now          Neighbours // nil: no watch
	before       arp.State
	startError   string    // error of the last start, logged once
	startErrorAt time.Time // time of the first one
	running      sync.WaitGroup
}

// follow starts the ARP watch, again if the interface has changed.
func (k *Keeper) follow(ctx context.Context, want plan.Network, have plan.State) {
	s := &k.surroundings
	if s.watch == nil || have.NoARP || !want.HasAddresses(have) {
		return
	}
	address := want.Sources[0].Prefix.Addr()
	o := arp.Options{
		Index: have.Index, MAC: have.MAC, Address: address, Gateway: want.Sources[0].Gateway,
		Conflict:       func(mac net.HardwareAddr) { k.conflict(address, mac) },
		GatewayChanged: func(reachable bool, mac net.HardwareAddr) { k.gatewayChanged(want, reachable, mac) },
		Misses:         k.Router.start.misses,
		Log:            k.Router.Log,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now != nil && o.Index == s.options.Index && slices.Equal(o.MAC, s.options.MAC) {
		return
	}
	s.stop()
	watch, err := s.watch(o)
	if err != nil {
		if s.startError != err.Error() {
			k.Router.Log.Warn("ARP watch not started", "error", err)
		}
		if s.startError == "" {
			s.startErrorAt = time.Now()
		}
		s.startError = err.Error()
		return
	}
	s.now, s.options, s.startError = watch, o, ""
	k.Router.start.misses = 0
	s.running.Go(func() {
		err := watch.Run(ctx)
		if err != nil && !errors.Is(err, arp.ErrGone) {
			k.Router.Log.Warn("ARP watch ended", "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.now == watch { // the next comparison starts another one
			s.stop()
		}
	})
	_ = watch.ProbeGateway() // an error is a miss
}

// setCarrier passes the state of the carrier to the current watch.
func (s *surroundings) setCarrier(carrier bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now != nil {
		s.now.SetCarrier(carrier)
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
		total.ConflictMAC, total.ConflictAt = now.ConflictMAC, now.ConflictAt
	}
	return total
}

// state returns the state of the ARP watch, and the error if it does not run, with
// the time of the first one.
func (s *surroundings) state() (state arp.State, unwatched string, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sum(), s.startError, s.startErrorAt
}

// note adds a holder of the address that a probe found.
func (s *surroundings) note(holder net.HardwareAddr, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before.Conflicts++
	s.before.ConflictMAC, s.before.ConflictAt = holder, at
}

func (k *Keeper) conflict(address netip.Addr, mac net.HardwareAddr) {
	k.Router.Log.Error("reserved address conflict", "address", address.String(), "mac", mac.String(), "hint", stopHolder.In(k.Router.Names))
}

func (k *Keeper) gatewayChanged(want plan.Network, reachable bool, mac net.HardwareAddr) {
	if reachable {
		k.Router.Log.Info("gateway answers ARP", "gateway", want.Sources[0].Gateway.String(), "mac", mac.String())
		return
	}
	k.Router.Log.Error(gatewaySilent, "gateway", want.Sources[0].Gateway.String(), "hint", k.Router.gatewayHint(want))
}
