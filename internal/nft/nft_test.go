package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var sides = rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")}, Mark: 0x1000}

func parse(t *testing.T, list string) rules.Plan {
	t.Helper()
	set, err := rules.Parse(list, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rules.NewPlan(set, sides)
}

// lines returns a list of n redirects.
func lines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d tcp 203.0.113.26 443\n", 10001+i)
	}
	return b.String()
}

// inNamespace runs fn in an empty network namespace.
func inNamespace(t *testing.T, fn func()) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error { fn(); return nil }); err != nil {
		t.Fatal(err)
	}
}

func beginTx(t *testing.T) *Tx {
	t.Helper()
	tx, err := Begin(t.Context(), rules.IPv4, rules.IPv6)
	if err != nil {
		t.Fatal(err)
	}
	return tx
}

// After a change from every plan to every plan the kernel lists the loaded rules, and
// undo restores the former state. In the short variant, plans of thousands of redirects
// change from and to a few others only.
func TestApply(t *testing.T) {
	open, carries := sides, sides
	open.Crossing = rules.CrossAll
	carries.Carry = rules.Carry{Interface: "tunnel0", UDP: 9468, First: 1024, Last: 33279}
	helped, other := sides, sides
	helped.Helpers = []rules.Helper{{Name: "tftp", Protocol: rules.UDP, Port: 69}, {Name: "ftp", Protocol: rules.TCP, Port: 21}}
	other.Helpers = helped.Helpers[1:]
	example := "80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n53 udp 203.0.113.26\n203.0.113.27\n"
	plans := map[string]rules.Plan{
		"none":        {},
		"example":     parse(t, example),
		"guard":       parse(t, example).WithoutRedirects(),
		"no fallback": parse(t, "80 tcp 203.0.113.25\n"),
		"another":     parse(t, "80 tcp 203.0.113.26\n8081 tcp 203.0.113.26 80\n"),
		"large":       parse(t, lines(10000)),
		"open":        rules.NewPlan(rules.Set{}, open),
		"carry":       rules.NewPlan(rules.Set{}, carries),
		"proxy":       rules.NewProxyPlan(sides),
		"helpers":     rules.NewPlan(rules.Set{Fallback: netip.MustParseAddr("203.0.113.27")}, helped),
		"helper":      rules.NewPlan(rules.Set{}, other),
		"no IPv6":     parse(t, example).Without(rules.IPv6),
		"drop log":    parse(t, example).WithDropLog(),
	}
	six := parse(t, lines(1000))
	six.Chains = append(six.Chains, rules.Chain{Family: rules.IPv6, Table: rules.NAT, Hook: rules.Prerouting, Rules: []rules.Rule{
		{In: "eth0", Target: rules.Redirected},
		{In: "eth0", Target: rules.DNAT, To: netip.MustParseAddr("2001:db8::27")},
	}})
	for port := range rules.Port(2000) {
		six.Redirects = append(six.Redirects, rules.Redirect{Protocol: rules.TCP, Port: 1 + port, To: netip.MustParseAddr("2001:db8::25")})
	}
	for i := range rules.Port(1500) {
		six.Redirects = append(six.Redirects, rules.Redirect{
			Protocol: rules.UDP, Port: 1 + 10*i, Last: 6 + 10*i, To: netip.MustParseAddr("2001:db8::25"), ToPort: 40001 + 10*i, Shifts: true,
		})
	}
	plans["both families"] = six
	for from := range plans {
		t.Run(from, func(t *testing.T) {
			for to := range plans {
				if !nstest.Long() && !few(from, to, []string{"large", "both families"}, "none", "another", "carry") {
					continue
				}
				inNamespace(t, func() {
					if _, err := beginTx(t).Apply(t.Context(), plans[from]); err != nil {
						t.Fatal(err)
					}
					tx := beginTx(t)
					if found := tx.Differs(plans[from]); len(found) > 0 {
						t.Fatalf("drift after load: %v", found)
					}
					undo, err := tx.Apply(t.Context(), plans[to])
					if err != nil {
						t.Fatalf("to %s: %v", to, err)
					}
					again := beginTx(t)
					if found := again.Differs(plans[to]); len(found) > 0 {
						t.Errorf("to %s: %v", to, found)
					}
					if got, want := again.Redirects(), len(plans[to].Destinations()) > 0; got != want {
						t.Errorf("to %s: redirects: %v", to, got)
					}
					if err := undo(); err != nil {
						t.Errorf("undo from %s: %v", to, err)
					}
					if found := beginTx(t).Differs(plans[from]); len(found) > 0 {
						t.Errorf("undo from %s: %v", to, found)
					}
				})
			}
		})
	}
}

