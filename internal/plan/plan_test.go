package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// simulate changes a state as the kernel does.
func simulate(s *State, c Change) {
	side, table := &s.Cluster, &s.Routes
	if c.Route.Destination.Addr().Is6() || c.Rule.IPv6 {
		side, table = &s.IPv6.Cluster, &s.IPv6.Routes
	}
	if c.Route.Table != 0 {
		table = &side.Table
	}
	remove := func(r Route) {
		if i := slices.IndexFunc(*table, r.same); i >= 0 {
			*table = slices.Delete(*table, i, i+1)
		}
	}
	switch c.Op {
	case AddAddress:
		s.Addresses = append(s.Addresses, c.Address)
		if c.Address.Addr().Is6() {
			s.IPv6.Tentative = append(s.IPv6.Tentative, c.Address.Addr())
		}
		if s.Up {
			s.connect(c.Address)
		}
	case RemoveAddress:
		is := func(a netip.Addr) bool { return a == c.Address.Addr() }
		s.Addresses = slices.DeleteFunc(s.Addresses, func(p netip.Prefix) bool { return p == c.Address })
		s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.Index == c.Index && r.Source == c.Address.Addr() })
		if s.IPv6 != nil {
			s.IPv6.Tentative, s.IPv6.Duplicate = slices.DeleteFunc(s.IPv6.Tentative, is), slices.DeleteFunc(s.IPv6.Duplicate, is)
		}
	case SetDown:
		s.Up = false
		s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.Index == c.Index })
	case SetUp:
		s.Up = true
		for _, a := range s.Addresses {
			s.connect(a)
		}
	case ReplaceRoute:
		if i := slices.IndexFunc(*table, func(r Route) bool { return key(r) == key(c.Route) }); i >= 0 {
			(*table)[i] = c.Route
		} else {
			*table = append(*table, c.Route)
		}
	case AppendRoute:
		*table = append(*table, c.Route)
	case DeleteRoute:
		remove(c.Route)
	case AddRule:
		side.Rules = append(side.Rules, c.Rule)
	case DeleteRule:
		side.Rules = slices.DeleteFunc(side.Rules, c.Rule.same)
	case WriteSysctl:
		value, _ := strconv.Atoi(c.Value)
		switch {
		case c.Sysctl == IPForward:
			s.Forwards = value == 1
			for i := range s.Forwarding {
				s.Forwarding[i].On = s.Forwards
			}
		case c.Sysctl == IPv6Forward:
			s.IPv6.Forwards = value == 1
		case strings.HasSuffix(c.Sysctl, "/forwarding"):
			for i, f := range s.Forwarding {
				if ForwardingOf(f.Interface) == c.Sysctl {
					s.Forwarding[i].On = value == 1
				}
			}
		case c.Sysctl == PromoteSecondaries("macvlan0"):
			s.Promotes = value == 1
		default:
			s.Sysctls[c.Sysctl] = value
		}
	}
}

// connect adds the route to the subnet of an address, as the kernel does.
func (s *State) connect(a netip.Prefix) {
	if a.Addr().Is4() {
		s.Routes = append(s.Routes, Route{Destination: a.Masked(), Index: s.Index, Source: a.Addr(), Scope: ScopeLink})
		return
	}
	r := Route{Destination: a.Masked(), Index: s.Index, Metric: subnetMetric}
	if !slices.ContainsFunc(s.IPv6.Routes, func(have Route) bool { return key(have) == key(r) && have.Index == r.Index }) {
		s.IPv6.Routes = append(s.IPv6.Routes, r)
	}
}

