package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// packetTargets are the targets of chains that every packet traverses.
var packetTargets = []Target{MarkPacket, Return, Drop, LogPacket}

// targets are the chains that a plan may have, and the targets of their rules. They
// are those with the same effect in both backends:
//
//   - The rules of table raw match packets in iptables and connections in nftables.
//   - iptables refuses to drop in table nat, and to reject outside of table filter
//     (net/ipv4/netfilter/ipt_REJECT.c).
//   - The kernel knows the path of a segment from the routing decision on
//     (net/netfilter/xt_TCPMSS.c, tcpmss_tg4_check).
var targets = map[Table]map[Hook][]Target{
	Raw: {Prerouting: {AttachHelper, Return}},
	Mangle: {
		Prerouting:  append(slices.Clone(packetTargets), MarkConnection),
		Output:      append(slices.Clone(packetTargets), MarkConnection, ClampMSS),
		Postrouting: append(slices.Clone(packetTargets), MarkConnection, ClampMSS),
	},
	NAT: {
		Prerouting:  {Redirected, DNAT, Return},
		Postrouting: {SNAT, Return},
	},
	Filter: {
		Input:   append(slices.Clone(packetTargets), Reject),
		Forward: append(slices.Clone(packetTargets), Reject),
	},
	Limits:      {Prerouting: {CheckLimits, Return, Reject, LogPacket}},
	SourceGuard: {Postrouting: packetTargets},
}

// FamilyOf returns the family of an address; zero: none, as of an address that does
// not appear in packets, or that is valid on one link only.
func FamilyOf(a netip.Addr) Family {
	switch {
	case a.Is4():
		return IPv4
	case a.Is6() && !a.Is4In6() && a.Zone() == "":
		return IPv6
	}
	return 0
}

// Validate returns an error if the plan has a rule, a redirect or a helper that a
// backend cannot express, or that the backends would express in different ways. It names
// the chain, the rule and the reason. Backends load valid plans only, and render all of
// a valid rule.
func (p Plan) Validate() error {
	var takes, limits [IPv6 + 1]bool // families with a rule for redirects, and for limits
	for i, c := range p.Chains {
		same := func(other Chain) bool {
			return c.Family == other.Family && c.Table == other.Table && c.Hook == other.Hook
		}
		switch {
		case c.Family != IPv4 && c.Family != IPv6:
			return fmt.Errorf("invalid chain (%s): unknown family", c)
		case targets[c.Table][c.Hook] == nil:
			return fmt.Errorf("invalid chain (%s): no such hook in this table", c)
		case slices.ContainsFunc(p.Chains[:i], same):
			return fmt.Errorf("invalid chain (%s): defined twice", c)
		}
		if c.Table == Limits && (len(c.Rules) == 0 || c.Rules[0].Target != CheckLimits || slices.ContainsFunc(c.Rules[1:], func(r Rule) bool { return r.Target == CheckLimits })) {
			return fmt.Errorf("invalid chain (%s): the first rule, and no other, checks limits", c)
		}
		for _, r := range c.Rules {
			if fault := p.fault(c, r); fault != "" {
				return fmt.Errorf("invalid rule in chain (%s): %s: %s", c, r.append(nil, c.Family, false), fault)
			}
			takes[c.Family] = takes[c.Family] || r.Target == Redirected
			limits[c.Family] = limits[c.Family] || r.Target == CheckLimits
		}
	}
	for i, h := range p.Helpers {
		if h.Name == "" || len(h.Name) > 15 || !literal(h.Name) { // NF_CT_HELPER_NAME_LEN
			return fmt.Errorf("invalid helper %q: its name must be 1 to 15 printable characters without quotes and spaces", h.Name)
		}
		if h.Protocol != TCP && h.Protocol != UDP {
			return fmt.Errorf("invalid helper %q: protocol %s has no helpers", h.Name, h.Protocol)
		}
		if slices.ContainsFunc(p.Helpers[:i], func(other Helper) bool { return other.Protocol == h.Protocol && strings.EqualFold(other.Name, h.Name) }) {
			return fmt.Errorf("invalid helper %q: defined twice for %s", h.Name, h.Protocol)
		}
	}
	for _, r := range p.Limits {
		if f := FamilyOf(r.To); f == 0 || !limits[f] || !r.Protocol.hasPorts() || r.Port == 0 || r.Last != 0 && r.Last <= r.Port {
			return fmt.Errorf("invalid limit of redirect %s: no chain limits it", r)
		}
		if fault := r.Limits.Value().fault(); fault != "" {
			return fmt.Errorf("invalid limit of redirect %s: %s", r, fault)
		}
	}
	if len(p.Redirects) > 0 && !slices.EqualFunc(p.Limits, limited(p.Redirects), Redirect.sameLimits) {
		return errors.New("invalid limits: they are not those of the redirects")
	}
	return p.validateRedirects(takes)
}

