package rules

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the files in testdata/sources")

// dual has two sources of each family.
var dual = Sides{
	Cluster: "eth0", Egress: "macvlan0", Mark: 0x1000, Health: 9465,
	Sources: []netip.Addr{ip("192.168.12.99"), ip("2001:db8:12::99"), ip("192.168.12.100"), ip("2001:db8:12::100")},
}

var dualSet = Set{
	Redirects: []Redirect{
		{Protocol: TCP, Port: 443, To: ip("203.0.113.25")},
		{Protocol: TCP, Port: 443, To: ip("2001:db8::25")},
		{Protocol: UDP, Port: 5353, To: ip("2001:db8::9"), ToPort: 53},
	},
	Fallback: ip("203.0.113.27"), Fallback6: ip("2001:db8::27"),
}

// With sources of both families, the rules for IPv6 are those of IPv4, and let neighbour
// discovery pass.
func TestSources(t *testing.T) {
	one := dual
	one.Sources = dual.Sources[:2]
	six := dual
	six.Sources = dual.Sources[1:2]
	sixSet := Set{Redirects: dualSet.Redirects[1:], Fallback6: dualSet.Fallback6}
	for name, test := range map[string]struct {
		plan  Plan
		print []byte // of unit-test
	}{
		"one":       {NewPlan(dualSet, one), UnitTest(dualSet, one)},
		"two":       {NewPlan(dualSet, dual), UnitTest(dualSet, dual)},
		"proxy":     {NewProxyPlan(dual), nil},
		"only-IPv6": {NewPlan(sixSet, six), UnitTest(sixSet, six)},
	} {
		t.Run(name, func(t *testing.T) {
			plan := test.plan
			for _, p := range []Plan{plan, plan.WithDropLog(), plan.WithoutRedirects(), plan.Without(IPv6), plan.Without(IPv4), plan.WithoutParts(plan.WithDropLog().Parts())} {
				if err := p.Validate(); err != nil {
					t.Error(err)
				}
			}
			var got strings.Builder
			fmt.Fprintf(&got, "-- unit-test --\n%s-- iptables --\n", test.print)
			for _, c := range plan.IPTables() {
				fmt.Fprintf(&got, "%s %s %s\n%s", c.Family, c.Table, c.Name, c.Saved)
			}
			fmt.Fprintf(&got, "-- plan --\n%s", plan)
			file := "../testdata/sources/" + name + ".txt"
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil { //nolint:gosec // it is for everybody to read
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got.String(), "\n")); diff != "" {
				t.Errorf("%s: - want, + got (make golden rewrites it):\n%s", file, diff)
			}
		})
	}
}

// Sources of one family do not change the rules of the other one, which are those without
// any.
func TestFamiliesAreIndependent(t *testing.T) {
	of := func(p Plan, f Family) []Chain {
		return slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return c.Family != f })
	}
	one := dual
	one.Sources = dual.Sources[:1]
	both := one
	both.Sources = dual.Sources[:2]
	four := Set{Redirects: dualSet.Redirects[:1], Fallback: dualSet.Fallback}
	if diff := cmp.Diff(fmt.Sprint(of(NewPlan(four, one), IPv4)), fmt.Sprint(of(NewPlan(dualSet, both), IPv4))); diff != "" {
		t.Errorf("IPv4 alone and with IPv6:\n%s", diff)
	}
	without := NewPlan(dualSet, both).Without(IPv6)
	if len(of(without, IPv6)) > 0 || !slices.Equal(without.Redirects, four.Redirects) {
		t.Errorf("without IPv6:\n%s", without)
	}
	if err := without.Validate(); err != nil {
		t.Error(err)
	}
	if NewPlan(dualSet, one).Validate() == nil {
		t.Error("a redirect of a family without a source is valid")
	}
	both.Health = 0
	if guarded := NewPlan(dualSet, both).WithoutRedirects(); len(guarded.Destinations()) > 0 || !guarded.Equal(NewPlan(Set{}, both)) {
		t.Errorf("without redirects:\n%s", guarded)
	}
	if got := len(NewPlan(dualSet, both).Destinations()); got != 5 {
		t.Errorf("%d destinations, want 5", got)
	}
	if got := dualSet.Families(); !slices.Equal(got, []Family{IPv4, IPv6}) {
		t.Errorf("families of destinations: %v", got)
	}
	if got := (Set{Fallback6: ip("2001:db8::27")}).Families(); !slices.Equal(got, []Family{IPv6}) {
		t.Errorf("families of a fallback: %v", got)
	}
}