// randomIPv6 adds what other programs may have left of IPv6.
func randomIPv6(r *rand.Rand, n Network, s *State) {
	some := func() bool { return r.IntN(2) == 0 }
	s.IPv6 = &IPv6State{Forwards: some(), Cluster: ClusterState{Index: 2, Addresses: []netip.Addr{addr("fd00::98")}}}
	for _, a := range []string{"2001:db8:12::99/64", "2001:db8:12::98/64", "fe80::9/64"} {
		if r.IntN(3) > 0 {
			continue
		}
		p := netip.MustParsePrefix(a)
		s.Addresses = append(s.Addresses, p)
		switch r.IntN(4) {
		case 0:
			s.IPv6.Tentative = append(s.IPv6.Tentative, p.Addr())
		case 1:
			s.IPv6.Duplicate = append(s.IPv6.Duplicate, p.Addr())
		}
	}
	route := func(to, gateway string, index, metric int) Route {
		return Route{Destination: netip.MustParsePrefix(to), Gateway: addr(gateway), Index: index, Metric: metric}
	}
	all := []Route{
		n.rejecting(), route("::/0", "fe80::1", 3, openMetric), route("::/0", "fe80::1", 2, usualMetric), route("::/0", "fe80::2", 2, openMetric),
		route("::/0", "fd00::1", 2, 100), route("fd00::/64", "", 2, subnetMetric), route("2001:db8:12::/64", "", 3, subnetMetric),
		route("fe80::/64", "", 2, subnetMetric), route("fe80::/64", "", 3, subnetMetric), route("fd01::/48", "fd00::1", 2, usualMetric),
		route("::/1", "fd00::1", 2, usualMetric), route("8000::/1", "fd00::1", 2, usualMetric),
	}
	for _, i := range r.Perm(len(all)) {
		if some() && !slices.ContainsFunc(s.IPv6.Routes, func(have Route) bool { return key(have) == key(all[i]) && have.Index == all[i].Index }) {
			s.IPv6.Routes = append(s.IPv6.Routes, all[i])
		}
	}
	for _, rule := range append(n.Cluster.rules(s.IPv6.Cluster.Addresses, true), n.Cluster.gate(), Rule{IPv6: true, Priority: 1, Mark: 1, Mask: 1, Table: n.Cluster.Table}) {
		if some() {
			s.IPv6.Cluster.Rules = append(s.IPv6.Cluster.Rules, rule)
		}
	}
}

// leaks reports whether IPv6 packets can have a source that another host may have: the
// way is open, and the address not settled.
func leaks(n Network, s State) bool {
	if n.Usable(s, true) {
		return false
	}
	byEgress := func(r Route) bool { return r.IsDefault() && r.Index == s.Index && r.Metric <= openMetric }
	return !n.isGated(s) || slices.ContainsFunc(s.IPv6.Routes, byEgress)
}

// random returns a state that other programs may have left.
func random(r *rand.Rand, n Network) State {
	some := func() bool { return r.IntN(2) == 0 }
	s := State{Index: 3, Up: some(), Carrier: true, NoARP: some(), Promotes: some(), Forwards: some(), Sysctls: n.Defaults()}
	s.Cluster = ClusterState{Index: 2, Addresses: []netip.Addr{addr("10.128.0.98")}}
	s.Forwarding = []InterfaceForwarding{{"macvlan0", some()}, {"eth0", some()}}
	for name := range s.Sysctls {
		if some() {
			s.Sysctls[name] = r.IntN(3)
		}
	}
	for _, a := range []string{"192.168.12.99/24", "192.168.12.98/24", "192.168.13.7/32"} {
		if r.IntN(3) == 0 {
			s.Addresses = append(s.Addresses, netip.MustParsePrefix(a))
		}
	}
	all := append(n.Routes(3), cluster, cniDefault, route("0.0.0.0/0", "10.128.0.2", 2, "", 100), route("192.168.12.1/32", "10.128.0.1", 2, "", 0),
		route("192.168.12.0/24", "", 3, "192.168.12.98", 0), subnet, route("10.96.0.0/12", "10.128.0.1", 2, "", 0))
	for _, i := range r.Perm(len(all)) {
		if some() && !slices.ContainsFunc(s.Routes, func(have Route) bool { return key(have) == key(all[i]) && have.Index == all[i].Index }) {
			s.Routes = append(s.Routes, all[i])
		}
	}
	for _, rule := range n.Cluster.rules(s.Cluster.Addresses, false) {
		if some() {
			s.Cluster.Rules = append(s.Cluster.Rules, rule)
		}
	}
	if some() {
		s.Cluster.Rules = append(s.Cluster.Rules, Rule{Priority: rulePriority, Mark: 1, Mask: 1, Table: n.Cluster.Table})
	}
	return s
}

func familyOf(ipv6 bool) int {
	if ipv6 {
		return 1
	}
	return 0
}

