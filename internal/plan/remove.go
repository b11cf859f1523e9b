package plan

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// Remove returns the steps that take everything of a router out of a namespace, in their
// order; none if nothing of it is there. before is the state from before the router: see
// [Network.Before] if nobody has kept it.
//
// The rules stay until the reserved addresses, and the routes by the egress interface, are
// gone: what still comes is dropped, since it would leave by another interface. The cluster
// side's default route comes first: the pod always has one. The connections end before the
// rules, too: without these the kernel would still translate their packets, and forward
// them to the cluster side if forwarding cannot be ended.
//
// have.Strays are the rules of all backends.
func Remove(want Want, have Have, before State) []Step {
	n := want.Network
	var all []Step
	if len(have.Flowtable) > 0 {
		all = append(all, RemoveFlowtable{})
	}
	all = append(all, steps(shut(have.State, before))...)
	for _, ipv6 := range []bool{false, true} {
		have, before := have.State.of(ipv6), before.of(ipv6)
		all = append(all, steps(leaveCluster(n, n.routesOf(have, ipv6), have, before))...)
	}
	for _, ipv6 := range []bool{false, true} {
		have, before := have.State.of(ipv6), before.of(ipv6)
		all = append(all, steps(leaveRoutes(n, n.routesOf(have, ipv6), have, before))...)
	}
	all = append(all, steps(leaveEgress(n, have.State, before))...)
	if want.Macvlan != nil && have.State.Index != 0 {
		all = append(all, Destroy{n.Interface})
	}
	if len(have.Strays) > 0 {
		all = append(all, Forget{})
	}
	for _, name := range have.Strays {
		all = append(all, RemoveStray{name})
	}
	if len(have.Carry) > 0 {
		all = append(all, RemoveCarry{})
	}
	if len(have.Gate) > 0 {
		all = append(all, RemoveGate{})
	}
	all = append(all, steps(unset(want, have.State, before))...)
	if len(all) > 0 {
		all = append(all, Forget{})
	}
	return all
}

// Before returns the state that a namespace probably had before a router, of which nobody
// kept one: the default route by the cluster interface, sysctls with their initial values,
// and no forwarding. What is not the router's own stays.
func (n Network) Before(have State, initial Sysctls) State {
	before := State{Up: have.Up, Promotes: initial[PromoteSecondaries(n.Interface)] != 0, Sysctls: initial}
	if !have.Forwards { // its interfaces' are not the router's
		before.Forwarding = have.Forwarding
	}
	if back, known := n.Cluster.ClusterDefault(have); known {
		back.Table, back.Kept = 0, false
		before.Routes = []Route{back}
	}
	return before
}

// routesOf returns the routes of a family by the egress interface that a router may have
// added: those wanted, and default routes by a gateway of an earlier configuration.
func (n Network) routesOf(have State, ipv6 bool) []Route {
	routes := n.Routes(have.Index)
	if ipv6 {
		routes = n.routesIPv6(have.Index)
	}
	for _, r := range have.Routes {
		if r.Index == have.Index && r.Index != 0 && r.IsDefault() && (!ipv6 || r.Metric <= openMetric) && !slices.ContainsFunc(routes, r.same) {
			routes = append(routes, r)
		}
	}
	return routes
}

