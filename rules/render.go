package rules

import (
	"slices"
	"strconv"
)

// UnitTest returns the NAT rules of set in the notation that the original
// prints in its unit-test mode: built-in chains, no match modules, one line for
// each destination, then one for the source address.
func UnitTest(set Set, sides Sides) []byte {
	var b []byte
	for _, c := range NewPlan(set, sides).Chains {
		if c.Table != NAT {
			continue
		}
		for _, r := range c.Rules {
			b = append(b, "-A "...)
			b = append(b, c.Hook...)
			b = append(b, ' ')
			b = append(r.append(b, false), '\n')
		}
	}
	return b
}

// AppendSaved appends to b the rules of the chain as iptables-save prints them
// and iptables-restore takes them, a line each. Because both are the same, a
// chain that still is as it was loaded can be told by comparing text.
func (c Chain) AppendSaved(b []byte) []byte {
	const line = 96 // bytes of a redirect, with room to spare
	b = slices.Grow(b, line*len(c.Rules))
	for _, r := range c.Rules {
		b = append(b, "-A "...)
		b = append(b, c.Name...)
		b = append(b, ' ')
		b = append(r.append(b, true), '\n')
	}
	return b
}

// append writes the rule's match and target in iptables notation. Where modules
// is set it names the match module of the protocol, as iptables-save does.
func (r Rule) append(b []byte, modules bool) []byte {
	option := func(name, value string) {
		b = append(b, name...)
		b = append(b, value...)
		b = append(b, ' ')
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
	if r.Port != 0 {
		if modules {
			option("-m ", r.Protocol.String())
		}
		b = append(b, "--dport "...)
		b = strconv.AppendUint(b, uint64(r.Port), 10)
		b = append(b, ' ')
	}
	if r.Redirected || r.RepliesNotTo.IsValid() || r.Confirmed || r.Original || r.Reply {
		b = append(b, "-m conntrack "...)
	}
	if r.Redirected {
		option("--ctstate ", "DNAT")
	}
	if r.RepliesNotTo.IsValid() {
		option("! --ctrepldst ", r.RepliesNotTo.String())
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
	b = append(b, "-j "...)
	b = append(b, r.Target...)
	switch r.Target {
	case Drop:
		return b
	case DNAT:
		b = append(b, " --to-destination "...)
	case SNAT:
		b = append(b, " --to-source "...)
	case MarkPacket, MarkConnection:
		b = append(b, " --set-xmark "...)
		return append(b, r.Mark.String()...)
	}
	b = r.To.AppendTo(b)
	if r.ToPort != 0 {
		b = append(b, ':')
		b = strconv.AppendUint(b, uint64(r.ToPort), 10)
	}
	return b
}