// few reports whether a test in the short variant changes from one plan to another one: a
// large one changes to itself, and from and to some others.
func few(from, to string, large []string, others ...string) bool {
	if from == to {
		return true
	}
	if slices.Contains(large, from) {
		return slices.Contains(others, to)
	}
	return !slices.Contains(large, to) || slices.Contains(others, from)
}

// The table that an earlier version gave the source guard is deleted with the
// addition of the new one, and restored by undo.
func TestFormerGuardTableIsReplaced(t *testing.T) {
	plan := parse(t, "80 tcp 203.0.113.25\n")
	held := func() []string {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		tables, err := conn.ListTables()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, table := range tables {
			names = append(names, table.Name)
		}
		return names
	}
	beginGuard := func() *Tx {
		tx, err := BeginGuard(t.Context(), rules.IPv4, rules.IPv6)
		if err != nil {
			t.Fatal(err)
		}
		return tx
	}
	inNamespace(t, func() {
		key := tableKey{formerGuardName, rules.IPv4}
		former := beginGuard()
		if diff := cmp.Diff([]string{"no table egress-router-guard yet"}, former.Differs(plan)); diff != "" {
			t.Errorf("differences of a fresh namespace: - want, + got:\n%s", diff)
		}
		if err := former.become(state{key: render(plan, guardName)[tableKey{guardName, rules.IPv4}]}); err != nil {
			t.Fatal(err)
		}
		before := beginGuard()
		want := []string{"table ip egress-router-guard: missing", "table ip egress-router-last: not in the plan"}
		if diff := cmp.Diff(want, before.Differs(plan)); diff != "" {
			t.Errorf("differences: - want, + got:\n%s", diff)
		}
		undo, err := before.Apply(t.Context(), plan)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{guardName}, held()); diff != "" {
			t.Errorf("tables: - want, + got:\n%s", diff)
		}
		if found := beginGuard().Differs(plan); len(found) > 0 {
			t.Errorf("after the transaction: %v", found)
		}
		if err := undo(); err != nil {
			t.Fatal(err)
		}
		if found := beginGuard().differences(before.now); len(found) > 0 {
			t.Errorf("after undo: %v", found)
		}
		if diff := cmp.Diff([]string{formerGuardName}, held()); diff != "" {
			t.Errorf("tables after undo: - want, + got:\n%s", diff)
		}
	})
}

// A refused transaction changes nothing.
func TestRefused(t *testing.T) {
	inNamespace(t, func() {
		before, bad := parse(t, "80 tcp 203.0.113.25\n"), parse(t, lines(1500))
		if _, err := beginTx(t).Apply(t.Context(), before); err != nil {
			t.Fatal(err)
		}
		// An SNAT rule in a chain that cannot have one, the last one.
		last := &bad.Chains[len(bad.Chains)-1]
		last.Rules = append(last.Rules, rules.Rule{Target: rules.SNAT, To: sides.Sources[0]})
		tx := beginTx(t)
		if _, ok := errors.AsType[*LoadError](tx.become(render(bad, tableName))); !ok {
			t.Error("no *LoadError")
		}
		if _, err := tx.Apply(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "invalid rule in chain") || len(tx.Differs(bad)) != 1 {
			t.Errorf("error %v, differences %q: want the plan's fault", err, tx.Differs(bad))
		}
		if found := beginTx(t).Differs(before); len(found) > 0 {
			t.Errorf("tables changed: %v", found)
		}
	})
}

