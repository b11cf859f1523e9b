package plan

import (
	"net/netip"
	"slices"

	"github.com/egress-router/egress-router/internal/spec"
)

// prepare returns the changes for the settings, which come before any packet arrives, and the
// one that sets the egress interface up, if it is down. An interface without an address
// can already send probes.
func prepare(want Network, have State) []Change {
	return slices.Concat(set(want, have), want.clusterIPv6(have), want.closeIPv6(have), up(want, have))
}

func up(want Network, have State) []Change {
	if have.Up {
		return nil
	}
	return []Change{{Op: SetUp, Interface: want.Interface, Index: have.Index}}
}

// missing returns the sources that the egress interface does not have.
func (n Network) missing(have State) spec.Sources {
	return slices.DeleteFunc(slices.Clone(n.Sources), func(s spec.Source) bool { return slices.Contains(have.Addresses, s.Prefix) })
}

// has reports whether the egress interface has the reserved addresses of a family.
func (n Network) has(have State, ipv6 bool) bool { return len(n.missing(have).Of(ipv6)) == 0 }

// HasAddresses reports whether the egress interface has the reserved addresses.
func (n Network) HasAddresses(have State) bool { return len(n.missing(have)) == 0 }

// claim returns the changes that add the reserved addresses and set the egress
// interface up. The kernel adds only the subnet's route with an address, so these
// steps may come before the rules if nothing is redirected yet.
func claim(want Network, have State) []Change {
	var steps []Change
	take := func(s Change) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}
	// In a shared subnet the later address is a secondary one, and by default
	// the kernel deletes it together with the first one (ip-sysctl.rst,
	// promote_secondaries).
	if want.sharesSubnet(have) && !have.Promotes {
		take(Change{
			Op: WriteSysctl, Sysctl: PromoteSecondaries(want.Interface), Value: "1", OldValue: "0", Optional: true,
			Effect: "the kernel deletes the reserved address with another one of its subnet",
		})
	}
	for _, s := range want.missing(have) {
		for _, a := range have.Addresses { // the kernel has an IPv6 address with one length
			if a.Addr() == s.Prefix.Addr() && a.Addr().Is6() {
				take(Change{Op: RemoveAddress, Address: a})
			}
		}
		take(Change{Op: AddAddress, Address: s.Prefix, Shared: want.Shared})
	}
	if want.retry {
		for _, s := range want.Contested(have) {
			take(Change{Op: RemoveAddress, Address: s.Prefix})
			take(Change{Op: AddAddress, Address: s.Prefix, Shared: want.Shared})
		}
	}
	return append(steps, up(want, have)...)
}

// sharesSubnet reports whether a reserved address has another address of its subnet, also
// a reserved one.
func (n Network) sharesSubnet(have State) bool {
	others, sources := have.Addresses, n.Sources.Of(false)
	for _, s := range sources {
		others = append(slices.Clip(others), s.Prefix)
	}
	return slices.ContainsFunc(sources, func(s spec.Source) bool {
		return slices.ContainsFunc(others, func(a netip.Prefix) bool { return a != s.Prefix && a.Masked() == s.Prefix.Masked() })
	})
}

// diff returns the changes from have to want, in their order; none if there is no
// drift. Call it again after the steps until it returns none: setting an
// interface up makes the kernel add routes that may need further steps.
//
// No step deletes the last default route before the new one exists.
func diff(want Network, have State) []Change {
	claim := claim(want, have)
	var steps []Change
	take := func(s Change) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}
	for _, r := range have.Lost {
		take(Change{Op: AddRule, Rule: r})
	}
	steps = append(steps, set(want, have)...)
	if len(want.Sources.Of(false)) > 0 {
		steps = append(steps, diffCluster(want.Cluster, have, false)...)
	}
	steps = slices.Concat(steps, want.clusterIPv6(have), want.closeIPv6(have), claim)
	for _, r := range have.AdvertisedRoutes {
		take(Change{Op: DeleteRoute, Route: r})
	}
	for _, a := range have.Advertised {
		take(Change{Op: RemoveAddress, Address: a.Prefix, Kernel: a.Kernel})
	}
	if len(want.Sources.Of(false)) > 0 {
		steps = append(steps, diffEgress(want, have, want.Routes(have.Index), false)...)
	}
	return append(steps, want.openIPv6(have)...)
}

