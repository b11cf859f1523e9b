package rules

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sides = Sides{Cluster: "eth0", Egress: "macvlan0", Source: ip("192.168.12.99"), Mark: 0x1000}

// The cases are the contract's example of the unit-test mode and its table.
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
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

func TestIPTables(t *testing.T) {
	closed := []string{
		`IPv4 mangle EGRESS-PREROUTING
-A EGRESS-PREROUTING -i eth0 -m conntrack --ctdir ORIGINAL -j CONNMARK --set-xmark 0x1000/0x1000
-A EGRESS-PREROUTING ! -d 192.168.12.99/32 -i macvlan0 -j DROP
-A EGRESS-PREROUTING -i macvlan0 -m connmark --mark 0x1000/0x1000 -j MARK --set-xmark 0x1000/0x1000
`,
		`IPv4 nat EGRESS-PREROUTING
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 203.0.113.26:80
-A EGRESS-PREROUTING -i eth0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 203.0.113.26:443
-A EGRESS-PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27
`,
		`IPv4 filter EGRESS-FORWARD
-A EGRESS-FORWARD -i eth0 -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j RETURN
-A EGRESS-FORWARD -i macvlan0 -o eth0 -m conntrack --ctstate DNAT --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i eth0 ! -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j DROP
-A EGRESS-FORWARD -i eth0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-FORWARD -i eth0 -m conntrack --ctdir ORIGINAL -j REJECT --reject-with icmp-port-unreachable
-A EGRESS-FORWARD -j DROP
`,
		`IPv4 filter EGRESS-INPUT
-A EGRESS-INPUT -p icmp -m icmp --icmp-type 5 -j DROP
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-INPUT -d 192.168.12.99/32 -i macvlan0 -p icmp -m icmp --icmp-type 8 -j RETURN
-A EGRESS-INPUT -d 192.168.12.99/32 -i macvlan0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-INPUT -i macvlan0 -j DROP
-A EGRESS-INPUT -i eth0 -m conntrack --ctstate INVALID -j DROP
`,
		`IPv4 mangle EGRESS-OUTPUT
-A EGRESS-OUTPUT -m conntrack --ctdir REPLY -m connmark --mark 0x1000/0x1000 -j MARK --set-xmark 0x1000/0x1000
`,
		`IPv4 mangle EGRESS-POSTROUTING
-A EGRESS-POSTROUTING -o macvlan0 -m conntrack ! --ctrepldst 192.168.12.99 --ctstatus CONFIRMED --ctdir ORIGINAL -j DROP
-A EGRESS-POSTROUTING ! -s 192.168.12.99/32 -o macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A EGRESS-POSTROUTING -s 192.168.12.99/32 -o eth0 -m conntrack --ctdir REPLY -m connmark ! --mark 0x1000/0x1000 -j DROP
-A EGRESS-POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
`,
		`IPv4 nat EGRESS-POSTROUTING
-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
`,
		`IPv6 filter EGRESS-FORWARD
-A EGRESS-FORWARD -j DROP
`,
		`IPv6 filter EGRESS-INPUT
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -m icmp6 --icmpv6-type 134 -j DROP
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -m icmp6 --icmpv6-type 137 -j DROP
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -j RETURN
-A EGRESS-INPUT -i macvlan0 -j DROP
`,
	}
	open := slices.Clone(closed)
	open[2] = `IPv4 filter EGRESS-FORWARD
-A EGRESS-FORWARD -i eth0 -o macvlan0 -m conntrack --ctdir ORIGINAL -j RETURN
-A EGRESS-FORWARD -i macvlan0 -o eth0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i eth0 ! -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j DROP
-A EGRESS-FORWARD -i eth0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-FORWARD -i eth0 -m conntrack --ctdir ORIGINAL -j REJECT --reject-with icmp-port-unreachable
-A EGRESS-FORWARD -j DROP
`
	open[7] = `IPv6 filter EGRESS-FORWARD
-A EGRESS-FORWARD -i macvlan0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i macvlan0 -j DROP
`
	all := sides
	all.Crossing = CrossAll
	proxy := []string{
		`IPv4 mangle EGRESS-PREROUTING
-A EGRESS-PREROUTING -i eth0 -m conntrack --ctdir ORIGINAL -j CONNMARK --set-xmark 0x1000/0x1000
-A EGRESS-PREROUTING ! -d 192.168.12.99/32 -i macvlan0 -j DROP
`,
		"IPv4 filter EGRESS-FORWARD\n-A EGRESS-FORWARD -j DROP\n",
		strings.TrimSuffix(closed[3], "-A EGRESS-INPUT -i eth0 -m conntrack --ctstate INVALID -j DROP\n"),
		`IPv4 mangle EGRESS-POSTROUTING
-A EGRESS-POSTROUTING -s 192.168.12.99/32 -o eth0 -m conntrack --ctdir REPLY -m connmark ! --mark 0x1000/0x1000 -j DROP
`,
		closed[7], closed[8],
	}
	for name, test := range map[string]struct {
		plan Plan
		want []string
	}{
		"redirected only": {NewPlan(exampleSet, sides), closed},
		"all":             {NewPlan(exampleSet, all), open},
		"proxy":           {NewProxyPlan(sides), proxy},
		"proxy, all":      {NewProxyPlan(all), proxy},
		"no IPv6":         {NewPlan(exampleSet, sides).Without(IPv6), closed[:7]},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, c := range test.plan.IPTables() {
				got = append(got, fmt.Sprintf("%s %s %s\n%s", c.Family, c.Table, c.Name, c.Saved))
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

func TestGuard(t *testing.T) {
	plan := NewPlan(exampleSet, sides)
	without := plan.WithoutRedirects()
	if !without.Equal(NewPlan(Set{}, sides)) {
		t.Errorf("WithoutRedirects is not the plan of an empty set:\n%s", without)
	}
	if len(plan.Destinations()) != 4 || len(without.Destinations()) != 0 {
		t.Errorf("destinations with and without redirects: %v, %v; want 4, none", plan.Destinations(), without.Destinations())
	}
	if plan.Equal(without) {
		t.Error("plans with and without redirects are equal")
	}
}

func TestOwnsChain(t *testing.T) {
	for name, want := range map[string]bool{
		"EGRESS-PREROUTING": true, "EGRESS-TCP": true, "EGRESS-UDP-0-4095": true, "EGRESS-MYLOG": false, "PREROUTING": false, "EGRESS-": false,
		"EGRESS-TMP-PREROUTING": true, "EGRESS-TMP-TCP": true, "EGRESS-TMP-TCP-65520-65535": true, "EGRESS-TMP-JUMPS": true,
		"EGRESS-TMP": false, "EGRESS-TMP-": false, "EGRESS-TMP-MYLOG": false, "EGRESS-TMP-TMP-TCP": false, "EGRESS-JUMPS": false,
	} {
		if got := OwnsChain(name); got != want {
			t.Errorf("OwnsChain(%q) = %v, want %v", name, got, want)
		}
	}
}
