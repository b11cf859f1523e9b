package main

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// known returns the variants that a router supports: a router without
// EGRESS_ROUTER_BACKEND supports iptables only.
func known(t *testing.T, program string) []variant {
	t.Helper()
	found, err := variants()
	if err != nil {
		t.Fatal(err)
	}
	help, err := exec.Command(program, "help").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(help, []byte("EGRESS_ROUTER_BACKEND")) {
		return found[:2]
	}
	return found
}

// A round or two with each variant show that it measures; the figures do not matter.
func TestMeasure(t *testing.T) {
	program := router(t)
	found := known(t, program)
	loads, err := makeLoads()
	if err != nil {
		t.Fatal(err)
	}
	loads[1].rivalGoal = goalRival
	rounds := 1
	if nstest.Long() {
		rounds = 2
	}
	for _, v := range found {
		for i, l := range loads[:2] {
			if i > 0 && v.rival == nil && !nstest.Long() {
				continue // the example has shown the rest
			}
			l.rounds = rounds
			rows, err := measure(t.Context(), program, v, l)
			if err != nil {
				t.Fatalf("%s, %s: %v", v.name, l.name, err)
			}
			checkRows(t, rows, rounds)
		}
	}
	comparisons := 2
	if nstest.Long() {
		comparisons = idleComparisons
	}
	peak, idle, _, err := measureIdle(t.Context(), program, found[0], loads[0], comparisons)
	if err != nil || idle < 1e6 || peak < idle {
		t.Errorf("memory at most %g, at rest %g, error %v", peak, idle, err)
	}
}

// brief is the effort of tests, which check that there are figures.
var brief = effort{rounds: 1, each: 5 * time.Millisecond, sizes: []int{1, 20}}

func TestMeasureConnections(t *testing.T) {
	program := router(t)
	rows, err := measureConnections(t.Context(), program, known(t, program), brief)
	if err != nil {
		t.Fatal(err)
	}
	checkRows(t, rows, brief.rounds)
}

func TestMeasureThroughput(t *testing.T) {
	program := router(t)
	rows, err := measureThroughput(t.Context(), program, known(t, program), brief)
	if err != nil {
		t.Fatal(err)
	}
	checkRows(t, rows, brief.rounds)
}

// checkRows checks that all rows have figures above 0.
func checkRows(t *testing.T, rows []row, rounds int) {
	t.Helper()
	if len(rows) == 0 {
		t.Error("no rows")
	}
	for _, r := range rows {
		if len(r.pairs) != rounds || r.pairs[0].reference <= 0 || r.pairs[0].router <= 0 {
			t.Errorf("%s, %s: pairs %v, want %d", r.what, r.variant, r.pairs, rounds)
		}
	}
}

// A router that loads other rules, or into another table, is not measured.
func TestMeasureRefusesWrongRules(t *testing.T) {
	found, err := variants()
	if err != nil {
		t.Fatal(err)
	}
	l := load{name: "example", redirects: 4, rounds: 1}
	for _, test := range []struct {
		program string
		variant variant
		want    string
	}{
		{"/bin/true", found[0], ": 0 redirects, want 4"},
		{"/bin/true", found[1], ": 0 redirects, want 4"},
		{"/bin/true", found[2], `no "table ip egress-router"`},
		{"/bin/false", found[0], "exit status 1"},
	} {
		if _, err := measure(t.Context(), test.program, test.variant, l); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s, %s: error %v, want %q", test.program, test.variant.name, err, test.want)
		}
		if _, err := measureConnections(t.Context(), test.program, []variant{test.variant}, brief); err == nil {
			t.Errorf("%s, %s: measuring connections: no error", test.program, test.variant.name)
		}
	}
	if _, _, _, err := measureIdle(t.Context(), "/bin/true", found[0], l, 1); err == nil {
		t.Error("measuring /bin/true at rest: no error")
	}
}

