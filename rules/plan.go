package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A Table is one of the kernel's tables of chains, by the name that iptables
// gives it.
type Table string

// The tables that plans use.
const (
	// Mangle sees every packet and may mark it, before its route is chosen.
	Mangle Table = "mangle"
	// NAT translates addresses. It sees the first packet of each connection
	// only; the kernel repeats its verdict for the others.
	NAT Table = "nat"
)

// A Hook is a point on a packet's way through the kernel
// (linux/netfilter_ipv4.h), by the name of the built-in chain that stands
// there.
type Hook string

// The hooks that plans use.
const (
	Prerouting  Hook = "PREROUTING"
	Forward     Hook = "FORWARD"
	Output      Hook = "OUTPUT"
	Postrouting Hook = "POSTROUTING"
)

// A Target is what a rule does with a packet that it matches.
type Target string

// The targets that plans use.
const (
	DNAT           Target = "DNAT"     // change the destination to Rule.To and Rule.ToPort
	SNAT           Target = "SNAT"     // change the source to Rule.To
	MarkPacket     Target = "MARK"     // set the packet's mark, Rule.Mark
	MarkConnection Target = "CONNMARK" // set the mark of the packet's connection, Rule.Mark
	Drop           Target = "DROP"
)

// A Mark is a set of bits in the 32-bit mark of a packet or a connection. Other
// programs use other bits.
type Mark uint32

// String returns the mark with its mask, as iptables-save prints it.
func (m Mark) String() string { return fmt.Sprintf("0x%x/0x%[1]x", uint32(m)) }

// A Rule is one match and one target. A zero field matches everything.
type Rule struct {
	In       string // interface that the packet arrived on
	Out      string // interface that it leaves by
	NotOut   string // interface that it does not leave by
	Protocol Protocol
	Port     Port // destination port
	Marked   Mark // mark of the connection
	// Of the connection that the packet belongs to:
	RepliesNotTo netip.Addr // replies to it do not come to this address
	Confirmed    bool       // its first packet has left
	Redirected   bool       // by DNAT
	Original     bool       // the packet goes the way of the first one
	Reply        bool       // the packet goes the other way

	Target Target
	To     netip.Addr
	ToPort Port // zero: the port stays
	Mark   Mark
}

// A Chain is an ordered list of rules of ours. A packet that arrives at Hook
// goes through it before any rule of another program.
type Chain struct {
	Table Table
	Hook  Hook
	Name  string
	Rules []Rule
}

// A Plan is what the kernel's tables shall hold: the one value that is applied,
// compared with the kernel, printed and taken back. Chains stand in the order
// in which a packet of a new connection meets them.
type Plan struct {
	Chains []Chain
}

// Sides names the two sides of the router and the address that it lends.
type Sides struct {
	Cluster string     // interface that clients come in by
	Egress  string     // interface on the physical network
	Source  netip.Addr // the reserved address, IPv4
	Mark    Mark       // of connections that came in on the cluster side
}

// ChainPrefix begins the name of each of our chains, which goes on with the
// name of the hook that the chain stands at.
const ChainPrefix = "EGRESS-"

const (
	preroutingChain  = ChainPrefix + string(Prerouting)
	forwardChain     = ChainPrefix + string(Forward)
	outputChain      = ChainPrefix + string(Output)
	postroutingChain = ChainPrefix + string(Postrouting)
)

