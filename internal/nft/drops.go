package nft

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// Drops reads the counters of the plan's rules that drop. It does not read the
// redirects. It may be called while another goroutine uses the Tx.
//
// The kernel keeps a counter until its rule is deleted. A change of other chains, or
// of the map of redirects, does not touch it.
func (tx *Tx) Drops(_ context.Context, plan rules.Plan) (rules.Drops, error) {
	return readDrops(plan, tx.families, func(c rules.Chain) (table, chain string) {
		name := tableNameOf(c)
		if !slices.Contains(tx.names, name) {
			return "", ""
		}
		return name, chainName(c)
	}, func(c rules.Chain, found []*nftables.Rule, i int) int {
		// Another program may have added rules.
		return slices.IndexFunc(c.Rules, func(r rules.Rule) bool { return reflect.DeepEqual(expressions(c.Family, r), found[i].Exprs) })
	})
}

// IPTablesDrops does the same for a plan that iptables of the nf_tables flavour has
// loaded. iptables-save lists all tables, even for one of them, which takes 0.1 s with
// ten thousand redirects.
//
// Rules are identified by their place, since versions of iptables load different
// expressions. A chain with another number of rules is left out: another program has
// changed it, and it will be repaired.
func IPTablesDrops(families []rules.Family, plan rules.Plan) (rules.Drops, error) {
	return readDrops(plan, families, func(c rules.Chain) (table, chain string) {
		if !c.Table.InIPTables() {
			return "", ""
		}
		return string(c.Table), c.Name()
	}, func(c rules.Chain, found []*nftables.Rule, i int) int {
		if len(found) != len(c.Rules) {
			return -1
		}
		return i
	})
}

// readDrops reads the counters of the chains for which at returns a place. number
// returns the index in the plan of a rule found, negative: none.
func readDrops(plan rules.Plan, families []rules.Family, at func(rules.Chain) (table, chain string), number func(c rules.Chain, found []*nftables.Rule, i int) int) (rules.Drops, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	drops := make(rules.Drops)
	for _, c := range plan.DropChains() {
		table, chain := at(c)
		if table == "" || !slices.Contains(families, c.Family) {
			continue
		}
		found, err := conn.GetRules(&nftables.Table{Name: table, Family: formats[c.Family].number}, &nftables.Chain{Name: chain})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list rules of chain %s: %w", chain, err)
		}
		for i, r := range found {
			packets := takeCount(r.Exprs)
			if n := number(c, found, i); n >= 0 {
				drops.Add(c, n, packets)
			}
		}
	}
	return drops, nil
}

// takeCount returns the packets in the counter of a rule as the kernel lists it, and
// makes the rule comparable: it sets the counter to zero.
func takeCount(rule []expr.Any) (packets uint64) {
	for _, e := range rule {
		if c, ok := e.(*expr.Counter); ok {
			packets = c.Packets
			*c = expr.Counter{}
		}
	}
	return packets
}
