package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const namedLines = "443 tcp DB.example.com 5432\n444-446 udp db.example.com drain=no\n80 tcp 203.0.113.25\n447 udp other.example.com.\n203.0.113.27\n"

// resolutions are those of a map.
func resolutions(of map[string]Resolution) func(string) Resolution {
	return func(name string) Resolution { return of[name] }
}

func parseNamed(t *testing.T, list string) Set {
	t.Helper()
	set, err := ParseExtended(list, variables{})
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func TestResolve(t *testing.T) {
	set := parseNamed(t, namedLines)
	if diff := cmp.Diff([]string{"db.example.com", "other.example.com."}, set.Names()); diff != "" {
		t.Errorf("names, - want, + got:\n%s", diff)
	}
	if again := parseNamed(t, set.String()); !again.Equal(set) {
		t.Errorf("%q reads back as %q", set, again)
	}
	resolved := set.Resolve(resolutions(map[string]Resolution{"db.example.com": {
		Addresses: []netip.Addr{ip("10.0.0.1"), ip("10.0.0.2"), ip("2001:db8::1")}, Former: []netip.Addr{ip("10.0.0.3")},
	}}))
	var got []string
	for _, r := range resolved.Redirects {
		var all []string
		for a := range r.All() {
			all = append(all, a.String())
		}
		got = append(got, fmt.Sprintf("%s %s %s %s %v", r.LocalPorts(), r.Protocol, r.Destination(), strings.Join(all, ","), r.Unresolved()))
	}
	want := []string{
		"443 tcp db.example.com 10.0.0.1,10.0.0.2 false", "443 tcp db.example.com 2001:db8::1 false",
		"444-446 udp db.example.com 10.0.0.1,10.0.0.2 false", "444-446 udp db.example.com 2001:db8::1 false",
		"80 tcp 203.0.113.25 203.0.113.25 false", "447 udp other.example.com.  true",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	if set.Redirects[0].To.IsValid() {
		t.Error("the set itself has changed")
	}
}

// The ports of names without an address do not get the fallback, and have no redirect.
func TestUnresolvedNamesAreRefused(t *testing.T) {
	set := parseNamed(t, namedLines)
	translations := func(set Set) (rules []string) {
		plan := NewPlan(set, sides)
		if err := plan.Validate(); err != nil {
			t.Error(err)
		}
		for _, c := range plan.IPTables() {
			if c.Table == NAT && c.Name == "EGRESS-PREROUTING" && c.Family == IPv4 {
				for line := range strings.Lines(string(c.Saved)) {
					rules = append(rules, strings.TrimPrefix(strings.TrimSpace(line), "-A EGRESS-PREROUTING -i eth0 "))
				}
			}
		}
		return rules
	}
	want := []string{
		"-p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25",
		"-p tcp -m tcp --dport 443 -j RETURN", "-p udp -m udp --dport 444:447 -j RETURN", "-j DNAT --to-destination 203.0.113.27",
	}
	if diff := cmp.Diff(want, translations(set)); diff != "" {
		t.Errorf("no name has an address, - want, + got:\n%s", diff)
	}
	resolved := set.Resolve(resolutions(map[string]Resolution{"db.example.com": {Addresses: []netip.Addr{ip("10.0.0.1")}}}))
	want = []string{
		`-p tcp -m tcp --dport 443 -m comment --comment "db.example.com" -j DNAT --to-destination 10.0.0.1:5432`,
		`-p udp -m udp --dport 444:446 -m comment --comment "db.example.com" -j DNAT --to-destination 10.0.0.1`,
		"-p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25", "-p udp -m udp --dport 447 -j RETURN", "-j DNAT --to-destination 203.0.113.27",
	}
	if diff := cmp.Diff(want, translations(resolved)); diff != "" {
		t.Errorf("one has, - want, + got:\n%s", diff)
	}
	set.Fallback = netip.Addr{}
	if got := translations(set); len(got) != 1 {
		t.Errorf("without a fallback: %v", got)
	}
	if plan := NewPlan(set, sides); plan.Size() != 4 || len(plan.Destinations()) != 1 {
		t.Errorf("%d redirects to %v", plan.Size(), plan.Destinations())
	}
}

// The number of rules that refuse does not grow with the number of names: one contains the
// redirects between them, which precede it.
func TestRefusalsOfManyNames(t *testing.T) {
	var list strings.Builder
	for i := range 6000 {
		fmt.Fprintf(&list, "%d tcp %s 443\n", 10_000+i, []string{"a.example.com", "203.0.113.25", "2001:db8::25"}[i%3])
	}
	set := parseNamed(t, list.String()+"20000-20010 tcp a.example.com\n20011-20020 tcp 203.0.113.26\n20021 tcp a.example.com\n20023 tcp a.example.com\n203.0.113.27\n2001:db8::27\n")
	for _, f := range []Family{IPv4, IPv6} {
		got := make(map[string]bool)
		for _, r := range set.refused(f) {
			got[r.LocalPorts()] = true
			for port := r.Port; port <= r.last(); port++ {
				if i := int(port) - 10_000; port < 20_000 && i%3 != 0 && i%3 != map[Family]int{IPv4: 1, IPv6: 2}[f] {
					t.Errorf("%s: port %d is refused, which the fallback has", f, port)
				}
			}
		}
		want := map[Family]int{IPv4: 2000 + 2, IPv6: 2000 + 3}[f]
		if len(got) != want || !got["20023"] {
			t.Errorf("%s: %d rules, want %d", f, len(got), want)
		}
	}
	known := set.Resolve(resolutions(map[string]Resolution{"a.example.com": {Addresses: []netip.Addr{ip("10.0.0.1")}}}))
	if got := known.refused(IPv4); len(got) != 0 {
		t.Errorf("%d rules with an address", len(got))
	}
	var dense strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&dense, "%d tcp %s 443\n", 10_000+i, []string{"a.example.com", "203.0.113.25"}[i%2])
	}
	if got := parseNamed(t, dense.String()).refused(IPv4); len(got) != 1 || got[0].LocalPorts() != "10000-19998" {
		t.Errorf("%d rules for one block of ports, want one", len(got))
	}
}

