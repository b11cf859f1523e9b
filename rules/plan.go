package rules

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
)

// A Family is a version of the Internet Protocol, by its number.
type Family uint8

// The families of plans.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns the family's name.
func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// A Table is one of the kernel's tables of chains, by the name that iptables
// gives it.
type Table string

// The tables of plans, in the order in which a packet traverses them.
const (
	// Raw attaches helpers to new connections. In iptables its rules match every
	// packet, before conntrack does.
	Raw Table = "raw"
	// Mangle contains rules for every packet and may set marks before routing.
	Mangle Table = "mangle"
	// NAT translates addresses. Its rules match only the first packet of each
	// connection; the kernel repeats the translation for the others.
	NAT Table = "nat"
	// Filter contains rules for every packet, after DNAT, and is the only table
	// that can reject a packet with an answer.
	Filter Table = "filter"
	// Limits contains rules for the first packet of each connection to a port with limits,
	// before its destination is translated, that may reject it. It is in nftables with
	// every backend: only its sets keep their counts while rules change. A packet that it
	// rejects has no connection afterwards.
	Limits Table = "limits"
	// SourceGuard sees every outgoing packet after NAT, with its final source.
	// iptables has no such table, since none of its chains comes after NAT;
	// nftables allows a chain at any priority.
	SourceGuard Table = "source-guard"
)

// A Hook is a point of a packet's path through the kernel
// (linux/netfilter_ipv4.h), named after its built-in chain.
type Hook string

// The hooks of the kernel.
const (
	Prerouting  Hook = "PREROUTING"
	Input       Hook = "INPUT"
	Forward     Hook = "FORWARD"
	Output      Hook = "OUTPUT"
	Postrouting Hook = "POSTROUTING"
)

// Hooks lists every hook. A chain named after one of them is ours, even if this
// version has no chain there.
var Hooks = []Hook{Prerouting, Input, Forward, Output, Postrouting}

// A Target is what a rule does with a packet that it matches.
type Target string

// The targets of plans.
const (
	// Redirected changes the destination to that of the plan's redirect for
	// the packet's family, protocol and port. A packet without a redirect continues
	// with the next rule.
	Redirected     Target = "REDIRECTS"
	DNAT           Target = "DNAT"     // change the destination to Rule.To and Rule.ToPort
	SNAT           Target = "SNAT"     // change the source to Rule.To
	MarkPacket     Target = "MARK"     // set the packet's mark, Rule.Mark
	MarkConnection Target = "CONNMARK" // set the mark of the packet's connection, Rule.Mark
	// CheckLimits lets a connection pass the chain that is within the limits of the redirect
	// for its protocol and port, or for which there are none. One beyond them continues with
	// the next rule.
	CheckLimits  Target = "LIMITS"
	AttachHelper Target = "CT" // attach Rule.Helper to the packet's new connection
	// ClampMSS lowers the maximum segment size of a TCP SYN (RFC 9293, section
	// 3.7.1) to what fits the MTU of the paths to both ends, as the pod's routes know
	// them.
	ClampMSS Target = "TCPMSS"
	Return   Target = "RETURN" // continue with other programs' rules
	Drop     Target = "DROP"
	// Reject drops and answers: TCP with a reset (RFC 9293, section 3.5.2),
	// other protocols with port unreachable (RFC 1122, section 3.2.2.1). It is
	// for rules whose Protocol is TCP, or that follow a rule for all of TCP.
	Reject Target = "REJECT"
	// LogPacket sends the header of some packets to the sockets of LogGroup, with
	// Rule.Reason. The packet continues with the next rule.
	LogPacket Target = "NFLOG"
)

// A Reason is why a rule drops or rejects packets: the label of its counter.
type Reason string

// The reasons.
const (
	NotRedirected   Reason = "not-redirected"   // from the cluster side, and no redirect matches
	Invalid         Reason = "invalid"          // part of no connection that may cross, or an ICMP redirect
	PhysicalNetwork Reason = "physical-network" // from the physical network, and no reply
	WrongSource     Reason = "source-guard"     // would leave with another source than the reserved address
	OtherInterface  Reason = "other-interface"  // came, or would leave, by a third interface
	OverLimit       Reason = "limit"            // opens a connection beyond the limits of its redirect
)

// Reasons lists every reason.
var Reasons = []Reason{NotRedirected, Invalid, PhysicalNetwork, WrongSource, OtherInterface, OverLimit}

// A Mark is a set of bits in the 32-bit mark of a packet or a connection. Other
// programs use other bits of it.
type Mark uint32

// String returns the mark with its mask, as iptables-save prints it.
func (m Mark) String() string { return fmt.Sprintf("0x%x/0x%[1]x", uint32(m)) }

// A Message is a type of messages of ICMP or ICMPv6. No rule matches the type 0.
type Message uint8