// Hooks are all hooks of the kernel. Chains named after one of them are ours,
// also where this version has none there; others with our prefix need not be.
var Hooks = []Hook{Prerouting, "INPUT", Forward, Output, Postrouting}

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
// sends for them gets it too: ICMP errors, such as the one that tells a client of
// a smaller MTU on the egress side.
//
// A redirected packet that would leave by another interface, because the egress
// side or its default route is gone or the destination is on the cluster side,
// is dropped.
//
// The last mangle rule is for connections that the NAT rules have not seen: the
// kernel decides on the source of a connection with its first packet, so one
// that was there before the source rule, or before the reserved address was
// another one, would leave with its old source for as long as it lives.
func NewPlan(set Set, sides Sides) Plan {
	redirects := make([]Rule, 0, len(set.Redirects)+1)
	for _, r := range set.Redirects {
		redirects = append(redirects, Rule{
			In: sides.Cluster, Protocol: r.Protocol, Port: r.Port,
			Target: DNAT, To: r.To, ToPort: r.ToPort,
		})
	}
	if set.Fallback.IsValid() {
		redirects = append(redirects, Rule{In: sides.Cluster, Target: DNAT, To: set.Fallback})
	}
	return Plan{Chains: []Chain{
		{Table: Mangle, Hook: Prerouting, Name: preroutingChain, Rules: []Rule{
			{In: sides.Cluster, Original: true, Target: MarkConnection, Mark: sides.Mark},
			{In: sides.Egress, Marked: sides.Mark, Target: MarkPacket, Mark: sides.Mark},
		}},
		{Table: Mangle, Hook: Output, Name: outputChain, Rules: []Rule{
			{Marked: sides.Mark, Reply: true, Target: MarkPacket, Mark: sides.Mark},
		}},
		{Table: Mangle, Hook: Forward, Name: forwardChain, Rules: []Rule{
			{In: sides.Cluster, NotOut: sides.Egress, Redirected: true, Original: true, Target: Drop},
		}},
		{Table: Mangle, Hook: Postrouting, Name: postroutingChain, Rules: []Rule{
			{Out: sides.Egress, RepliesNotTo: sides.Source, Confirmed: true, Original: true, Target: Drop},
		}},
		{Table: NAT, Hook: Prerouting, Name: preroutingChain, Rules: redirects},
		{Table: NAT, Hook: Postrouting, Name: postroutingChain, Rules: []Rule{
			{Out: sides.Egress, Target: SNAT, To: sides.Source},
		}},
	}}
}

// Guard returns the plan without its redirects. It is what must stand before
// the routes change: with it nothing is redirected, and whatever leaves by the
// egress side has the reserved address.
func (p Plan) Guard() Plan {
	guard := Plan{Chains: slices.Clone(p.Chains)}
	for i, c := range guard.Chains {
		if !slices.ContainsFunc(c.Rules, isRedirect) {
			continue
		}
		guard.Chains[i].Rules = nil
		for _, r := range c.Rules {
			if !isRedirect(r) {
				guard.Chains[i].Rules = append(guard.Chains[i].Rules, r)
			}
		}
	}
	return guard
}

func isRedirect(r Rule) bool { return r.Target == DNAT }

// Equal reports whether both plans hold the same chains with the same rules in
// the same order.
func (p Plan) Equal(other Plan) bool {
	return slices.EqualFunc(p.Chains, other.Chains, func(a, b Chain) bool {
		return a.Table == b.Table && a.Hook == b.Hook && a.Name == b.Name && slices.Equal(a.Rules, b.Rules)
	})
}

// String returns the plan for a person to read: for each chain, the hook it
// stands at and its rules.
func (p Plan) String() string {
	var b strings.Builder
	for _, c := range p.Chains {
		fmt.Fprintf(&b, "table %s, hook %s, chain %s\n", c.Table, c.Hook, c.Name)
		for _, r := range c.Rules {
			b.WriteString("  ")
			b.Write(r.append(nil, false))
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// Destinations returns where the plan redirects to.
func (p Plan) Destinations() []netip.Addr {
	var to []netip.Addr
	for _, c := range p.Chains {
		for _, r := range c.Rules {
			if isRedirect(r) {
				to = append(to, r.To)
			}
		}
	}
	return to
}

// Count returns how many rules of the plan have the given target.
func (p Plan) Count(t Target) int {
	n := 0
	for _, c := range p.Chains {
		for _, r := range c.Rules {
			if r.Target == t {
				n++
			}
		}
	}
	return n
}
