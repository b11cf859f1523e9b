package iptables

import (
	"bytes"
	"crypto/sha256"
	"maps"
	"testing"

	"github.com/egress-router/egress-router/rules"
)

// The counters of a chain are those of its planned rules, in any form and also if another
// program has added rules.
func TestAddDrops(t *testing.T) {
	chain := rules.Chain{Family: rules.IPv4, Table: rules.Filter, Hook: rules.Input, Rules: []rules.Rule{
		{In: "macvlan0", Reply: true, Target: rules.Return},
		{In: "macvlan0", Unconnected: true, Target: rules.Drop, Reason: rules.Invalid},
		{In: "macvlan0", Target: rules.Drop, Reason: rules.PhysicalNetwork},
	}}
	const (
		others  = "*filter\n:EGRESS-INPUT - [0:0]\n[9:99] -A INPUT -j EGRESS-INPUT\n[8:88] -A EGRESS-FORWARD -i macvlan0 -j DROP\n"
		first   = "-A EGRESS-INPUT -i macvlan0 -m conntrack --ctdir REPLY -j RETURN\n"
		second  = "-A EGRESS-INPUT -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP\n"
		third   = "-A EGRESS-INPUT -i macvlan0 -j DROP\n"
		another = "-A EGRESS-INPUT --jump DROP -i macvlan0\n"
	)
	var s spelling
	loaded := rules.Plan{Chains: []rules.Chain{chain}}.IPTables()[0].Saved
	other := bytes.Replace(loaded, []byte(third), []byte(another), 1)
	s.know(map[chainID]form{{rules.Filter, "EGRESS-INPUT"}: {sha256.Sum256(other), loaded}}, loadedJump)
	for name, test := range map[string]struct {
		saved            string
		invalid, outside uint64
	}{
		"as loaded":       {"[5:50] " + first + "[3:30] " + second + "[2:20] " + third, 3, 2},
		"another form":    {"[5:50] " + first + "[3:30] " + second + "[2:20] " + another, 3, 2},
		"a rule added":    {"[7:70] -A EGRESS-INPUT -p udp -j ACCEPT\n[5:50] " + first + "[3:30] " + second + "[2:20] " + third, 3, 2},
		"a rule deleted":  {"[5:50] " + first + "[2:20] " + third, 0, 2},
		"no counters":     {first + second + third, 0, 0},
		"an invalid one":  {"[x:50] " + first + "[2:20] " + third, 0, 0},
		"nothing":         {"", 0, 0},
		"large":           {"[18446744073709551615:1] " + third, 0, 1<<64 - 1},
		"larger than any": {"[18446744073709551616:1] " + third, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			drops, want := make(rules.Drops), make(rules.Drops)
			s.addDrops(drops, chain, []byte(others+test.saved+"COMMIT\n"))
			for number, n := range []uint64{0, test.invalid, test.outside} {
				if n > 0 {
					want.Add(chain, number, n)
				}
			}
			if !maps.Equal(drops, want) {
				t.Errorf("drops %v, want %v", drops, want)
			}
		})
	}
}