// The answer to a probe of an interface that is down arrives while many redirects are
// loaded. If the run waits for it before it claims the address, or if there are few, the rules
// are loaded once.
func TestProbeBesideLargeLoad(t *testing.T) {
	for _, test := range []struct {
		name     string
		redirect int
		conflict spec.Conflict
		up       bool
		loads    []Stage
	}{
		{"many, down", manyRedirects, spec.ConflictWarn, false, []Stage{Guard, Rules}},
		{"many, down, defended", manyRedirects, spec.ConflictDefend, false, []Stage{Guard, Rules}},
		{"many, down, refused", manyRedirects, spec.ConflictRefuse, false, []Stage{Guard}},
		{"many, up", manyRedirects, spec.ConflictWarn, true, []Stage{Guard}},
		{"few, down", manyRedirects - 1, spec.ConflictWarn, false, []Stage{Guard}},
	} {
		t.Run(test.name, func(t *testing.T) {
			set := rules.Set{Redirects: make([]rules.Redirect, test.redirect)}
			for i := range set.Redirects {
				set.Redirects[i] = rules.Redirect{Protocol: rules.TCP, Port: rules.Port(i + 1), To: addr("203.0.113.25")}
			}
			goal := Want{
				Network: want, Forward: true, Start: true, Conflict: test.conflict,
				Rules: rules.NewPlan(set, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: want.Sources.Addresses()}),
			}
			have := Have{State: State{Index: 3, Up: test.up, Sysctls: Sysctls{}}, Differs: []string{"no rules"}}
			var loads []Stage
			probed := false
			for _, g := range Steps(goal, have) {
				for _, s := range g.Steps {
					switch s := s.(type) {
					case Probe:
						probed = true
					case Load:
						loads = append(loads, g.Stage)
						if last := len(loads) == len(test.loads); s.Part == last || s.Rules.Equal(goal.Rules) != last {
							t.Errorf("load %d: %q", len(loads), s)
						}
						if g.Stage == Rules && !probed {
							t.Error("loaded before the probe")
						}
					}
				}
			}
			if !slices.Equal(loads, test.loads) || !probed {
				t.Errorf("loaded in the stages %v, want %v; probed: %t", loads, test.loads, probed)
			}
		})
	}
}

