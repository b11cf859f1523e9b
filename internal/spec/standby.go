package spec

import (
	"net/netip"
	"time"
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
}

// A Fence is what a router does on a kernel that cannot hold back all packets of one that
// has lost the addresses.
type Fence string

// The fences.
const (
	FenceAuto    Fence = "auto"    // do without, and say so
	FenceRequire Fence = "require" // refuse to stand by
)
