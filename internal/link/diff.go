package link

import (
	"net/netip"
	"slices"
)

// Up returns the step that sets the egress interface up, if it is down. An
// address can be asked for then, which comes before it is claimed.
func Up(want Want, have State) []Step {
	if have.Up {
		return nil
	}
	return []Step{{Op: SetUp, Interface: want.Interface, Index: have.Index}}
}

// HasAddress reports whether the egress interface has the reserved address.
func (w Want) HasAddress(have State) bool { return slices.Contains(have.Addresses, w.Address) }

// Claim returns the steps that give the egress interface the reserved address
// and set it up. With the address the kernel adds the route to its subnet, and no
// other packet goes another way: they may come before the rules, if nothing is
// redirected yet.
func Claim(want Want, have State) []Step {
	var steps []Step
	take := func(s Step) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}
	missing, shared := true, false
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
	return append(steps, Up(want, have)...)
}

// Diff returns the steps from have to want, in the order to take them; none
// where the kernel is as wanted. It is to be called again after they are
// taken, until it returns none: setting an interface up makes the kernel add
// routes that may need steps of their own.
//
// No step takes the last default route away before the new one stands.
func Diff(want Want, have State) []Step {
	claim := Claim(want, have)
	steps := append(diffCluster(want.Cluster, have), claim...)
	take := func(s Step) {
		s.Interface, s.Index = want.Interface, have.Index
		steps = append(steps, s)
	}
	stands := make(map[int]Route) // the routes that are wanted ones then, by index
	for _, r := range want.Routes(have.Index) {
		step, i := place(r, have.Routes)
		if step != nil {
			take(*step)
		}
		stands[i] = r
	}
	// Backwards: the inverses then append routes in the order that they had.
	for i, r := range slices.Backward(have.Routes) {
		if _, wanted := stands[i]; wanted {
			continue
		}
		// Another default route, or one that hides a wanted route behind it.
		if r.IsDefault() || hides(i, r, stands) {
			take(Step{Op: DeleteRoute, Route: r})
			continue
		}
		// What else leaves by the egress interface has the reserved address
		// too: the routes of another address's subnet, above all.
		if r.Index == have.Index && r.Type == 0 && r.Source != want.Address.Addr() {
			for _, s := range resource(i, want.Address.Addr(), have.Routes) {
				take(s)
			}
		}
	}
	// The kernel adds this one with the address; somebody deleted it.
	subnet := Route{
		Destination: want.Address.Masked(), Index: have.Index, Interface: want.Interface, Source: want.Address.Addr(), Scope: ScopeLink,
	}
	there := func(r Route) bool { return key(r) == key(subnet) && r.Index == have.Index }
	if len(claim) == 0 && want.Address.Bits() > 0 && !want.Address.IsSingleIP() && !slices.ContainsFunc(have.Routes, there) {
		take(Step{Op: AppendRoute, Route: subnet})
	}
	return steps
}

// hides reports whether the route with index i stands in front of a wanted one
// that the kernel tells apart from it by its place only.
func hides(i int, r Route, stands map[int]Route) bool {
	for j, wanted := range stands {
		if i < j && key(wanted) == key(r) {
			return true
		}
	}
	return false
}

// resource returns the steps that give the route with index i another source.
func resource(i int, source netip.Addr, routes []Route) []Step {
	r := routes[i]
	changed := r
	changed.Source = source
	switch step, at := place(changed, routes); {
	case step == nil: // there is one already
		return []Step{{Op: DeleteRoute, Route: r}}
	case at == i:
		return []Step{*step}
	}
	// The kernel would replace another one.
	return []Step{{Op: DeleteRoute, Route: r}, {Op: AppendRoute, Route: changed}}
}

// place returns the step that makes r one of the routes, nil where it is, and
// the index of the route that is r afterwards, -1 where it is a new one.
//
// The kernel replaces the first route with the same destination, TOS and
// metric, whatever its type and interface, and refuses to where another of them
// is r already (fib_table_insert in net/ipv4/fib_trie.c).
func place(r Route, routes []Route) (step *Step, stands int) {
	if i := slices.IndexFunc(routes, r.same); i >= 0 {
		return nil, i
	}
	i := slices.IndexFunc(routes, func(have Route) bool { return key(have) == key(r) })
	if i < 0 {
		return &Step{Op: ReplaceRoute, Route: r}, i
	}
	old := routes[i]
	return &Step{Op: ReplaceRoute, Route: r, Old: &old}, i
}

// A routeKey is what the kernel tells routes of a table apart by when it adds
// or replaces one.
type routeKey struct {
	destination netip.Prefix
	tos, metric int
}

func key(r Route) routeKey { return routeKey{r.Destination, r.TOS, r.Metric} }

// Forwarding returns the steps that let the kernel forward packets between the
// two interfaces; none where it does already. The original left it to the node,
// and did nothing where the node did not.
//
// Writing net.ipv4.ip_forward sets the sysctl of every interface, and so does
// taking it back; an interface that forwarded before is set again after that.
func Forwarding(have State) []Step {
	var steps []Step
	for _, i := range have.Forwarding {
		if i.On != have.Forwards {
			steps = append(steps, Step{Op: WriteSysctl, Sysctl: forwarding(i.Interface), Value: "1", OldValue: value(i.On)})
		}
	}
	if !have.Forwards {
		steps = append(steps, Step{Op: WriteSysctl, Sysctl: ipForward, Value: "1", OldValue: "0"})
	}
	return steps
}

// value returns a switch as sysctls have it.
func value(on bool) string {
	if on {
		return "1"
	}
	return "0"
}