func TestNamesBeside(t *testing.T) {
	before := parseNamed(t, "443 tcp a.example.com\n444 tcp b.example.com\n445 tcp 203.0.113.25\n446 tcp c.example.com")
	after := parseNamed(t, "443 tcp a.example.com\n444 tcp c.example.com\n445 tcp b.example.com\n446 tcp c.example.com")
	if got := after.NamesBeside(before); !slices.Equal(got, []string{"b.example.com", "c.example.com"}) {
		t.Errorf("%v, want those of the lines that have changed", got)
	}
}

func TestUnitTestWithNames(t *testing.T) {
	want := `-A PREROUTING -i eth0 -p tcp --dport 443 -j DNAT --to-destination db.example.com:5432
-A PREROUTING -i eth0 -p udp --dport 444:446 -j DNAT --to-destination db.example.com:1444-1446/444
-A PREROUTING -i eth0 -p tcp --dport 80 -j DNAT --to-destination 203.0.113.25
-A PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27
-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
`
	set := parseNamed(t, "443 tcp db.example.com 5432\n444-446 udp db.example.com 1444-1446\n80 tcp 203.0.113.25\n203.0.113.27")
	if diff := cmp.Diff(want, string(UnitTest(set, sides))); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

// A name that has lost its addresses of one family keeps the connections to them, and its
// port of that family does not get the fallback.
func TestStaleWithoutAFamily(t *testing.T) {
	set := parseNamed(t, "443 tcp db.example.com 5432\n444 tcp db.example.com 5432 drain=no\n203.0.113.27\n2001:db8::27")
	resolved := set.Resolve(func(string) Resolution {
		return Resolution{Addresses: []netip.Addr{ip("10.0.0.1")}, Former: []netip.Addr{ip("2001:db8::1")}}
	})
	both := sides
	both.Sources = []netip.Addr{sides.Sources[0], ip("2001:db8:12::99")}
	plan := NewPlan(resolved, both)
	if err := plan.Validate(); err != nil || plan.Size() != 4 {
		t.Errorf("%d redirects and fallbacks, %v", plan.Size(), err)
	}
	if !strings.Contains(plan.String(), "IPv6\n  -i eth0 -p tcp --dport 443:444 -j RETURN\n") {
		t.Errorf("the ports are not refused:\n%s", plan)
	}
	stale := plan.Stale([]netip.Addr{ip("fd00::98")})
	for which, want := range map[string]bool{"443 [2001:db8::1]:5432": false, "443 [2001:db8::27]:443": true, "444 [2001:db8::1]:5432": true} {
		port, server, _ := strings.Cut(which, " ")
		c := Connection{TCP, ip("fd00::71"), netip.MustParseAddrPort("[fd00::98]:" + port), netip.MustParseAddrPort(server), both.Sources[1]}
		if stale(c) != want {
			t.Errorf("port %s to %s: stale %v, want %v", port, server, !want, want)
		}
	}
}

// Connections to an address that a name no longer has stay, unless the line says otherwise;
// those to any other server end.
func TestStaleWithNames(t *testing.T) {
	set := parseNamed(t, "443 tcp db.example.com 5432\n444 tcp db.example.com 5432 drain=no\n203.0.113.27")
	for name, test := range map[string]struct {
		found Resolution
		stale map[string]bool // by local port and server
	}{
		"followed": {
			Resolution{Addresses: []netip.Addr{ip("10.0.0.1")}, Former: []netip.Addr{ip("10.0.0.2")}},
			map[string]bool{
				"443 10.0.0.1:5432": false, "443 10.0.0.2:5432": false, "443 10.0.0.3:5432": true, "443 10.0.0.2:80": true,
				"444 10.0.0.1:5432": false, "444 10.0.0.2:5432": true,
			},
		},
		"since the start": {
			Resolution{Addresses: []netip.Addr{ip("10.0.0.1")}, AnyFormer: true},
			map[string]bool{"443 10.0.0.3:5432": false, "443 10.0.0.3:80": true, "444 10.0.0.1:5432": false, "444 10.0.0.3:5432": true},
		},
		"no answer since the start": {
			Resolution{AnyFormer: true},
			map[string]bool{"443 10.0.0.3:5432": false, "443 10.0.0.3:443": true, "443 203.0.113.27:443": true, "444 10.0.0.3:5432": false},
		},
		"no answer since a reload": {Resolution{}, map[string]bool{"443 10.0.0.3:5432": true, "443 203.0.113.27:443": true}},
	} {
		t.Run(name, func(t *testing.T) {
			resolved := set.Resolve(func(string) Resolution { return test.found })
			stale := NewPlan(resolved, sides).Stale([]netip.Addr{ip("10.128.0.98")})
			for which, want := range test.stale {
				port, server, _ := strings.Cut(which, " ")
				c := Connection{TCP, ip("10.128.0.71"), netip.MustParseAddrPort("10.128.0.98:" + port), netip.MustParseAddrPort(server), sides.Sources[0]}
				if stale(c) != want {
					t.Errorf("port %s to %s: stale %v, want %v", port, server, !want, want)
				}
				c.RepliesTo = ip("192.168.12.98")
				if !stale(c) {
					t.Errorf("port %s to %s from another source is not stale", port, server)
				}
			}
		})
	}
}

// A change of ten names among 10,000 destinations changes only the chains that they are in:
// their own, or with one address those of their ranges, which have few other rules.
func TestNamesChangeTheirChains(t *testing.T) {
	var list strings.Builder
	for i := range 10_000 {
		to := "203.0.113.25"
		if i%1000 == 500 {
			to = fmt.Sprintf("n%d.example.com 80", i/1000)
		}
		fmt.Fprintf(&list, "%d tcp %s\n", 10_001+i, to)
	}
	set := parseNamed(t, list.String())
	chains := func(addresses ...string) map[string]string {
		t.Helper()
		var all []netip.Addr
		for _, a := range addresses {
			all = append(all, ip(a))
		}
		texts := make(map[string]string)
		for _, c := range NewPlan(set.Resolve(func(string) Resolution { return Resolution{Addresses: all} }), sides).IPTables() {
			texts[fmt.Sprint(c.Family, c.Table, c.Name)] = string(c.Saved)
		}
		return texts
	}
	for name, test := range map[string]struct {
		before, after []string
		changed       int
	}{
		"one address":      {[]string{"10.0.0.1"}, []string{"10.0.0.2"}, 10},
		"two addresses":    {[]string{"10.0.0.1", "10.0.0.2"}, []string{"10.0.0.1", "10.0.0.3"}, 10},
		"another number":   {[]string{"10.0.0.1", "10.0.0.2"}, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, 10},
		"the first answer": {nil, []string{"10.0.0.1"}, 10},
		"a second address": {[]string{"10.0.0.1"}, []string{"10.0.0.1", "10.0.0.2"}, 20}, // also a chain of its own
		"no change":        {[]string{"10.0.0.1", "10.0.0.2"}, []string{"10.0.0.1", "10.0.0.2"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			before, after := chains(test.before...), chains(test.after...)
			changed, lines := 0, 0
			for chain, text := range after {
				if before[chain] != text {
					changed++
					lines += strings.Count(text, "\n")
				}
			}
			if changed != test.changed || lines > changed*fanOut {
				t.Errorf("%d chains with %d rules changed, want %d", changed, lines, test.changed)
			}
		})
	}
}

// The rules of a name have it as a comment, unless it is too long. Those of unit-test do not.
func TestNamesAreComments(t *testing.T) {
	address := []netip.Addr{netip.MustParseAddr("203.0.113.9")}
	for name, commented := range map[string]bool{"db.test": true, strings.Repeat("a.", 124) + "com": true, strings.Repeat("a.", 124) + "com.": false} {
		set, err := ParseExtended("80 tcp "+name, nil)
		if err != nil {
			t.Fatal(err)
		}
		sides := Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")}}
		plan := NewPlan(set.Resolve(func(string) Resolution { return Resolution{Addresses: address} }), sides)
		text := ""
		for _, c := range plan.IPTables() {
			text += string(c.Saved)
		}
		comment := fmt.Sprintf("--dport 80 -m comment --comment %q -j DNAT --to-destination 203.0.113.9\n", name)
		if strings.Contains(text, comment) != commented {
			t.Errorf("comment %v, want %v:\n%s", !commented, commented, text)
		}
		if text := string(UnitTest(set, sides)); strings.Contains(text, "comment") {
			t.Errorf("unit-test:\n%s", text)
		}
	}
}
