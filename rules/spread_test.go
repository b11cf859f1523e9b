package rules

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// addresses returns n addresses from 10.0.0.1 on, in IPv6 from 2001:db8::1 on.
func addresses(f Family, n int) []netip.Addr {
	a := ip("10.0.0.1")
	if f == IPv6 {
		a = ip("2001:db8::1")
	}
	var all []netip.Addr
	for range n {
		all, a = append(all, a), a.Next()
	}
	return all
}

func TestSpread(t *testing.T) {
	for _, f := range []Family{IPv4, IPv6} {
		for _, n := range []int{1, 2, 3, MaxAddresses} {
			all := addresses(f, n)
			r := Redirect{Protocol: TCP, Port: 80, ToPort: 8080}.Spread(all)
			if got := slices.Collect(r.All()); !slices.Equal(got, all) || r.Number() != n || r.Several() != (n > 1) {
				t.Errorf("%v, %d of them; want %v", got, r.Number(), all)
			}
			if again := (Redirect{Protocol: TCP, Port: 80, ToPort: 8080}).Spread(all); again != r {
				t.Errorf("%v and %v differ", r, again)
			}
			if !r.Reaches(netip.AddrPortFrom(all[n-1], 8080), 80) || r.Reaches(netip.AddrPortFrom(all[n-1].Next(), 8080), 80) || r.Reaches(netip.AddrPortFrom(all[0], 80), 80) {
				t.Errorf("%v reaches other servers than its own", r)
			}
		}
	}
	// A list of one address each has 10,000 of them.
	if size := unsafe.Sizeof(Redirect{}); size > 48 {
		t.Errorf("a redirect has %d bytes", size)
	}
}

// Each address gets the same share of the connections: each rule of n - i left one of as
// many.
func TestSpreadOut(t *testing.T) {
	for n := 2; n <= MaxAddresses; n++ {
		set := Set{Redirects: []Redirect{Redirect{Protocol: TCP, Port: 80}.Spread(addresses(IPv4, n))}}
		rest, rules := 1.0, 0
		for line := range strings.Lines(string(UnitTest(set, sides))) {
			if !strings.Contains(line, "DNAT") {
				continue
			}
			chance := 1.0
			if _, after, random := strings.Cut(line, "--mode random --probability "); random {
				text, _, _ := strings.Cut(after, " ")
				chance, _ = strconv.ParseFloat(text, 64)
			}
			if share := rest * chance * float64(n); share < 1-1e-6 || share > 1+1e-6 {
				t.Errorf("%d addresses: %s has %f of its share", n, line, share)
			}
			rest -= rest * chance
			rules++
		}
		if rules != n || rest > 1e-9 {
			t.Errorf("%d addresses: %d rules, and %f of the connections without one", n, rules, rest)
		}
	}
}

// In a tree each redirect to several addresses has a chain of its own, and a change of its
// addresses changes that chain alone.
func TestTreeWithSeveralAddresses(t *testing.T) {
	var redirects []Redirect
	for i := range 1000 {
		r := Redirect{Protocol: TCP, Port: Port(10001 + 4*i), Last: Port(10001 + 4*i + i%3)}
		if i%3 == 0 {
			r.Last = 0
		}
		redirects = append(redirects, r.Spread(addresses(IPv4, 1+i%5)))
	}
	texts := func() map[string][]byte {
		found := make(map[string][]byte)
		for _, c := range NewPlan(Set{Redirects: redirects}, sides).IPTables() {
			if found[c.Name] != nil && c.Table == NAT && c.Family == IPv4 {
				t.Errorf("two chains %s", c.Name)
			}
			if c.Table == NAT {
				found[c.Name] = c.Saved
				if !OwnsChain(c.Name) {
					t.Errorf("%s is no chain of ours", c.Name)
				}
			}
		}
		return found
	}
	before := texts()
	for i := 7; i < 1000; i += 100 { // three addresses
		redirects[i] = redirects[i].Spread(addresses(IPv4, 3)[:2])
	}
	changed := 0
	for name, text := range texts() {
		if !bytes.Equal(before[name], text) {
			changed++
			if n := bytes.Count(text, []byte("\n")); n != 2 {
				t.Errorf("%s changed and has %d rules", name, n)
			}
		}
		if n := bytes.Count(text, []byte("\n")); n > fanOut+1 {
			t.Errorf("%s has %d rules", name, n)
		}
	}
	if changed != 10 {
		t.Errorf("%d chains changed", changed)
	}
}

