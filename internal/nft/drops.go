package nft

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// Drops reads the counters of the plan's rules that drop. It does not read the
// redirects. It may be called while another goroutine uses the Tx.
//
// The kernel keeps a counter until its rule is deleted. A change of other chains, or
// of the map of redirects, does not touch it.
func (tx *Tx) Drops(_ context.Context, plan rules.Plan) (rules.Drops, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	drops := make(rules.Drops)
	for _, c := range plan.DropChains() {
		if (c.Table == rules.SourceGuard) != (tx.name == guardName) || !slices.Contains(tx.families, c.Family) {
			continue
		}
		found, err := conn.GetRules(tableOf(tableKey{tx.name, c.Family}), &nftables.Chain{Name: chainName(c)})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list rules of chain %s: %w", chainName(c), err)
		}
		for _, r := range found {
			packets := takeCount(r.Exprs)
			// Another program may have added rules.
			same := func(planned rules.Rule) bool { return reflect.DeepEqual(expressions(planned), r.Exprs) }
			if i := slices.IndexFunc(c.Rules, same); i >= 0 {
				drops.Add(c, i, packets)
			}
		}
	}
	return drops, nil
}