// The types of messages in plans.
const (
	RedirectMessage       Message = 5   // ICMP (RFC 792)
	EchoRequest           Message = 8   // ICMP (RFC 792)
	EchoRequestIPv6       Message = 128 // ICMPv6 (RFC 4443)
	ListenerQuery         Message = 130 // ICMPv6 (RFC 2710)
	ListenerReport        Message = 131 // ICMPv6 (RFC 2710)
	ListenerDone          Message = 132 // ICMPv6 (RFC 2710)
	RouterAdvertisement   Message = 134 // ICMPv6 (RFC 4861)
	NeighbourSolicitation Message = 135 // ICMPv6 (RFC 4861)
	NeighbourAdvert       Message = 136 // ICMPv6 (RFC 4861)
	RedirectMessageIPv6   Message = 137 // ICMPv6 (RFC 4861)
	ListenerReportV2      Message = 143 // ICMPv6 (RFC 3810)
)

// A Rule is one match and one target. A zero field matches every packet. Not every
// combination is valid: see [Plan.Validate].
type Rule struct {
	From      netip.Prefix // source of the packet
	NotFrom   netip.Prefix // any other source
	Toward    netip.Prefix // destination of the packet
	NotToward netip.Prefix // any other destination
	In        string       // input interface
	Out       string       // output interface
	NotOut    string       // any other output interface
	Protocol  Protocol
	Port      Port    // destination port; the first one of a range
	Last      Port    // the last one of a range; zero: Port alone
	SYN       bool    // a TCP segment with SYN and without RST
	Message   Message // type of ICMP or ICMPv6 messages, by Protocol
	Marked    Mark    // mark of the connection
	Unmarked  Mark    // any other mark of the connection
	Clients   Share   // source of the packet
	// Matches of the packet's connection:
	RepliesTo    netip.Addr // destination of its replies
	RepliesNotTo netip.Addr // any other destination of its replies
	Confirmed    bool       // its first packet has left
	Redirected   bool       // its destination was changed by DNAT
	Expected     bool       // a helper expected it
	Original     bool       // the packet has the direction of the first packet
	Reply        bool       // the packet has the other direction, or is an ICMP error about a packet of the first direction
	// The packet has no connection, so that no NAT rule applies to it.
	Unconnected bool
	Invalid     bool // the same, and no rule of another program has exempted it from tracking

	Target Target
	To     netip.Addr
	ToPort Port // of DNAT, and the first one of SNAT; zero: the port is unchanged
	ToLast Port // the last port of SNAT
	// OneOf matches one of that many packets, at random; zero: every one. Redirects to
	// several addresses have it.
	OneOf  uint8
	Shifts bool    // as in Redirect
	Limits Limited // as in Redirect
	Mark   Mark
	Helper string // the kernel's name of a helper
	Name   string // of the redirect's line, which the kernel keeps as a comment: see [Plan.IPTables]
	Reason Reason // of Drop, Reject and LogPacket
}

// A Share is the addresses with the value End in their last Bits bits, at most eight. The
// zero Share is all addresses.
type Share struct{ Bits, End uint8 }

// A Chain is an ordered list of our rules. A packet at Hook traverses it before
// any rule of another program.
type Chain struct {
	Family Family
	Table  Table
	Hook   Hook
	Rules  []Rule
}

// Name returns the name of the chain: the name of its hook with a prefix.
func (c Chain) Name() string { return ChainPrefix + string(c.Hook) }

// ChainPrefix is the prefix of all our chains. Other programs may use it too.
const ChainPrefix = "EGRESS-"

// ScratchPrefix is the prefix of scratch chains: a backend loads rules into them
// to read back the form in which iptables prints them. The longest name has 26
// characters; iptables takes 28 (linux/netfilter/x_tables.h,
// XT_EXTENSION_MAXNAMELEN).
const ScratchPrefix = ChainPrefix + "TMP-"

// ScratchJumps is the scratch chain for a jump as in built-in chains.
const ScratchJumps = ScratchPrefix + "JUMPS"

// ScratchName returns the name of the scratch chain for a chain of ours.
func ScratchName(chain string) string {
	return ScratchPrefix + strings.TrimPrefix(chain, ChainPrefix)
}

// OwnsChain reports whether an iptables chain has one of our names.
func OwnsChain(name string) bool {
	if rest, scratch := strings.CutPrefix(name, ScratchPrefix); scratch {
		if name == ScratchJumps {
			return true
		}
		name = ChainPrefix + rest
	}
	hook, ok := strings.CutPrefix(name, ChainPrefix)
	return ok && slices.Contains(Hooks, Hook(hook)) || IsTreeChain(name)
}

