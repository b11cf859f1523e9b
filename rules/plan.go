package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A Family is a version of the Internet Protocol, by its number.
type Family uint8

// The families that plans use. Connections are redirected to IPv4 addresses
// only; what a plan has for IPv6 keeps others out.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns the family's name.
func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// A Table is one of the kernel's tables of chains, by the name that iptables
// gives it.
type Table string

// The tables that plans use, in the order in which a packet meets them.
const (
	// Mangle sees every packet and may mark it, before its route is chosen.
	Mangle Table = "mangle"
	// NAT translates addresses. It sees the first packet of each connection
	// only; the kernel repeats its verdict for the others.
	NAT Table = "nat"
	// Filter sees every packet with its destination translated, and is the
	// only one that can refuse it with an answer.
	Filter Table = "filter"
	// SourceGuard sees every outgoing packet after NAT, with its final source.
	// iptables has no such table, since none of its chains comes after NAT;
	// nftables allows a chain at any priority.
	SourceGuard Table = "source-guard"
)

// A Hook is a point on a packet's way through the kernel
// (linux/netfilter_ipv4.h), by the name of the built-in chain that stands
// there.
type Hook string

// The hooks of the kernel.
const (
	Prerouting  Hook = "PREROUTING"
	Input       Hook = "INPUT"
	Forward     Hook = "FORWARD"
	Output      Hook = "OUTPUT"
	Postrouting Hook = "POSTROUTING"
)

// Hooks are all of them. Chains named after one of them are ours, also where
// this version has none there.
var Hooks = []Hook{Prerouting, Input, Forward, Output, Postrouting}

// A Target is what a rule does with a packet that it matches.
type Target string

// The targets that plans use.
const (
	// Redirected changes the destination to that of the plan's redirect for
	// the packet's protocol and port. A packet that none is for goes on to
	// the next rule.
	Redirected     Target = "REDIRECTS"
	DNAT           Target = "DNAT"     // change the destination to Rule.To and Rule.ToPort
	SNAT           Target = "SNAT"     // change the source to Rule.To
	MarkPacket     Target = "MARK"     // set the packet's mark, Rule.Mark
	MarkConnection Target = "CONNMARK" // set the mark of the packet's connection, Rule.Mark
	Return         Target = "RETURN"   // leave it to other programs' rules
	Drop           Target = "DROP"
	// Reject drops and says so: TCP with a reset (RFC 9293, section 3.5.2),
	// the rest as a port that nobody listens on (RFC 1122, section 3.2.2.1).
	// It is for rules whose Protocol is TCP, or of which TCP has been taken
	// out before.
	Reject Target = "REJECT"
)

// A Mark is a set of bits in the 32-bit mark of a packet or a connection. Other
// programs use other bits.
type Mark uint32

// String returns the mark with its mask, as iptables-save prints it.
func (m Mark) String() string { return fmt.Sprintf("0x%x/0x%[1]x", uint32(m)) }

// A Rule is one match and one target. A zero field matches everything.
type Rule struct {
	From     netip.Addr // source that the packet has
	NotFrom  netip.Addr // source that it does not have
	Toward   netip.Addr // destination that it has
	In       string     // interface that it arrived on
	Out      string     // interface that it leaves by
	NotOut   string     // interface that it does not leave by
	Protocol Protocol
	Port     Port // destination port
	Echo     bool // an ICMP echo request (RFC 792)
	Marked   Mark // mark of the connection
	Unmarked Mark // mark that the connection does not have
	// Of the connection that the packet belongs to:
	RepliesNotTo netip.Addr // replies to it do not come to this address
	Confirmed    bool       // its first packet has left
	Redirected   bool       // by DNAT
	Original     bool       // the packet goes the way of the first one
	Reply        bool       // the packet goes the other way, or is an error about one that went the first
	// The packet belongs to no connection, so that no NAT rule sees it.
	Unconnected bool

	Target Target
	To     netip.Addr
	ToPort Port // zero: the port stays
	Mark   Mark
}

// A Chain is an ordered list of rules of ours. A packet that arrives at Hook
// goes through it before any rule of another program.
type Chain struct {
	Family Family
	Table  Table
	Hook   Hook
	Rules  []Rule
}

// Name returns the name of the chain: that of the hook with a prefix.
func (c Chain) Name() string { return ChainPrefix + string(c.Hook) }

// ChainPrefix begins the name of each of our chains. Others may begin so too.
const ChainPrefix = "EGRESS-"

// OwnsChain reports whether a chain of iptables has a name that we give.
func OwnsChain(name string) bool {
	hook, ok := strings.CutPrefix(name, ChainPrefix)
	return ok && slices.Contains(Hooks, Hook(hook)) || IsTreeChain(name)
}

// String returns the heading of a chain for a person to read.
func (c Chain) String() string {
	s := fmt.Sprintf("table %s, hook %s, chain %s", c.Table, c.Hook, c.Name())
	if c.Family != IPv4 {
		s += fmt.Sprintf(", %s", c.Family)
	}
	return s
}