func TestValidateSeveralAddresses(t *testing.T) {
	for name, to := range map[string][]netip.Addr{
		"twice":       {ip("10.0.0.1"), ip("10.0.0.2"), ip("10.0.0.1")},
		"unspecified": {ip("10.0.0.1"), ip("0.0.0.0")},
		"too many":    addresses(IPv4, MaxAddresses+1),
	} {
		plan := NewPlan(Set{Redirects: []Redirect{Redirect{Protocol: TCP, Port: 80}.Spread(to)}}, sides)
		if err := plan.Validate(); err == nil || !strings.Contains(err.Error(), "expected up to 64 addresses of IPv4, each once") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// The lines of a plan name all addresses.
func TestPlanWithSeveralAddresses(t *testing.T) {
	set, err := ParseExtended("443 tcp 203.0.113.25,203.0.113.26,203.0.113.27 8443", variables{})
	if err != nil {
		t.Fatal(err)
	}
	plan := NewPlan(set, sides)
	got := ""
	for line := range strings.Lines(plan.String()) {
		if strings.Contains(line, "DNAT --to") {
			got += line
		}
	}
	want := ""
	for i, chance := range []string{"-m statistic --mode random --probability 0.33333333349 ", "-m statistic --mode random --probability 0.50000000000 ", ""} {
		want += fmt.Sprintf("  -i eth0 -p tcp --dport 443 %s-j DNAT --to-destination 203.0.113.%d:8443\n", chance, 25+i)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	if plan.Size() != 1 || len(plan.Destinations()) != 3 {
		t.Errorf("%d redirects to %v", plan.Size(), plan.Destinations())
	}
	stale := plan.Stale([]netip.Addr{ip("10.128.0.98")})
	for server, want := range map[string]bool{"203.0.113.25:8443": false, "203.0.113.27:8443": false, "203.0.113.28:8443": true, "203.0.113.26:443": true} {
		c := Connection{TCP, ip("10.128.0.71"), netip.MustParseAddrPort("10.128.0.98:443"), netip.MustParseAddrPort(server), sides.Sources[0]}
		if stale(c) != want {
			t.Errorf("a connection to %s: stale %v, want %v", server, !want, want)
		}
	}
}

// A plan without some servers has the others, and all of a redirect if none would be left.
func TestWithoutServers(t *testing.T) {
	set, err := ParseExtended("1 tcp 10.0.0.1,10.0.0.2,10.0.0.3 80\n2 tcp 10.0.0.1,10.0.0.2 80\n3 tcp 10.0.0.1 80\n4 tcp 10.0.0.1,10.0.0.3\n5 udp 10.0.0.1,10.0.0.3 80\n6-7 tcp 10.0.0.1,10.0.0.3\n8-9 tcp 10.0.0.3,10.0.0.1 80", nil)
	if err != nil {
		t.Fatal(err)
	}
	plan := NewPlan(set, sides)
	out := map[string]bool{"10.0.0.1:80": true, "10.0.0.2:80": true}
	left := make(map[string]bool)
	got := plan.WithoutServers(func(a netip.AddrPort) bool { return out[a.String()] }, func(a netip.AddrPort) { left[a.String()] = true })
	want := "1 tcp 10.0.0.3 80\n2 tcp 10.0.0.1,10.0.0.2 80\n3 tcp 10.0.0.1 80\n4 tcp 10.0.0.1,10.0.0.3\n5 udp 10.0.0.1,10.0.0.3 80\n6-7 tcp 10.0.0.1,10.0.0.3\n8-9 tcp 10.0.0.3 80\n"
	if diff := cmp.Diff(want, (Set{Redirects: got.Redirects}).String()); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	if !NewPlan(set, sides).Equal(plan) || got.Equal(plan) {
		t.Error("the plan itself has changed")
	}
	named := parseNamed(t, "1 tcp db.example.com 80").Resolve(func(string) Resolution {
		return Resolution{Addresses: []netip.Addr{ip("10.0.0.1"), ip("10.0.0.3")}}
	})
	got = NewPlan(named, sides).WithoutServers(func(a netip.AddrPort) bool { return out[a.String()] }, func(netip.AddrPort) {})
	if r := got.Redirects[0]; r.Name() != "db.example.com" || r.Number() != 1 || r.To != ip("10.0.0.3") {
		t.Errorf("of a name: %s, %d addresses, %s", r, r.Number(), r.To)
	}
	got = plan.WithoutServers(func(a netip.AddrPort) bool { return out[a.String()] }, func(netip.AddrPort) {})
	if len(left) != 2 {
		t.Errorf("left out: %v", left)
	}
	if len(got.Destinations()) != len(plan.Destinations()) {
		t.Errorf("destinations %v, want those of existing connections too", got.Destinations())
	}
	stale := got.Stale([]netip.Addr{ip("10.128.0.98")})
	if stale(Connection{TCP, ip("10.128.0.71"), netip.MustParseAddrPort("10.128.0.98:1"), netip.MustParseAddrPort("10.0.0.2:80"), sides.Sources[0]}) {
		t.Error("a connection to an address that is left out is stale")
	}
}
