package nft

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/egress-router/egress-router/rules"
)

// A Stray is the rules in nf_tables that an earlier run with another backend left:
// our own tables, or our chains of iptables' nf_tables flavour. They would keep
// redirecting beside the rules in use.
type Stray struct {
	batch batch
	found []string // descriptions for the log
}

// FindStrays looks for our own tables, if ours is set, and for chains of ours in
// the tables of iptables, if iptables is set. It returns nil where there is
// nothing, as on a kernel without nf_tables. The source guard belongs to every
// backend and is no stray.
func FindStrays(families []rules.Family, ours, iptables bool) (*Stray, error) {
	var tables []string
	if ours {
		tables = []string{tableName}
	}
	return find(families, tables, iptables)
}

// FindAll looks for everything of ours, the source guard too.
func FindAll(families []rules.Family) (*Stray, error) {
	return find(families, []string{tableName, guardName, limitsName, formerGuardName}, true)
}

// find looks for our tables with the given names, and for chains of ours in the tables of
// iptables, if iptables is set.
func find(families []rules.Family, tables []string, iptables bool) (*Stray, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	var s Stray
	for _, f := range families {
		chains, err := conn.ListChainsOfTableFamily(formats[f].number)
		if missing(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list nftables chains: %w", err)
		}
		for _, name := range tables {
			if slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name == name }) {
				s.found = append(s.found, fmt.Sprintf("table %s %s of nftables", formats[f].name, name))
				s.batch.deleteTable(tableOf(tableKey{name, f}))
			}
		}
		if iptables {
			if err := s.addIPTables(conn, f, chains); err != nil {
				return nil, err
			}
		}
	}
	if len(s.found) == 0 {
		return nil, nil
	}
	return &s, nil
}

// addIPTables adds our chains of iptables in one family.
func (s *Stray) addIPTables(conn *nftables.Conn, f rules.Family, chains []*nftables.Chain) error {
	for _, name := range []rules.Table{rules.NAT, rules.Mangle, rules.Filter, rules.Raw} {
		t := &nftables.Table{Name: string(name), Family: formats[f].number}
		var own, others []string
		for _, c := range chains {
			switch {
			case c.Table.Name != t.Name:
			case rules.OwnsChain(c.Name):
				own = append(own, c.Name)
			default:
				others = append(others, c.Name)
			}
		}
		if len(own) == 0 {
			continue
		}
		s.found = append(s.found, fmt.Sprintf("%d chains of iptables (nf_tables) in table %s %s", len(own), formats[f].name, name))
		referenced := make(map[string]bool)
		for _, chain := range others {
			list, err := conn.GetRules(t, &nftables.Chain{Name: chain})
			if err != nil {
				return fmt.Errorf("list rules of chain %s in table %s: %w", chain, t.Name, err)
			}
			for _, r := range list {
				to, plain := leadsTo(r.Exprs)
				if !slices.Contains(own, to) {
					continue
				}
				if plain {
					s.batch.deleteRules(t, chain, r.Handle)
				} else {
					referenced[to] = true // another program's rule stays, and its chain becomes empty
				}
			}
		}
		for _, chain := range own {
			s.batch.deleteRules(t, chain, 0)
		}
		for _, chain := range own {
			if !referenced[chain] {
				s.batch.deleteChain(t, chain)
			}
		}
	}
	return nil
}

// leadsTo returns the chain to which a rule jumps, and whether the rule matches
// every packet, as our jumps do.
func leadsTo(rule []expr.Any) (chain string, plain bool) {
	plain = true
	for _, e := range rule {
		switch e := e.(type) {
		case *expr.Counter: // iptables counts in every rule
		case *expr.Verdict:
			chain = e.Chain
		default:
			plain = false
		}
	}
	return chain, plain
}

// String lists the rules.
func (s *Stray) String() string { return strings.Join(s.found, ", ") }

// Remove removes all of them, or, after an error, none. There is no rollback: only
// iptables can restore all parts of its rules.
func (s *Stray) Remove(context.Context) (undo func() error, err error) {
	if err := s.batch.run(); err != nil {
		return nil, fmt.Errorf("remove %s: %w", s, err)
	}
	return nil, nil
}
