package plan

import (
	"net/netip"
	"slices"

	"github.com/egress-router/egress-router/internal/spec"
)

// An IPv6State is the kernel's state of IPv6, besides the addresses of the egress
// interface.
type IPv6State struct {
	Routes    []Route      // of the main table
	Tentative []netip.Addr // addresses of the egress interface for which duplicate address detection runs
	Duplicate []netip.Addr // and those that another host has
	Forwards  bool         // net.ipv6.conf.all.forwarding
	Cluster   ClusterState // with the index of State.Cluster, without link-local addresses
}

// The metrics of IPv6 routes in the main table, of which the lowest is preferred. Those
// of the kernel are from 256 (net/ipv6/route.c).
const (
	openMetric   = 1    // of the default route by the gateway
	closedMetric = 2    // of the one that rejects packets while there is no other
	subnetMetric = 256  // of a subnet on the link (linux/ipv6_route.h, IP6_RT_PRIO_ADDRCONF)
	usualMetric  = 1024 // of other routes (linux/ipv6_route.h, IP6_RT_PRIO_USER)
)

// gatePriority is the priority of the routing rule that closes IPv6, before our others.
const gatePriority = rulePriority - 1

// ClusterAddresses returns the pod's addresses on the cluster side.
func (s State) ClusterAddresses() []netip.Addr {
	return slices.Concat(s.Cluster.Addresses, s.of(true).Cluster.Addresses)
}

// AllRoutes returns the routes of the main tables.
func (s State) AllRoutes() []Route { return slices.Concat(s.Routes, s.of(true).Routes) }

// ofLink reports whether the route is one of the kernel's own of every interface with IPv6
// (RFC 4291): to link-local or multicast addresses.
func (r Route) ofLink() bool {
	a := r.Destination.Addr()
	return a.Is6() && (a.IsLinkLocalUnicast() || a.IsMulticast())
}

// of returns the state with the routes, and the cluster side, of one family.
func (s State) of(ipv6 bool) State {
	if !ipv6 {
		return s
	}
	if s.IPv6 == nil {
		return State{Index: s.Index}
	}
	s.Routes, s.Cluster, s.Lost = s.IPv6.Routes, s.IPv6.Cluster, nil
	return s
}

// Contested returns the IPv6 sources that another host has, as the kernel detected before
// it used them.
func (n Network) Contested(have State) spec.Sources {
	return slices.DeleteFunc(n.Sources.Of(true), func(s spec.Source) bool {
		return have.IPv6 == nil || !slices.Contains(have.IPv6.Duplicate, s.Prefix.Addr())
	})
}

// Unsettled returns the IPv6 sources whose duplicate address detection is not over.
func (n Network) Unsettled(have State) spec.Sources {
	return slices.DeleteFunc(n.Sources.Of(true), func(s spec.Source) bool {
		return have.IPv6 == nil || !slices.Contains(have.IPv6.Tentative, s.Prefix.Addr())
	})
}

// Usable reports whether the egress interface has all reserved addresses of a family, and,
// of IPv6, no other host has one of them. As long as an IPv6 address is tentative, none is
// known not to have it (RFC 4862, section 5.4).
func (n Network) Usable(have State, ipv6 bool) bool {
	if !ipv6 {
		return n.has(have, false)
	}
	return have.Up && n.has(have, true) && len(n.Contested(have)) == 0 && len(n.Unsettled(have)) == 0
}

// Closed returns the reason why no IPv6 packet crosses although there is an IPv6 source;
// empty: none that time or a repair removes at once.
func (n Network) Closed(have State) string {
	switch contested, unsettled := n.Contested(have), n.Unsettled(have); {
	case len(contested) > 0:
		return "another host has " + list(contested.Addresses())
	case len(unsettled) > 0:
		return "duplicate address detection of " + list(unsettled.Addresses()) + " has not ended"
	}
	return ""
}

// gate returns the routing rule by which no IPv6 packet from the cluster side reaches the
// physical network: the table of replies leads back, or rejects packets.
func (c ClusterSide) gate() Rule {
	return Rule{IPv6: true, Priority: gatePriority, Arrival: c.Interface, Table: c.Table}
}

// isGated reports whether that rule exists.
func (n Network) isGated(have State) bool {
	return have.IPv6 != nil && slices.ContainsFunc(have.IPv6.Cluster.Rules, n.Cluster.gate().same)
}

// opens reports whether the changes make IPv6 usable: the addresses are settled, and
// IPv6 is closed.
func (n Network) opens(have State) bool {
	return len(n.Sources.Of(true)) > 0 && n.Usable(have, true) && n.isGated(have)
}

// OfIPv6 reports whether a change is of an IPv6 address, route or routing rule.
func (s Change) OfIPv6() bool {
	return s.Address.Addr().Is6() || s.Route.Destination.Addr().Is6() || s.Rule.IPv6
}

// rejecting returns the default route for packets without another IPv6 route: without it,
// the pod's own sockets would use the default route of the cluster side while that of the
// physical network is missing, or its gateway does not answer.
func (n Network) rejecting() Route {
	return Route{Destination: everything(true), Metric: closedMetric, Type: unreachable}
}

