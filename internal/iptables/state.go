package iptables

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A state is the router's part of the rules of one family, by table, as the kernel
// has it or as it is planned.
type state map[rules.Table]*contents

// contents is the router's part of one table.
type contents struct {
	// Chains of the router with their rules as text, a line each.
	chains map[string][]byte
	// By chain, the positions, from 1, of the jumps to it in its hook.
	jumps map[string][]int
	// Chains of the router that other rules of other chains lead to.
	referenced map[string]bool
}

func newContents() *contents {
	return &contents{chains: make(map[string][]byte), jumps: make(map[string][]int), referenced: make(map[string]bool)}
}

// of returns the contents of a table, empty if the state has none.
func (s state) of(table rules.Table) *contents {
	if c := s[table]; c != nil {
		return c
	}
	return newContents()
}

// chainOf returns the name of the router's chain at a hook.
func chainOf(hook rules.Hook) string { return rules.ChainPrefix + string(hook) }

// hookOf returns the hook that a chain of the router is named after.
func hookOf(chain string) rules.Hook {
	return rules.Hook(strings.TrimPrefix(chain, rules.ChainPrefix))
}

// ICMPv6 as iptables prints it without /etc/protocols, from a list of its own, and
// as it prints it with that file and a plan renders it.
var (
	protocolWithoutFile = []byte(" -p icmpv6 ")
	protocolByFile      = []byte(" -p ipv6-icmp ")
)

// parse returns the state in the text of iptables-save. Jumps are rules that jump
// to a chain and match every packet, in the form that they are loaded in or in the
// given one.
func parse(saved []byte, jump jumpForm) state {
	p := parser{found: make(state), jump: jump}
	for line := range bytes.Lines(saved) {
		p.add(line)
	}
	return p.found
}

// A parser reads the text of iptables-save line by line.
type parser struct {
	found state
	jump  jumpForm
	// The planned rules of chains, of which a chain with the same rules becomes a part: the
	// text of ten thousand redirects has a megabyte.
	planned map[chainID][]byte

	table    rules.Table
	c        *contents // of table
	position map[rules.Hook]int
}

// read reads all lines of a file.
func (p *parser) read(file io.Reader) error {
	const most = 32 << 10 // bytes of a line without an allocation
	lines := bufio.NewReaderSize(file, most)
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			line = slices.Clone(line)
			var rest []byte
			rest, err = lines.ReadBytes('\n')
			line = append(line, rest...)
		}
		p.add(line)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// add reads a line, and keeps no part of it.
func (p *parser) add(line []byte) {
	if line = withoutColumns(line); len(line) < 2 {
		return
	}
	switch line[0] {
	case '*':
		p.table = rules.Table(bytes.TrimSpace(line[1:]))
		p.c, p.position = newContents(), make(map[rules.Hook]int)
		p.found[p.table] = p.c
	case ':':
		chain, _, _ := bytes.Cut(line[1:], []byte(" "))
		if rules.OwnsChain(string(chain)) {
			p.c.chains[string(chain)] = nil
		}
	case '-':
		name, rule := cutChain(line)
		if text, own := p.c.chains[name]; own {
			p.c.chains[name] = p.appendRule(name, text, line)
			return
		}
		hook := rules.Hook(name)
		p.position[hook]++
		to := target(rule)
		switch {
		case to == "":
		case to == chainOf(hook) && (string(rule) == loadedJump.to(to) || string(rule) == p.jump.to(to)):
			p.c.jumps[to] = append(p.c.jumps[to], p.position[hook])
		default:
			p.c.referenced[to] = true
		}
	}
}

// appendRule appends a rule to the text of a chain, which stays a part of the planned one
// as long as they are equal.
func (p *parser) appendRule(chain string, text, line []byte) []byte {
	if before, after, found := bytes.Cut(line, protocolWithoutFile); found {
		line = slices.Concat(before, protocolByFile, after)
	}
	planned, n := p.planned[chainID{p.table, chain}], len(text)+len(line)
	if n <= len(planned) && bytes.Equal(planned[len(text):n], line) && (len(text) == 0 || &text[0] == &planned[0]) {
		return planned[:n:n]
	}
	return append(text, line...)
}

// withoutColumns returns a line of iptables-save without the parts that change with
// time, or that iptables-restore does not take: counters in front ("[12:345] -A …",
// iptables-save(8), --counters) and a remark at the end ("… # handle 7"). Options
// behind a "#" show that it begins a value, such as the name of an interface.
func withoutColumns(line []byte) []byte {
	if len(line) > 0 && line[0] == '[' {
		_, line, _ = bytes.Cut(line, []byte("] "))
	}
	if at := bytes.LastIndexByte(line, '#'); at > 0 && line[at-1] == ' ' && !bytes.ContainsRune(line[at:], '"') && !bytes.Contains(line[at:], []byte(" -")) {
		line = append(bytes.TrimRight(line[:at:at], " "), '\n')
	}
	return line
}

// cutChain returns the chain and the rule of a line "-A CHAIN RULE". The rule is empty
// if iptables-save cannot print it, such as one with a verdict map of nft(8).
func cutChain(line []byte) (chain string, rule []byte) {
	name, rule, _ := bytes.Cut(bytes.TrimSpace(bytes.TrimPrefix(line, []byte("-A "))), []byte(" "))
	return string(name), rule
}

// target returns the chain of the router that a rule of another chain names, empty
// if there is none.
func target(rule []byte) string {
	if bytes.Contains(rule, []byte(rules.ChainPrefix)) {
		// The target stands behind the matches, of which a comment may be such a name.
		for _, field := range slices.Backward(strings.Fields(string(rule))) {
			if rules.OwnsChain(field) {
				return field
			}
		}
	}
	return ""
}