// validateRedirects is the part of Validate for the redirects, of which takes has the
// families with a rule for them.
func (p Plan) validateRedirects(takes [IPv6 + 1]bool) error {
	used := make(map[service]*[1 << 16]bool) // by local port; the services have none
	for _, r := range p.Redirects {
		family := FamilyOf(r.To)
		if r.Unresolved() && r.Port != 0 { // it has no rule yet
			continue
		}
		switch {
		case family == 0 || r.To.IsUnspecified() || r.Port == 0:
			return fmt.Errorf("invalid redirect %s: expected a port and an address", r)
		case !r.Protocol.hasPorts():
			return fmt.Errorf("invalid redirect %s: protocol %s has no ports", r, r.Protocol)
		case r.Several() && !r.spreads():
			return fmt.Errorf("invalid redirect %s: expected up to %d addresses of %s, each once", r, MaxAddresses, family)
		case r.Last != 0 && r.Last <= r.Port || r.Shifts && (r.Last == 0 || r.ToPort == 0 || int(r.ToPort)+int(r.Last-r.Port) > 65535):
			return fmt.Errorf("invalid redirect %s: expected a range of ports", r)
		case !takes[family]:
			return fmt.Errorf("invalid redirect %s: no chain redirects %s", r, family)
		}
		ports := used[service{family, r.Protocol, 0}]
		if ports == nil {
			ports = new([1 << 16]bool)
			used[service{family, r.Protocol, 0}] = ports
		}
		for port := int(r.Port); port <= int(r.last()); port++ {
			if ports[port] {
				return fmt.Errorf("invalid redirect %s: port %d of %s has another one", r, port, r.Protocol)
			}
			ports[port] = true
		}
	}
	return nil
}

// fault returns the reason why a rule of chain c is invalid, empty if it is valid.
func (p Plan) fault(c Chain, r Rule) string {
	if !slices.Contains(targets[c.Table][c.Hook], r.Target) {
		return fmt.Sprintf("this chain has no target %s", r.Target)
	}
	for _, a := range []netip.Addr{r.From.Addr(), r.NotFrom.Addr(), r.Toward.Addr(), r.NotToward.Addr(), r.RepliesTo, r.RepliesNotTo, r.To} {
		if a.IsValid() && FamilyOf(a) != c.Family {
			return fmt.Sprintf("%s is not an address of packets of %s", a, c.Family)
		}
	}
	for _, n := range []netip.Prefix{r.From, r.NotFrom, r.Toward, r.NotToward} {
		if n != (netip.Prefix{}) && (n.Bits() < 1 || n != n.Masked()) { // iptables prints neither
			return fmt.Sprintf("%s is not a network", n)
		}
	}
	for _, name := range []string{r.In, r.Out, r.NotOut} {
		if len(name) > 15 || !literal(name) || strings.HasSuffix(name, "+") || strings.HasPrefix(name, "!") {
			return fmt.Sprintf("%q is not a literal name of an interface", name)
		}
	}
	for _, check := range []func(Chain, Rule) string{faultOfPacket, faultOfConnection, p.faultOfTarget} {
		if fault := check(c, r); fault != "" {
			return fault
		}
	}
	return ""
}

// literal reports whether iptables-restore takes a word as it is: white space and quotes
// have a meaning in its input.
func literal(word string) bool {
	return !strings.ContainsFunc(word, func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune("\"'\\`", c) })
}