// From any state the steps lead to one without steps, in few rounds of each stage. Until
// all rules are loaded, nothing opens the way between the sides, and the address comes
// after rules and sysctls.
func TestStepsConverge(t *testing.T) {
	source := rand.New(rand.NewPCG(16, 2))
	set, err := rules.Parse("80 tcp 203.0.113.25", nil)
	if err != nil {
		t.Fatal(err)
	}
	many := set
	for port := range rules.Port(manyRedirects) {
		r := set.Redirects[0]
		r.Port += port
		many.Redirects = append(many.Redirects, r)
	}
	for n := range 1000 {
		set := set
		if source.IntN(3) == 0 {
			set = many
		}
		network := want
		network.Sources = slices.Clone(want.Sources)
		if source.IntN(3) == 0 {
			network.Sources = append(network.Sources, spec.Source{Prefix: netip.MustParsePrefix("192.168.12.97/24"), Gateway: addr("192.168.12.1")})
		}
		gateway := addr([]string{"fe80::1", "2001:db8:12::1"}[source.IntN(2)])
		for _, a := range []string{"2001:db8:12::99/64", "2001:db8:12::97/64"}[:source.IntN(3)] {
			network.Sources = append(network.Sources, spec.Source{Prefix: netip.MustParsePrefix(a), Gateway: gateway})
		}
		six := len(network.Sources.Of(true)) > 0
		if six && source.IntN(4) == 0 {
			network.Sources = network.Sources.Of(true)
		}
		network.Cluster = ClusterSide{Interface: "eth0", Mark: 0x1000, Table: 4711, Destinations: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}}
		goal := Want{
			Network: network, Forward: source.IntN(4) > 0, Start: source.IntN(2) == 0, Conflict: []spec.Conflict{spec.ConflictWarn, spec.ConflictRefuse, spec.ConflictDefend}[source.IntN(3)],
			Rules: rules.NewPlan(set, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: network.Sources.Addresses()}),
		}
		have := Have{State: random(source, network), Redirects: source.IntN(2) == 0}
		if six || source.IntN(3) == 0 {
			if randomIPv6(source, network, &have.State); !six && len(have.State.IPv6.Cluster.Rules) == 0 {
				have.State.IPv6 = nil // it is not observed
				have.State.Addresses = slices.DeleteFunc(have.State.Addresses, func(a netip.Prefix) bool { return a.Addr().Is6() })
			}
		}
		for _, a := range []string{"192.168.12.98", "2001:db8:12::98", "192.168.12.99", "192.168.13.7"} {
			if source.IntN(3) == 0 {
				have.Former = append(have.Former, addr(a))
			}
		}
		another := six && source.IntN(3) == 0 // host has an IPv6 address
		if source.IntN(3) == 0 {
			goal.Gate, goal.Role, goal.Network.Shared = &Gate{Interface: "macvlan0", Sources: network.Sources.Addresses()}, Standby+Role(source.IntN(3)), true
			another = false // other routers with the address are no other hosts
		}
		if source.IntN(2) == 0 {
			have.Gate = []string{"no gate"} // or one that is not wanted
		}
		if source.IntN(3) > 0 {
			have.Differs = []string{"other rules"}
		}
		if source.IntN(3) == 0 {
			have.Strays = []string{"stale rules"}
		}
		begin := fmt.Sprintf("%+v", have)
		var log []string
		rounds, last := make(map[Stage]int), Stage(0)
		for {
			groups := Steps(goal, have)
			if len(groups) == 0 {
				break
			}
			g := groups[0]
			if rounds[g.Stage]++; rounds[g.Stage] > 3 {
				t.Fatalf("%d: stage %d does not end: %v\nfrom %s\nafter %s", n, g.Stage, g.Steps, begin, strings.Join(log, "\n"))
			}
			for _, s := range g.Steps {
				log = append(log, s.String())
				switch s := s.(type) {
				case Fence:
					have.Fenced, have.Changed = true, true
				case RemoveGate:
					have.Fenced = true
				case Change:
					opens := !s.Optional && s.Op == WriteSysctl
					if s.Op == AddAddress && len(have.Gate) > 0 && !have.Fenced || s.Op == AddAddress && s.Shared != (goal.Gate != nil) {
						t.Fatalf("%d: %q before the gate, after\n%s", n, s, strings.Join(log, "\n"))
					}
					open := have.Loaded == nil && len(have.Differs) > 0 || have.Loaded != nil && !have.Loaded.Equal(goal.Rules)
					if opens && open || !opens && !s.Optional && have.Loaded == nil && len(have.Differs) > 0 {
						t.Fatalf("%d: %q before the rules, after\n%s", n, s, strings.Join(log, "\n"))
					}
					if s.Op == AddAddress && s.Address.Addr().Is6() && leaks(network, have.State) {
						t.Fatalf("%d: %q while IPv6 is open, from %s, after\n%s", n, s, begin, strings.Join(log, "\n"))
					}
					simulate(&have.State, s)
					have.Changed = true
				case Load:
					have.Loaded, have.Changed = &s.Rules, true
				case Probe:
					have.Probed = true
				case Settle:
					have.Trusted = true
				case Announce:
					ipv6 := s.Addresses[0].Is6()
					if !goal.Network.Usable(have.State, ipv6) {
						t.Fatalf("%d: announced before it is there: %s", n, strings.Join(log, "\n"))
					}
					have.Announced[familyOf(ipv6)] = true
				case Ask:
					have.Asked[familyOf(s.Gateway.Is6())] = true
				case Await:
					have.Awaited = true
					if another {
						have.State.IPv6.Duplicate = append(have.State.IPv6.Duplicate, have.State.IPv6.Tentative...)
					}
					have.State.IPv6.Tentative = nil
				case RemoveStray:
					have.Strays = have.Strays[1:]
				}
			}
			if goal.Gate != nil && (have.Probed || have.Trusted || have.Announced != [2]bool{} || have.Asked != [2]bool{}) {
				t.Fatalf("%d: a claim beside that of the election: %v", n, g.Steps)
			}
			have.Claimed = have.Claimed || g.Stage == Claim
			if six && !have.Opened && g.Stage >= Routing && leaks(network, have.State) {
				t.Fatalf("%d: IPv6 open after stage %d, from %s, after\n%s", n, g.Stage, begin, strings.Join(log, "\n"))
			}
			if last = g.Stage; last == Opening {
				have.Opened = true
			}
		}
		if len(have.Gate) > 0 && !have.Fenced {
			t.Fatalf("%d: the gate stays as it was, after\n%s", n, strings.Join(log, "\n"))
		}
		for _, a := range have.State.Addresses {
			if goal.Start && slices.Contains(have.Former, a.Addr()) && !network.Sources.Have(a.Addr()) {
				t.Fatalf("%d: %s of an earlier configuration is left, from %s, after\n%s", n, a, begin, strings.Join(log, "\n"))
			}
		}
		if s := have.State.IPv6; goal.Start && !six && s != nil && (len(s.Cluster.Rules) > 0 || len(s.Cluster.Table) > 0 || slices.ContainsFunc(s.Routes, network.rejecting().same)) {
			t.Fatalf("%d: IPv6 of an earlier configuration is left, from %s, after\n%s", n, begin, strings.Join(log, "\n"))
		}
		have.Differs, have.Changed, have.Opened, goal.Start = nil, false, false, false
		if six && !goal.Network.Usable(have.State, true) {
			// The end of the detection is an event, after which a repair opens IPv6.
			if leaks(network, have.State) {
				t.Fatalf("%d: IPv6 left open, from %s, after\n%s", n, begin, strings.Join(log, "\n"))
			}
			have.State.IPv6.Tentative, have.State.IPv6.Duplicate = nil, nil
			for range 3 {
				for _, g := range Steps(goal, have) {
					for _, s := range g.Steps {
						if c, is := s.(Change); is {
							log = append(log, s.String())
							simulate(&have.State, c)
						}
					}
				}
			}
		}
		if six && network.isGated(have.State) {
			t.Fatalf("%d: IPv6 closed\nfrom %s\nafter %s", n, begin, strings.Join(log, "\n"))
		}
		if left := Steps(goal, have); len(left) > 0 {
			t.Fatalf("%d: left %v\nfrom %s\nafter %s", n, left, begin, strings.Join(log, "\n"))
		}
	}
}

