// Package link brings the egress interface into the state that the router
// needs: address, link state, routes and the sysctls that go with them.
//
// It observes the kernel (Kernel.Observe), compares what it finds with what is
// wanted (Diff, which is pure), and carries out the steps between the two
// (Kernel.Do). Each Step knows its inverse, so that whoever applies steps can
// take them back.
package link

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// A Want is the state that the router needs.
type Want struct {
	Interface string       // of the egress side
	Address   netip.Prefix // reserved address with its length, IPv4
	Gateway   netip.Addr   // on the physical network, IPv4
	Cluster   ClusterSide
}

// Scope is how far a route's destination is (rtnetlink(7), rtm_scope).
type Scope uint8

// The scopes that wanted routes have.
const (
	ScopeUniverse Scope = 0   // behind a gateway
	ScopeLink     Scope = 253 // on the link itself
)

// A Route is an IPv4 route.
type Route struct {
	Table       int          // zero: the main table
	Destination netip.Prefix // 0.0.0.0/0 for a default route
	Gateway     netip.Addr   // the zero Addr: on the link
	Index       int          // of the interface; zero: none, or several
	Interface   string       // its name, for a person
	Source      netip.Addr   // that local sockets get; the zero Addr: the kernel chooses
	Metric      int          // lower is preferred
	Scope       Scope
	TOS         int
	Type        int  // of the kernel (rtnetlink(7), rtm_type); zero: unicast
	Kept        bool // added by a router, to keep a destination on the cluster side

	kernel any // the adapter's own form, with all it has to put back
}

// same reports whether both routes do the same. Their protocol (who made them)
// does not matter.
func (r Route) same(other Route) bool {
	r.Interface, other.Interface = "", ""
	r.kernel, other.kernel = nil, nil
	return r == other
}

// IsDefault reports whether the route is for every destination.
func (r Route) IsDefault() bool { return r.Destination.Bits() == 0 }

// String returns the route as ip-route(8) shows it.
func (r Route) String() string {
	var b strings.Builder
	if r.Type != 0 {
		fmt.Fprintf(&b, "%s ", typeNames[r.Type])
	}
	switch {
	case r.IsDefault():
		b.WriteString("default")
	case r.Destination.IsSingleIP():
		b.WriteString(r.Destination.Addr().String())
	default:
		b.WriteString(r.Destination.String())
	}
	if r.Gateway.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Gateway)
	}
	if r.Interface != "" {
		fmt.Fprintf(&b, " dev %s", r.Interface)
	}
	if r.Scope == ScopeLink {
		b.WriteString(" scope link")
	}
	if r.Source.IsValid() {
		fmt.Fprintf(&b, " src %s", r.Source)
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	return b.String()
}

// An InterfaceForwarding tells whether one interface forwards.
type InterfaceForwarding struct {
	Interface string
	On        bool
}

// A State is what the kernel holds, as far as a Want concerns it.
type State struct {
	Index     int // of the egress interface
	Up        bool
	Carrier   bool // false where the NIC below has no link
	NoARP     bool // the interface resolves no addresses (IFF_NOARP)
	MAC       net.HardwareAddr
	Addresses []netip.Prefix // IPv4, of the egress interface
	Routes    []Route        // IPv4, of the main table
	Promotes  bool           // promote_secondaries holds on the egress interface
	Forwards  bool           // net.ipv4.ip_forward
	// Whether the two interfaces forward what they receive
	// (net.ipv4.conf.NAME.forwarding): those that are there.
	Forwarding []InterfaceForwarding
	Cluster    ClusterState
}

// ForwardsAny reports whether any packet that comes in could be forwarded.
func (s State) ForwardsAny() bool {
	return s.Forwards || slices.ContainsFunc(s.Forwarding, func(i InterfaceForwarding) bool { return i.On })
}

// EgressHas reports whether a route to a, by the egress interface, is more
// specific than one of the given length.
func (s State) EgressHas(a netip.Addr, bits int) bool {
	return slices.ContainsFunc(s.Routes, func(r Route) bool {
		return r.Index == s.Index && r.Type == 0 && r.Destination.Bits() > bits && r.Destination.Contains(a)
	})
}

// Routes returns the routes that w needs, with index as the interface's.
//
// The gateway has a route of its own because it need not be in the address's
// subnet: with a /32 address nothing else is. Both routes name the reserved
// address as the source, so that sockets of the pod itself use it whatever
// other addresses the interface has.
func (w Want) Routes(index int) []Route {
	gateway := Route{
		Destination: netip.PrefixFrom(w.Gateway, w.Gateway.BitLen()),
		Index:       index, Interface: w.Interface, Source: w.Address.Addr(), Scope: ScopeLink,
	}
	standard := Route{
		Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0),
		Gateway:     w.Gateway,
		Index:       index, Interface: w.Interface, Source: w.Address.Addr(), Scope: ScopeUniverse,
	}
	return []Route{gateway, standard}
}