// faultOfPacket returns the fault in the matches of the packet.
func faultOfPacket(c Chain, r Rule) string {
	icmp := ICMP
	if c.Family == IPv6 {
		icmp = ICMPv6
	}
	switch {
	case r.In != "" && (c.Hook == Output || c.Hook == Postrouting):
		return "packets have no input interface here" // Postrouting: with some kernels
	case (r.Out != "" || r.NotOut != "") && (c.Hook == Prerouting || c.Hook == Input):
		return "packets have no output interface here"
	case r.Out != "" && r.NotOut != "", r.From.IsValid() && r.NotFrom.IsValid(), r.Clients.Bits > 0 && (r.From.IsValid() || r.NotFrom.IsValid()), r.Toward.IsValid() && r.NotToward.IsValid():
		return "iptables matches an interface or an address once"
	case (r.Protocol == ICMP || r.Protocol == ICMPv6) && r.Protocol != icmp:
		return fmt.Sprintf("%s is not a protocol of %s", r.Protocol, c.Family)
	case r.Clients.Bits > 8 || r.Clients.End&^r.Clients.Mask() != 0:
		return "a share of clients is a value of at most eight bits"
	case r.Port != 0 && !r.Protocol.hasPorts():
		return "a port needs the protocol TCP, UDP or SCTP"
	case r.Last != 0 && (r.Port == 0 || r.Last <= r.Port):
		return "a range of ports has two ends"
	case r.SYN && r.Protocol != TCP:
		return "SYN needs the protocol TCP"
	case r.Message != 0 && r.Protocol != icmp:
		return fmt.Sprintf("a type of messages needs the protocol %s", icmp)
	case r.Message == 255: // any type (iptables-extensions(8), icmp)
		return "iptables cannot match the type 255"
	}
	return ""
}

// faultOfConnection returns the fault in the matches of the packet's connection.
func faultOfConnection(c Chain, r Rule) string {
	with := r.Redirected || r.RepliesTo.IsValid() || r.RepliesNotTo.IsValid() || r.Confirmed || r.Expected || r.Original || r.Reply || r.Marked != 0 || r.Unmarked != 0
	without := r.Unconnected || r.Invalid
	switch {
	case (with || without) && c.Table == Raw:
		return "packets have no connection before conntrack"
	case with && without:
		return "a packet without connection has no properties of one"
	case r.Unconnected && r.Invalid, r.Expected && r.Confirmed, r.RepliesTo.IsValid() && r.RepliesNotTo.IsValid():
		return "iptables matches one state, one status and one destination of replies" // of two, any
	case r.Original && r.Reply:
		return "a packet has one direction"
	}
	return ""
}

// faultOfTarget returns the fault in the target, or in the matches that it needs.
func (p Plan) faultOfTarget(c Chain, r Rule) string {
	translates := r.Target == DNAT || r.Target == SNAT
	marks := r.Target == MarkPacket || r.Target == MarkConnection
	attaches := r.Target == AttachHelper
	switch {
	case translates != r.To.IsValid() || r.To.IsValid() && r.To.IsUnspecified():
		return "only DNAT and SNAT need an address"
	case r.ToPort != 0 && (!translates || !r.Protocol.hasPorts()):
		return "a port to translate to needs DNAT or SNAT and the protocol TCP, UDP or SCTP"
	case r.Target == SNAT && r.ToPort != 0 && r.ToPort >= r.ToLast, r.ToLast != 0 && (r.Target != SNAT || r.ToPort == 0):
		return "SNAT translates to a range of ports"
	case r.Shifts, r.Limits != Limited{}:
		return "only redirects shift ports or have limits"
	case r.OneOf != 0, r.Name != "":
		return "only redirects have several addresses or a name"
	case marks != (r.Mark != 0):
		return "only MARK and CONNMARK need a mark"
	case attaches != (r.Helper != ""):
		return "only CT needs a helper"
	case attaches && !slices.ContainsFunc(p.Helpers, func(h Helper) bool { return h.Name == r.Helper && h.Protocol == r.Protocol && h.has(c.Family) }):
		return "the plan has no such helper for the rule's protocol"
	case (r.Reason != "") != (r.Drops() || r.Target == LogPacket):
		return "only rules that drop or log need a reason"
	case r.Reason != "" && !slices.Contains(Reasons, r.Reason):
		return "unknown reason"
	case r.Target == ClampMSS && !r.SYN:
		return "TCPMSS needs SYN"
	case r.Target == Redirected && r.Protocol != 0:
		return "protocols and ports are those of the redirects"
	}
	return ""
}