// From the state that a router leaves, Remove leads back to the one from before, without an
// address that routes by the egress interface have lost, and nothing is left to remove.
func TestRemoveLeadsBack(t *testing.T) {
	source := rand.New(rand.NewPCG(17, 1))
	for n := range 1000 {
		network := want
		network.Cluster = ClusterSide{Interface: "eth0", Mark: 0x1000, Table: 4711, Destinations: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}}
		if source.IntN(2) == 0 {
			network.Sources = append(slices.Clone(want.Sources), spec.Source{
				Prefix: netip.MustParsePrefix("2001:db8:12::99/64"), Gateway: addr([]string{"fe80::1", "2001:db8:12::1"}[source.IntN(2)]),
			})
		}
		before := random(source, network)
		if len(network.Sources) > 1 {
			randomIPv6(source, network, &before)
			*before.IPv6 = IPv6State{
				Forwards: before.IPv6.Forwards, Cluster: ClusterState{Index: 2, Addresses: before.IPv6.Cluster.Addresses},
				Routes: slices.DeleteFunc(before.IPv6.Routes, func(r Route) bool { return r.Index == before.Index || r.same(network.rejecting()) }),
			}
		}
		before.Cluster.Rules, before.Addresses = nil, nil
		ours := slices.Concat(network.Routes(3), network.routesIPv6(3))
		before.Routes = slices.DeleteFunc(before.Routes, func(r Route) bool { return r.Index == before.Index || r.Destination == ours[0].Destination })
		have := Have{State: copied(before)}
		for range 10 {
			if have.State.IPv6 != nil { // duplicate address detection ends
				have.State.IPv6.Tentative = nil
			}
			for _, g := range Steps(Want{Network: network, Forward: true}, have) {
				for _, s := range g.Steps {
					if c, is := s.(Change); is {
						simulate(&have.State, c)
					}
				}
			}
		}
		have.Strays, have.Gate = []string{"rules"}, []string{"a gate"}
		begin := fmt.Sprintf("%+v\nthen %+v", before, have.State)
		var log []string
		forgotten := false
		for _, s := range Remove(Want{Network: network}, have, before) {
			log = append(log, s.String())
			if c, is := s.(Change); is {
				simulate(&have.State, c)
			}
			forgotten = forgotten || s == Step(Forget{})
			if _, is := s.(RemoveGate); is {
				have.Gate = nil
				if len(have.State.Addresses) > 0 || len(have.Strays) > 0 {
					t.Fatalf("%d: the gate goes before the address or the rules:\n%s", n, strings.Join(log, "\n"))
				}
			}
			if _, is := s.(RemoveStray); is {
				have.Strays = nil
				if !forgotten {
					t.Fatalf("%d: the rules go before the connections:\n%s", n, strings.Join(log, "\n"))
				}
				if len(have.State.Addresses) > 0 || slices.ContainsFunc(have.State.AllRoutes(), func(r Route) bool { return slices.ContainsFunc(ours, r.same) }) {
					t.Fatalf("%d: the rules go before the address and its routes:\n%s", n, strings.Join(log, "\n"))
				}
			}
		}
		if got, want := printed(have.State), printed(before); got != want {
			t.Fatalf("%d: got\n%s\nwant\n%s\nfrom %s\nafter\n%s", n, got, want, begin, strings.Join(log, "\n"))
		}
		if left := Remove(Want{Network: network}, have, before); len(left) > 0 {
			t.Fatalf("%d: left %v\nfrom %s\nafter\n%s", n, left, begin, strings.Join(log, "\n"))
		}
	}
}