// diffEgress returns the changes of one family's routes by the egress interface, and of
// others in the main table that precede them.
func diffEgress(want Network, have State, desired []Route, ipv6 bool) []Change {
	var steps []Change
	take := func(s Change) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}
	sources := want.Sources.Of(ipv6)
	source := sources[0].Prefix.Addr()
	placed := make(map[int]Route) // desired routes after the steps, by index
	for _, r := range desired {
		step, i := place(r, have.Routes)
		if step != nil {
			take(*step)
		}
		placed[i] = r
	}
	// Backwards, so that the inverse steps restore the order of the routes.
	for i, r := range slices.Backward(have.Routes) {
		if _, desired := placed[i]; desired {
			continue
		}
		// Another default route, or a route that hides a desired one, or one to the gateway of
		// an earlier configuration. IPv6 default routes that come after ours stay: the kernel
		// adds those of router advertisements again.
		if r.IsDefault() && (!ipv6 || r.Metric <= closedMetric) || have.isHalf(r) || hides(i, r, placed) || have.isFormerGateway(r, desired) {
			take(Change{Op: DeleteRoute, Route: r})
			continue
		}
		// Other routes of the egress interface get the reserved address as their
		// source too, above all those of another address's subnet.
		if r.Index == have.Index && r.Type == 0 && r.Source != source && !r.IsDefault() && !r.ofLink() {
			for _, s := range setRouteSource(i, source, have.Routes) {
				take(s)
			}
		}
	}
	if !want.has(have, ipv6) || !have.Up {
		return steps
	}
	// The kernel adds these routes with the addresses; another program deleted one.
	var subnets []Route
	for _, s := range sources {
		subnet := Route{Destination: s.Prefix.Masked(), Index: have.Index, Interface: want.Interface, Source: source, Scope: ScopeLink}
		if ipv6 {
			subnet.Scope, subnet.Metric = ScopeUniverse, subnetMetric
		}
		same := func(r Route) bool { return key(r) == key(subnet) && r.Index == have.Index }
		if s.Prefix.Bits() > 0 && !s.Prefix.IsSingleIP() && !slices.ContainsFunc(slices.Concat(have.Routes, subnets), same) {
			subnets = append(subnets, subnet)
			take(Change{Op: AppendRoute, Route: subnet})
		}
	}
	return steps
}

// isFormerGateway reports whether r, which is not desired, leads to the gateway of another
// default route of the egress interface than those desired.
func (s State) isFormerGateway(r Route, desired []Route) bool {
	return r.Index == s.Index && r.Type == 0 && r.Destination.IsSingleIP() && !r.Gateway.IsValid() &&
		slices.ContainsFunc(s.Routes, func(d Route) bool {
			return d.Index == s.Index && d.IsDefault() && d.Gateway == r.Destination.Addr() && !slices.ContainsFunc(desired, func(w Route) bool { return w.Gateway == d.Gateway })
		})
}

// hides reports whether the route with index i comes before a desired route with
// the same key.
func hides(i int, r Route, placed map[int]Route) bool {
	for j, desired := range placed {
		if i < j && key(desired) == key(r) {
			return true
		}
	}
	return false
}

// setRouteSource returns the steps that set the source of the route with index i.
func setRouteSource(i int, source netip.Addr, routes []Route) []Change {
	r := routes[i]
	changed := r
	changed.Source = source
	switch step, at := place(changed, routes); {
	case step == nil: // such a route exists
		return []Change{{Op: DeleteRoute, Route: r}}
	case at == i:
		return []Change{*step}
	}
	// Replacing would affect another route.
	return []Change{{Op: DeleteRoute, Route: r}, {Op: AppendRoute, Route: changed}}
}

// place returns the step that adds r to the routes, nil if r is one of them, and
// the index of r afterwards, -1 for a new route.
//
// The kernel replaces the first route with the same destination, TOS and
// metric, with any type and interface, and refuses if another one of them
// equals r (fib_table_insert in net/ipv4/fib_trie.c).
func place(r Route, routes []Route) (step *Change, placed int) {
	if i := slices.IndexFunc(routes, r.same); i >= 0 {
		return nil, i
	}
	i := slices.IndexFunc(routes, func(have Route) bool { return key(have) == key(r) })
	if i < 0 {
		return &Change{Op: ReplaceRoute, Route: r}, i
	}
	old := routes[i]
	return &Change{Op: ReplaceRoute, Route: r, Old: &old}, i
}

// A routeKey is the kernel's key of a route in a table: adding or replacing a
// route affects the routes with the same key.
type routeKey struct {
	destination netip.Prefix
	tos, metric int
}

func key(r Route) routeKey { return routeKey{r.Destination, r.TOS, r.Metric} }

// Forwarding returns the changes that enable forwarding between the two interfaces;
// none if it is enabled. The original left this to the node, and did nothing if
// the node did not forward.
//
// Writing net.ipv4.ip_forward sets the sysctl of every interface, also on
// rollback; the steps of single interfaces come first, so that their rollback
// comes last.
func Forwarding(want Network, have State) []Change {
	var steps []Change
	if len(want.Sources.Of(true)) > 0 && have.IPv6 != nil && !have.IPv6.Forwards {
		steps = append(steps, Change{Op: WriteSysctl, Sysctl: IPv6Forward, Value: "1", OldValue: "0"})
	}
	if len(want.Sources.Of(false)) == 0 {
		return steps
	}
	for _, i := range have.Forwarding {
		if i.On != have.Forwards {
			steps = append(steps, Change{Op: WriteSysctl, Sysctl: ForwardingOf(i.Interface), Value: "1", OldValue: value(i.On)})
		}
	}
	if !have.Forwards {
		steps = append(steps, Change{Op: WriteSysctl, Sysctl: IPForward, Value: "1", OldValue: "0"})
	}
	return steps
}

// value returns the sysctl value of a switch.
func value(on bool) string {
	if on {
		return "1"
	}
	return "0"
}
