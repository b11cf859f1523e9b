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

// A Part is rules of a plan without which a router works, and whose modules a kernel may
// lack.
type Part Target

// The parts of plans.
const (
	DropLogPart  Part = Part(LogPacket) // rules of WithDropLog
	MSSClampPart Part = Part(ClampMSS)  // without it large transfers hang if ICMP is filtered
)

// Parts returns the parts that the plan has.
func (p Plan) Parts() (parts []Part) {
	for _, part := range []Part{DropLogPart, MSSClampPart} {
		if slices.ContainsFunc(p.Chains, func(c Chain) bool { return slices.ContainsFunc(c.Rules, part.has) }) {
			parts = append(parts, part)
		}
	}
	return parts
}

func (p Part) has(r Rule) bool { return r.Target == Target(p) }

// WithoutParts returns the plan without some parts.
func (p Plan) WithoutParts(parts []Part) Plan {
	without := p
	without.Chains = slices.Clone(p.Chains)
	for i, c := range without.Chains {
		without.Chains[i].Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r Rule) bool {
			return slices.ContainsFunc(parts, func(part Part) bool { return part.has(r) })
		})
	}
	return without
}
