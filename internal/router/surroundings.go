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
	"github.com/egress-router/egress-router/internal/link"
)

// Neighbours are the hosts of the physical network, as far as they claim the
// reserved address or are the gateway; they are an *arp.Watch.
type Neighbours interface {
	Run(context.Context) error
	ProbeGateway() error
	State() arp.State
	Close()
}

// surroundings is what a router knows of the physical network: the neighbours on
// its interface as it is now, and what earlier ones have counted.
type surroundings struct {
	watch   func(arp.Options) (Neighbours, error)
	options arp.Options // of now

	mu      sync.Mutex
	now     Neighbours // nil: there is none
	before  arp.State
	trouble string // why there is none, said once
	running sync.WaitGroup
}

// follow sees that the neighbours are those of the interface as it is.
func (k *Keeper) follow(ctx context.Context, want link.Want, have link.State) {
	s := &k.surroundings
	if s.watch == nil || have.NoARP || !want.HasAddress(have) {
		return
	}
	o := arp.Options{
		Index: have.Index, MAC: have.MAC, Address: want.Address.Addr(), Gateway: want.Gateway,
		Conflict:       func(mac net.HardwareAddr) { k.conflict(want.Address.Addr(), mac) },
		GatewayChanged: func(reachable bool, mac net.HardwareAddr) { k.gatewayChanged(want.Gateway, reachable, mac) },
		Log:            k.Router.Log,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now != nil && o.Index == s.options.Index && slices.Equal(o.MAC, s.options.MAC) {
		return
	}
	s.leave()
	watch, err := s.watch(o)
	if err != nil {
		if s.trouble != err.Error() {
			k.Router.Log.Warn("ARP watch not started", "error", err)
		}
		s.trouble = err.Error()
		return
	}
	s.now, s.options, s.trouble = watch, o, ""
	s.running.Go(func() {
		err := watch.Run(ctx)
		if err != nil && !errors.Is(err, arp.ErrGone) {
			k.Router.Log.Warn("ARP watch ended", "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.now == watch { // the next comparison begins anew
			s.leave()
		}
	})
	_ = watch.ProbeGateway() // what it fails for, it will be asked again for
}

// leave gives up the neighbours of now. The caller has the lock.
func (s *surroundings) leave() {
	if s.now == nil {
		return
	}
	s.now.Close()
	s.before = s.sum()
	s.before.Gateway = arp.GatewayState{}
	s.now = nil
}

// sum returns what is known, with what was counted before. The caller has the
// lock.
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

// state returns what is known of the physical network, and why that is nothing.
func (s *surroundings) state() (state arp.State, unwatched string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sum(), s.trouble
}

// note adds another holder of the address, who was found by asking.
func (s *surroundings) note(holder net.HardwareAddr, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before.Conflicts++
	s.before.ConflictMAC, s.before.ConflictAt = holder, at
}

// probe asks for the gateway, if the interface has the address to ask from.
func (s *surroundings) probe() {
	s.mu.Lock()
	now := s.now
	s.mu.Unlock()
	if now != nil {
		_ = now.ProbeGateway() // on an interface that is down or gone, which is found otherwise
	}
}

func (k *Keeper) conflict(address netip.Addr, mac net.HardwareAddr) {
	e := ConflictError{address, mac}
	k.Router.Log.Error("reserved address conflict", "address", address.String(), "mac", mac.String(), "hint", e.Hint())
}

func (k *Keeper) gatewayChanged(gateway netip.Addr, reachable bool, mac net.HardwareAddr) {
	if reachable {
		k.Router.Log.Info("gateway answers ARP", "gateway", gateway.String(), "mac", mac.String())
		return
	}
	k.Router.Log.Error("gateway does not answer ARP", "gateway", gateway.String(),
		"hint", "check that EGRESS_GATEWAY is right, that the node's NIC is in that network, and that the switch or hypervisor accepts the hardware address of the egress interface")
}