// copied returns a copy that shares nothing with a state.
func copied(s State) State {
	s.Addresses, s.Routes, s.Forwarding = slices.Clone(s.Addresses), slices.Clone(s.Routes), slices.Clone(s.Forwarding)
	s.Sysctls = maps.Clone(s.Sysctls)
	if s.IPv6 != nil {
		six := *s.IPv6
		six.Routes = slices.Clone(six.Routes)
		s.IPv6 = &six
	}
	return s
}

// printed returns what a router changes of a state, in a fixed order.
func printed(s State) string {
	var lines []string
	for _, r := range slices.Concat(s.AllRoutes(), s.Cluster.Table, s.of(true).Cluster.Table) {
		lines = append(lines, r.String())
	}
	slices.Sort(lines)
	return fmt.Sprintf("up %v promotes %v forwards %v %v %v\n%v\n%v\n%s\n%s", s.Up, s.Promotes, s.Forwards, s.Forwarding, s.IPv6 != nil && s.IPv6.Forwards,
		s.Addresses, slices.Concat(s.Cluster.Rules, s.of(true).Cluster.Rules), strings.Join(lines, "\n"), s.Sysctls)
}

// An IPv6 address that another host has is tried again by a run that starts, and by a
// repair that is asked to, once.
func TestContestedAddressIsRetried(t *testing.T) {
	network := want
	network.Sources = append(slices.Clone(want.Sources), spec.Source{Prefix: netip.MustParsePrefix("2001:db8:12::99/64"), Gateway: addr("fe80::1")})
	network.Cluster = ClusterSide{Interface: "eth0", Mark: 0x1000, Table: 4711}
	again := []string{"remove address 2001:db8:12::99/64 from macvlan0", "add address 2001:db8:12::99/64 to macvlan0"}
	for name, test := range map[string]struct {
		want Want
		have Have
		goal []string
	}{
		"start":         {Want{Start: true}, Have{}, again},
		"repair":        {Want{}, Have{}, nil},
		"asked repair":  {Want{Retry: true}, Have{}, again},
		"after a retry": {Want{Retry: true}, Have{Claimed: true}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			test.want.Network = network
			test.have.State = done()
			test.have.State.Cluster.Index, test.have.State.Sysctls = 2, nil
			test.have.State.Addresses = append(test.have.State.Addresses, netip.MustParsePrefix("2001:db8:12::99/64"))
			test.have.State.IPv6 = &IPv6State{
				Routes: []Route{network.rejecting()}, Duplicate: []netip.Addr{addr("2001:db8:12::99")},
				Cluster: ClusterState{Index: 2, Rules: []Rule{network.Cluster.gate()}},
			}
			var got []string
			for _, g := range Steps(test.want, test.have) {
				for _, s := range g.Steps {
					if c, is := s.(Change); is && (c.Op == AddAddress || c.Op == RemoveAddress) {
						got = append(got, s.String())
					}
				}
			}
			if !slices.Equal(got, test.goal) {
				t.Errorf("got %q, want %q", got, test.goal)
			}
		})
	}
}
