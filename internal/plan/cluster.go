package plan

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// A ClusterSide keeps the traffic of the cluster network on the cluster interface,
// although the default route leads to the physical network.
//
// Replies use a routing table of their own, by routing rules: forwarded replies
// carry a mark, replies of the pod's own sockets have an address of the cluster
// interface as their source. The table contains the cluster interface's routes of
// the main table, and its default route, copied before the main table's is
// replaced.
type ClusterSide struct {
	Interface    string         // empty: no cluster side
	Mark         uint32         // mark bits of replies
	Table        int            // number of the replies' routing table
	Destinations []netip.Prefix // other networks to reach by the cluster side
	// Default is the cluster interface's default route of the last comparison,
	// as returned by ClusterSide.ClusterDefault. It takes precedence over later
	// changes by other programs. Nil: unknown.
	Default *Route
}

// A ClusterState is the kernel's state of a ClusterSide.
type ClusterState struct {
	Index     int          // interface index; zero: it does not exist
	Addresses []netip.Addr // IPv4 addresses of the interface
	Table     []Route      // routes of ClusterSide.Table
	Rules     []Rule       // rules for that table
}

// A Rule is a routing rule (ip-rule(8)): it selects packets and a table. A
// zero field matches every packet.
type Rule struct {
	IPv6       bool
	Priority   int // lower is first
	Mark, Mask uint32
	Source     netip.Prefix
	Arrival    string // name of the interface by which a packet arrives
	Table      int

	Kernel any // the adapter's own form
}

// String returns the rule in the notation of ip-rule(8).
func (r Rule) String() string {
	s := fmt.Sprintf("priority %d", r.Priority)
	if r.Source.IsValid() {
		s += fmt.Sprintf(" from %s", r.Source)
	}
	if r.Arrival != "" {
		s += " iif " + r.Arrival
	}
	if r.Mark != 0 {
		s += fmt.Sprintf(" fwmark 0x%x/0x%x", r.Mark, r.Mask)
	}
	s += fmt.Sprintf(" table %d", r.Table)
	if r.IPv6 {
		s += " (IPv6)"
	}
	return s
}

func (r Rule) same(other Rule) bool {
	r.Kernel, other.Kernel = nil, nil
	return r == other
}

// rulePriority is the priority of our routing rules: after the rules for the table
// of local addresses (0), before those for the main table (32766), and in a range
// that few programs use.
const rulePriority = 20000

// MainPriority is the priority of the kernel's own rule for the main table (ip-rule(8)).
const MainPriority = 32766

// unreachable is the type of a route that rejects packets (rtnetlink(7),
// RTN_UNREACHABLE).
const unreachable = 7

// typeNames are the names of route types in ip-route(8).
var typeNames = map[int]string{2: "local", 3: "broadcast", 4: "anycast", 5: "multicast", 6: "blackhole", unreachable: "unreachable", 8: "prohibit", 9: "throw"}

// rules returns the routing rules for the replies' table.
func (c ClusterSide) rules(addresses []netip.Addr, ipv6 bool) []Rule {
	rules := []Rule{{IPv6: ipv6, Priority: rulePriority, Mark: c.Mark, Mask: c.Mark, Table: c.Table}}
	for _, a := range addresses {
		rules = append(rules, Rule{IPv6: ipv6, Priority: rulePriority, Source: netip.PrefixFrom(a, a.BitLen()), Table: c.Table})
	}
	return rules
}

