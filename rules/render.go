package rules

import (
	"net/netip"
	"slices"
	"strconv"
)

// UnitTest returns the NAT rules of set in the notation that the original
// prints in its unit-test mode: built-in chains, no match modules, one line for
// each destination, then one for the source address. It looks no name up: a line
// with one has it in place of an address.
func UnitTest(set Set, sides Sides) []byte {
	var b []byte
	with := set
	with.Redirects = slices.DeleteFunc(slices.Clone(set.Redirects), Redirect.Unresolved)
	plan := NewPlan(with, sides)
	for _, c := range plan.Chains {
		if c.Table != NAT {
			continue
		}
		add := func(r *Rule) {
			b = append(b, "-A "...)
			b = append(b, c.Hook...)
			b = append(b, ' ')
			b = append(r.append(b, c.Family, false), '\n')
		}
		for _, r := range c.Rules {
			if r.Target != Redirected || len(with.Redirects) == len(set.Redirects) {
				plan.spellOut(c.Family, r, add)
				continue
			}
			for _, to := range set.Redirects { // in the order of the lines
				if to.Unresolved() {
					add(to.nameRule(r))
				} else if FamilyOf(to.To) == c.Family {
					rule := r
					to.spellOut(&rule, add)
				}
			}
		}
	}
	return b
}

// A TextChain is a chain of iptables: a chain of a plan, or one below it.
type TextChain struct {
	Family Family
	Table  Table
	Name   string
	Hook   Hook // hook with a jump to it; empty: other chains lead to it
	// The rules as iptables-save 1.8.9 prints them and iptables-restore reads them,
	// one a line. Other versions may print another form: see internal/iptables.
	Saved []byte
}

// InIPTables reports whether iptables has the table. The others are in nftables with every
// backend.
func (t Table) InIPTables() bool { return t != SourceGuard && t != Limits }

// IPTables returns the plan as chains of iptables, without the tables that it lacks.
func (p Plan) IPTables() []TextChain {
	var chains []TextChain
	for _, c := range p.Chains {
		if !c.Table.InIPTables() {
			continue
		}
		chain := TextChain{Family: c.Family, Table: c.Table, Name: c.Name(), Hook: c.Hook}
		var reached []TextChain
		for _, r := range c.Rules {
			if r.Target == Redirected && weight(p.RedirectsOf(c.Family)) > plainRedirects {
				chain.Saved, reached = p.appendTree(chain.Saved, chain, r)
				continue
			}
			p.spellOut(c.Family, r, chain.appendRule)
		}
		chains = append(append(chains, chain), reached...)
	}
	return chains
}

// appendRule appends a rule to the text of the chain.
func (c *TextChain) appendRule(r *Rule) {
	c.Saved = append(c.Saved, "-A "...)
	c.Saved = append(c.Saved, c.Name...)
	c.Saved = append(c.Saved, ' ')
	c.Saved = append(r.append(c.Saved, c.Family, true), '\n')
}

// append writes the rule's match and target in iptables notation. If modules is
// set, it names the match module of the protocol, as iptables-save does. The rule is
// valid ([Plan.Validate]), or printed for its error.
func (r *Rule) append(b []byte, family Family, modules bool) []byte {
	option := func(name, value string) { b = appendOption(b, name, value) }
	if r.Clients != (Share{}) {
		end, mask := r.Clients.masked(family)
		option("-s ", end.String()+"/"+mask.String())
	}
	for _, a := range []struct {
		name string
		addr netip.Prefix
	}{{"-s ", r.From}, {"! -s ", r.NotFrom}, {"-d ", r.Toward}, {"! -d ", r.NotToward}} {
		if a.addr.IsValid() {
			option(a.name, a.addr.String())
		}
	}
	if r.In != "" {
		option("-i ", r.In)
	}
	if r.Out != "" {
		option("-o ", r.Out)
	}
	if r.NotOut != "" {
		option("! -o ", r.NotOut)
	}
	if r.Protocol != 0 {
		option("-p ", r.Protocol.String())
	}
	if modules && (r.Port != 0 || r.SYN) {
		option("-m ", r.Protocol.String())
	}
	if r.Port != 0 {
		b = append(b, "--dport "...)
		b = strconv.AppendUint(b, uint64(r.Port), 10)
		if r.Last != 0 {
			b = append(b, ':')
			b = strconv.AppendUint(b, uint64(r.Last), 10)
		}
		b = append(b, ' ')
	}
	if r.SYN {
		option("--tcp-flags ", "SYN,RST SYN")
	}
	if r.Message != 0 {
		module, name := "icmp", "--icmp-type "
		if r.Protocol == ICMPv6 {
			module, name = "icmp6", "--icmpv6-type "
		}
		if modules {
			option("-m ", module)
		}
		option(name, strconv.Itoa(int(r.Message)))
	}
	b = r.appendConnection(b)
	if r.OneOf != 0 {
		b = appendOneOf(b, r.OneOf)
	}
	if !modules {
		b = r.Limits.Value().append(b)
	}
	if r.Name != "" {
		option("-m comment --comment ", strconv.Quote(r.Name))
	}
	if r.Target == LogPacket {
		b = append(b, "-m limit --limit 1/sec "...)
	}
	b = append(b, "-j "...)
	b = append(b, r.Target...)
	return r.appendTarget(b, family)
}