// String returns the heading of a chain in printed plans.
func (c Chain) String() string {
	s := fmt.Sprintf("table %s, hook %s, chain %s", c.Table, c.Hook, c.Name())
	if c.Family != IPv4 {
		s += fmt.Sprintf(", %s", c.Family)
	}
	return s
}

// A Plan is the desired content of the kernel's tables: the one value that is
// loaded, compared with the kernel, printed and rolled back. Chains are in the
// order in which a packet of a new connection traverses them, those of IPv6 last.
type Plan struct {
	Chains []Chain
	// Redirects are the destinations of the target Redirected, which takes those of
	// its chain's family. No two of a family have the same Protocol and Port.
	Redirects []Redirect
	// Limits are the redirects with limits, also while a plan is without redirects, so that
	// their counts stay.
	Limits []Redirect
	// Helpers are those that rules with the target AttachHelper may name.
	Helpers []Helper
}

// Sides describes the two sides of the router and the reserved address.
type Sides struct {
	Cluster string // interface by which clients connect
	Egress  string // interface on the physical network
	// The reserved addresses of both families, in the order of the configuration. The
	// pod's own sockets have the first one of their family.
	Sources []netip.Addr
	Mark    Mark // mark of connections from the cluster side
	Health  Port // TCP port of the pod that the fallback does not redirect; zero: none
	Peers   Port // UDP port of the pod for other routers, likewise
	// The connections that may cross to the egress side.
	Crossing Crossing
	Helpers  []Helper // helpers to attach, by the port of the server
	Carry    Carry
}

// A Carry is the tunnel between the routers of one address, by which the one that does not
// hold it sends and receives the IPv4 packets of the connections that enter by it. The zero
// Carry is none.
type Carry struct {
	Interface   string
	UDP         Port // port of the tunnel's packets on the cluster side
	First, Last Port // source ports of the router's own connections, which no other router has
}

// carries reports whether packets of a family use the tunnel.
func (s Sides) carries(f Family) bool { return s.Carry.Interface != "" && f == IPv4 }

// MostSources is the largest number of reserved addresses of one family. Rules for each
// packet match each of them.
const MostSources = 32

// SourcesOf returns the reserved addresses of a family.
func (s Sides) SourcesOf(f Family) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(s.Sources), func(a netip.Addr) bool { return FamilyOf(a) != f })
}

// A Crossing selects the connections that may cross from the cluster side to the
// physical network.
type Crossing uint8

const (
	// CrossRedirected lets redirected connections cross. All others are
	// rejected, as by a pod that forwards nothing.
	CrossRedirected Crossing = iota
	// CrossAll lets every connection cross, as the original did if a pod was the
	// gateway of others. Without a reserved IPv6 address, IPv6 connections cross as far
	// as the kernel forwards them.
	CrossAll
)

// NewPlan returns the chains for a set.
//
// The NAT rules are those of the original, in its order: a redirect for each
// destination, matched by the input interface; then SNAT to the reserved address
// for all packets that leave by the egress side.
//
// The mangle rules route replies. The only default route leads to the egress
// side, so a reply to a client outside of the cluster side's own subnet would
// leave there. Connections from the cluster side are marked, and their replies
// get the mark on arrival at the egress side, before routing: a routing rule for
// that mark leads back to the cluster side. Packets of the original direction must
// not get it. The pod's own packets for these connections get it too: rejections,
// and ICMP errors such as the one for a smaller MTU on the egress side.
//
// A connection that a server opens, such as for active FTP, crosses if a helper of
// the connection of the client expects it: conntrack gives it the addresses and the
// mark of that connection.
//
// What arrives at the egress side for another address than the reserved one is
// dropped before routing: replies to every connection that crosses have the reserved
// address there, and the kernel would answer some of the others itself, from the
// reserved address, before any filter rule (net/ipv4/ip_forward.c: time exceeded,
// redirect).
//
// The last mangle rules match packets that NAT does not translate. The kernel
// chooses the source of a connection with its first packet, so a connection from
// before the SNAT rule, or from before a change of the reserved address, would
// keep its old source. A packet without a connection, such as one outside of
// TCP's window, would leave untranslated. The last one drops the pod's answer, by
// the cluster side, to a packet from the physical network with a forged source: an
// echo reply or a reset.
//
// The MTU of the two sides often differs, such as 1450 of an overlay and 1500 or
// 9000, and firewalls drop the ICMP errors that would tell both ends: the maximum
// segment size of each SYN, and of each answer to one, is lowered to the MTU of the
// path. This happens after routing, where the mark of a reply has its effect, and in
// a chain that every packet traverses already.
//
// The source guard is for the time after another program deleted the SNAT rule:
// no packet leaves with another source until the rule is back.
//
// A connection beyond the limits of its redirect is refused before it is redirected: it
// has no entry in conntrack, and does not get to the fallback. A packet of a connection
// that exists is not limited.
//
// The filter rules begin with the match of nearly all packets. A redirected packet
// that would leave by another interface is dropped: the egress side or its default
// route is missing, or the destination is on the cluster side. It is not rejected,
// so that its connection continues after a repair. Nothing else crosses:
// otherwise any host with a route to the pod could use the reserved address, and
// hosts of the physical network could send packets into the cluster or to local
// services of the pod. The original forwarded all of these. No packet of a family
// without a reserved address crosses.
//
// A packet of a client that conntrack finds invalid, such as a segment outside of
// TCP's window, is not redirected and reaches the pod itself, whose reset would end
// the connection. It is dropped.
//
// TCP from the physical network to the reserved address that belongs to no
// connection is answered with a reset, as by any host (RFC 9293, section 3.5.2):
// a server learns that its session is dead, after a take-over by another pod or
// after its line was removed, and ident queries (RFC 1413) of mail and IRC servers
// do not wait for a timeout. Each answer is one segment without data and without
// options, never larger than the packet that it answers: a flood with forged
// sources is not amplified. It leaves by the egress side or not at all.
//
// With a tunnel to other routers of the address, a connection that enters here may leave by
// the tunnel, with the same source, and the packets of theirs cross here in both directions.
//
// A client has one of several reserved addresses for as long as these stay. Sockets of the
// pod keep the one that they have. A rule for each of several addresses returns in front
// of the one that drops all others.
func NewPlan(set Set, sides Sides) Plan {
	plan := Plan{Redirects: set.Redirects, Limits: limited(set.Redirects), Helpers: sides.Helpers}
	for _, f := range []Family{IPv4, IPv6} {
		if len(sides.SourcesOf(f)) > 0 {
			plan.Chains = append(plan.Chains, redirectChains(f, set, sides)...)
		} else {
			plan.Chains = append(plan.Chains, closedChains(f, sides)...)
		}
	}
	return plan
}

