package link

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// A ClusterSide is what keeps the traffic of the cluster network there, although
// the default route leads to the physical network.
//
// Replies go by a table of their own, to which routing rules lead: replies that
// are forwarded carry a mark, replies of the pod's own sockets have an address
// of the cluster interface as their source. The table holds the routes that
// the cluster interface has in the main table, and its default route, which is
// kept there from before it is replaced in the main table.
type ClusterSide struct {
	Interface    string         // empty: there is none, and nothing is kept
	Mark         uint32         // of packets that are replies, the bits of it
	Table        int            // number of the replies' routing table
	Destinations []netip.Prefix // what else is reached by the cluster side
	// Default is the default route that the cluster interface had, as
	// ClusterSide.ClusterDefault returned it: for whoever watches, so that what
	// somebody makes of it later is not taken for it. Nil: not known.
	Default *Route
}

// A ClusterState is what the kernel holds, as far as a ClusterSide concerns it.
type ClusterState struct {
	Index     int          // of the interface; zero: it is not there
	Addresses []netip.Addr // IPv4, of the interface
	Table     []Route      // of ClusterSide.Table
	Rules     []Rule       // that lead to it
	Filter    string       // the interface's rp_filter
	Strict    bool         // the reverse-path filter is strict on it
}

// A Rule is an IPv4 routing rule (ip-rule(8)): which packets look up a route in
// which table. A zero field matches everything.
type Rule struct {
	Priority   int // lower is first
	Mark, Mask uint32
	Source     netip.Prefix
	Table      int

	kernel any // the adapter's own form
}

// String returns the rule as ip-rule(8) takes it.
func (r Rule) String() string {
	s := fmt.Sprintf("priority %d", r.Priority)
	if r.Source.IsValid() {
		s += fmt.Sprintf(" from %s", r.Source)
	}
	if r.Mark != 0 {
		s += fmt.Sprintf(" fwmark 0x%x/0x%x", r.Mark, r.Mask)
	}
	return s + fmt.Sprintf(" table %d", r.Table)
}

func (r Rule) same(other Rule) bool {
	r.kernel, other.kernel = nil, nil
	return r == other
}

// rulePriority is that of our routing rules: behind those that send packets to
// the table of local addresses (0), in front of the main table's (32766), and
// where few programs that order theirs by hand put any.
const rulePriority = 20000

// unreachable is the type of a route that refuses packets (rtnetlink(7),
// RTN_UNREACHABLE).
const unreachable = 7

// typeNames are the types of routes as ip-route(8) shows them.
var typeNames = map[int]string{2: "local", 3: "broadcast", 4: "anycast", 5: "multicast", 6: "blackhole", unreachable: "unreachable", 8: "prohibit", 9: "throw"}

// rules returns the routing rules that lead to the replies' table.
func (c ClusterSide) rules(addresses []netip.Addr) []Rule {
	rules := []Rule{{Priority: rulePriority, Mark: c.Mark, Mask: c.Mark, Table: c.Table}}
	for _, a := range addresses {
		rules = append(rules, Rule{Priority: rulePriority, Source: netip.PrefixFrom(a, a.BitLen()), Table: c.Table})
	}
	return rules
}

// routes returns what the replies' table shall hold. Behind the routes it
// refuses: a reply that the cluster side cannot deliver is not to leave by the
// egress side, with the pod's own address.
func (c ClusterSide) routes(have State, standard Route, known bool) []Route {
	var routes []Route
	for _, r := range have.Routes {
		if r.Index == have.Cluster.Index && r.Type == 0 && !r.IsDefault() && !r.Kept {
			routes = append(routes, r)
		}
	}
	if known {
		standard.Metric = 0
		routes = append(routes, standard)
	}
	for i := range routes {
		routes[i].Table = c.Table
	}
	// A gateway has to be reachable when a route by it is added.
	slices.SortStableFunc(routes, func(a, b Route) int { return cmp.Compare(b.Scope, a.Scope) })
	return append(routes, Route{
		Table: c.Table, Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Metric: math.MaxUint32, Type: unreachable,
	})
}

// ClusterDefault returns the default route of the cluster interface, and whether
// there is one: the preferred one in the main table, else the one that was kept
// from there.
func (s State) ClusterDefault() (found Route, known bool) {
	for _, routes := range [][]Route{s.Routes, s.Cluster.Table} {
		for _, r := range routes {
			if r.IsDefault() && r.Type == 0 && r.Index == s.Cluster.Index && (!known || r.Metric < found.Metric) {
				found, known = r, true
			}
		}
		if known {
			break
		}
	}
	return found, known
}

// ClusterDefault returns the default route of the cluster interface: the one that
// is known from before, as long as its gateway can be reached, else that of the
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

// diffCluster returns the steps that keep the cluster side. They come before
// the default route changes, so that replies have a way at any time.
func diffCluster(want ClusterSide, have State) []Step {
	if want.Interface == "" || have.Cluster.Index == 0 {
		return nil
	}
	var steps []Step
	take := func(s Step) {
		s.Interface, s.Index = want.Interface, have.Cluster.Index
		steps = append(steps, s)
	}
	stands := make(map[int]bool) // routes of the table that are wanted ones then

	standard, known := want.ClusterDefault(have)
	routes := want.routes(have, standard, known)
	for _, r := range routes {
		step, i := place(r, have.Cluster.Table)
		if step != nil {
			take(*step)
		}
		stands[i] = true
	}
	for i, r := range slices.Backward(have.Cluster.Table) {
		if !stands[i] {
			take(Step{Op: DeleteRoute, Route: r})
		}
	}
	rules := want.rules(have.Cluster.Addresses)
	for _, r := range rules {
		if !slices.ContainsFunc(have.Cluster.Rules, r.same) {
			take(Step{Op: AddRule, Rule: r})
		}
	}
	for _, r := range have.Cluster.Rules {
		if !slices.ContainsFunc(rules, r.same) {
			take(Step{Op: DeleteRule, Rule: r})
		}
	}
	kept := make(map[int]bool)
	for _, d := range want.Destinations {
		if !known || onClusterSide(d, have) {
			continue
		}
		r := standard
		r.Table, r.Destination, r.Metric, r.Kept = 0, d, 0, true
		step, i := place(r, have.Routes)
		if step != nil {
			take(*step)
		}
		kept[i] = true
	}
	// What an earlier run kept there may be a destination of redirects now.
	for i, r := range slices.Backward(have.Routes) {
		if r.Kept && !kept[i] {
			take(Step{Op: DeleteRoute, Route: r})
		}
	}
	// A packet from a client that is reached by the cluster's default route
	// comes in by another interface than the main table has for its source.
	if have.Cluster.Strict {
		take(Step{Op: WriteSysctl, Sysctl: reversePathFilter(want.Interface), Value: "2", OldValue: have.Cluster.Filter, Optional: true})
	}
	return steps
}

// onClusterSide reports whether a route of the main table, other than a default
// route and one that a router added, leads to all of d by the cluster interface.
func onClusterSide(d netip.Prefix, have State) bool {
	return slices.ContainsFunc(have.Routes, func(r Route) bool {
		return r.Index == have.Cluster.Index && r.Type == 0 && !r.IsDefault() && !r.Kept &&
			r.Destination.Bits() <= d.Bits() && r.Destination.Contains(d.Addr())
	})
}
