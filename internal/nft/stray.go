package nft

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// A Stray is the rules in nf_tables that an earlier run with another backend left:
// our own tables, or our chains of iptables' nf_tables flavour. They would keep
// redirecting beside the rules in use.
type Stray struct {
	translations batch // removed first, if the stray is everything
	batch        batch
	found        []string // descriptions for the log
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
	return find(families, tables, iptables, false)
}

// FindAll looks for everything of ours, the source guard too.
func FindAll(families []rules.Family) (*Stray, error) {
	return find(families, []string{tableName, guardName, limitsName, formerGuardName}, true, true)
}

// find looks for our tables with the given names, and for chains of ours in the tables of
// iptables, if iptables is set. If all is set, nothing else drops packets: what translates
// them is removed first.
func find(families []rules.Family, tables []string, iptables, all bool) (*Stray, error) {
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
				for _, c := range chains {
					if all && c.Table.Name == name && c.Type == nftables.ChainTypeNAT {
						s.translations.deleteRules(c.Table, c.Name, 0)
					}
				}
			}
		}
		if iptables {
			if err := s.addIPTables(conn, f, chains, all); err != nil {
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
func (s *Stray) addIPTables(conn *nftables.Conn, f rules.Family, chains []*nftables.Chain, all bool) error {
	for _, name := range []rules.Table{rules.NAT, rules.Mangle, rules.Filter, rules.Raw} {
		batch := &s.batch
		if all && name == rules.NAT {
			batch = &s.translations
		}
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
					batch.deleteRules(t, chain, r.Handle)
				} else {
					referenced[to] = true // another program's rule stays, and its chain becomes empty
				}
			}
		}
		for _, chain := range own {
			batch.deleteRules(t, chain, 0)
		}
		for _, chain := range own {
			if !referenced[chain] {
				batch.deleteChain(t, chain)
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

// Remove removes all of them, or, after an error, none, or what translates addresses alone.
// There is no rollback: only iptables can restore all parts of its rules.
//
// A packet on its way has passed the chains of some hooks and not those of the next ones. One
// whose destination was translated would leave by any interface, with the source of the client,
// if the chains that drop it were gone then.
func (s *Stray) Remove(context.Context) (undo func() error, err error) {
	if len(s.translations.messages) > 0 {
		err = s.translations.run()
		awaitPackets()
	}
	if err == nil {
		err = s.batch.run()
	}
	if err != nil {
		return nil, fmt.Errorf("remove %s: %w", s, err)
	}
	return nil, nil
}

// awaitPackets waits until every packet that the kernel was handling has left it, which it does
// under RCU: membarrier(2) with MEMBARRIER_CMD_GLOBAL waits for a grace period. A kernel
// without it leaves microseconds in which such a packet is on its way.
func awaitPackets() {
	const global = 1 // linux/membarrier.h
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}