// redirectChains returns the chains for a family that has a source.
func redirectChains(f Family, set Set, sides Sides) (chains []Chain) {
	if len(sides.Helpers) > 0 {
		chains = append(chains, Chain{f, Raw, Prerouting, helperRules(f, set, sides)})
	}
	chains = append(chains, Chain{f, Mangle, Prerouting, arrivalRules(f, sides, true)})
	if len(ofFamily(limited(set.Redirects), f)) > 0 {
		chains = append(chains, Chain{f, Limits, Prerouting, limitRules(sides)})
	}
	return append(chains,
		Chain{f, NAT, Prerouting, redirectRules(set.refuse(f, sides), set.FallbackOf(f), sides)},
		Chain{f, Filter, Forward, slices.Concat(carriedRules(f, sides), forwardRules(sides))},
		Chain{f, Filter, Input, append(inputRules(f, sides), Rule{In: sides.Cluster, Invalid: true, Target: Drop, Reason: Invalid})},
		Chain{f, Mangle, Output, []Rule{
			{Marked: sides.Mark, Reply: true, Target: MarkPacket, Mark: sides.Mark},
		}},
		Chain{f, Mangle, Postrouting, departureRules(f, sides)},
		Chain{f, NAT, Postrouting, sourceRules(f, sides)},
		Chain{f, SourceGuard, Postrouting, guardRules(f, sides)},
	)
}

// NewProxyPlan returns the chains of a pod with a proxy and without redirects.
// The physical network must neither reach the proxy nor send packets through the
// pod, which forwards nothing. Connections are marked as in [NewPlan], so that
// answers to forged sources can be dropped: those by the cluster side on
// connections without the mark.
func NewProxyPlan(sides Sides) (plan Plan) {
	sides.Crossing = CrossRedirected
	for _, f := range []Family{IPv4, IPv6} {
		if len(sides.SourcesOf(f)) == 0 {
			plan.Chains = append(plan.Chains, closedChains(f, sides)...)
			continue
		}
		plan.Chains = append(plan.Chains,
			Chain{f, Mangle, Prerouting, arrivalRules(f, sides, false)},
			Chain{f, Filter, Forward, forwardNothing(sides)},
			Chain{f, Filter, Input, inputRules(f, sides)},
			Chain{f, Mangle, Postrouting, forgedRules(f, sides)},
		)
	}
	return plan
}