// A Plan is what the kernel's tables shall hold: the one value that is applied,
// compared with the kernel, printed and taken back. Chains stand in the order
// in which a packet of a new connection meets them, those of IPv6 last.
type Plan struct {
	Chains []Chain
	// Redirects are what the rule with the target Redirected looks up. No two
	// have the same Port.
	Redirects []Redirect
}

// Sides names the two sides of the router and the address that it lends.
type Sides struct {
	Cluster string     // interface that clients come in by
	Egress  string     // interface on the physical network
	Source  netip.Addr // the reserved address, IPv4
	Mark    Mark       // of connections that came in on the cluster side
	Health  Port       // TCP port of the pod itself that the fallback leaves alone; zero: none
	// What is let from the one to the other.
	Crossing Crossing
}

// A Crossing is what is let from the cluster side to the physical network.
type Crossing uint8

const (
	// CrossRedirected lets redirected connections cross. Everything else is
	// refused, as by a pod that forwards nothing.
	CrossRedirected Crossing = iota
	// CrossAll lets every connection cross, as the original did where a pod
	// had been made the gateway of others. What of IPv6 crosses that way is
	// left to the kernel.
	CrossAll
)

// NewPlan returns the chains that carry out set.
//
// The NAT rules are those of the original, in its order: a redirect for each
// destination, matched by the interface that the packet came in by; then, for
// whatever leaves by the egress side, the reserved address as its source.
//
// The mangle rules are for replies. The only default route leads to the egress
// side, so a reply to a client that is not in the cluster side's own subnet
// would leave there. Connections that come in on the cluster side are marked,
// and what arrives for them on the egress side gets the mark before its route
// is chosen: a routing rule for that mark leads back to the cluster side. The
// packets of the connection's own direction must not get it. What the pod itself
// sends for them gets it too: refusals, and ICMP errors such as the one that
// tells a client of a smaller MTU on the egress side.
//
// The last mangle rules are for packets that the NAT rules have not seen. The
// kernel decides on the source of a connection with its first packet, so one
// that was there before the source rule, or before the reserved address was
// another one, would leave with its old source for as long as it lives. And a
// packet that belongs to no connection, such as one out of TCP's window, would
// leave as it is. Nor does the pod answer, by the cluster side, an echo request
// that came from the physical network with a forged source.
//
// The source guard is for the time after another program deleted the SNAT rule:
// no packet leaves with another source until the rule is back.
//
// The filter rules begin with what nearly every packet is. A redirected packet
// that would leave by another interface, because the egress side or its default
// route is gone or the destination is on the cluster side, is dropped; not
// refused, so that its connection goes on when they are back. Nothing else
// crosses. Whoever can route packets to the pod
// could otherwise use the reserved address, and whoever is on the physical
// network could send packets into the cluster, or talk to what listens in the
// pod; the original forwarded all of it. Of IPv6, which has no reserved address,
// nothing crosses.
func NewPlan(set Set, sides Sides) Plan {
	translate := []Rule{{In: sides.Cluster, Target: Redirected}}
	if set.Fallback.IsValid() {
		if sides.Health != 0 {
			translate = append(translate, Rule{In: sides.Cluster, Protocol: TCP, Port: sides.Health, Target: Return})
		}
		translate = append(translate, Rule{In: sides.Cluster, Target: DNAT, To: set.Fallback})
	}
	closed := sides.Crossing == CrossRedirected
	plan := Plan{
		Redirects: set.Redirects,
		Chains: []Chain{
			{IPv4, Mangle, Prerouting, []Rule{
				{In: sides.Cluster, Original: true, Target: MarkConnection, Mark: sides.Mark},
				{In: sides.Egress, Marked: sides.Mark, Target: MarkPacket, Mark: sides.Mark},
			}},
			{IPv4, NAT, Prerouting, translate},
			{IPv4, Filter, Forward, []Rule{
				{In: sides.Cluster, Out: sides.Egress, Redirected: closed, Original: true, Target: Return},
				{In: sides.Egress, Out: sides.Cluster, Redirected: closed, Reply: true, Target: Return},
				{In: sides.Cluster, NotOut: sides.Egress, Redirected: true, Original: true, Target: Drop},
				{In: sides.Cluster, Protocol: TCP, Original: true, Target: Reject},
				{In: sides.Cluster, Original: true, Target: Reject},
				{Target: Drop},
			}},
			{IPv4, Filter, Input, inputRules(sides, Rule{Echo: true, Toward: sides.Source})},
			{IPv4, Mangle, Output, []Rule{
				{Marked: sides.Mark, Reply: true, Target: MarkPacket, Mark: sides.Mark},
			}},
			{IPv4, Mangle, Postrouting, []Rule{
				{Out: sides.Egress, RepliesNotTo: sides.Source, Confirmed: true, Original: true, Target: Drop},
				{Out: sides.Egress, NotFrom: sides.Source, Unconnected: true, Target: Drop},
				{Out: sides.Cluster, From: sides.Source, Unmarked: sides.Mark, Reply: true, Target: Drop},
			}},
			{IPv4, NAT, Postrouting, []Rule{
				{Out: sides.Egress, Target: SNAT, To: sides.Source},
			}},
			{IPv4, SourceGuard, Postrouting, []Rule{
				{Out: sides.Egress, NotFrom: sides.Source, Target: Drop},
			}},
		},
	}
	plan.Chains = append(plan.Chains, chainsIPv6(sides)...)
	return plan
}

