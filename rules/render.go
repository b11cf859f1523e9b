package rules

import "strconv"

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

// AppendRestore appends to b the plan's chains of one table as input for
// iptables-restore --noflush, without the COMMIT that ends it: each chain is
// made or emptied, then filled, all at once, and chains that the plan does not
// name stay as they are.
//
// Rules are written as iptables-save prints them, so that a chain that still
// is as it was loaded can be told by comparing text.
func (p Plan) AppendRestore(b []byte, table Table) []byte {
	b = append(b, '*')
	b = append(b, table...)
	b = append(b, '\n')
	for _, c := range p.Chains {
		if c.Table == table {
			b = append(b, ':')
			b = append(b, c.Name...)
			b = append(b, " - [0:0]\n"...)
		}
	}
	for _, c := range p.Chains {
		if c.Table != table {
			continue
		}
		for _, r := range c.Rules {
			b = append(b, "-A "...)
			b = append(b, c.Name...)
			b = append(b, ' ')
			b = append(r.append(b, true), '\n')
		}
	}
	return b
}

// AppendSaved appends the rule to b as iptables-save prints it, without the
// chain.
func (r Rule) AppendSaved(b []byte) []byte { return r.append(b, true) }

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
	if r.Original {
		option("-m conntrack ", "--ctdir ORIGINAL")
	}
	if r.Marked != 0 {
		option("-m connmark --mark ", r.Marked.String())
	}
	b = append(b, "-j "...)
	b = append(b, r.Target...)
	switch r.Target {
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