// A path to another server, or to none, is not measured.
func TestPathRefusesWrongServer(t *testing.T) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := plainPath(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.check(t.Context(), "tcp", lab.Source); err == nil {
		t.Error("check of a source that plain routing does not set: no error")
	}
	p.to = netip.AddrPortFrom(fallback.Addr(), fallback.Port()+1)
	for what, measure := range map[string]func(time.Duration) (float64, error){"connections": p.connections, "datagrams": p.datagrams} {
		if _, err := measure(time.Minute); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: error %v, want a refusal", what, err)
		}
	}
}

func TestMissingTool(t *testing.T) {
	_, err := findIptables("new")
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(hint(err), "install the package iptables") {
		t.Errorf("error %v, hint %q", err, hint(err))
	}
	_, err = findNft("/nowhere/nft")
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(hint(err), "install the package nftables") {
		t.Errorf("error %v, hint %q", err, hint(err))
	}
}

// The output of nft list of a router's tables can be loaded, and is the same again.
func TestNftRules(t *testing.T) {
	const tables = `table ip egress-router {
	map redirects {
		type inet_proto . inet_service : ipv4_addr . inet_service
		counter
		elements = { tcp . 80 : 203.0.113.25 . 80, udp . 53 : 203.0.113.26 . 5353 }
	}
	chain prerouting {
		type nat hook prerouting priority dstnat;
		iifname "eth0" dnat to meta l4proto . th dport map @redirects
		iifname "eth0" dnat to 203.0.113.27
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname "macvlan0" counter snat to 192.168.12.99
	}
}
table ip6 egress-router {
	chain forward {
		type filter hook forward priority 0;
		iifname "eth0" drop
	}
}
table ip other {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		dnat to 203.0.113.28
	}
}
`
	found, err := variants()
	if err != nil {
		t.Fatal(err)
	}
	n := found[2].tool
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	first, err := writeRules(tables)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.load(t.Context(), l, l.Client, first); err != nil {
		t.Fatal(err)
	}
	listed, err := n.rules(t.Context(), l, l.Client)
	if err != nil {
		t.Fatal(err)
	}
	if got := n.redirects(listed); got != 3 {
		t.Errorf("%d redirects, want 3, in\n%s", got, listed)
	}
	second, err := writeRules(listed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.load(t.Context(), l, l.Far, second); err != nil {
		t.Fatal(err)
	}
	again, err := n.rules(t.Context(), l, l.Far)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(listed, again); diff != "" || !strings.Contains(listed, "table ip6 ") {
		t.Errorf("- first, + again:\n%s", diff)
	}
}

func TestRestoreInput(t *testing.T) {
	const saved = `# Generated by iptables-save v1.8.9 on Mon Jan  1 00:00:00 2024
*filter
:INPUT ACCEPT [3:180]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:EGRESS-PREROUTING - [0:0]
-A PREROUTING -j EGRESS-PREROUTING
-A EGRESS-PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
-A PREROUTING -i eth0 -j MARK --set-xmark 0x1/0x1
COMMIT
# Completed on Mon Jan  1 00:00:00 2024
`
	const want = `*nat
:EGRESS-PREROUTING - [0:0]
-A PREROUTING -j EGRESS-PREROUTING
-A EGRESS-PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27
COMMIT
*mangle
-A PREROUTING -i eth0 -j MARK --set-xmark 0x1/0x1
COMMIT
`
	if diff := cmp.Diff(want, restoreInput(saved)); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{7}, 0.25, 7},
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 3, 2}, 0.5, 2.5},
		{[]float64{5, 4, 3, 2, 1}, 0.25, 2},
		{[]float64{5, 4, 3, 2, 1}, 0.75, 4},
		{[]float64{1, 2}, 0.25, 1.25},
		{[]float64{1, 2}, 1, 2},
	} {
		if got := quantile(test.values, test.q); got != test.want {
			t.Errorf("quantile(%v, %g) = %g, want %g", test.values, test.q, got, test.want)
		}
	}
}

