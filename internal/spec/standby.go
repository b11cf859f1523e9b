package spec

import (
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A Standby makes a router one of several with the same addresses, of which at most one
// sends.
type Standby struct {
	Interval time.Duration // between heartbeats, and between pings; all other times follow
	Port     uint16        // UDP port of heartbeats on the cluster side
	// Witness is the host whose answers to pings show to whom the physical network sends: the
	// gateway, or a host beyond it; of the family of the first source.
	Witness netip.Addr
	Fence   Fence
	Carry   *Carry // nil: a connection ends if another router than that by which it enters holds the addresses
}

// A Carry is the part of a router in a tunnel between those with its addresses.
type Carry struct {
	// The range of source ports of its connections, which no other router has. Zero: the front
	// end does not know it yet.
	First, Last rules.Port
}

// The tunnel's name, and its UDP port on the cluster side: the one behind that of heartbeats.
const (
	CarryInterface            = "egress-carry"
	CarryPort      rules.Port = 9468
)

// MostCarryPeers is the largest number of other routers in a tunnel: each has a value of
// CarryMarks other than zero, and the packets for the holder have the last one.
const MostCarryPeers = 14

// CarryMarks are the bits of the marks of packets for the tunnel, four that no known program of
// a pod uses; those who use bits of the upper half do in the network namespace of the node.
const CarryMarks = 0x0f000000

// A Fence is what a router does on a kernel that cannot hold back all packets of one that
// has lost the addresses.
type Fence string

// The fences.
const (
	FenceAuto    Fence = "auto"    // do without, and say so
	FenceRequire Fence = "require" // refuse to stand by
)
