package plan

import (
	"fmt"

	"github.com/egress-router/egress-router/internal/spec"
)

// A Macvlan is the egress interface if the router creates it.
type Macvlan struct {
	Interface string // its name in the pod
	spec.Macvlan
}

// String returns the creation of m as a sentence in the imperative, without a full
// stop.
func (m Macvlan) String() string {
	nic := "the NIC of the host's IPv4 default route"
	if m.Parent != "" {
		nic = "the host's " + m.Parent
	}
	mtu := "its MTU"
	if m.MTU != 0 {
		mtu = fmt.Sprintf("MTU %d", m.MTU)
	}
	return fmt.Sprintf("create %s, a macvlan of %s in mode %s, with %s", m.Interface, nic, m.Mode, mtu)
}