// Each address is in one share at most, and sources have equal numbers of addresses, up to
// an eighth. The first one has those in no share.
func TestShares(t *testing.T) {
	for n := 1; n <= MostSources; n++ {
		clients := make([]int, n)
		for address := range 256 {
			of := 0
			for i := 1; i < n; i++ {
				for _, s := range shares(i, n) {
					if uint8(address)&s.Mask() != s.End { //nolint:gosec // a byte
						continue
					}
					if of != 0 {
						t.Fatalf("%d sources: address %d is in two shares", n, address)
					}
					of = i
				}
			}
			clients[of]++
		}
		if low, high := slices.Min(clients), slices.Max(clients); 8*low < 7*high-8 {
			t.Errorf("%d sources have %v of 256 addresses", n, clients)
		}
	}
	// Few consecutive addresses are spread as well.
	seen := make(map[uint8]bool)
	for address := range uint8(4) {
		for i := 1; i < 3; i++ {
			if slices.ContainsFunc(shares(i, 3), func(s Share) bool { return address&s.Mask() == s.End }) {
				seen[uint8(i)] = true //nolint:gosec // a few
			}
		}
	}
	if len(seen) != 2 {
		t.Errorf("of the addresses 0 to 3, the second and third source have %d", len(seen))
	}
}

// The helpers that the kernel has for IPv4 alone have no rules for IPv6.
func TestHelpersOfIPv6(t *testing.T) {
	with := dual
	for _, g := range HelperGroups {
		with.Helpers = append(with.Helpers, g.Helpers...)
	}
	plan := NewPlan(dualSet, with)
	if err := plan.Validate(); err != nil {
		t.Error(err)
	}
	for f, want := range map[Family]int{IPv4: 12, IPv6: 8} {
		i := slices.IndexFunc(plan.Chains, func(c Chain) bool { return c.Family == f && c.Table == Raw })
		if got := len(plan.Chains[i].Rules); got != want || len(plan.HelpersOf(f)) != want {
			t.Errorf("%s: %d rules for %d helpers, want %d", f, got, len(plan.HelpersOf(f)), want)
		}
	}
}

// A connection keeps one of the sources, also if a new one of its client got another.
func TestStaleSources(t *testing.T) {
	stale := NewPlan(dualSet, dual).Stale([]netip.Addr{ip("10.128.0.98"), ip("fd00::98")})
	at := netip.MustParseAddrPort
	for _, test := range []struct {
		source string
		want   bool
	}{{"192.168.12.99", false}, {"192.168.12.100", false}, {"192.168.12.101", true}} {
		if got := stale(Connection{TCP, ip("10.128.0.71"), at("10.128.0.98:443"), at("203.0.113.25:443"), ip(test.source)}); got != test.want {
			t.Errorf("with source %s: stale %v", test.source, got)
		}
	}
	for _, source := range dual.Sources {
		if stale(Connection{TCP, source, at("203.0.113.25:443"), at("203.0.113.25:443"), source}) {
			t.Errorf("a connection of the pod from %s is stale", source)
		}
	}
	if !stale(Connection{TCP, ip("fd00::71"), at("[fd00::98]:443"), at("[2001:db8::25]:443"), ip("2001:db8:12::101")}) {
		t.Error("IPv6 with another source is not stale")
	}
	if stale(Connection{UDP, ip("fd00::71"), at("[fd00::98]:9"), at("[2001:db8::27]:9"), ip("2001:db8:12::100")}) {
		t.Error("IPv6 to the fallback is stale")
	}
}
