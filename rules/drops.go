package rules

import "slices"

// A DropRule identifies a rule with a reason by its place in a plan.
type DropRule struct {
	Family Family
	Table  Table
	Hook   Hook
	Number int // index in the chain
	Reason Reason
}

// Drops are the kernel's counters of rules with a reason: the packets that each has
// dropped or rejected since it was loaded. A rule that is not loaded has no entry.
type Drops map[DropRule]uint64

// drops reports whether the chain has a rule with a reason.
func (c Chain) drops() bool {
	return slices.ContainsFunc(c.Rules, func(r Rule) bool { return r.Reason != "" })
}

// DropChains returns the chains that have rules with a reason. These are few and
// short, however long the list of redirects.
func (p Plan) DropChains() []Chain {
	return slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return !c.drops() })
}

// Add adds packets to the counter of the rule with the given index in a chain, if
// the rule has a reason.
func (d Drops) Add(c Chain, number int, packets uint64) {
	if reason := c.Rules[number].Reason; reason != "" {
		d[DropRule{c.Family, c.Table, c.Hook, number, reason}] += packets
	}
}