// After a concurrent change the tables are read again: no part of the plan is
// missing or doubled.
// A helper that the kernel lacks is named, with the modules to load.
func TestMissingHelper(t *testing.T) {
	inNamespace(t, func() {
		with := sides
		with.Helpers = []rules.Helper{{Name: "ftp", Protocol: rules.TCP, Port: 21}, {Name: "none", Protocol: rules.TCP, Port: 1}}
		tx := beginTx(t)
		_, err := tx.Apply(t.Context(), rules.NewPlan(rules.Set{}, with))
		missing, ok := errors.AsType[*rules.HelperError](err)
		if !ok || missing.Helper.Name != "none" || !strings.Contains(missing.Hint(nil), "modprobe -a nf_conntrack_none") {
			t.Errorf("error %v, want one that names the helper", err)
		}
		if tx := beginTx(t); tx.Holds() {
			t.Error("tables remain")
		}
	})
}

func TestChangedMeanwhile(t *testing.T) {
	example := parse(t, "80 tcp 203.0.113.25\n203.0.113.27\n")
	inNamespace(t, func() {
		first, second := beginTx(t), beginTx(t)
		for _, tx := range []*Tx{first, second} {
			if _, err := tx.Apply(t.Context(), example); err != nil {
				t.Fatal(err)
			}
			if found := beginTx(t).Differs(example); len(found) > 0 {
				t.Errorf("drift after load: %v", found)
			}
		}
		late := beginTx(t)
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := late.Apply(t.Context(), example.WithoutRedirects()); err != nil {
			t.Fatal(err)
		}
		if found := beginTx(t).Differs(example.WithoutRedirects()); len(found) > 0 {
			t.Errorf("drift after load: %v", found)
		}
	})
}

// Unchanged elements are not touched, so that the kernel's counters in them
// continue.
func TestOnlyWhatDiffersChanges(t *testing.T) {
	have := render(parse(t, lines(3000)), tableName)[tableKey{tableName, rules.IPv4}]
	want := render(parse(t, lines(2999)+"9 udp 203.0.113.25\n"), tableName)[tableKey{tableName, rules.IPv4}]
	var b batch
	b.change(tableOf(tableKey{tableName, rules.IPv4}), have, want)
	var kinds []int
	for _, m := range b.messages {
		kinds = append(kinds, int(m.Header.Type)&0xff)
	}
	if diff := cmp.Diff([]int{unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM}, kinds); diff != "" {
		t.Errorf("messages: - want, + got:\n%s", diff)
	}
	for _, m := range b.messages {
		if len(m.Data) > 200 {
			t.Errorf("a message of %d bytes for one element", len(m.Data))
		}
	}
}

// spread returns a redirect to several addresses.
func spread(r rules.Redirect, to ...string) rules.Redirect {
	var all []netip.Addr
	for _, a := range to {
		all = append(all, netip.MustParseAddr(a))
	}
	return r.Spread(all)
}

