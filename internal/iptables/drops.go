package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/egress-router/egress-router/rules"
)

// Drops reads the counters of the plan's rules that drop, with one iptables-save
// for each table that has some. The nat table, which contains the redirects, has none:
// for the legacy flavour the number of redirects does not matter; for the nf_tables
// flavour, whose iptables-save always lists all tables, use internal/nft. It may be
// called while another goroutine uses the Tx.
//
// The kernel keeps a counter until its rule is deleted: a restore that changes other
// chains only does not touch it.
func (tx *Tx) Drops(ctx context.Context, plan rules.Plan) (rules.Drops, error) {
	type read struct {
		chains []rules.Chain
		finish func() (stdout, stderr []byte, err error)
		f      *familyTx
	}
	var reads []*read
	for _, f := range tx.families {
		tables := make(map[rules.Table]*read)
		for _, c := range plan.DropChains() {
			if c.Family != f.family || !c.Table.InIPTables() {
				continue
			}
			if tables[c.Table] == nil {
				tables[c.Table] = &read{finish: f.backend.start(ctx, nil, f.program("save"), "-c", "-t", string(c.Table)), f: f}
				reads = append(reads, tables[c.Table])
			}
			tables[c.Table].chains = append(tables[c.Table].chains, c)
		}
	}
	drops := make(rules.Drops)
	var failed []error
	for _, r := range reads {
		saved, _, err := r.finish()
		if err != nil {
			failed = append(failed, fmt.Errorf("reading the counters: %w", err))
			continue
		}
		for _, c := range r.chains {
			r.f.spelling.addDrops(drops, c, saved)
		}
	}
	if err := errors.Join(failed...); err != nil {
		return nil, err
	}
	return drops, nil
}

// addDrops adds the counters of a chain in the text of iptables-save --counters. Rules
// that are not in the plan, as another program may have added, do not count.
func (s *spelling) addDrops(drops rules.Drops, c rules.Chain, saved []byte) {
	var text []byte
	var packets []uint64
	for line := range bytes.Lines(saved) {
		counters, _, _ := bytes.Cut(line, []byte(":"))
		rule := withoutColumns(line)
		if name, _ := cutChain(rule); len(counters) == 0 || counters[0] != '[' || name != c.Name() {
			continue
		}
		n, err := strconv.ParseUint(string(counters[1:]), 10, 64)
		if err != nil {
			return
		}
		packets = append(packets, n)
		text = append(text, bytes.Replace(rule, protocolWithoutFile, protocolByFile, 1)...)
	}
	planned := slices.Collect(bytes.Lines(rules.Plan{Chains: []rules.Chain{c}}.IPTables()[0].Saved))
	found := slices.Collect(bytes.Lines(s.loaded(chainID{c.Table, c.Name()}, text)))
	if len(planned) != len(c.Rules) || len(found) != len(packets) {
		return
	}
	for i, line := range found {
		if number := slices.IndexFunc(planned, func(p []byte) bool { return bytes.Equal(p, line) }); number >= 0 {
			drops.Add(c, number, packets[i])
		}
	}
}