// only returns the network of one address.
func only(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// alone reports whether one rule can match all packets without a reserved address of the
// family: there is only one of IPv4. With IPv6 neighbour discovery has others.
func alone(f Family, sources []netip.Addr) bool { return f == IPv4 && len(sources) == 1 }

// arrivalRules returns the rules for packets that arrive, before routing. marks is set if
// replies are routed by the mark of their connection.
func arrivalRules(f Family, sides Sides, marks bool) []Rule {
	rules := []Rule{{In: sides.Cluster, Original: true, Target: MarkConnection, Mark: sides.Mark}}
	drop := Rule{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork}
	var replies []Rule
	if marks {
		replies = []Rule{{In: sides.Egress, Marked: sides.Mark, Target: MarkPacket, Mark: sides.Mark}}
	}
	if marks && sides.carries(f) {
		replies = append(replies, Rule{In: sides.Carry.Interface, Marked: sides.Mark, Target: MarkPacket, Mark: sides.Mark})
	}
	sources := sides.SourcesOf(f)
	if alone(f, sources) {
		drop.NotToward = only(sources[0])
		return append(append(rules, drop), replies...)
	}
	rules = append(rules, replies...)
	for _, s := range sources {
		rules = append(rules, Rule{In: sides.Egress, Toward: only(s), Target: Return})
	}
	if f == IPv6 {
		for _, d := range discovery {
			for _, m := range d.received {
				rules = append(rules, Rule{In: sides.Egress, Toward: d.addresses, Protocol: ICMPv6, Message: m, Target: Return})
			}
		}
	}
	return append(rules, drop)
}

// discovery has the messages by which the hosts of a link find each other (RFC 4861), and
// by which they have a switch pass on those to multicast addresses (RFC 2710, RFC 3810),
// with addresses of the pod other than a reserved one: those received by their
// destination, those sent by their source. The unspecified address is the source of
// duplicate address detection (RFC 4862), and of reports during it. The kernel sends no
// others if it neither solicits routers nor is one that advertises itself.
var discovery = []struct {
	addresses      netip.Prefix
	received, sent []Message
}{
	{netip.MustParsePrefix("ff02::/16"), []Message{ListenerQuery, NeighbourSolicitation, NeighbourAdvert}, nil},
	{
		netip.MustParsePrefix("fe80::/10"), []Message{NeighbourSolicitation, NeighbourAdvert},
		[]Message{ListenerReport, ListenerDone, NeighbourSolicitation, NeighbourAdvert, ListenerReportV2},
	},
	{netip.MustParsePrefix("::/128"), nil, []Message{ListenerReport, NeighbourSolicitation, ListenerReportV2}},
}

// departingDiscovery returns the rules for neighbour discovery that leaves by the egress
// side with another source than a reserved address.
func departingDiscovery(f Family, sides Sides) (rules []Rule) {
	if f != IPv6 {
		return nil
	}
	for _, d := range discovery {
		for _, m := range d.sent {
			rules = append(rules, Rule{Out: sides.Egress, From: d.addresses, Protocol: ICMPv6, Message: m, Target: Return})
		}
	}
	return rules
}

// redirectRules returns the rules that change destinations.
func redirectRules(refuse []Rule, fallback netip.Addr, sides Sides) []Rule {
	rules := []Rule{{In: sides.Cluster, Target: Redirected}}
	if fallback.IsValid() {
		rules = append(rules, refuse...)
		if sides.Health != 0 {
			rules = append(rules, Rule{In: sides.Cluster, Protocol: TCP, Port: sides.Health, Target: Return})
		}
		if sides.Peers != 0 {
			rules = append(rules, Rule{In: sides.Cluster, Protocol: UDP, Port: sides.Peers, Target: Return})
		}
		if sides.Carry.Interface != "" {
			rules = append(rules, Rule{In: sides.Cluster, Protocol: UDP, Port: sides.Carry.UDP, Target: Return})
		}
		rules = append(rules, Rule{In: sides.Cluster, Target: DNAT, To: fallback})
	}
	return rules
}

// forwardRules returns the rules for packets that cross.
func forwardRules(sides Sides) []Rule {
	closed := sides.Crossing == CrossRedirected
	return []Rule{
		{In: sides.Cluster, Out: sides.Egress, Redirected: closed, Original: true, Target: Return},
		{In: sides.Egress, Out: sides.Cluster, Redirected: closed, Reply: true, Target: Return},
		{In: sides.Egress, Out: sides.Cluster, Redirected: true, Expected: true, Original: true, Target: Return},
		{In: sides.Cluster, Out: sides.Egress, Redirected: true, Expected: true, Reply: true, Target: Return},
		{In: sides.Cluster, NotOut: sides.Egress, Redirected: true, Original: true, Target: Drop, Reason: OtherInterface},
		{In: sides.Cluster, Protocol: TCP, Original: true, Target: Reject, Reason: NotRedirected},
		{In: sides.Cluster, Original: true, Target: Reject, Reason: NotRedirected},
		{In: sides.Cluster, Target: Drop, Reason: Invalid},
		{In: sides.Egress, Unconnected: true, Target: Drop, Reason: Invalid},
		{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork},
		{Target: Drop, Reason: OtherInterface},
	}
}

// carriedRules returns the rules for packets that cross by the tunnel. Those of another
// router's connections have no connection here: package nft exempts those of known routers
// from tracking, and drops what else arrives by the tunnel. The others are of redirected
// connections that enter here.
func carriedRules(f Family, sides Sides) (rules []Rule) {
	if !sides.carries(f) {
		return nil
	}
	tunnel, closed := sides.Carry.Interface, sides.Crossing == CrossRedirected
	rules = []Rule{
		{In: sides.Cluster, Out: tunnel, Redirected: closed, Original: true, Target: Return},
		{In: tunnel, Out: sides.Cluster, Redirected: closed, Reply: true, Target: Return},
	}
	for _, s := range sides.SourcesOf(f) {
		rules = append(rules,
			Rule{From: only(s), In: tunnel, Out: sides.Egress, Unconnected: true, Target: Return},
			Rule{Toward: only(s), In: sides.Egress, Out: tunnel, Unconnected: true, Target: Return})
	}
	return append(rules, Rule{In: tunnel, Target: Drop, Reason: OtherInterface})
}

// forwardNothing returns the rules that drop every forwarded packet.
func forwardNothing(sides Sides) []Rule {
	return []Rule{
		{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork},
		{Target: Drop, Reason: NotRedirected},
	}
}

// inputRules returns the rules that drop input from the physical network, except
// for replies to the pod's own connections, echo requests to a reserved address and
// neighbour discovery. Redirects are dropped first, from either side: conntrack relates
// one that quotes a packet of a connection to that connection, and the kernel would
// believe anybody's for minutes. The sysctls against them may be out of reach.
func inputRules(f Family, sides Sides) []Rule {
	icmp, redirect, echo := ICMP, RedirectMessage, EchoRequest
	if f == IPv6 {
		icmp, redirect, echo = ICMPv6, RedirectMessageIPv6, EchoRequestIPv6
	}
	rules := []Rule{{Protocol: icmp, Message: redirect, Target: Drop, Reason: Invalid}}
	if f == IPv6 {
		rules = append(rules, Rule{In: sides.Egress, Protocol: ICMPv6, Message: RouterAdvertisement, Target: Drop, Reason: PhysicalNetwork})
	}
	rules = append(rules, Rule{In: sides.Egress, Reply: true, Target: Return})
	if f == IPv6 {
		for _, m := range discovery[0].received { // arrivalRules checks their destination
			rules = append(rules, Rule{In: sides.Egress, Protocol: ICMPv6, Message: m, Target: Return})
		}
	}
	for _, s := range sides.SourcesOf(f) {
		rules = append(rules, Rule{In: sides.Egress, Toward: only(s), Protocol: icmp, Message: echo, Target: Return})
	}
	for _, s := range sides.SourcesOf(f) {
		rules = append(rules, Rule{In: sides.Egress, Toward: only(s), Protocol: TCP, Original: true, Target: Reject, Reason: PhysicalNetwork})
	}
	if sides.carries(f) { // of connections that have ended
		rules = append(rules, Rule{In: sides.Carry.Interface, Target: Drop, Reason: Invalid})
	}
	return append(rules,
		Rule{In: sides.Egress, Unconnected: true, Target: Drop, Reason: Invalid},
		Rule{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork},
	)
}

// departureRules returns the rules for packets that leave, before their source changes.
func departureRules(f Family, sides Sides) []Rule {
	clamp := Rule{Protocol: TCP, SYN: true, Target: ClampMSS}
	sources := sides.SourcesOf(f)
	confirmed := Rule{Out: sides.Egress, Confirmed: true, Original: true, Target: Drop, Reason: WrongSource}
	unconnected := Rule{Out: sides.Egress, Unconnected: true, Target: Drop, Reason: Invalid}
	if alone(f, sources) {
		confirmed.RepliesNotTo, unconnected.NotFrom = sources[0], only(sources[0])
		return append(append([]Rule{confirmed, unconnected}, forgedRules(f, sides)...), clamp)
	}
	rules := append([]Rule{clamp}, forgedRules(f, sides)...)
	for _, s := range sources {
		rules = append(rules, Rule{Out: sides.Egress, RepliesTo: s, Confirmed: true, Original: true, Target: Return})
	}
	rules = append(rules, confirmed)
	for _, s := range sources {
		rules = append(rules, Rule{Out: sides.Egress, From: only(s), Unconnected: true, Target: Return})
	}
	return append(append(rules, departingDiscovery(f, sides)...), unconnected)
}

// forgedRules returns the rules that drop the pod's answers, by the cluster side, to
// packets from the physical network with a forged source.
func forgedRules(f Family, sides Sides) (rules []Rule) {
	for _, s := range sides.SourcesOf(f) {
		rules = append(rules, Rule{Out: sides.Cluster, From: only(s), Unmarked: sides.Mark, Reply: true, Target: Drop, Reason: PhysicalNetwork})
	}
	return rules
}

// sourceRules returns the rules that set the source. With a tunnel the ports are those of the
// router's range, by which the holder of the address knows whose connection a reply is of.
func sourceRules(f Family, sides Sides) (rules []Rule) {
	rules = addressRules(f, sides)
	if !sides.carries(f) {
		return rules
	}
	var all []Rule
	for _, out := range []string{sides.Egress, sides.Carry.Interface} {
		for _, r := range rules {
			r.Out = out
			for _, p := range []Protocol{TCP, UDP, SCTP} {
				ranged := r
				ranged.Protocol, ranged.ToPort, ranged.ToLast = p, sides.Carry.First, sides.Carry.Last
				all = append(all, ranged)
			}
			all = append(all, r)
		}
	}
	return all
}

// addressRules returns the rules that set the source's address.
func addressRules(f Family, sides Sides) (rules []Rule) {
	sources := sides.SourcesOf(f)
	if len(sources) > 1 {
		for _, s := range sources { // of the pod's sockets
			rules = append(rules, Rule{Out: sides.Egress, From: only(s), Target: SNAT, To: s})
		}
	}
	for i, s := range sources {
		if i == 0 {
			continue // has the clients that no other one has
		}
		for _, clients := range shares(i, len(sources)) {
			rules = append(rules, Rule{Out: sides.Egress, Clients: clients, Target: SNAT, To: s})
		}
	}
	return append(rules, Rule{Out: sides.Egress, Target: SNAT, To: sources[0]})
}

// shares returns the clients of the source number i of n, from 0. Addresses of clients
// differ at their end, since pods get them one after the other, or at random. So the values
// of their last bits are divided among the sources: the sources have equal numbers of
// values, up to an eighth, and consecutive addresses are of different sources.
//
// No hash of the kernel is in both backends: that of iptables (net/netfilter/xt_cluster.c)
// uses the first four bytes of an IPv6 address, and the range of SNAT needs consecutive
// sources.
func shares(i, n int) (shares []Share) {
	width := bits.Len(uint(n - 1)) //nolint:gosec // at least one source
	if n != 1<<width {
		width = min(bits.Len(uint(8*n-1)), 8) //nolint:gosec // as above
	}
	// The values in the order of their reversed bits, in which those with an equal end are
	// a range whose first value is a multiple of its length.
	first, end := i<<width/n, (i+1)<<width/n
	for first < end {
		free := bits.TrailingZeros(uint(first | 1<<width)) //nolint:gosec // a value of some bits
		for first+1<<free > end {
			free--
		}
		fixed := width - free
		shares = append(shares, Share{uint8(fixed), bits.Reverse8(uint8(first>>free)) >> (8 - fixed)}) //nolint:gosec // eight bits
		first += 1 << free
	}
	return shares
}

// guardRules returns the source guard.
func guardRules(f Family, sides Sides) (rules []Rule) {
	sources := sides.SourcesOf(f)
	if sides.carries(f) {
		// Packets that the holder sends back have it as the destination.
		for _, s := range sources {
			rules = append(rules,
				Rule{Out: sides.Carry.Interface, From: only(s), Target: Return},
				Rule{Out: sides.Carry.Interface, Toward: only(s), Target: Return})
		}
		rules = append(rules, Rule{Out: sides.Carry.Interface, Target: Drop, Reason: WrongSource})
	}
	drop := Rule{Out: sides.Egress, Target: Drop, Reason: WrongSource}
	if alone(f, sources) {
		drop.NotFrom = only(sources[0])
		return append(rules, drop)
	}
	for _, s := range sources {
		rules = append(rules, Rule{Out: sides.Egress, From: only(s), Target: Return})
	}
	return append(append(rules, departingDiscovery(f, sides)...), drop)
}

// closedChains returns the chains for a family without a source. IPv6 uses ICMP in place
// of ARP (RFC 4861). Of that, the physical network may not set routes, addresses and next
// hops.
func closedChains(f Family, sides Sides) []Chain {
	forward := forwardNothing(sides)
	if f == IPv6 && sides.Crossing == CrossAll {
		forward = []Rule{
			{In: sides.Egress, Reply: true, Target: Return},
			{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork},
		}
	}
	input := inputRules(f, Sides{Egress: sides.Egress})
	if f == IPv6 {
		input = []Rule{
			{In: sides.Egress, Protocol: ICMPv6, Message: RouterAdvertisement, Target: Drop, Reason: PhysicalNetwork},
			{In: sides.Egress, Protocol: ICMPv6, Message: RedirectMessageIPv6, Target: Drop, Reason: PhysicalNetwork},
			{In: sides.Egress, Reply: true, Target: Return},
			{In: sides.Egress, Protocol: ICMPv6, Target: Return},
			{In: sides.Egress, Unconnected: true, Target: Drop, Reason: Invalid},
			{In: sides.Egress, Target: Drop, Reason: PhysicalNetwork},
		}
	}
	return []Chain{{f, Filter, Forward, forward}, {f, Filter, Input, input}}
}

// WithoutRedirects returns the plan without its redirects. It is loaded before the
// routes change: nothing is redirected then, and all packets that leave by the
// egress side have the reserved address.
func (p Plan) WithoutRedirects() Plan {
	without := Plan{Chains: slices.Clone(p.Chains), Limits: p.Limits, Helpers: p.Helpers}
	for i, c := range without.Chains {
		without.Chains[i].Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r Rule) bool { return r.Target == DNAT || r.Target == AttachHelper })
	}
	return without
}