// A change of a few addresses changes their elements alone, and if a line gets another
// number of them, the map of that number and the rules that look up. Nothing else is loaded
// again, also in the kernel, which has all elements afterwards.
func TestOnlyChangedAddressesChange(t *testing.T) {
	lists := func(changed int, to ...string) rules.Plan {
		var set rules.Set
		for i := range 10_000 {
			r := rules.Redirect{Protocol: rules.TCP, Port: rules.Port(10_001 + i)}
			switch {
			case i < changed:
				r = spread(r, to...)
			case i%4 == 0:
				r = spread(r, "203.0.113.25", "203.0.113.26")
			case i%4 == 1:
				r = spread(r, "203.0.113.25", "203.0.113.26", "203.0.113.27")
			default:
				r = spread(r, "203.0.113.25")
			}
			set.Redirects = append(set.Redirects, r)
		}
		return rules.NewPlan(set, sides)
	}
	key := tableKey{tableName, rules.IPv4}
	plans := []rules.Plan{
		lists(10, "203.0.113.28", "203.0.113.29"), lists(10, "203.0.113.30", "203.0.113.29"), lists(10, "203.0.113.30"),
		lists(10, "203.0.113.25", "203.0.113.26", "203.0.113.27", "203.0.113.28"), lists(10, "203.0.113.25"),
	}
	// Messages for elements, rules, and maps.
	expected := [][3]int{{20, 0, 0}, {30, 0, 0}, {50, 4, 1}, {10, 3, 1}}
	for i, want := range expected {
		var b batch
		b.change(tableOf(key), render(plans[i], tableName)[key], render(plans[i+1], tableName)[key])
		var got [3]int
		for _, m := range b.messages {
			switch int(m.Header.Type) & 0xff {
			case unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM:
				_ = attributes(m.Data[4:], func(kind uint16, list []byte) error {
					if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
						return attributes(list, func(uint16, []byte) error { got[0]++; return nil })
					}
					return nil
				})
			case unix.NFT_MSG_NEWRULE:
				got[1]++
			case unix.NFT_MSG_DELRULE:
			case unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET:
				got[2]++
			default:
				t.Errorf("a message of type %d", m.Header.Type&0xff)
			}
		}
		if got != want {
			t.Errorf("change %d has %d elements, rules and maps; want %d", i, got, want)
		}
	}
	inNamespace(t, func() {
		tx := beginTx(t)
		for i, plan := range plans {
			undo, err := tx.Apply(t.Context(), plan)
			if err != nil {
				t.Fatal(err)
			}
			if found := beginTx(t).Differs(plan); len(found) > 0 {
				t.Errorf("plan %d: drift after load: %v", i, found)
			}
			if i == 0 {
				continue
			}
			if err := undo(); err != nil {
				t.Fatal(err)
			}
			if found := beginTx(t).Differs(plans[i-1]); len(found) > 0 {
				t.Errorf("plan %d: drift after rollback: %v", i, found)
			}
			if _, err := tx.Apply(t.Context(), plan); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestSteps(t *testing.T) {
	d := func(list string) destinations {
		set, err := rules.Parse(list, nil)
		if err != nil {
			t.Fatal(err)
		}
		return newMaps(set.Redirects)[mapKinds[0].name]
	}
	for name, test := range map[string]struct{ have, want, gone, more string }{
		"nothing":     {"", "", "", ""},
		"from none":   {"", "1 tcp 192.0.2.1", "", "1 tcp 192.0.2.1"},
		"to none":     {"1 tcp 192.0.2.1", "", "1 tcp 192.0.2.1", ""},
		"same":        {"1 tcp 192.0.2.1\n2 udp 192.0.2.1", "2 udp 192.0.2.1\n1 tcp 192.0.2.1 1", "", ""},
		"elsewhere":   {"1 tcp 192.0.2.1", "1 tcp 192.0.2.2", "1 tcp 192.0.2.1", "1 tcp 192.0.2.2"},
		"one between": {"1 tcp 192.0.2.1\n3 tcp 192.0.2.1", "1 tcp 192.0.2.1\n2 tcp 192.0.2.1\n3 tcp 192.0.2.1", "", "2 tcp 192.0.2.1"},
		"one less":    {"1 tcp 192.0.2.1\n300 tcp 192.0.2.1\n7 udp 192.0.2.9", "1 tcp 192.0.2.1\n7 udp 192.0.2.9", "300 tcp 192.0.2.1", ""},
		"protocol":    {"1 tcp 192.0.2.1", "1 udp 192.0.2.1", "1 tcp 192.0.2.1", "1 udp 192.0.2.1"},
	} {
		t.Run(name, func(t *testing.T) {
			gone, more := d(test.have).steps(d(test.want))
			show := func(d destinations) string { return fmt.Sprint([]destination(d)) }
			if show(gone) != show(d(test.gone)) || show(more) != show(d(test.more)) {
				t.Errorf("gone %v, more %v", gone, more)
			}
		})
	}
}

// A truncated answer of the kernel is an error, not a panic.
func FuzzAttributes(f *testing.F) {
	var b batch
	b.changeElements(unix.NFT_MSG_NEWSETELEM, 0, tableOf(tableKey{tableName, rules.IPv4}), mapKinds[0], newMaps([]rules.Redirect{
		{Protocol: rules.TCP, Port: 80, To: netip.MustParseAddr("192.0.2.1")},
	})[mapKinds[0].name])
	f.Add(b.messages[0].Data[4:])
	f.Add([]byte{3, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = attributes(data, func(_ uint16, list []byte) error {
			return attributes(list, func(_ uint16, element []byte) error {
				_, err := mapKinds[0].parseElement(element, 8)
				_, numbered := mapKinds[3].parseElement(element, 8)
				return errors.Join(err, numbered)
			})
		})
	})
}

// An element is decoded as it was encoded.
func TestElementRoundTrip(t *testing.T) {
	for f, to := range map[rules.Family][2]string{rules.IPv4: {"192.0.2.1", "203.0.113.255"}, rules.IPv6: {"2001:db8::1", "2001:db8:ffff::ffff"}} {
		maps := newMaps([]rules.Redirect{
			{Protocol: rules.TCP, Port: 80, To: netip.MustParseAddr(to[0])},
			{Protocol: rules.UDP, Port: 65535, To: netip.MustParseAddr(to[1]), ToPort: 1},
			{Protocol: rules.UDP, Port: 100, Last: 200, To: netip.MustParseAddr(to[1])},
			{Protocol: rules.SCTP, Port: 100, Last: 200, To: netip.MustParseAddr(to[0]), ToPort: 1000, Shifts: true},
			spread(rules.Redirect{Protocol: rules.TCP, Port: 81}, to[:]...),
			spread(rules.Redirect{Protocol: rules.TCP, Port: 100, Last: 200}, to[:]...),
			spread(rules.Redirect{Protocol: rules.TCP, Port: 300, Last: 400, ToPort: 1}, to[:]...),
		})
		table := tableOf(tableKey{tableName, f})
		for _, k := range mapKinds[:6] {
			var b batch
			b.changeElements(unix.NFT_MSG_NEWSETELEM, 0, table, k, maps[k.name])
			var got destinations
			err := attributes(b.messages[0].Data[4:], func(kind uint16, list []byte) error {
				if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
					return nil
				}
				return attributes(list, func(_ uint16, element []byte) error {
					d, err := k.parseElement(element, k.valueLen(table.Family))
					got = append(got, d)
					return err
				})
			})
			if err != nil || len(got) == 0 || fmt.Sprint([]destination(got)) != fmt.Sprint([]destination(maps[k.name])) {
				t.Errorf("%s, %s: %v, %v; want %v", f, k.name, got, err, maps[k.name])
			}
		}
	}
}

// Of any number of elements, each list fits into its attribute.
func TestElementsAreDivided(t *testing.T) {
	for _, f := range []rules.Family{rules.IPv4, rules.IPv6} {
		for _, k := range mapKinds[:6] {
			want := make(destinations, 5000)
			for i := range want {
				binary.BigEndian.PutUint16(want[i].key[4:], uint16(i)) //nolint:gosec // less than 5000
				want[i].end, want[i].name = want[i].key, strings.Repeat("x", i%254)
			}
			table, got := tableOf(tableKey{tableName, f}), 0
			var b batch
			b.changeElements(unix.NFT_MSG_NEWSETELEM, 0, table, k, want)
			for _, m := range b.messages {
				if err := attributes(m.Data[4:], func(kind uint16, list []byte) error {
					if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
						return nil
					}
					return attributes(list, func(_ uint16, element []byte) error {
						d, err := k.parseElement(element, k.valueLen(table.Family))
						if !k.ranges {
							d.end = d.key
						}
						if d != want[got] {
							t.Fatalf("%s, %s: element %d is %v, want %v", f, k.name, got, d, want[got])
						}
						got++
						return err
					})
				}); err != nil {
					t.Fatalf("%s, %s: %v", f, k.name, err)
				}
			}
			if got != len(want) {
				t.Errorf("%s, %s: %d elements, want %d", f, k.name, got, len(want))
			}
		}
	}
}

// The kernel finds the server's port of each port of a range by the elements of the range,
// of which there are few.
func TestOffsets(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	moved, most := mapKinds[2], 0
	for range 20000 {
		n := 1 + random.IntN([]int{2, 10, 1000, 65534}[random.IntN(4)])
		first, to := 1+random.IntN(65535-n), 1+random.IntN(65535-n)
		r := rules.Redirect{Protocol: rules.UDP, Port: rules.Port(first), Last: rules.Port(first + n), To: netip.MustParseAddr("192.0.2.1"), ToPort: rules.Port(to), Shifts: true}
		elements := moved.add(nil, r)
		most = max(most, len(elements))
		number := func(b []byte) int { return int(binary.BigEndian.Uint16(b)) }
		next := first
		for _, e := range elements {
			low, high := number(e.key[4:]), number(e.end[4:])
			begin, end := number(e.value[4:]), number(e.value[8:])
			if low != next || high < low {
				t.Fatalf("%v: elements %v", r, elements)
			}
			next = high + 1
			for _, local := range []int{low, high, (low + high) / 2, low + random.IntN(high-low+1)} {
				if got := begin + local%(end-begin+1); got != to+local-first {
					t.Fatalf("%v: port %d of the server for %d, by %d-%d", r, got, local, begin, end)
				}
			}
		}
		if next != first+n+1 {
			t.Fatalf("%v: elements up to %d", r, next-1)
		}
	}
	if most > 16 {
		t.Errorf("%d elements for one range", most)
	}
}

// Only our own tables are removed from nftables, and only our chains and the jumps
// to them from iptables' tables.
func TestStrays(t *testing.T) {
	both := []rules.Family{rules.IPv4, rules.IPv6}
	inNamespace(t, func() {
		if s, err := FindStrays(both, true, true); s != nil || err != nil {
			t.Fatalf("in an empty namespace: %v, %v", s, err)
		}
		if _, err := beginTx(t).Apply(t.Context(), parse(t, lines(10))); err != nil {
			t.Fatal(err)
		}
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		// As iptables creates them; another program's rule leads to one too.
		nat := conn.AddTable(&nftables.Table{Name: "nat", Family: nftables.TableFamilyIPv4})
		base := conn.AddChain(&nftables.Chain{
			Name: "PREROUTING", Table: nat, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
		})
		for _, name := range []string{"EGRESS-PREROUTING", "EGRESS-TCP", "EGRESS-TCP-0-4095", "EGRESS-MYLOG"} {
			c := conn.AddChain(&nftables.Chain{Name: name, Table: nat})
			conn.AddRule(&nftables.Rule{Table: nat, Chain: c, Exprs: []expr.Any{&expr.Counter{}}})
			for _, match := range [][]expr.Any{nil, protocol(rules.TCP)} {
				if match != nil && name != "EGRESS-PREROUTING" {
					continue
				}
				conn.AddRule(&nftables.Rule{Table: nat, Chain: base, Exprs: append(match, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: name})})
			}
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		s, err := FindStrays(both, true, true)
		if s == nil || err != nil {
			t.Fatalf("%v, %v", s, err)
		}
		if want := "table ip egress-router of nftables, 3 chains of iptables (nf_tables) in table ip nat, table ip6 egress-router of nftables"; s.String() != want {
			t.Errorf("found %q, want %q", s, want)
		}
		if _, err := s.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		var left []string
		chains, err := conn.ListChains()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chains {
			list, err := conn.GetRules(c.Table, c)
			if err != nil {
				t.Fatal(err)
			}
			left = append(left, fmt.Sprintf("%s %s %d", c.Table.Name, c.Name, len(list)))
		}
		// The other program's rule still leads to a chain, which is empty.
		if diff := cmp.Diff([]string{"nat PREROUTING 2", "nat EGRESS-PREROUTING 0", "nat EGRESS-MYLOG 1"}, left); diff != "" {
			t.Errorf("left: - want, + got:\n%s", diff)
		}
	})
}

func TestHints(t *testing.T) {
	for name, test := range map[string]struct {
		err  interface{ Hint(wording.Names) string }
		want string
	}{
		"too long":      {&LoadError{unix.EMSGSIZE}, "net.core.wmem_max"},
		"missing parts": {&LoadError{unix.ENOENT}, "modprobe nft_nat"},
		"no nf_tables":  {&KernelError{unix.EINVAL}, "modprobe nf_tables"},
		"no privilege":  {&LoadError{os.ErrPermission}, ""},
	} {
		if got := test.err.Hint(nil); !strings.Contains(got, test.want) || (test.want == "") != (got == "") {
			t.Errorf("%s: %q", name, got)
		}
	}
}
