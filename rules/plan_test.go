package rules

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sides = Sides{Cluster: "eth0", Egress: "macvlan0", Source: ip("192.168.12.99"), Mark: 0x1000}

// The contract's example of the unit-test mode, and the cases of its table.
func TestUnitTest(t *testing.T) {
	const snat = "-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99\n"
	for name, test := range map[string]struct {
		set  Set
		want string
	}{
		"contract": {
			Set{[]Redirect{{TCP, 8080, ip("203.0.113.26"), 80}}, ip("203.0.113.27")},
			"-A PREROUTING -i eth0 -p tcp --dport 8080 -j DNAT --to-destination 203.0.113.26:80\n" +
				"-A PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27\n" + snat,
		},
		"same port": {
			Set{Redirects: []Redirect{{UDP, 53, ip("203.0.113.26"), 0}}},
			"-A PREROUTING -i eth0 -p udp --dport 53 -j DNAT --to-destination 203.0.113.26\n" + snat,
		},
		"nothing": {Set{}, snat},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, string(UnitTest(test.set, sides))); diff != "" {
				t.Errorf("- wanted, + got:\n%s", diff)
			}
		})
	}
}

func TestAppendSaved(t *testing.T) {
	want := []string{
		`-A EGRESS-PREROUTING -i eth0 -m conntrack --ctdir ORIGINAL -j CONNMARK --set-xmark 0x1000/0x1000
-A EGRESS-PREROUTING -i macvlan0 -m connmark --mark 0x1000/0x1000 -j MARK --set-xmark 0x1000/0x1000
`,
		`-A EGRESS-OUTPUT -m conntrack --ctdir REPLY -m connmark --mark 0x1000/0x1000 -j MARK --set-xmark 0x1000/0x1000
`,
		`-A EGRESS-FORWARD -i eth0 ! -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j DROP
`,
		`-A EGRESS-POSTROUTING -o macvlan0 -m conntrack ! --ctrepldst 192.168.12.99 --ctstatus CONFIRMED --ctdir ORIGINAL -j DROP
`,
		`-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 203.0.113.26:80
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 203.0.113.26:443
-A EGRESS-PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27
`,
		`-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
`,
	}
	var got []string
	for _, chain := range NewPlan(exampleSet, sides).Chains {
		got = append(got, string(chain.AppendSaved(nil)))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("- wanted, + got:\n%s", diff)
	}
}

func TestGuard(t *testing.T) {
	plan := NewPlan(exampleSet, sides)
	guard := plan.Guard()
	if !guard.Equal(NewPlan(Set{}, sides)) {
		t.Errorf("the guard is not the plan of an empty set:\n%s", guard)
	}
	if plan.Count(DNAT) != 4 || guard.Count(DNAT) != 0 || guard.Count(SNAT) != 1 {
		t.Errorf("redirects in plan, guard: %d, %d; source rules in guard: %d; want 4, 0; 1", plan.Count(DNAT), guard.Count(DNAT), guard.Count(SNAT))
	}
	if plan.Equal(guard) {
		t.Error("plan and guard are equal")
	}
}
