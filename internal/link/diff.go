package link

import (
	"net/netip"
	"slices"
)

// Diff returns the steps from have to want, in the order to take them; none
// where the kernel is as wanted. It is to be called again after they are
// taken, until it returns none: setting an interface up makes the kernel add
// routes that may need steps of their own.
//
// No step takes the last default route away before the new one stands.
func Diff(want Want, have State) []Step {
	var steps []Step
	take := func(s Step) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}

	steps = append(steps, diffCluster(want.Cluster, have)...)

	missing := true
	shared := false // an address of the same subnet was there first
	for _, a := range have.Addresses {
		if a == want.Address {
			missing = false
		} else if a.Bits() == want.Address.Bits() && a.Masked() == want.Address.Masked() {
			shared = true
		}
	}
	// In a shared subnet the later address is a secondary one, and by default
	// the kernel deletes those along with the first (ip-sysctl.rst,
	// promote_secondaries).
	if shared && !have.Promotes {
		take(Step{Op: WriteSysctl, Sysctl: promoteSecondaries(want.Interface), Value: "1", OldValue: "0", Optional: true})
	}
	if missing {
		take(Step{Op: AddAddress, Address: want.Address})
	}
	if !have.Up {
		take(Step{Op: SetUp})
	}

	wanted := want.Routes(have.Index)
	for _, r := range wanted {
		old, there := find(have.Routes, r)
		if !there {
			take(Step{Op: ReplaceRoute, Route: r})
		} else if !old.same(r) {
			take(Step{Op: ReplaceRoute, Route: r, Old: &old})
		}
	}
	// What else leaves by the egress interface has the reserved address too:
	// the routes of another address's subnet, above all.
	for _, r := range have.Routes {
		if r.Index != have.Index || r.Type != 0 || r.Source == want.Address.Addr() || isDefaultOrWanted(r, wanted) {
			continue
		}
		old := r
		r.Source = want.Address.Addr()
		take(Step{Op: ReplaceRoute, Route: r, Old: &old})
	}
	// The last one first: the inverses then append them in their order.
	for i, r := range slices.Backward(have.Routes) {
		if r.IsDefault() && !isReplaced(r, have.Routes[:i], wanted) {
			take(Step{Op: DeleteRoute, Route: r})
		}
	}
	return steps
}

// find returns the route that the kernel would replace by r: the first with the
// same destination, TOS and metric, whatever its type (fib_table_insert in
// net/ipv4/fib_trie.c).
func find(routes []Route, r Route) (Route, bool) {
	for _, have := range routes {
		if key(have) == key(r) {
			return have, true
		}
	}
	return Route{}, false
}

type routeKey struct {
	destination netip.Prefix
	tos, metric int
}

func key(r Route) routeKey { return routeKey{r.Destination, r.TOS, r.Metric} }

func isDefaultOrWanted(r Route, wanted []Route) bool {
	_, w := find(wanted, r)
	return r.IsDefault() || w
}

// isReplaced reports whether a wanted route takes r's place, before being the
// routes in front of it.
func isReplaced(r Route, before, wanted []Route) bool {
	if _, earlier := find(before, r); earlier {
		return false
	}
	_, w := find(wanted, r)
	return w
}

// Forwarding returns the step that lets the kernel forward packets, none where
// it does already. The original left it to the node, and did nothing where the
// node did not.
func Forwarding(have State) []Step {
	if have.Forwards {
		return nil
	}
	return []Step{{Op: WriteSysctl, Sysctl: ipForward, Value: "1", OldValue: "0"}}
}