func TestGoal(t *testing.T) {
	for _, test := range []struct {
		goal             goal
		figure           float64
		want, wantString string
	}{
		{goal{}, 7, "", ""},
		{atMost(1.3), 1.29, "ok", "<= 1.3"},
		{atMost(1.3), 1.3, "ok", "<= 1.3"},
		{atMost(1.3), 1.31, "MISSED", "<= 1.3"},
		{atLeast(0.95), 0.949, "MISSED", ">= 0.95"},
		{atLeast(0.95), 0.95, "ok", ">= 0.95"},
		{atLeast(5), 6, "ok", ">= 5"},
	} {
		if got := test.goal.judge(test.figure); got != test.want || test.goal.String() != test.wantString {
			t.Errorf("%s: %g is %q, want %q and %q", test.goal, test.figure, got, test.want, test.wantString)
		}
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int]string{1: "1", 100: "100", 1000: "1,000", 10000: "10,000", 123456: "123,456"} {
		if got := thousands(n); got != want {
			t.Errorf("thousands(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestPrintRow(t *testing.T) {
	r := row{what: "init, example", variant: "iptables-legacy", goal: atMost(10)}
	for _, router := range []float64{16, 24, 20} {
		r.pairs = append(r.pairs, pair{2, router})
	}
	var got strings.Builder
	printHeader(&got, "ms")
	r.print(&got)
	r.goal = atMost(9)
	r.print(&got)
	r.goal = atLeast(10)
	r.print(&got)
	r.goal = goal{}
	r.print(&got)
	r.pairs = []pair{{20000, 19000}}
	r.print(&got)
	const want = `
what                                     variant           reference ms   router ms   ratio          spread    goal ok
init, example                            iptables-legacy           2.00       20.00   10.00   9.00 to 11.00   <= 10 ok
init, example                            iptables-legacy           2.00       20.00   10.00   9.00 to 11.00    <= 9 MISSED
init, example                            iptables-legacy           2.00       20.00   10.00   9.00 to 11.00   >= 10 ok
init, example                            iptables-legacy           2.00       20.00   10.00   9.00 to 11.00
init, example                            iptables-legacy          20000       19000    0.95    0.95 to 0.95
`
	if diff := cmp.Diff(want[1:], got.String()); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestCompare(t *testing.T) {
	rows := compare([]series{
		{"one", [][]float64{{100, 200}, {99, 198}, {95, 190}}, nil},
		{linear, [][]float64{{100, 200}, {80, 160}, {10, 20}}, nil},
	}, []int{1, 100, 10000})
	want := []row{
		{"100 destinations, to 1", "one", []pair{{100, 99}, {200, 198}}, goal{}},
		{"10,000 destinations, to 1", "one", []pair{{100, 95}, {200, 190}}, goalFlat},
		{"10,000 destinations, to linear chain", "one", []pair{{10, 95}, {20, 190}}, goalLinear},
		{"100 destinations, to 1", linear, []pair{{100, 80}, {200, 160}}, goal{}},
		{"10,000 destinations, to 1", linear, []pair{{100, 10}, {200, 20}}, goal{}},
	}
	if diff := cmp.Diff(want, rows, cmp.AllowUnexported(row{}, pair{}, goal{})); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestLengthen(t *testing.T) {
	const one = `*nat
:EGRESS-POSTROUTING - [0:0]
:EGRESS-PREROUTING - [0:0]
-A PREROUTING -j EGRESS-PREROUTING
-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 10001 -j DNAT --to-destination 203.0.113.26:443
COMMIT
`
	const three = `*nat
:EGRESS-POSTROUTING - [0:0]
:EGRESS-PREROUTING - [0:0]
-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 10001 -j DNAT --to-destination 203.0.113.26:443
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 10002 -j DNAT --to-destination 203.0.113.26:443
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 10003 -j DNAT --to-destination 203.0.113.26:443
COMMIT
`
	if diff := cmp.Diff(three, lengthen(one, 3)); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestMemory(t *testing.T) {
	const status = "Name:\tegress-router\nVmHWM:\t    5004 kB\nVmRSS:\t    4 kB\n"
	for name, want := range map[string]float64{"VmHWM": 5004 * 1024, "VmRSS": 4096} {
		if got, err := memory(status, name); got != want || err != nil {
			t.Errorf("%s: %g, %v; want %g", name, got, err, want)
		}
	}
	if _, err := memory(status, "VmSwap"); err == nil {
		t.Error("memory of a missing field: no error")
	}
}
