package iptables

import (
	"testing"

	"github.com/google/go-cmp/cmp"
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
