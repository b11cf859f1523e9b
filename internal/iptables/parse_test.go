package iptables

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

// Lines in which a part has the look of another one.
func TestParseAmbiguousLines(t *testing.T) {
	const saved = `*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:EGRESS-PREROUTING - [0:0]
:EGRESS-TCP - [0:0]
:EGRESS-UDP - [0:0]
-A PREROUTING
-A PREROUTING -j EGRESS-PREROUTING
-A OUTPUT -p tcp -m comment --comment EGRESS-TCP -j EGRESS-UDP
[12:345] -A EGRESS-PREROUTING -i #eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25 # handle 7
-A EGRESS-PREROUTING
-A EGRESS-TCP -m comment --comment "a # b" -j ACCEPT
COMMIT
`
	got := parse([]byte(saved), jumpForm{})["nat"]
	chains := make(map[string]string)
	for name, text := range got.chains {
		chains[name] = string(text)
	}
	want := map[string]string{
		// An interface may have such a name, and a rule of nft(8) no form.
		"EGRESS-PREROUTING": "-A EGRESS-PREROUTING -i #eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25\n-A EGRESS-PREROUTING\n",
		"EGRESS-TCP":        "-A EGRESS-TCP -m comment --comment \"a # b\" -j ACCEPT\n",
		"EGRESS-UDP":        "",
	}
	if diff := cmp.Diff(want, chains); diff != "" {
		t.Errorf("chains: - want, + got:\n%s", diff)
	}
	if diff := cmp.Diff(map[string][]int{"EGRESS-PREROUTING": {2}}, got.jumps); diff != "" {
		t.Errorf("jumps: - want, + got:\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"EGRESS-UDP": true}, got.referenced); diff != "" {
		t.Errorf("referenced: - want, + got:\n%s", diff)
	}
}

// A chain that begins as planned is a part of the planned text, which no other rule changes;
// lines may be longer than the buffer.
func TestReadShares(t *testing.T) {
	planned := []byte("-A EGRESS-PREROUTING -p tcp -j RETURN\n-A EGRESS-PREROUTING -p udp -j RETURN\n")
	first, second, _ := strings.Cut(string(planned), "\n")
	first += "\n"
	long := "-A EGRESS-PREROUTING -m comment --comment \"" + strings.Repeat("x", 100_000) + "\" -j RETURN\n"
	for name, test := range map[string]struct {
		rules  string
		shares bool
	}{
		"as planned":       {string(planned), true},
		"the first rule":   {first, true},
		"one more":         {string(planned) + first, false},
		"another second":   {first + long, false},
		"the second first": {second + first, false},
		"long":             {long + first, false},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(planned)
			p := parser{found: make(state), planned: map[chainID][]byte{{rules.NAT, "EGRESS-PREROUTING"}: planned}}
			saved := "*nat\n:PREROUTING ACCEPT [0:0]\n:EGRESS-PREROUTING - [0:0]\n" + test.rules + "COMMIT\n"
			if err := p.read(strings.NewReader(saved)); err != nil {
				t.Fatal(err)
			}
			got := p.found.of(rules.NAT).chains["EGRESS-PREROUTING"]
			if string(got) != test.rules {
				t.Errorf("found %d bytes, want %d", len(got), len(test.rules))
			}
			if shares := &got[0] == &planned[0]; shares != test.shares {
				t.Errorf("shares the planned text: %v, want %v", shares, test.shares)
			}
			if !bytes.Equal(planned, before) {
				t.Errorf("the planned text has changed: %q", planned)
			}
		})
	}
}

func TestNamed(t *testing.T) {
	tx := Tx{families: []*familyTx{{now: parse([]byte(`*nat
:EGRESS-PREROUTING - [0:0]
:EGRESS-TCP-80-80 - [0:0]
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 81 -j DNAT --to-destination 203.0.113.1
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 82 -m comment --comment "a.test" -j DNAT --to-destination 203.0.113.2
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 83:84 -m comment --comment b.test -j DNAT --to-destination 203.0.113.3:90-91/83
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 85 -m comment --comment "c.test" -j RETURN
-A EGRESS-TCP-80-80 -p tcp -m tcp --dport 80 -m statistic --mode random --probability 0.50000000000 -m comment --comment "a.test" -j DNAT --to-destination 203.0.113.4:90
-A PREROUTING -p tcp -m tcp --dport 82 -m comment --comment "d.test" -j DNAT --to-destination 203.0.113.5
COMMIT
`), loadedJump)}, {now: parse([]byte(`*nat
:EGRESS-PREROUTING - [0:0]
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 82 -m comment --comment "a.test" -j DNAT --to-destination 2001:db8::2
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 83 -m comment --comment "b.test" -j DNAT --to-destination [2001:db8::3]:90
COMMIT
`), loadedJump)}}}
	named := tx.Named()
	for _, all := range named {
		slices.SortFunc(all, netip.Addr.Compare)
	}
	if got, want := fmt.Sprint(named), "map[a.test:[203.0.113.2 203.0.113.4 2001:db8::2] b.test:[203.0.113.3 2001:db8::3]]"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