// everything returns the destination of a default route.
func everything(ipv6 bool) netip.Prefix {
	if ipv6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// routes returns the desired routes of the replies' table. The last one rejects
// packets: a reply that the cluster side cannot deliver must not leave by the
// egress side with the pod's own address.
func (c ClusterSide) routes(have State, defaultRoute Route, known, ipv6 bool) []Route {
	var routes []Route
	for _, r := range have.Routes {
		if r, ok := r.by(have.Cluster.Index); ok && r.Type == 0 && !r.IsDefault() && !have.isHalf(r) && !r.Kept && !r.ofLink() {
			routes = append(routes, r)
		}
	}
	if known {
		if defaultRoute.Metric = 0; ipv6 {
			defaultRoute.Metric = usualMetric
		}
		routes = append(routes, defaultRoute)
	}
	for i := range routes {
		routes[i].Table = c.Table
	}
	// The kernel accepts a route only if its gateway is reachable already.
	slices.SortStableFunc(routes, func(a, b Route) int { return cmp.Compare(b.Scope, a.Scope) })
	return append(routes, Route{
		Table: c.Table, Destination: everything(ipv6), Metric: math.MaxUint32, Type: unreachable,
	})
}

// isHalf reports whether r is a route to one half of all addresses that, with the one to
// the other half, is the default route of the cluster interface: VPN programs add such
// a pair (0.0.0.0/1 and 128.0.0.0/1), which precedes the default route. The pair of an
// earlier run that deleted only one of them is marked in the replies' table.
func (s State) isHalf(r Route) bool {
	if s.Cluster.Index == 0 || r.Index != s.Cluster.Index || r.Destination.Bits() != 1 || r.Type != 0 || r.TOS != 0 {
		return false
	}
	sameHop := func(o Route) bool {
		return o.Index == r.Index && o.Gateway == r.Gateway && o.Type == 0 && o.TOS == 0
	}
	return slices.ContainsFunc(s.Routes, func(o Route) bool {
		return sameHop(o) && o.Destination.Bits() == 1 && o.Destination != r.Destination
	}) || slices.ContainsFunc(s.Cluster.Table, func(o Route) bool { return sameHop(o) && o.IsDefault() && o.Kept })
}

// ClusterDefault returns the default route of the cluster interface, if any: the
// preferred one in the main table, otherwise the copy in the replies' table. A route
// with next hops on other interfaces, too, counts with those of the cluster interface.
func (s State) ClusterDefault() (found Route, known bool) {
	if i := slices.IndexFunc(s.Routes, s.isHalf); i >= 0 {
		found = s.Routes[i]
		found.Destination, found.Metric, found.Kept = everything(found.Destination.Addr().Is6()), 0, true
		return found, true
	}
	for _, routes := range [][]Route{s.Routes, s.Cluster.Table} {
		for _, r := range routes {
			if r, ok := r.by(s.Cluster.Index); ok && r.IsDefault() && r.Type == 0 && (!known || r.Metric < found.Metric) {
				found, known = r, true
			}
		}
		if known {
			break
		}
	}
	return found, known
}

// ClusterDefault returns the default route of the cluster interface: the one of
// the last comparison while its gateway is reachable, otherwise the one of the
// state.
func (c ClusterSide) ClusterDefault(have State) (Route, bool) {
	before := c.Default
	if before == nil || before.Index != have.Cluster.Index {
		return have.ClusterDefault()
	}
	reaches := func(r Route) bool {
		return r.Index == before.Index && r.Type == 0 && !r.IsDefault() && !r.Gateway.IsValid() && r.Destination.Contains(before.Gateway)
	}
	if before.Gateway.IsValid() && !slices.ContainsFunc(have.Routes, reaches) {
		return have.ClusterDefault()
	}
	return *before, true
}

// diffCluster returns the steps of one family for the cluster side. They come before the
// change of the default route, so that replies always have a route.
func diffCluster(want ClusterSide, have State, ipv6 bool) []Change {
	if want.Interface == "" || have.Cluster.Index == 0 {
		return nil
	}
	var steps []Change
	take := func(s Change) {
		s.Interface, s.Index = want.Interface, have.Cluster.Index
		steps = append(steps, s)
	}
	placed := make(map[int]bool) // desired routes after the steps, by index

	defaultRoute, known := want.ClusterDefault(have)
	routes := want.routes(have, defaultRoute, known, ipv6)
	for _, r := range routes {
		step, i := place(r, have.Cluster.Table)
		if step != nil {
			take(*step)
		}
		placed[i] = true
	}
	for i, r := range slices.Backward(have.Cluster.Table) {
		if !placed[i] {
			take(Change{Op: DeleteRoute, Route: r})
		}
	}
	rules := want.rules(have.Cluster.Addresses, ipv6)
	for _, r := range rules {
		if !slices.ContainsFunc(have.Cluster.Rules, r.same) {
			take(Change{Op: AddRule, Rule: r})
		}
	}
	for _, r := range have.Cluster.Rules {
		if !slices.ContainsFunc(rules, r.same) && r.Arrival == "" {
			take(Change{Op: DeleteRule, Rule: r})
		}
	}
	kept := make(map[int]bool)
	for _, d := range want.Destinations {
		if !known || d.Addr().Is6() != ipv6 || onClusterSide(d, have) {
			continue
		}
		r := defaultRoute
		r.Table, r.Destination, r.Metric, r.Kept = 0, d, 0, true
		if ipv6 {
			r.Metric = usualMetric
		}
		step, i := place(r, have.Routes)
		if step != nil {
			take(*step)
		}
		kept[i] = true
	}
	// A destination that an earlier run kept may be a redirect's destination now.
	for i, r := range slices.Backward(have.Routes) {
		if r.Kept && !kept[i] {
			take(Change{Op: DeleteRoute, Route: r})
		}
	}
	return steps
}

// onClusterSide reports whether a route of the main table leads to all of d by the
// cluster interface. Default routes and routes added by a router do not count.
func onClusterSide(d netip.Prefix, have State) bool {
	return slices.ContainsFunc(have.Routes, func(r Route) bool {
		return r.Index == have.Cluster.Index && r.Type == 0 && !r.IsDefault() && !have.isHalf(r) && !r.Kept &&
			r.Destination.Bits() <= d.Bits() && r.Destination.Contains(d.Addr())
	})
}
