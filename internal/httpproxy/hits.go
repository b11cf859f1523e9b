package httpproxy

import "sync/atomic"

// A ruleSet are rules in effect, with the number of times that each has decided.
type ruleSet struct {
	Rules
	hits []*atomic.Int64 // by the number of the rule; 0: no rule matched
}

// newRuleSet returns rules whose counters go on from those before; nil: begin at 0.
func newRuleSet(rules Rules, before *ruleSet) *ruleSet {
	kept := make(map[string]*atomic.Int64)
	s := &ruleSet{rules, make([]*atomic.Int64, len(rules)+1)}
	s.hits[0] = new(atomic.Int64)
	if before != nil {
		s.hits[0] = before.hits[0]
		for i, r := range before.Rules {
			if kept[r.String()] == nil { // the same rule a second time decides nothing
				kept[r.String()] = before.hits[i+1]
			}
		}
	}
	for i, r := range rules {
		if s.hits[i+1] = kept[r.String()]; s.hits[i+1] == nil {
			s.hits[i+1] = new(atomic.Int64)
		}
		delete(kept, r.String())
	}
	return s
}

// Hits is the number of requests and tunnels that a rule has decided, since it came onto
// the list.
type Hits struct {
	Rule  Rule // the zero Rule: none matched
	Count int64
}

// Hits returns the hits of all rules, and at last of those that none matched, which are
// denied.
func (p *Proxy) Hits() []Hits {
	s := p.rules.Load()
	list := make([]Hits, 0, len(s.hits))
	for i, r := range s.Rules {
		list = append(list, Hits{r, s.hits[i+1].Load()})
	}
	return append(list, Hits{Count: s.hits[0].Load()})
}
