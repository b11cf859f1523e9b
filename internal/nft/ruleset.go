package nft

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/egress-router/egress-router/rules"
)

// A state is the content of our tables, as the kernel has them or as a plan
// needs them. A table that does not exist has no entry.
type state map[tableKey]*table

// A tableKey identifies one of our tables.
type tableKey struct {
	name   string
	family rules.Family
}

// String returns the table as nft(8) lists it.
func (k tableKey) String() string { return fmt.Sprintf("table %s %s", formats[k.family].name, k.name) }

// A table is the content of one of our tables.
type table struct {
	flags   nftables.TableFlags // such as dormant, which disables it
	chains  map[string]*chain
	to      map[string]destinations // by the name of the map
	limits  *limits                 // nil: none
	helpers []helper
	others  []string // names of other objects in it
}

// A chain is a base chain of ours or, without a hook, a chain of another program in
// our table.
type chain struct {
	kind     nftables.ChainType
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	based    bool // kind, hook and priority are valid
	drops    bool // its policy is drop
	rules    [][]expr.Any
}

// A place is the type, hook and priority of a plan's chain in nftables.
type place struct {
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
}

// places are the places of the chains. The kernel walks base chains in the order of
// their priorities; ours are one before those of iptables (linux/netfilter_ipv4.h,
// nf_ip_hook_priorities) and most others, since in nat chains the first verdict
// counts: another program's masquerading rule would choose another source.
var places = map[rules.Table]map[rules.Hook]place{
	rules.Mangle: {
		rules.Prerouting:  {nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle - 1},
		rules.Output:      {nftables.ChainTypeRoute, nftables.ChainHookOutput, *nftables.ChainPriorityMangle - 1},
		rules.Postrouting: {nftables.ChainTypeFilter, nftables.ChainHookPostrouting, *nftables.ChainPriorityMangle - 1},
	},
	// Only the first packet of a connection traverses chains of this type. A helper is
	// attached before the translation, which then provides for changes of the length
	// of messages (nf_nat_setup_info in net/netfilter/nf_nat_core.c).
	rules.Raw: {
		rules.Prerouting: {nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest - 2},
	},
	rules.NAT: {
		rules.Prerouting:  {nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest - 1},
		rules.Postrouting: {nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource - 1},
	},
	// After all chains that translate a source, including those of iptables.
	rules.SourceGuard: {
		rules.Postrouting: {nftables.ChainTypeFilter, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource + 1},
	},
	rules.Filter: {
		rules.Input:   {nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter - 1},
		rules.Forward: {nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter - 1},
	},
}

// chainName returns the nftables name of a plan's chain.
func chainName(c rules.Chain) string { return strings.ToLower(fmt.Sprintf("%s-%s", c.Table, c.Hook)) }

// tableNameOf returns the name of the table for a plan's chain.
func tableNameOf(c rules.Chain) string {
	switch c.Table {
	case rules.SourceGuard:
		return guardName
	case rules.Limits:
		return limitsName
	}
	return tableName
}

// render returns the part of a valid plan that belongs to the tables with the given names.
func render(plan rules.Plan, names ...string) state {
	want := make(state)
	for _, c := range plan.Chains {
		name := tableNameOf(c)
		if !slices.Contains(names, name) {
			continue
		}
		key := tableKey{name, c.Family}
		t := want[key]
		if t == nil {
			t = &table{chains: make(map[string]*chain)}
			want[key] = t
		}
		if c.Table == rules.Raw {
			t.helpers = newHelpers(plan.HelpersOf(c.Family))
		}
		rendered := new(chain)
		if at, based := places[c.Table][c.Hook]; based {
			*rendered = chain{kind: at.kind, hook: *at.hook, priority: at.priority, based: true}
		}
		for _, r := range c.Rules {
			if r.Target == rules.CheckLimits {
				t.limits, t.chains[entryName] = newLimits(plan.LimitsOf(c.Family)), entry(c.Family, r)
				continue
			}
			if r.Target != rules.Redirected {
				rendered.rules = append(rendered.rules, expressions(c.Family, r))
				continue
			}
			t.to = newMaps(plan.RedirectsOf(c.Family))
			for _, k := range mapKinds {
				if _, there := t.to[k.name]; there {
					rendered.rules = append(rendered.rules, lookUp(c.Family, r, k))
				}
			}
		}
		t.chains[chainName(c)] = rendered
	}
	return want
}

