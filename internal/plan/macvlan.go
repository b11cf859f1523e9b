package plan

import "fmt"

// A Macvlan describes the egress interface if the router creates it, in place of a
// CNI plugin or a container engine: a macvlan of a NIC in the host's network
// namespace.
type Macvlan struct {
	Interface string // its name in the pod
	Parent    string // NIC of the host; empty: the NIC of its IPv4 default route
	Mode      string // notation of ip-link(8): private, bridge, vepa or passthru
	HostNetns string // file of the host's network namespace
}

// String returns the creation of m as a sentence in the imperative, without a full
// stop.
func (m Macvlan) String() string {
	nic := "the NIC of the host's IPv4 default route"
	if m.Parent != "" {
		nic = "the host's " + m.Parent
	}
	return fmt.Sprintf("create %s, a macvlan of %s in mode %s, with its MTU", m.Interface, nic, m.Mode)
}