// closeIPv6 returns the changes that come before an IPv6 address: until it is usable, no
// packet may have it as its source.
func (n Network) closeIPv6(have State) []Change {
	if len(n.Sources.Of(true)) == 0 || have.IPv6 == nil {
		return nil
	}
	var steps []Change
	take := func(s Change) {
		s.Interface, s.Index = n.Interface, have.Index
		steps = append(steps, s)
	}
	if step, _ := place(n.rejecting(), have.IPv6.Routes); step != nil {
		take(*step)
	}
	if n.Usable(have, true) {
		return steps
	}
	if n.Cluster.Interface != "" && !n.isGated(have) {
		take(Change{Op: AddRule, Rule: n.Cluster.gate()})
	}
	for _, r := range have.IPv6.Routes {
		if r.IsDefault() && r.Index == have.Index && r.Index != 0 && r.Metric <= openMetric {
			take(Change{Op: DeleteRoute, Route: r})
		}
	}
	return steps
}

// clusterIPv6 returns the changes of the cluster side's IPv6. Its default route in the main
// table stays as it is, and behind ours: the kernel adds and deletes those of router
// advertisements.
func (n Network) clusterIPv6(have State) []Change {
	if len(n.Sources.Of(true)) == 0 || have.IPv6 == nil {
		return nil
	}
	side := n.Cluster
	side.Default = nil
	return diffCluster(side, have.of(true), true)
}

// routesIPv6 returns the desired IPv6 routes, with index as the interface's. A link-local
// gateway needs no route of its own; any other gets one, as with IPv4.
func (n Network) routesIPv6(index int) []Route {
	sources := n.Sources.Of(true)
	if len(sources) == 0 {
		return nil
	}
	first := sources[0]
	routes := []Route{{
		Destination: everything(true), Gateway: first.Gateway,
		Index: index, Interface: n.Interface, Source: first.Prefix.Addr(), Metric: openMetric,
	}, n.rejecting()}
	if !first.Gateway.IsLinkLocalUnicast() {
		routes = slices.Insert(routes, 0, Route{
			Destination: netip.PrefixFrom(first.Gateway, 128), Index: index, Interface: n.Interface, Source: first.Prefix.Addr(), Metric: usualMetric,
		})
	}
	return routes
}

// openIPv6 returns the changes that let IPv6 packets reach the physical network, once the
// addresses are usable.
func (n Network) openIPv6(have State) []Change {
	if len(n.Sources.Of(true)) == 0 || have.IPv6 == nil || !n.Usable(have, true) {
		return nil
	}
	steps := diffEgress(n, have.of(true), n.routesIPv6(have.Index), true)
	for _, r := range have.IPv6.Cluster.Rules {
		if r.Arrival != "" {
			steps = append(steps, Change{Op: DeleteRule, Interface: n.Interface, Index: have.Index, Rule: r})
		}
	}
	return steps
}

// awaits reports whether a run waits until it knows that no other host has the IPv6
// addresses. A repair does not wait: the kernel notifies of the end. Without a carrier the
// detection does not begin.
func (w Want) awaits(have Have) bool {
	return w.Start && !have.Awaited && len(w.Network.Sources.Of(true)) > 0 && !w.Network.Usable(have.State, true) &&
		(have.State.Carrier || !have.State.Up)
}

// settled returns the state after duplicate address detection without a conflict.
func (n Network) settled(have State) State {
	six := IPv6State{}
	if have.IPv6 != nil {
		six = *have.IPv6
	}
	have.Up, six.Tentative, six.Duplicate = true, nil, nil
	have.Addresses, six.Routes = slices.Clone(have.Addresses), slices.Clone(six.Routes)
	source := n.Sources.Of(true)[0].Prefix.Addr()
	for _, s := range n.missing(have).Of(true) {
		have.Addresses = append(have.Addresses, s.Prefix)
		six.Routes = append(six.Routes, Route{Destination: s.Prefix.Masked(), Index: have.Index, Interface: n.Interface, Source: source, Metric: subnetMetric})
	}
	if !n.isGated(have) && n.Cluster.Interface != "" {
		six.Cluster.Rules = append(slices.Clone(six.Cluster.Rules), n.Cluster.gate())
	}
	if step, _ := place(n.rejecting(), six.Routes); step != nil {
		six.Routes = append(six.Routes, n.rejecting())
	}
	have.IPv6 = &six
	return have
}

// admit returns the steps after duplicate address detection.
func admit(want Want, have Have) []Group {
	switch {
	case want.awaits(have):
		return []Group{{Detection, []Step{Await{want.Network.Sources.Of(true).Addresses()}}}}
	case len(want.Network.Sources.Of(true)) == 0 || !want.Network.Usable(have.State, true):
		return nil
	}
	have.Announced[0], have.Asked[0] = true, true
	changes := steps(have.remaining(slices.Concat(want.Network.openIPv6(have.State), want.Network.clusterIPv6(have.State))))
	all := append(announce(want, have, false), changes...)
	if want.Forward && len(changes) > 0 {
		all = append(all, Forget{})
	}
	if len(all) == 0 {
		return nil
	}
	return []Group{{Admission, all}}
}