// masked returns the addresses of the share as an address and a mask.
func (s Share) masked(f Family) (end, mask netip.Addr) {
	value := netip.IPv4Unspecified().AsSlice()
	if f == IPv6 {
		value = netip.IPv6Unspecified().AsSlice()
	}
	value[len(value)-1] = s.End
	end, _ = netip.AddrFromSlice(value)
	value[len(value)-1] = s.Mask()
	mask, _ = netip.AddrFromSlice(value)
	return end, mask
}

// Mask returns the mask for the last byte of an address.
func (s Share) Mask() uint8 { return uint8(1<<s.Bits - 1) } //nolint:gosec // at most eight bits

func appendOption(b []byte, name, value string) []byte {
	return append(append(append(b, name...), value...), ' ')
}

// appendConnection writes the rule's matches of the packet's connection, in the
// order of iptables-save.
func (r *Rule) appendConnection(b []byte) []byte {
	option := func(name, value string) { b = appendOption(b, name, value) }
	if r.Unconnected || r.Invalid || r.Redirected || r.RepliesTo.IsValid() || r.RepliesNotTo.IsValid() || r.Confirmed || r.Expected || r.Original || r.Reply {
		b = append(b, "-m conntrack "...)
	}
	if r.Unconnected {
		option("--ctstate ", "INVALID,UNTRACKED")
	}
	if r.Invalid {
		option("--ctstate ", "INVALID")
	}
	if r.Redirected {
		option("--ctstate ", "DNAT")
	}
	if r.RepliesTo.IsValid() {
		option("--ctrepldst ", r.RepliesTo.String())
	}
	if r.RepliesNotTo.IsValid() {
		option("! --ctrepldst ", r.RepliesNotTo.String())
	}
	if r.Expected {
		option("--ctstatus ", "EXPECTED")
	}
	if r.Confirmed {
		option("--ctstatus ", "CONFIRMED")
	}
	if r.Original {
		option("--ctdir ", "ORIGINAL")
	}
	if r.Reply {
		option("--ctdir ", "REPLY")
	}
	if r.Marked != 0 {
		option("-m connmark --mark ", r.Marked.String())
	}
	if r.Unmarked != 0 {
		option("-m connmark ! --mark ", r.Unmarked.String())
	}
	return b
}

// appendTarget writes the options of the target.
func (r *Rule) appendTarget(b []byte, family Family) []byte {
	switch r.Target {
	case DNAT:
		b = append(b, " --to-destination "...)
	case SNAT:
		b = append(b, " --to-source "...)
	case MarkPacket, MarkConnection:
		b = append(b, " --set-xmark "...)
		return append(b, r.Mark.String()...)
	case AttachHelper:
		return append(append(b, " --helper "...), r.Helper...)
	case ClampMSS:
		return append(b, " --clamp-mss-to-pmtu"...)
	case LogPacket:
		b = append(b, " --nflog-prefix "...)
		b = append(b, r.Reason...)
		b = append(b, " --nflog-group "...)
		return strconv.AppendUint(b, LogGroup, 10)
	case Reject:
		switch {
		case r.Protocol == TCP:
			return append(b, " --reject-with tcp-reset"...)
		case family == IPv6:
			return append(b, " --reject-with icmp6-port-unreachable"...)
		}
		return append(b, " --reject-with icmp-port-unreachable"...)
	default:
		return b
	}
	if r.ToPort == 0 {
		return r.To.AppendTo(b)
	}
	b = netip.AddrPortFrom(r.To, uint16(r.ToPort)).AppendTo(b)
	if r.Shifts { // the base of the range is behind the slash (iptables-extensions(8), DNAT)
		b = append(b, '-')
		b = strconv.AppendUint(b, uint64(r.ToPort+r.Last-r.Port), 10)
		b = append(b, '/')
		b = strconv.AppendUint(b, uint64(r.Port), 10)
	}
	if r.ToLast != 0 {
		b = append(b, '-')
		b = strconv.AppendUint(b, uint64(r.ToLast), 10)
	}
	return b
}