// NewProxyPlan returns the chains of a pod that redirects nothing and in which
// a proxy listens: nobody on the physical network shall use it, nor send
// packets through the pod, which has no part in forwarding.
func NewProxyPlan(sides Sides) Plan {
	sides.Crossing = CrossRedirected
	return Plan{Chains: append([]Chain{
		{IPv4, Filter, Forward, []Rule{{Target: Drop}}},
		{IPv4, Filter, Input, inputRules(sides, Rule{Echo: true, Toward: sides.Source})},
	}, chainsIPv6(sides)...)}
}

// inputRules returns what keeps the physical network from the pod itself, but
// for what takes part in its own connections and what also matches.
func inputRules(sides Sides, also Rule) []Rule {
	also.In, also.Target = sides.Egress, Return
	return []Rule{
		{In: sides.Egress, Reply: true, Target: Return},
		also,
		{In: sides.Egress, Target: Drop},
	}
}

// chainsIPv6 returns the chains for IPv6, which works by ICMP where IPv4 has ARP
// (RFC 4861).
func chainsIPv6(sides Sides) []Chain {
	forward := []Rule{{Target: Drop}}
	if sides.Crossing == CrossAll {
		forward = []Rule{
			{In: sides.Egress, Reply: true, Target: Return},
			{In: sides.Egress, Target: Drop},
		}
	}
	return []Chain{
		{IPv6, Filter, Forward, forward},
		{IPv6, Filter, Input, inputRules(sides, Rule{Protocol: ICMPv6})},
	}
}

// Guard returns the plan without its redirects. It is what must stand before
// the routes change: with it nothing is redirected, and whatever leaves by the
// egress side has the reserved address.
func (p Plan) Guard() Plan {
	guard := Plan{Chains: slices.Clone(p.Chains)}
	for i, c := range guard.Chains {
		guard.Chains[i].Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r Rule) bool { return r.Target == DNAT })
	}
	return guard
}

// Without returns the plan without the chains of a family, for a kernel that
// does not have it.
func (p Plan) Without(f Family) Plan {
	p.Chains = slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return c.Family == f })
	return p
}

// Equal reports whether both plans hold the same chains with the same rules in
// the same order.
func (p Plan) Equal(other Plan) bool {
	return slices.EqualFunc(p.Chains, other.Chains, func(a, b Chain) bool {
		return a.Family == b.Family && a.Table == b.Table && a.Hook == b.Hook && slices.Equal(a.Rules, b.Rules)
	}) && slices.Equal(p.Redirects, other.Redirects)
}

// String returns the plan for a person to read: for each chain, the hook it
// stands at and its rules.
func (p Plan) String() string {
	var b strings.Builder
	for _, c := range p.Chains {
		fmt.Fprintln(&b, c)
		for _, r := range c.Rules {
			p.spellOut(r, func(r *Rule) { fmt.Fprintf(&b, "  %s\n", r.append(nil, c.Family, false)) })
		}
	}
	return b.String()
}

// spellOut calls fn with the rule, or, in place of one with the target
// Redirected, with a rule for each redirect. The rule is fn's for the call only.
func (p Plan) spellOut(r Rule, fn func(*Rule)) {
	if r.Target != Redirected {
		fn(&r)
		return
	}
	for _, to := range p.Redirects {
		r.Protocol, r.Port, r.Target, r.To, r.ToPort = to.Protocol, to.Port, DNAT, to.To, to.ToPort
		fn(&r)
	}
}

// Destinations returns where the plan redirects to.
func (p Plan) Destinations() []netip.Addr {
	var to []netip.Addr
	for _, r := range p.Redirects {
		to = append(to, r.To)
	}
	if f := p.fallback(); f.IsValid() {
		to = append(to, f)
	}
	return to
}

// fallback returns where connections go that no redirect is for.
func (p Plan) fallback() netip.Addr { return p.first(DNAT).To }

// source returns what whatever leaves by the egress side has as its source.
func (p Plan) source() netip.Addr { return p.first(SNAT).To }

// first returns the first rule with the given target.
func (p Plan) first(t Target) Rule {
	for _, c := range p.Chains {
		for _, r := range c.Rules {
			if r.Target == t {
				return r
			}
		}
	}
	return Rule{}
}
