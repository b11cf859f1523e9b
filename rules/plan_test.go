package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sides = Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{ip("192.168.12.99")}, Mark: 0x1000}

// The cases are the contract's example of the unit-test mode and its table.
func TestUnitTest(t *testing.T) {
	const snat = "-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99\n"
	for name, test := range map[string]struct {
		set  Set
		want string
	}{
		"contract": {
			Set{Redirects: []Redirect{{Protocol: TCP, Port: 8080, To: ip("203.0.113.26"), ToPort: 80}}, Fallback: ip("203.0.113.27")},
			"-A PREROUTING -i eth0 -p tcp --dport 8080 -j DNAT --to-destination 203.0.113.26:80\n" +
				"-A PREROUTING -i eth0 -j DNAT --to-destination 203.0.113.27\n" + snat,
		},
		"same port": {
			Set{Redirects: []Redirect{{Protocol: UDP, Port: 53, To: ip("203.0.113.26")}}},
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
-A EGRESS-FORWARD -i macvlan0 -o eth0 -m conntrack --ctstate DNAT --ctstatus EXPECTED --ctdir ORIGINAL -j RETURN
-A EGRESS-FORWARD -i eth0 -o macvlan0 -m conntrack --ctstate DNAT --ctstatus EXPECTED --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i eth0 ! -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j DROP
-A EGRESS-FORWARD -i eth0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-FORWARD -i eth0 -m conntrack --ctdir ORIGINAL -j REJECT --reject-with icmp-port-unreachable
-A EGRESS-FORWARD -i eth0 -j DROP
-A EGRESS-FORWARD -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A EGRESS-FORWARD -i macvlan0 -j DROP
-A EGRESS-FORWARD -j DROP
`,
		`IPv4 filter EGRESS-INPUT
-A EGRESS-INPUT -p icmp -m icmp --icmp-type 5 -j DROP
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-INPUT -d 192.168.12.99/32 -i macvlan0 -p icmp -m icmp --icmp-type 8 -j RETURN
-A EGRESS-INPUT -d 192.168.12.99/32 -i macvlan0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
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
-A EGRESS-FORWARD -i macvlan0 -j DROP
-A EGRESS-FORWARD -j DROP
`,
		`IPv6 filter EGRESS-INPUT
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -m icmp6 --icmpv6-type 134 -j DROP
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -m icmp6 --icmpv6-type 137 -j DROP
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-INPUT -i macvlan0 -p ipv6-icmp -j RETURN
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A EGRESS-INPUT -i macvlan0 -j DROP
`,
	}
	open := slices.Clone(closed)
	open[2] = `IPv4 filter EGRESS-FORWARD
-A EGRESS-FORWARD -i eth0 -o macvlan0 -m conntrack --ctdir ORIGINAL -j RETURN
-A EGRESS-FORWARD -i macvlan0 -o eth0 -m conntrack --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i macvlan0 -o eth0 -m conntrack --ctstate DNAT --ctstatus EXPECTED --ctdir ORIGINAL -j RETURN
-A EGRESS-FORWARD -i eth0 -o macvlan0 -m conntrack --ctstate DNAT --ctstatus EXPECTED --ctdir REPLY -j RETURN
-A EGRESS-FORWARD -i eth0 ! -o macvlan0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j DROP
-A EGRESS-FORWARD -i eth0 -p tcp -m conntrack --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A EGRESS-FORWARD -i eth0 -m conntrack --ctdir ORIGINAL -j REJECT --reject-with icmp-port-unreachable
-A EGRESS-FORWARD -i eth0 -j DROP
-A EGRESS-FORWARD -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A EGRESS-FORWARD -i macvlan0 -j DROP
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
		"IPv4 filter EGRESS-FORWARD\n-A EGRESS-FORWARD -i macvlan0 -j DROP\n-A EGRESS-FORWARD -j DROP\n",
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

// A helper is attached by the port of the server; a line with the local port decides
// over the fallback.
func TestHelperRules(t *testing.T) {
	ftp, tftp := Helper{"ftp", TCP, 21}, Helper{"tftp", UDP, 69}
	server := ip("203.0.113.26")
	const line = "-A EGRESS-PREROUTING -i eth0 -p "
	ftpAt := func(port string) string { return line + "tcp -m tcp --dport " + port + " -j CT --helper ftp\n" }
	tftpAt := func(port string) string { return line + "udp -m udp --dport " + port + " -j CT --helper tftp\n" }
	for name, test := range map[string]struct {
		set      Set
		crossing Crossing
		want     string
	}{
		"nothing":        {Set{}, CrossRedirected, ""},
		"open":           {Set{}, CrossAll, ftpAt("21") + tftpAt("69")},
		"fallback":       {Set{Fallback: server}, CrossRedirected, ftpAt("21") + tftpAt("69")},
		"same port":      {Set{Redirects: []Redirect{{Protocol: TCP, Port: 21, To: server}, {Protocol: UDP, Port: 21, To: server}}}, CrossRedirected, ftpAt("21")},
		"other port":     {Set{Redirects: []Redirect{{Protocol: TCP, Port: 2121, To: server, ToPort: 21}, {Protocol: UDP, Port: 2169, To: server, ToPort: 69}}}, CrossRedirected, ftpAt("2121") + tftpAt("2169")},
		"other protocol": {Set{Redirects: []Redirect{{Protocol: UDP, Port: 21, To: server}, {Protocol: TCP, Port: 69, To: server}}}, CrossRedirected, ""},
		"other server":   {Set{Redirects: []Redirect{{Protocol: TCP, Port: 21, To: server, ToPort: 2121}}, Fallback: server}, CrossAll, tftpAt("69")},
	} {
		t.Run(name, func(t *testing.T) {
			with := sides
			with.Crossing, with.Helpers = test.crossing, []Helper{ftp, tftp}
			plan := NewPlan(test.set, with)
			chain := plan.IPTables()[0]
			if chain.Table != Raw || string(chain.Saved) != test.want {
				t.Errorf("chain of table %s:\n%swant:\n%s", chain.Table, chain.Saved, test.want)
			}
			if without := plan.WithoutRedirects(); len(without.Chains[0].Rules) > 0 || len(without.Helpers) != 2 {
				t.Errorf("without redirects: %v", without)
			}
			if plan.Equal(NewPlan(test.set, sides)) {
				t.Error("plans with and without helpers are equal")
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

// Exactly the rules that drop or reject have a reason, so that every packet is counted.
func TestDropsHaveReasons(t *testing.T) {
	all := sides
	all.Crossing = CrossAll
	used := make(map[Reason]bool)
	limits := Set{Redirects: []Redirect{{Protocol: TCP, Port: 80, To: ip("203.0.113.25"), Limits: NewLimited(Limit{Max: 1})}}}
	for _, plan := range []Plan{NewPlan(exampleSet, sides), NewPlan(Set{}, all), NewPlan(limits, sides), NewProxyPlan(sides)} {
		for _, c := range plan.Chains {
			for _, r := range c.Rules {
				if r.Drops() != slices.Contains(Reasons, r.Reason) || !r.Drops() && r.Reason != "" {
					t.Errorf("%s: rule %s has reason %q", c, r.append(nil, c.Family, false), r.Reason)
				}
				used[r.Reason] = true
			}
		}
	}
	for _, r := range Reasons {
		if !used[r] {
			t.Errorf("no rule has reason %q", r)
		}
	}
}

// The drop log adds rules and changes none.
func TestDropLog(t *testing.T) {
	plan := NewPlan(exampleSet, sides)
	logged := plan.WithDropLog()
	if !slices.Equal(plan.Parts(), []Part{MSSClampPart}) || !slices.Equal(logged.Parts(), []Part{DropLogPart, MSSClampPart}) ||
		!logged.WithoutParts([]Part{DropLogPart}).Equal(plan) || len(logged.WithoutParts(logged.Parts()).Parts()) > 0 {
		t.Errorf("log rules:\n%s", logged)
	}
	want := `-A EGRESS-INPUT -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -m limit --limit 1/sec -j NFLOG --nflog-prefix invalid --nflog-group 4711
-A EGRESS-INPUT -i macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A EGRESS-INPUT -i macvlan0 -m limit --limit 1/sec -j NFLOG --nflog-prefix physical-network --nflog-group 4711
-A EGRESS-INPUT -i macvlan0 -j DROP
`
	if got := string(logged.IPTables()[3].Saved); !strings.Contains(got, want) {
		t.Errorf("input chain:\n%s\nwant in it:\n%s", got, want)
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