// leave returns the changes that remove what an earlier configuration has left: addresses
// that are no longer wanted, with their routes, and all of a family without a source.
// former are the reserved addresses of the rules that the run has found. Any other address
// of the egress interface is of another program, and stays.
//
// The new rules are loaded before, so that no packet leaves with an address that is gone.
func (n Network) leave(have State, former []netip.Addr) []Change {
	gone := n
	gone.Sources = nil
	stay := slices.DeleteFunc(slices.Clone(have.Addresses), func(a netip.Prefix) bool {
		leaves := slices.Contains(former, a.Addr()) && !n.Sources.Have(a.Addr())
		if leaves {
			gone.Sources = append(gone.Sources, spec.Source{Prefix: a})
		}
		return leaves
	})
	has := func(all []netip.Prefix, subnet netip.Prefix) bool {
		return slices.ContainsFunc(all, func(a netip.Prefix) bool { return a.Masked() == subnet })
	}
	var changes, last []Change
	before := n.Before(have, nil)
	for _, ipv6 := range []bool{false, true} {
		have, before := have.of(ipv6), before.of(ipv6)
		var ours []Route
		switch {
		case len(n.Sources.Of(ipv6)) > 0:
			for _, r := range have.Routes {
				if r.Index == have.Index && r.Type == 0 && !r.Gateway.IsValid() && has(gone.Sources.Prefixes(), r.Destination) && !has(stay, r.Destination) {
					ours = append(ours, r)
				}
			}
		case len(have.Cluster.Rules) > 0:
			ours = n.routesOf(have, ipv6)
			changes = append(changes, leaveCluster(n, ours, have, before)...)
			if i := slices.IndexFunc(have.Routes, n.rejecting().same); i >= 0 { // while the addresses are there
				last = []Change{{Op: DeleteRoute, Interface: n.Interface, Index: have.Index, Route: have.Routes[i]}}
			}
			changes = append(changes, n.giveBack(have, gone.Sources, stay)...)
		}
		have.Routes = slices.DeleteFunc(slices.Clone(have.Routes), func(r Route) bool { return has(stay, r.Destination) })
		changes = append(changes, leaveRoutes(gone, ours, have, before)...)
	}
	return slices.Concat(changes, leaveEgress(gone, have, before), last)
}

// giveBack returns the changes that give the routes of other addresses of the egress
// interface their own source, which of IPv6 is none: with an address the kernel deletes the
// IPv4 routes that have it as their source.
func (n Network) giveBack(have State, gone spec.Sources, stay []netip.Prefix) (changes []Change) {
	for i, r := range have.Routes {
		at := slices.IndexFunc(stay, func(a netip.Prefix) bool { return a.Masked() == r.Destination })
		if at < 0 || r.Index != have.Index || r.Type != 0 || !gone.Have(r.Source) {
			continue
		}
		source := stay[at].Addr()
		if source.Is6() {
			source = netip.Addr{}
		}
		for _, c := range setRouteSource(i, source, have.Routes) {
			c.Interface, c.Index = n.Interface, have.Index
			changes = append(changes, c)
		}
	}
	return changes
}

// Traces reports whether a namespace has IPv6 routes or routing rules of a router, perhaps
// with sources that it no longer has.
func (n Network) Traces(have State) bool {
	return have.IPv6 != nil && (len(have.IPv6.Cluster.Rules) > 0 || slices.ContainsFunc(have.IPv6.Routes, n.rejecting().same))
}

// shuts reports whether the router has enabled forwarding.
func shuts(have, before State) bool { return have.Forwards && !before.Forwards }

// shut returns the changes that end forwarding, if the pod did not forward before. Writing
// net.ipv4.ip_forward sets the sysctl of every interface. Where /proc/sys is read-only,
// somebody else has enabled it.
func shut(have, before State) []Change {
	var changes []Change
	off := func(name string) {
		changes = append(changes, Change{Op: WriteSysctl, Sysctl: name, Value: "0", OldValue: "1", Optional: true, Effect: "the namespace forwards"})
	}
	if shuts(have, before) {
		off(IPForward)
	}
	if six := have.IPv6; six != nil && six.Forwards && (before.IPv6 == nil || !before.IPv6.Forwards) {
		off(IPv6Forward)
	}
	return changes
}

// leaveCluster returns the changes that give the cluster side its default route of one family
// back, and remove the routes and rules of the replies. ours are the routes by the egress
// interface. The kernel's own routing rules are added again, as by a repair.
func leaveCluster(want Network, ours []Route, have, before State) []Change {
	var changes []Change
	take := func(c Change) {
		c.Interface, c.Index = want.Cluster.Interface, have.Cluster.Index
		changes = append(changes, c)
	}
	for _, r := range have.Lost { // no route has an effect without them
		take(Change{Op: AddRule, Rule: r})
	}
	for _, r := range before.Routes {
		// Another program may have set another one since then.
		step, _ := place(r, have.Routes)
		if step != nil && (r.IsDefault() || before.isHalf(r)) && (step.Old == nil || slices.ContainsFunc(ours, step.Old.same)) {
			if way, lost := have.lostWay(r.Gateway); lost {
				take(Change{Op: ReplaceRoute, Route: way})
			}
			take(*step)
		}
	}
	for _, r := range slices.Backward(have.Routes) {
		if r.Kept {
			take(Change{Op: DeleteRoute, Route: r})
		}
	}
	for _, r := range have.Cluster.Rules {
		take(Change{Op: DeleteRule, Rule: r})
	}
	for _, r := range slices.Backward(have.Cluster.Table) {
		take(Change{Op: DeleteRoute, Route: r})
	}
	return changes
}