// redirects reports whether the table contains redirects.
func (t *table) redirects() bool {
	for _, k := range mapKinds {
		if len(t.to[k.name]) > 0 {
			return true
		}
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			for _, e := range r {
				if nat, ok := e.(*expr.NAT); ok && nat.Type == expr.NATTypeDestNAT && !looksUp(r) {
					return true
				}
			}
		}
	}
	return false
}

// looksUp reports whether a rule takes its destination from a map.
func looksUp(rule []expr.Any) bool {
	return slices.ContainsFunc(rule, func(e expr.Any) bool { _, lookup := e.(*expr.Lookup); return lookup })
}

// sameRules reports whether both chains have the same rules.
func (c *chain) sameRules(other *chain) bool {
	return slices.EqualFunc(c.rules, other.rules, func(a, b []expr.Any) bool { return reflect.DeepEqual(a, b) })
}

// sameBase reports whether both chains have the same place and policy.
func (c *chain) sameBase(other *chain) bool {
	return c.kind == other.kind && c.hook == other.hook && c.priority == other.priority && c.based == other.based && c.drops == other.drops
}

// differences returns the differences of the kernel from want, one line each.
func (tx *Tx) differences(want state) []string {
	var found []string
	s := tx.now
	if len(s) == 0 && len(want) > 0 {
		return []string{"no table " + tx.names[0] + " yet"}
	}
	for _, key := range tx.keys() {
		have, want := s[key], want[key]
		say := func(format string, args ...any) {
			found = append(found, fmt.Sprintf("%s: ", key)+fmt.Sprintf(format, args...))
		}
		switch {
		case have == nil && want == nil:
		case have == nil:
			say("missing")
		case want == nil:
			say("not in the plan")
		default:
			for _, line := range have.differences(want) {
				say("%s", line)
			}
		}
	}
	return found
}

// differences returns the differences of t from want, one line each.
func (t *table) differences(want *table) []string {
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	if t.flags != want.flags {
		say("unexpected flags %#x", t.flags)
	}
	for _, name := range t.others {
		if !slices.Contains(want.others, name) {
			say("%s not in the plan", name)
		}
	}
	if !slices.Equal(t.helpers, want.helpers) {
		say("helpers differ")
	}
	for _, name := range slices.Sorted(maps.Keys(want.chains)) {
		c, there := t.chains[name]
		switch {
		case !there:
			say("chain %s is missing", name)
		case !c.sameBase(want.chains[name]):
			say("chain %s has another type, hook, priority or policy", name)
		case !c.sameRules(want.chains[name]):
			say("chain %s has other rules", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		if _, planned := want.chains[name]; !planned {
			say("chain %s not in the plan", name)
		}
	}
	switch {
	case (t.limits == nil) != (want.limits == nil):
		say("map %s missing or not in the plan", entryName)
	case t.limits != nil:
		if gone, more := steps(t.limits.ports, want.limits.ports, compareDestinations); len(gone)+len(more) > 0 {
			say("map %s: %d elements differ", entryName, max(len(gone), len(more)))
		}
		if gone, more := steps(t.limits.lines, want.limits.lines, compareLines); len(gone)+len(more) > 0 {
			say("limits of %d redirects differ", max(len(gone), len(more)))
		}
	}
	for _, k := range mapKinds {
		have, there := t.to[k.name]
		to, planned := want.to[k.name]
		switch {
		case there != planned:
			say("map %s missing or not in the plan", k.name)
		case !slices.Equal(have, to):
			gone, more := have.steps(to)
			say("map %s: %d elements differ", k.name, max(len(gone), len(more)))
		}
	}
	return found
}
