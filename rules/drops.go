package rules

import "slices"

// A DropRule identifies a rule that drops by its place in a plan.
type DropRule struct {
	Family Family
	Table  Table
	Hook   Hook
	Number int // index in the chain
	Reason Reason
}

// Drops are the kernel's counters of the rules that drop: the packets that each has
// dropped or rejected since it was loaded. A rule that is not loaded has no entry.
type Drops map[DropRule]uint64

// Drops reports whether the rule drops or rejects packets, which are counted.
func (r Rule) Drops() bool { return r.Target == Drop || r.Target == Reject }

// DropChains returns the chains that have rules that drop. These are few and short,
// however long the list of redirects.
func (p Plan) DropChains() []Chain {
	return slices.DeleteFunc(slices.Clone(p.Chains), func(c Chain) bool { return !slices.ContainsFunc(c.Rules, Rule.Drops) })
}

// Add adds packets to the counter of the rule with the given index in a chain, if
// the rule drops.
func (d Drops) Add(c Chain, number int, packets uint64) {
	if r := c.Rules[number]; r.Drops() {
		d[DropRule{c.Family, c.Table, c.Hook, number, r.Reason}] += packets
	}
}

// LogGroup is the number of the group of LogPacket (linux/netfilter/nfnetlink_log.h).
// Each network namespace has 65,536 groups of its own.
const LogGroup = 4711

// LogBurst is the number of packets that each rule of LogPacket logs at once; then it
// logs one a second. It is the default of iptables (iptables-extensions(8), limit).
const LogBurst = 5

// WithDropLog returns the plan with a rule before each one that drops, which logs
// some of its packets. The limit is the kernel's, so that a flood costs nothing.
func (p Plan) WithDropLog() Plan {
	logged := p
	logged.Chains = slices.Clone(p.Chains)
	for i, c := range p.Chains {
		logged.Chains[i].Rules = nil
		for _, r := range c.Rules {
			if r.Drops() {
				log := r
				log.Target = LogPacket
				logged.Chains[i].Rules = append(logged.Chains[i].Rules, log)
			}
			logged.Chains[i].Rules = append(logged.Chains[i].Rules, r)
		}
	}
	return logged
}

// logs reports whether the rule is one of WithDropLog.
func (r Rule) logs() bool { return r.Target == LogPacket }

// HasDropLog reports whether the plan has rules of WithDropLog.
func (p Plan) HasDropLog() bool {
	return slices.ContainsFunc(p.Chains, func(c Chain) bool { return slices.ContainsFunc(c.Rules, Rule.logs) })
}

// WithoutDropLog returns the plan without the rules of WithDropLog, for a kernel that
// cannot log.
func (p Plan) WithoutDropLog() Plan {
	without := p
	without.Chains = slices.Clone(p.Chains)
	for i, c := range without.Chains {
		without.Chains[i].Rules = slices.DeleteFunc(slices.Clone(c.Rules), Rule.logs)
	}
	return without
}