// lostWay returns the route to a gateway of the cluster side that another program has deleted,
// from the replies' table.
func (s State) lostWay(gateway netip.Addr) (way Route, lost bool) {
	leads := func(r Route) bool {
		return r.Index == s.Cluster.Index && r.Type == 0 && !r.IsDefault() && !r.Gateway.IsValid() && r.Destination.Contains(gateway)
	}
	i := slices.IndexFunc(s.Cluster.Table, leads)
	if i < 0 || slices.ContainsFunc(s.Routes, leads) {
		return way, false
	}
	way = s.Cluster.Table[i]
	way.Table = 0
	return way, true
}

// leaveRoutes returns the changes that remove the routes of one family by the egress
// interface. With an IPv4 address the kernel deletes the routes that have it as their source;
// those of IPv6 it keeps, without the source (net/ipv6/route.c, fib6_remove_prefsrc).
func leaveRoutes(want Network, ours []Route, have, before State) []Change {
	var changes []Change
	for _, r := range have.Routes {
		if r.Destination.Addr().Is6() && r.Index == have.Index && want.Sources.Have(r.Source) && !slices.ContainsFunc(ours, r.same) {
			changes = append(changes, Change{Op: DeleteRoute, Interface: want.Interface, Index: have.Index, Route: r})
		}
	}
	for _, r := range slices.Backward(ours) {
		replaced := slices.ContainsFunc(before.Routes, func(b Route) bool { return key(b) == key(r) })
		if slices.ContainsFunc(have.Routes, r.same) && !replaced {
			changes = append(changes, Change{Op: DeleteRoute, Interface: want.Interface, Index: have.Index, Route: r})
		}
	}
	return changes
}

// leaveEgress returns the changes that remove the reserved addresses, and set the interface
// down if it was.
func leaveEgress(want Network, have, before State) []Change {
	var changes []Change
	take := func(c Change) {
		c.Interface, c.Index = want.Interface, have.Index
		changes = append(changes, c)
	}
	for _, s := range slices.Backward(want.Sources) {
		if slices.Contains(have.Addresses, s.Prefix) && !slices.Contains(before.Addresses, s.Prefix) {
			take(Change{Op: RemoveAddress, Address: s.Prefix})
		}
	}
	if have.Index != 0 && have.Up && !before.Up {
		take(Change{Op: SetDown})
	}
	return changes
}

// unset returns the changes that give the sysctls that the router sets their values from
// before.
func unset(want Want, have, before State) []Change {
	var changes []Change
	n := want.Network
	gone := want.Macvlan != nil && have.Index != 0 // with its sysctls
	write := func(name string, now, old int) {
		if gone && strings.Contains(name, "/conf/"+n.Interface+"/") {
			return
		}
		changes = append(changes, Change{
			Op: WriteSysctl, Interface: n.Interface, Index: have.Index, Sysctl: name,
			Value: strconv.Itoa(old), OldValue: strconv.Itoa(now), Optional: true, Effect: "they keep the values that the router has set",
		})
	}
	for _, i := range have.Forwarding {
		now := i.On && !shuts(have, before)
		was := slices.ContainsFunc(before.Forwarding, func(b InterfaceForwarding) bool { return b.Interface == i.Interface && b.On })
		if now != was && i.On && (!gone || i.Interface != n.Interface) {
			changes = append(changes, Change{Op: WriteSysctl, Sysctl: ForwardingOf(i.Interface), Value: value(was), OldValue: value(now)})
		}
	}
	if have.Promotes && !before.Promotes {
		write(PromoteSecondaries(n.Interface), 1, 0)
	}
	for _, s := range n.settings() {
		old, known := before.Sysctls[s.sysctl]
		if now, exists := have.Sysctls[s.sysctl]; known && exists && now == s.value && now != old {
			write(s.sysctl, now, old)
		}
	}
	return changes
}
