package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// A Carry is the tunnel between the routers of one address, a VXLAN (RFC 7348) over the
// cluster side without multicast and without learning. A router that does not hold the address
// sends by it what its clients send, with the address as the source, to the holder, which sends
// it to the physical network. The holder sends back what arrives for a port of another
// router's range.
type Carry struct {
	Interface   string // name of the tunnel
	Cluster     string // interface by which clients connect, and the tunnel's packets leave
	Egress      string
	Sources     []netip.Addr // of IPv4
	Own         netip.Addr   // IPv4 address of Cluster that the other routers know
	UDP         uint16       // port of the tunnel's packets
	First, Last uint16       // range of the own source ports
	// Known: the peers are. At the start they are not yet, and those of an earlier run stay.
	Known bool
	Table int         // routing table of what is sent to the holder; those behind it, one for each peer
	Peers []CarryPeer // in the order of their addresses, at most spec.MostCarryPeers
	// Toward is the one of Peers that holds the address, or may hold it next; the zero Addr:
	// there is none.
	Toward netip.Addr
}

// A CarryPeer is another router.
type CarryPeer struct {
	Address     netip.Addr // IPv4, on the cluster side
	First, Last uint16     // range of its source ports
}

// The marks of packets for the tunnel. SteerMark is that of packets to the holder; those to
// peers are the other values.
const (
	CarryMask  = spec.CarryMarks
	SteerMark  = CarryMask
	carryShift = 24
)

// VNI is the network identifier of the tunnel (RFC 7348, section 5): any, the same on all
// routers.
const VNI = int(spec.CarryPort)

// Mark returns the mark of packets that are sent back to a peer, by its index.
func (c Carry) Mark(peer int) uint32 { return uint32(peer+1) << carryShift } //nolint:gosec // at most spec.MostCarryPeers

// HardwareAddress returns the hardware address of the tunnel of a router with an address on
// the cluster side: a locally administered one (IEEE 802, section 8.4).
func HardwareAddress(a netip.Addr) [6]byte {
	b := a.As4()
	return [6]byte{0x02, 'e', b[0], b[1], b[2], b[3]}
}

// Equal reports whether both are the same.
func (c Carry) Equal(other Carry) bool {
	same := slices.Equal(c.Sources, other.Sources) && slices.Equal(c.Peers, other.Peers)
	return same && c.Interface == other.Interface && c.Cluster == other.Cluster && c.Egress == other.Egress && c.Own == other.Own &&
		c.UDP == other.UDP && c.First == other.First && c.Last == other.Last && c.Table == other.Table && c.Known == other.Known && c.Toward == other.Toward
}

// carryOf returns the tunnel of a router, without peers; nil: it has none.
func carryOf(r spec.Router) *Carry {
	if r.Standby == nil || r.Standby.Carry == nil {
		return nil
	}
	return &Carry{
		Interface: spec.CarryInterface, Cluster: r.Cluster, Egress: r.Egress, Sources: r.Sources.Of(false).Addresses(), UDP: uint16(spec.CarryPort),
		First: uint16(r.Standby.Carry.First), Last: uint16(r.Standby.Carry.Last), Table: r.ReplyTable + 1,
	}
}

// steer has the gate mark the packets for the holder.
func (g *Gate) steer(c *Carry) {
	if c != nil {
		g.Steers, g.SteerMark, g.SteerMask = c.Cluster, SteerMark, CarryMask
	}
}

type (
	// Connect sets the tunnel up.
	Connect struct {
		Carry
		Why string // what differs in the kernel
	}
	// RemoveCarry removes it.
	RemoveCarry struct{}
)

func (s Connect) String() string {
	var peers []string
	for _, p := range s.Peers {
		peers = append(peers, fmt.Sprintf("%s (ports %d-%d)", p.Address, p.First, p.Last))
	}
	if len(peers) == 0 {
		peers = []string{"no router yet"}
	}
	return fmt.Sprintf("set up the tunnel %s with own ports %d-%d to %s", s.Interface, s.First, s.Last, strings.Join(peers, ", "))
}

func (s RemoveCarry) String() string { return "remove the tunnel " + spec.CarryInterface }

// connect returns the step for the tunnel, which comes after the rules for its packets.
func connect(want Want, have Have) []Step {
	switch {
	case len(have.Carry) == 0 || have.Connected:
		return nil
	case want.Carry == nil:
		return []Step{RemoveCarry{}}
	}
	return []Step{Connect{*want.Carry, strings.Join(have.Carry, "; ")}}
}