// Without returns the plan without the chains and redirects of a family that the kernel
// lacks.
func (p Plan) Without(f Family) Plan {
	if len(p.RedirectsOf(f)) > 0 {
		of := func(r Redirect) bool { return FamilyOf(r.To) == f }
		p.Redirects, p.Limits = slices.DeleteFunc(slices.Clone(p.Redirects), of), slices.DeleteFunc(slices.Clone(p.Limits), of)
	}
	p.Chains = slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return c.Family == f })
	return p
}

// Equal reports whether both plans have the same chains with the same rules in
// the same order.
func (p Plan) Equal(other Plan) bool {
	return slices.EqualFunc(p.Chains, other.Chains, func(a, b Chain) bool {
		return a.Family == b.Family && a.Table == b.Table && a.Hook == b.Hook && slices.Equal(a.Rules, b.Rules)
	}) && slices.Equal(p.Redirects, other.Redirects) && slices.Equal(p.Limits, other.Limits) && slices.Equal(p.Helpers, other.Helpers)
}

// String returns the plan for a person to read: each chain with its hook and its
// rules.
func (p Plan) String() string {
	var b strings.Builder
	for _, c := range p.Chains {
		fmt.Fprintln(&b, c)
		for _, r := range c.Rules {
			p.spellOut(c.Family, r, func(r *Rule) { fmt.Fprintf(&b, "  %s\n", r.append(nil, c.Family, false)) })
		}
	}
	return b.String()
}

