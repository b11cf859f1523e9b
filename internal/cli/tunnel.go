package cli

import (
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"sync"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/standby"
	"github.com/egress-router/egress-router/rules"
)

// A tunnel is the kernel's tunnel to the other routers of the address.
type tunnel struct {
	mu     sync.Mutex
	failed error      // of the last look or change; nil: the tunnel is there
	toward netip.Addr // the latest one, of steer; the zero Addr: none
	led    bool       // steer has been called
}

// latest returns the tunnel of a reconcile with the latest way to the holder. If the reconcile began
// before the last change of the holder, it would otherwise lead packets back to the former one for as
// long as it runs. All else remains that of the reconcile, whose log names it.
func (t *tunnel) latest(want plan.Carry) plan.Carry {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := slices.ContainsFunc(want.Peers, func(p plan.CarryPeer) bool { return p.Address == t.toward })
	if t.led && (known || !t.toward.IsValid()) {
		want.Toward = t.toward
	}
	return want
}

// segment returns the highest maximum segment size of TCP for packets of a size: without the
// headers of IPv4 and TCP (RFC 9293, section 3.7.1).
func segment(mtu int) uint16 {
	const headers = 20 + 20
	return uint16(min(mtu-headers, math.MaxUint16)) //nolint:gosec // an MTU is at least 68 (RFC 791)
}

// sorter returns the table for a tunnel.
func sorter(want plan.Carry, mtu int) nft.Carry {
	c := nft.Carry{
		Interface: want.Interface, Cluster: want.Cluster, Egress: want.Egress, Sources: want.Sources, UDP: want.UDP,
		First: want.First, Last: want.Last, Mask: plan.CarryMask, MSS: segment(mtu),
	}
	for i, p := range want.Peers {
		c.Peers = append(c.Peers, nft.CarryPeer{Address: p.Address, First: p.First, Last: p.Last, Mark: want.Mark(i)})
	}
	return c
}

// Differs returns the differences of the tunnel in the kernel.
func (t *tunnel) Differs(want *plan.Carry) ([]string, error) {
	found, err := t.differs(want)
	if err != nil || len(found) == 0 { // otherwise Connect follows
		t.mu.Lock()
		t.failed = err
		t.mu.Unlock()
	}
	return found, err
}

func (t *tunnel) differs(want *plan.Carry) ([]string, error) {
	kernel, err := link.Open()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	if want == nil {
		// Another program may have removed the table, and left the rest of a run before.
		left, err := kernel.CarryLeft(spec.CarryInterface)
		if err != nil {
			return nil, err
		}
		loaded, err := nft.CarryLoaded()
		if err != nil || !loaded && !left {
			return nil, err
		}
		return []string{"a tunnel is there"}, nil
	}
	now := t.latest(*want)
	want = &now
	if !want.Known {
		loaded, err := nft.CarryLoaded()
		if err != nil {
			return nil, err
		}
		if there, err := kernel.HasCarry(*want); err != nil || loaded && there {
			return nil, err
		}
	}
	mtu, err := kernel.CarryMTU(*want)
	if err != nil {
		return nil, err
	}
	found, err := sorter(*want, mtu).Differs()
	if err != nil {
		return nil, err
	}
	links, err := kernel.CarryDiffers(*want)
	return slices.Concat(found, links), err
}

// Connect sets the tunnel up. The table that sorts its packets is loaded first.
func (t *tunnel) Connect(want plan.Carry) (err error) {
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.failed = err
	}()
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	want = t.latest(want)
	mtu, err := kernel.CarryMTU(want)
	if err != nil {
		return err
	}
	if err := sorter(want, mtu).Load(); err != nil {
		return err
	}
	if err := kernel.LoadCarry(want); err != nil {
		return err
	}
	for now := t.latest(want); now.Toward != want.Toward; now = t.latest(now) { // changed meanwhile
		if err := kernel.Steer(now); err != nil {
			return err
		}
		want = now
	}
	return nil
}

// firstTable returns the number of the first routing table of a network's tunnel.
func firstTable(n plan.Network) int { return n.Cluster.Table + 1 }

// Remove removes the tunnel of a network.
func (t *tunnel) Remove(n plan.Network) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	if err := kernel.RemoveCarry(spec.CarryInterface, firstTable(n)); err != nil {
		return err
	}
	return nft.RemoveCarry()
}

// err returns the error of the last look or change; nil: the tunnel is there.
func (t *tunnel) err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

// carried returns the counters of the tunnel.
func carried() (link.Carried, error) {
	kernel, err := link.Open()
	if err != nil {
		return link.Carried{}, err
	}
	defer kernel.Close()
	return kernel.Carried(spec.CarryInterface)
}

// steer leads the packets for the holder to another router, before a reconcile does the rest.
func (t *tunnel) steer(want plan.Carry) error {
	t.mu.Lock()
	t.toward, t.led = want.Toward, true
	t.mu.Unlock()
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	return kernel.Steer(want)
}

// placeCarry sets the range of source ports that follows from the router's address.
func placeCarry(c *config.Config) error {
	if c.Standby == nil || c.Standby.Carry == nil {
		return nil
	}
	own, err := clusterAddress(c.Cluster)
	if err != nil {
		return err
	}
	if !own.Is4() {
		return fmt.Errorf("EGRESS_STANDBY_CARRY=vxlan: expected an IPv4 address on %q, found %s", c.Cluster, own)
	}
	if c.PlaceCarry(own); c.Standby.Carry.First == 0 {
		return fmt.Errorf("EGRESS_STANDBY_CARRY=vxlan: expected at most %d routers in EGRESS_STANDBY_PEERS, found more", spec.MostCarryPeers+1)
	}
	return nil
}

// open returns the number of connections of clients, with the given reserved addresses, that have
// not ended, and how many of them have had no packet for standby.IdleAfter. Those without an end, such
// as of UDP, do not count.
func open(sources []netip.Addr) (n, idle int, err error) {
	timeouts, _ := conntrack.ReadTimeouts() // without them none is known to be idle
	err = conntrack.Each(sources, func(c conntrack.Connection) {
		if !c.Redirected || !c.Replied || c.Closed || c.Protocol != rules.TCP && c.Protocol != rules.SCTP {
			return
		}
		n++
		if timeouts.Silence(c) >= standby.IdleAfter {
			idle++
		}
	})
	return n, idle, err
}

// carries returns what makes the tunnel of a router lead to others.
func carries(want plan.Carry, t *tunnel, k *router.Keeper, log *slog.Logger) func(standby.Carry) {
	return func(c standby.Carry) {
		want.Known, want.Peers, want.Toward = true, nil, c.Toward
		for _, p := range c.Peers {
			want.Peers = append(want.Peers, plan.CarryPeer{Address: p.Address, First: p.Ports.First, Last: p.Ports.Last})
		}
		if err := t.steer(want); err != nil {
			log.Warn("tunnel not led to another router", "error", err)
		}
		k.SetCarry(want)
	}
}
