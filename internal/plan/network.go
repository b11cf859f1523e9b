package plan

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// A Network is the desired state of a namespace's network.
type Network struct {
	Interface string // name of the egress interface
	Sources   spec.Sources
	Cluster   ClusterSide
	Shared    bool // other routers have the sources, too: nobody looks for duplicates
	Silent    bool // requests for the sources are not answered

	// retry: IPv6 sources that another host had are added again.
	retry bool
}

// Scope is the distance of a route's destination (rtnetlink(7), rtm_scope).
type Scope uint8

// The scopes of desired routes.
const (
	ScopeUniverse Scope = 0   // behind a gateway
	ScopeLink     Scope = 253 // on the link itself
)

// A Route is a route.
type Route struct {
	Table       int          // zero: the main table
	Destination netip.Prefix // 0.0.0.0/0 or ::/0 for a default route
	Gateway     netip.Addr   // the zero Addr: none
	Index       int          // interface index; zero: none, or several: see Route.by
	Interface   string       // its name, for logs
	Source      netip.Addr   // source for local sockets; the zero Addr: the kernel chooses
	Metric      int          // the lowest is preferred
	Scope       Scope        // of IPv4; IPv6 has none
	TOS         int
	Type        int  // rtnetlink(7), rtm_type; zero: unicast
	Kept        bool // added to keep a destination on the cluster side

	// Kernel is the adapter's own form, for a complete restore; a Divided, if the
	// route may have next hops.
	Kernel any
}

// A Divided is a route that may have next hops on several interfaces, as an adapter to the
// kernel has listed it.
type Divided interface {
	// By returns the part of r, which is this route, by the interface with an index,
	// and whether there is one.
	By(r Route, index int) (part Route, ok bool)
}

// by returns the part of a route that leads by one interface: the route itself, or its
// next hops on that interface.
func (r Route) by(index int) (Route, bool) {
	if d, ok := r.Kernel.(Divided); ok && r.Index == 0 && index != 0 {
		return d.By(r, index)
	}
	return r, r.Index == index
}

// same reports whether both routes have the same effect. Their protocol, which
// identifies their creator, does not matter.
func (r Route) same(other Route) bool {
	r.Interface, other.Interface = "", ""
	r.Kernel, other.Kernel = nil, nil
	return r == other
}

// IsDefault reports whether the route matches every destination.
func (r Route) IsDefault() bool { return r.Destination.Bits() == 0 }

// String returns the route in the notation of ip-route(8).
func (r Route) String() string {
	var b strings.Builder
	if r.Type != 0 {
		fmt.Fprintf(&b, "%s ", typeNames[r.Type])
	}
	switch {
	case r.IsDefault() && r.Destination.Addr().Is4():
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

// An InterfaceForwarding is the forwarding sysctl of one interface.
type InterfaceForwarding struct {
	Interface string
	On        bool
}

// A State is the kernel's state of a Network.
type State struct {
	Index     int // index of the egress interface
	Up        bool
	Carrier   bool // false: the NIC below has no link
	NoARP     bool // the interface resolves no addresses (IFF_NOARP)
	MAC       net.HardwareAddr
	Addresses []netip.Prefix // of the egress interface; of IPv6 only if IPv6 is set
	Routes    []Route        // IPv4, of the main table
	Promotes  bool           // promote_secondaries of the egress interface
	Forwards  bool           // net.ipv4.ip_forward
	// The forwarding sysctls of the two interfaces, as far as they exist
	// (net.ipv4.conf.NAME.forwarding).
	Forwarding []InterfaceForwarding
	Sysctls    Sysctls // those of the settings
	// IPv6 addresses and routes of the egress interface that the kernel took from
	// router advertisements.
	Advertised       []Advertised
	AdvertisedRoutes []Route
	Lost             []Rule // missing ones of the kernel's own routing rules
	Cluster          ClusterState
	IPv6             *IPv6State // nil: there is no IPv6 source, nor one of an earlier configuration
}

// An Advertised is an IPv6 address from a router advertisement.
type Advertised struct {
	netip.Prefix
	Kernel any // the adapter's own form, for a complete restore
}

// ForwardsAny reports whether the kernel could forward any packet.
func (s State) ForwardsAny() bool {
	return s.Forwards || s.IPv6 != nil && s.IPv6.Forwards || slices.ContainsFunc(s.Forwarding, func(i InterfaceForwarding) bool { return i.On })
}

// EgressHas reports whether the egress interface has a route to a that is more
// specific than one of the given length.
func (s State) EgressHas(a netip.Addr, bits int) bool {
	return slices.ContainsFunc(s.of(a.Is6()).Routes, func(r Route) bool {
		return r.Index == s.Index && r.Type == 0 && r.Destination.Bits() > bits && r.Destination.Contains(a)
	})
}

// Routes returns the desired IPv4 routes, with index as the interface's.
//
// The gateway has a route of its own because it may be outside of the address's
// subnet, as with a /32 address. Both routes name the first reserved address as the
// source, so that the pod's own sockets use it if the interface has other addresses,
// too.
func (n Network) Routes(index int) []Route {
	var routes []Route
	for _, s := range n.Sources.Of(false).Families() {
		gateway := Route{
			Destination: netip.PrefixFrom(s.Gateway, s.Gateway.BitLen()),
			Index:       index, Interface: n.Interface, Source: s.Prefix.Addr(), Scope: ScopeLink,
		}
		defaultRoute := Route{
			Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0),
			Gateway:     s.Gateway,
			Index:       index, Interface: n.Interface, Source: s.Prefix.Addr(), Scope: ScopeUniverse,
		}
		routes = append(routes, gateway, defaultRoute)
	}
	return routes
}