// spellOut calls fn with the rule, or, for the target Redirected, with one rule
// for each redirect of the family and each of its addresses. fn must not keep the rule.
func (p Plan) spellOut(f Family, r Rule, fn func(*Rule)) {
	if r.Target != Redirected {
		fn(&r)
		return
	}
	for _, to := range p.RedirectsOf(f) {
		to.spellOut(&r, fn)
	}
}

// RedirectsOf returns the redirects to addresses of a family.
func (p Plan) RedirectsOf(f Family) []Redirect { return ofFamily(p.Redirects, f) }

func ofFamily(redirects []Redirect, f Family) []Redirect {
	other := func(r Redirect) bool { return FamilyOf(r.To) != f }
	if !slices.ContainsFunc(redirects, other) {
		return redirects
	}
	return slices.DeleteFunc(slices.Clone(redirects), other)
}

// Size returns the number of redirects and fallbacks.
func (p Plan) Size() int {
	n := len(p.Redirects)
	for i, r := range p.Redirects[min(1, n):] {
		if before := p.Redirects[i]; r.Name() != "" && r.Name() == before.Name() && r.Port == before.Port && r.Protocol == before.Protocol {
			n-- // another family of the same line
		}
	}
	for _, f := range []Family{IPv4, IPv6} {
		n += len(p.to(f, DNAT))
	}
	return n
}

// Destinations returns the addresses to which the plan redirects, or lets connections be
// redirected.
func (p Plan) Destinations() []netip.Addr {
	var to []netip.Addr
	for _, r := range p.Redirects {
		if r.More == (Addresses{}) { // most often
			to = append(to, r.To)
		} else {
			to = slices.AppendSeq(slices.AppendSeq(to, r.All()), r.kept())
		}
	}
	for _, f := range []Family{IPv4, IPv6} {
		to = append(to, p.to(f, DNAT)...)
	}
	return to
}

// to returns the addresses of the rules of a family with the given target: DNAT, the
// destination of connections without a redirect; SNAT, the sources of packets that leave
// by the egress side.
func (p Plan) to(f Family, t Target) (addresses []netip.Addr) {
	for _, c := range p.Chains {
		for _, r := range c.Rules {
			if c.Family == f && r.Target == t && !slices.Contains(addresses, r.To) {
				addresses = append(addresses, r.To)
			}
		}
	}
	return addresses
}

// HelpersOf returns the helpers of the plan that the kernel has for a family.
func (p Plan) HelpersOf(f Family) []Helper {
	return slices.DeleteFunc(slices.Clone(p.Helpers), func(h Helper) bool { return !h.has(f) })
}
