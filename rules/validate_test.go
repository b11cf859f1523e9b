package rules

import (
	"net/netip"
	"strings"
	"testing"
)

// The plans of the router are valid, with every option.
func TestPlansAreValid(t *testing.T) {
	all := sides
	all.Crossing, all.Health = CrossAll, 8081
	for _, group := range HelperGroups {
		all.Helpers = append(all.Helpers, group.Helpers...)
	}
	for name, plan := range map[string]Plan{
		"none": {}, "example": NewPlan(exampleSet, sides), "open": NewPlan(exampleSet, all), "proxy": NewProxyPlan(sides),
		"without redirects": NewPlan(exampleSet, all).WithoutRedirects(), "IPv4 only": NewPlan(exampleSet, all).Without(IPv6),
		"drop log": NewPlan(exampleSet, all).WithDropLog(), "no parts": NewPlan(exampleSet, all).WithoutParts([]Part{MSSClampPart}),
	} {
		if err := plan.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestInvalidRules(t *testing.T) {
	v4, v6 := ip("192.0.2.1"), ip("2001:db8::1")
	drop := func(r Rule) Rule { r.Target, r.Reason = Drop, Invalid; return r }
	mark := func(r Rule) Rule { r.Target, r.Mark = MarkPacket, 1; return r }
	for name, test := range map[string]struct {
		family Family
		table  Table
		hook   Hook
		rule   Rule
		want   string
	}{
		"hook of no table":            {IPv4, Raw, Output, Rule{Target: Return}, "no such hook in this table"},
		"unknown family":              {5, Raw, Prerouting, Rule{Target: Return}, "unknown family"},
		"no target":                   {IPv4, Filter, Input, Rule{}, "has no target"},
		"drop in nat":                 {IPv4, NAT, Prerouting, drop(Rule{}), "has no target DROP"},
		"mark in nat":                 {IPv4, NAT, Prerouting, mark(Rule{}), "has no target MARK"},
		"drop in raw":                 {IPv4, Raw, Prerouting, drop(Rule{}), "has no target DROP"},
		"reject in mangle":            {IPv4, Mangle, Output, Rule{Target: Reject, Reason: Invalid}, "has no target REJECT"},
		"clamp before routing":        {IPv4, Mangle, Prerouting, Rule{Protocol: TCP, SYN: true, Target: ClampMSS}, "has no target TCPMSS"},
		"IPv6 address in IPv4":        {IPv4, Filter, Input, drop(Rule{From: only(v6)}), "not an address of packets of IPv4"},
		"IPv4 address in IPv6":        {IPv6, Filter, Input, drop(Rule{NotToward: only(v4)}), "not an address of packets of IPv6"},
		"mapped address":              {IPv6, Filter, Input, drop(Rule{From: only(ip("::ffff:192.0.2.1"))}), "not an address"},
		"zone":                        {IPv6, Filter, Input, drop(Rule{RepliesNotTo: ip("fe80::1%eth0")}), "not an address"},
		"translation to other family": {IPv4, NAT, Prerouting, Rule{Target: DNAT, To: v6}, "not an address"},
		"network with host bits":      {IPv6, Filter, Input, drop(Rule{From: netip.MustParsePrefix("fe80::1/10")}), "not a network"},
		"every network":               {IPv4, Filter, Input, drop(Rule{NotToward: netip.MustParsePrefix("0.0.0.0/0")}), "not a network"},
		"clients of no share":         {IPv4, NAT, Postrouting, Rule{Clients: Share{2, 4}, Target: SNAT, To: v4}, "a share of clients is"},
		"clients of a long share":     {IPv6, NAT, Postrouting, Rule{Clients: Share{9, 4}, Target: SNAT, To: v6}, "a share of clients is"},
		"source and share":            {IPv4, NAT, Postrouting, Rule{From: only(v4), Clients: Share{1, 0}, Target: SNAT, To: v4}, "once"},
		"two destinations of replies": {IPv4, Filter, Input, drop(Rule{RepliesTo: v4, RepliesNotTo: v4}), "one destination of replies"},
		"helper of IPv4 alone":        {IPv6, Raw, Prerouting, Rule{Protocol: UDP, Target: AttachHelper, Helper: "snmp"}, "no such helper"},
		"pattern of interfaces":       {IPv4, Filter, Input, drop(Rule{In: "eth+"}), "not a literal name"},
		"long name":                   {IPv4, Filter, Input, drop(Rule{In: "abcdefghijklmnop"}), "not a literal name"},
		"quote in a name":             {IPv4, Filter, Forward, drop(Rule{NotOut: `a"b`}), "not a literal name"},
		"input interface at output":   {IPv4, Mangle, Output, drop(Rule{In: "eth0"}), "no input interface"},
		"output interface at input":   {IPv4, Filter, Input, drop(Rule{NotOut: "eth0"}), "no output interface"},
		"two output interfaces":       {IPv4, Filter, Forward, drop(Rule{Out: "eth0", NotOut: "eth1"}), "once"},
		"two sources":                 {IPv4, Filter, Forward, drop(Rule{From: only(v4), NotFrom: only(ip("192.0.2.2"))}), "once"},
		"ICMP in IPv6":                {IPv6, Filter, Input, drop(Rule{Protocol: ICMP}), "not a protocol of IPv6"},
		"ICMPv6 in IPv4":              {IPv4, Filter, Input, drop(Rule{Protocol: ICMPv6}), "not a protocol of IPv4"},
		"port without protocol":       {IPv4, Filter, Input, drop(Rule{Port: 80}), "a port needs"},
		"port of ICMP":                {IPv4, Filter, Input, drop(Rule{Protocol: ICMP, Port: 80}), "a port needs"},
		"SYN of UDP":                  {IPv4, Filter, Input, drop(Rule{Protocol: UDP, SYN: true}), "SYN needs"},
		"message of TCP":              {IPv4, Filter, Input, drop(Rule{Protocol: TCP, Message: 8}), "type of messages needs"},
		"message of no protocol":      {IPv6, Filter, Input, drop(Rule{Message: 8}), "type of messages needs"},
		"any message":                 {IPv4, Filter, Input, drop(Rule{Protocol: ICMP, Message: 255}), "the type 255"},
		"connection before conntrack": {IPv4, Raw, Prerouting, Rule{Original: true, Target: Return}, "before conntrack"},
		"unconnected and redirected":  {IPv4, Filter, Input, drop(Rule{Unconnected: true, Redirected: true}), "no properties"},
		"invalid and marked":          {IPv4, Filter, Input, drop(Rule{Invalid: true, Unmarked: 1}), "no properties"},
		"two states":                  {IPv4, Filter, Input, drop(Rule{Invalid: true, Unconnected: true}), "one state"},
		"two statuses":                {IPv4, Filter, Input, drop(Rule{Expected: true, Confirmed: true}), "one status"},
		"two directions":              {IPv4, Filter, Input, drop(Rule{Original: true, Reply: true}), "one direction"},
		"DNAT to nowhere":             {IPv4, NAT, Prerouting, Rule{Target: DNAT}, "an address"},
		"DNAT to no address":          {IPv4, NAT, Prerouting, Rule{Target: DNAT, To: netip.IPv4Unspecified()}, "an address"},
		"address of a mark":           {IPv4, Mangle, Output, mark(Rule{To: v4}), "an address"},
		"DNAT of a port of ICMP":      {IPv4, NAT, Prerouting, Rule{Protocol: ICMP, Target: DNAT, To: v4, ToPort: 1}, "a port to translate to"},
		"SNAT to a port":              {IPv4, NAT, Postrouting, Rule{Protocol: TCP, Target: SNAT, To: v4, ToPort: 1}, "a range of ports"},
		"SNAT to a range from 0":      {IPv4, NAT, Postrouting, Rule{Protocol: TCP, Target: SNAT, To: v4, ToLast: 1}, "a range of ports"},
		"SNAT to ports of no":         {IPv4, NAT, Postrouting, Rule{Target: SNAT, To: v4, ToPort: 1, ToLast: 2}, "a port to translate to"},
		"DNAT to a range":             {IPv4, NAT, Prerouting, Rule{Protocol: TCP, Target: DNAT, To: v4, ToPort: 1, ToLast: 2}, "a range of ports"},
		"no mark":                     {IPv4, Mangle, Output, Rule{Target: MarkPacket}, "need a mark"},
		"mark of another target":      {IPv4, Mangle, Output, Rule{Target: Return, Mark: 1}, "need a mark"},
		"helper of another target":    {IPv4, Mangle, Output, Rule{Target: Return, Helper: "ftp"}, "needs a helper"},
		"helper of no plan":           {IPv4, Raw, Prerouting, Rule{Protocol: TCP, Target: AttachHelper, Helper: "sip"}, "no such helper"},
		"helper of another protocol":  {IPv4, Raw, Prerouting, Rule{Protocol: UDP, Target: AttachHelper, Helper: "ftp"}, "no such helper"},
		"drop without reason":         {IPv4, Filter, Input, Rule{Target: Drop}, "need a reason"},
		"unknown reason":              {IPv4, Filter, Input, Rule{Target: LogPacket, Reason: "a b"}, "unknown reason"},
		"return with reason":          {IPv4, Filter, Input, Rule{Target: Return, Reason: Invalid}, "need a reason"},
		"clamp of every packet":       {IPv4, Mangle, Output, Rule{Protocol: TCP, Target: ClampMSS}, "TCPMSS needs SYN"},
		"redirects of a protocol":     {IPv4, NAT, Prerouting, Rule{Protocol: TCP, Target: Redirected}, "those of the redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			plan := Plan{Chains: []Chain{{test.family, test.table, test.hook, []Rule{test.rule}}}, Helpers: []Helper{{"ftp", TCP, 21}, {"snmp", UDP, 161}}}
			if err := plan.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

func TestInvalidPlans(t *testing.T) {
	valid := NewPlan(exampleSet, sides)
	for name, test := range map[string]struct {
		change func(*Plan)
		want   string
	}{
		"chain twice":             {func(p *Plan) { p.Chains = append(p.Chains, p.Chains[0]) }, "EGRESS-PREROUTING): defined twice"},
		"redirect twice":          {func(p *Plan) { p.Redirects = append(p.Redirects[:1:1], p.Redirects[0]) }, "has another one"},
		"redirect of no port":     {func(p *Plan) { p.Redirects = []Redirect{{Protocol: TCP, To: ip("192.0.2.1")}} }, "expected a port"},
		"redirect to nowhere":     {func(p *Plan) { p.Redirects = []Redirect{{Protocol: TCP, Port: 1}} }, "expected a port and an address"},
		"redirect of ICMP":        {func(p *Plan) { p.Redirects = []Redirect{{Protocol: ICMP, Port: 1, To: ip("192.0.2.1")}} }, "has no ports"},
		"redirect without a rule": {func(p *Plan) { p.Redirects = []Redirect{{Protocol: TCP, Port: 1, To: ip("2001:db8::1")}} }, "no chain redirects IPv6"},
		"helper without name":     {func(p *Plan) { p.Helpers = []Helper{{"", TCP, 1}} }, "1 to 15"},
		"helper of ICMP":          {func(p *Plan) { p.Helpers = []Helper{{"a", ICMP, 1}} }, "has no helpers"},
		"helper twice":            {func(p *Plan) { p.Helpers = []Helper{{"ras", UDP, 1}, {"RAS", UDP, 2}} }, "defined twice"},
	} {
		t.Run(name, func(t *testing.T) {
			plan := valid
			test.change(&plan)
			if err := plan.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
	// One port of each protocol and family.
	both := Plan{
		Chains: []Chain{{IPv4, NAT, Prerouting, []Rule{{Target: Redirected}}}, {IPv6, NAT, Prerouting, []Rule{{Target: Redirected}}}},
		Redirects: []Redirect{
			{Protocol: TCP, Port: 53, To: ip("192.0.2.1")}, {Protocol: UDP, Port: 53, To: ip("192.0.2.1")},
			{Protocol: TCP, Port: 53, To: ip("2001:db8::1")}, {Protocol: UDP, Port: 53, To: ip("2001:db8::1"), ToPort: 5353},
			{Protocol: SCTP, Port: 53, Last: 60, To: ip("2001:db8::1"), ToPort: 153, Shifts: true},
		},
	}
	if err := both.Validate(); err != nil {
		t.Error(err)
	}
	if got, want := both.String(), `table nat, hook PREROUTING, chain EGRESS-PREROUTING
  -p tcp --dport 53 -j DNAT --to-destination 192.0.2.1
  -p udp --dport 53 -j DNAT --to-destination 192.0.2.1
table nat, hook PREROUTING, chain EGRESS-PREROUTING, IPv6
  -p tcp --dport 53 -j DNAT --to-destination 2001:db8::1
  -p udp --dport 53 -j DNAT --to-destination [2001:db8::1]:5353
  -p sctp --dport 53:60 -j DNAT --to-destination [2001:db8::1]:153-160/53
`; got != want {
		t.Errorf("plan of both families:\n%swant:\n%s", got, want)
	}
}

// Every start of the router validates its plan, also a large one.
func BenchmarkValidate(b *testing.B) {
	plan := NewPlan(Set{Redirects: portsFrom(TCP, 10001, 10000, 1)}, sides)
	for b.Loop() {
		if err := plan.Validate(); err != nil {
			b.Fatal(err)
		}
	}
}
