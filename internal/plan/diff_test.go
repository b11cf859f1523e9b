package plan

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/spec"
)

var reserved = netip.MustParsePrefix("192.168.12.99/24")

var want = Network{
	Interface: "macvlan0",
	Sources:   spec.Sources{{Prefix: reserved, Gateway: netip.MustParseAddr("192.168.12.1")}},
}

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

// route makes a route of the main table; index 2 is eth0, 3 is macvlan0.
func route(destination, gateway string, index int, source string, metric int) Route {
	scope := ScopeLink
	if gateway != "" {
		scope = ScopeUniverse
	}
	return Route{
		Destination: netip.MustParsePrefix(destination), Gateway: addr(gateway), Index: index,
		Interface: []string{"", "lo", "eth0", "macvlan0"}[index], Source: addr(source), Metric: metric, Scope: scope,
	}
}

var (
	cniDefault = route("0.0.0.0/0", "10.128.0.1", 2, "", 0)
	cluster    = route("10.128.0.0/23", "", 2, "10.128.0.98", 0)
	subnet     = route("192.168.12.0/24", "", 3, "192.168.12.99", 0)
)

// done is a state without drift.
func done() State {
	return State{
		Index: 3, Up: true, Addresses: []netip.Prefix{reserved},
		Routes: append(want.Routes(3), cluster, subnet),
	}
}

func TestDiff(t *testing.T) {
	for name, test := range map[string]struct {
		have func() State
		want []string
	}{
		"done": {done, nil},
		"fresh": {
			func() State { return State{Index: 3, Routes: []Route{cniDefault, cluster}} },
			[]string{
				"add address 192.168.12.99/24 to macvlan0",
				"set macvlan0 up",
				"add route 192.168.12.1 dev macvlan0 scope link src 192.168.12.99",
				"replace route default via 10.128.0.1 dev eth0 by default via 192.168.12.1 dev macvlan0 src 192.168.12.99",
			},
		},
		"other protocols of routes do not matter": {
			func() State {
				s := done()
				for i := range s.Routes {
					s.Routes[i].Kernel = i
				}
				return s
			},
			nil,
		},
		"default routes with other metrics go, the last one first": {
			func() State {
				s := done()
				s.Routes = append(s.Routes, route("0.0.0.0/0", "10.128.0.1", 2, "", 100), route("0.0.0.0/0", "10.128.0.2", 2, "", 200))
				return s
			},
			[]string{
				"delete route default via 10.128.0.2 dev eth0 metric 200",
				"delete route default via 10.128.0.1 dev eth0 metric 100",
			},
		},
		"of several with our metric the first is replaced, the others go": {
			func() State {
				s := done()
				s.Routes = []Route{cniDefault, route("0.0.0.0/0", "10.128.0.2", 2, "", 0), s.Routes[0], subnet}
				return s
			},
			[]string{
				"replace route default via 10.128.0.1 dev eth0 by default via 192.168.12.1 dev macvlan0 src 192.168.12.99",
				"delete route default via 10.128.0.2 dev eth0",
			},
		},
		"a default route that drops packets is replaced too": {
			func() State {
				s := done()
				s.Routes[1] = Route{Destination: netip.MustParsePrefix("0.0.0.0/0"), Type: unreachable}
				return s
			},
			[]string{"replace route unreachable default by default via 192.168.12.1 dev macvlan0 src 192.168.12.99"},
		},
		"half of the internet is not a default route": {
			func() State {
				s := done()
				s.Routes = append(s.Routes, route("0.0.0.0/1", "10.128.0.1", 2, "", 0))
				return s
			},
			nil,
		},
		"both halves of the internet by the cluster side are its default route": {
			func() State {
				s := done()
				s.Cluster.Index = 2
				s.Routes = append(s.Routes, route("0.0.0.0/1", "10.128.0.1", 2, "", 0), route("128.0.0.0/1", "10.128.0.1", 2, "", 0))
				return s
			},
			[]string{
				"delete route 128.0.0.0/1 via 10.128.0.1 dev eth0",
				"delete route 0.0.0.0/1 via 10.128.0.1 dev eth0",
			},
		},
		"halves by two gateways are no default route": {
			func() State {
				s := done()
				s.Cluster.Index = 2
				s.Routes = append(s.Routes, route("0.0.0.0/1", "10.128.0.1", 2, "", 0), route("128.0.0.0/1", "10.128.0.2", 2, "", 0))
				return s
			},
			nil,
		},
		"a missing routing rule of the kernel comes first": {
			func() State {
				s := done()
				s.Up, s.Lost = false, []Rule{{Priority: 32766, Table: 254}}
				return s
			},
			[]string{"add routing rule priority 32766 table 254", "set macvlan0 up"},
		},
		"the gateway behind the cluster": {
			func() State {
				s := done()
				s.Routes[0] = route("192.168.12.1/32", "10.128.0.1", 2, "", 0)
				return s
			},
			[]string{"replace route 192.168.12.1 via 10.128.0.1 dev eth0 by 192.168.12.1 dev macvlan0 scope link src 192.168.12.99"},
		},
		"another address of the subnet": {
			func() State {
				s := done()
				s.Addresses = []netip.Prefix{netip.MustParsePrefix("192.168.12.50/24"), reserved}
				s.Routes = append(want.Routes(3), route("192.168.12.0/24", "", 3, "192.168.12.50", 0))
				return s
			},
			[]string{
				"set net/ipv4/conf/macvlan0/promote_secondaries = 1",
				"replace route 192.168.12.0/24 dev macvlan0 scope link src 192.168.12.50 by 192.168.12.0/24 dev macvlan0 scope link src 192.168.12.99",
			},
		},
		"the address with another length": {
			func() State {
				s := done()
				s.Addresses = []netip.Prefix{netip.MustParsePrefix("192.168.12.99/32")}
				return s
			},
			[]string{"add address 192.168.12.99/24 to macvlan0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, s := range diff(want, test.have()) {
				got = append(got, s.String())
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

// The inverse of an inverse is the step itself, except for a deleted route: its
// restore appends it.
func TestInverse(t *testing.T) {
	old := cniDefault
	for _, s := range []Change{
		{Op: AddAddress, Address: reserved},
		{Op: SetUp},
		{Op: ReplaceRoute, Route: want.Routes(3)[1], Old: &old},
		{Op: DeleteRoute, Route: cniDefault},
		{Op: WriteSysctl, Sysctl: IPForward, Value: "1", OldValue: "0"},
	} {
		if got := s.Inverse().Inverse(); got.String() != s.String() {
			t.Errorf("%s: its inverse is %q, whose inverse is %q", s, s.Inverse(), got)
		}
		if s.Inverse().String() == s.String() {
			t.Errorf("%s: is its own inverse", s)
		}
	}
	if got, want := (Change{Op: ReplaceRoute, Route: cniDefault}).Inverse().String(), "delete route default via 10.128.0.1 dev eth0"; got != want {
		t.Errorf("inverse of a route where none was: %q, want %q", got, want)
	}
}

func TestForwarding(t *testing.T) {
	if steps := Forwarding(want, State{Forwards: true}); len(steps) != 0 {
		t.Errorf("forwarding already, yet: %v", steps)
	}
	if steps := Forwarding(want, State{}); len(steps) != 1 || steps[0].String() != "set net.ipv4.ip_forward = 1" {
		t.Errorf("not forwarding: %v", steps)
	}
}