// hasRules reports whether any chain of the router has a rule.
func (c *contents) hasRules() bool {
	for _, text := range c.chains {
		if len(text) > 0 {
			return true
		}
	}
	return false
}

// hasChains reports whether there is any chain of the router.
func (s state) hasChains() bool {
	for _, c := range s {
		if len(c.chains) > 0 {
			return true
		}
	}
	return false
}

// differences returns the differences between s and the planned state, a line for
// each chain or jump.
//
// Text is comparable because recognise has replaced the forms of other versions of
// iptables: equal text proves that a chain is as it was loaded.
func (s state) differences(want state) []string {
	if len(want) > 0 && !s.hasChains() {
		return []string{"no chain of the router exists"}
	}
	var found []string
	add := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, table := range tablesOf(s, want) {
		have, want := s.of(table), want.of(table)
		inTree, scratch := 0, 0
		addChain := func(chain, difference string) {
			switch { // thousands of chains may match the first two cases
			case strings.HasPrefix(chain, rules.ScratchPrefix):
				scratch++
			case rules.IsTreeChain(chain):
				inTree++
			default:
				add("chain %s of table %s %s", chain, table, difference)
			}
		}
		for _, chain := range slices.Sorted(maps.Keys(want.chains)) {
			if text, exists := have.chains[chain]; !exists {
				addChain(chain, "is missing")
			} else if !bytes.Equal(text, want.chains[chain]) {
				addChain(chain, "has other rules")
			}
		}
		for _, chain := range slices.Sorted(maps.Keys(have.chains)) {
			if _, planned := want.chains[chain]; !planned {
				addChain(chain, "is not in the plan")
			}
		}
		if inTree > 0 {
			add("%d chains %sTCP… and %[2]sUDP… of table %s differ", inTree, rules.ChainPrefix, table)
		}
		if scratch > 0 {
			add("%d scratch chains %s… of table %s remain", scratch, rules.ScratchPrefix, table)
		}
		for _, chain := range chainsOf(have, want) {
			hook := hookOf(chain)
			switch {
			case slices.Equal(have.jumps[chain], want.jumps[chain]):
			case len(have.jumps[chain]) == 0:
				add("the jump from %s to %s of table %s is missing", hook, chain, table)
			case len(want.jumps[chain]) == 0:
				add("the jump from %s to %s of table %s is not in the plan", hook, chain, table)
			default:
				add("the jump from %s to %s of table %s is not the first rule, or not the only jump", hook, chain, table)
			}
		}
	}
	return found
}

// script returns the iptables-restore input that changes s into want, empty if
// they are equal. The kernel takes each table as a whole.
func (s state) script(want state) []byte {
	var b []byte
	tables := tablesOf(s, want)
	if !want.of(rules.NAT).hasRules() {
		// Redirects are removed before the rules that guard them.
		slices.Reverse(tables)
	}
	for _, table := range tables {
		have, want := s.of(table), want.of(table)
		chains := chainsOf(have, want)
		before := len(b)
		b = fmt.Appendf(b, "*%s\n", table)
		empty := len(b)
		var gone []string
		size := 0
		for _, chain := range chains {
			text, planned := want.chains[chain]
			old, exists := have.chains[chain]
			switch {
			case !planned && exists:
				gone = append(gone, chain)
				b = fmt.Appendf(b, "-F %s\n", chain)
			case planned && (!exists || !bytes.Equal(old, text)):
				// Creates the chain, or empties it.
				b = fmt.Appendf(b, ":%s - [0:0]\n", chain)
				size += len(text)
			}
		}
		b = slices.Grow(b, size)
		for _, chain := range chains {
			if text, planned := want.chains[chain]; planned && !bytes.Equal(have.chains[chain], text) {
				b = append(b, text...)
			}
		}
		for _, chain := range chains {
			if slices.Equal(have.jumps[chain], want.jumps[chain]) {
				continue
			}
			hook := hookOf(chain)
			for range have.jumps[chain] {
				b = fmt.Appendf(b, "-D %s -j %s\n", hook, chain)
			}
			for _, position := range want.jumps[chain] {
				b = fmt.Appendf(b, "-I %s %d -j %s\n", hook, position, chain)
			}
		}
		for _, chain := range gone {
			b = fmt.Appendf(b, "-X %s\n", chain)
		}
		if len(b) == empty {
			b = b[:before]
		} else {
			b = append(b, "COMMIT\n"...)
		}
	}
	return b
}

// tablesOf returns the tables of both states, raw, filter and mangle before nat:
// helpers and guards before redirects.
func tablesOf(a, b state) []rules.Table {
	tables := make(map[rules.Table]bool)
	for table := range a {
		tables[table] = true
	}
	for table := range b {
		tables[table] = true
	}
	sorted := slices.Sorted(maps.Keys(tables))
	slices.SortStableFunc(sorted, func(a, b rules.Table) int {
		switch rules.Raw {
		case a:
			return -1
		case b:
			return 1
		}
		return 0
	})
	return sorted
}

// chainsOf returns the chains of both, and those that they have jumps to, sorted.
func chainsOf(a, b *contents) []string {
	chains := make(map[string]bool)
	for _, c := range []*contents{a, b} {
		for chain := range c.chains {
			chains[chain] = true
		}
		for chain := range c.jumps {
			chains[chain] = true
		}
	}
	return slices.Sorted(maps.Keys(chains))
}
