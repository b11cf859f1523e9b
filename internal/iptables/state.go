package iptables

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A state is what the kernel holds, or shall hold, of ours in one family: table
// by table.
type state map[rules.Table]*contents

// contents is what matters to us of one table.
type contents struct {
	// Our chains, with their rules as iptables-save prints them.
	chains map[string][]byte
	// By chain, the positions, from 1, of the jumps to it in its hook.
	jumps map[string][]int
	// Chains of ours that rules of others lead to, other than by those jumps.
	referenced map[string]bool
}

func newContents() *contents {
	return &contents{chains: make(map[string][]byte), jumps: make(map[string][]int), referenced: make(map[string]bool)}
}

// of returns what a table holds; nothing where it is not there.
func (s state) of(table rules.Table) *contents {
	if c := s[table]; c != nil {
		return c
	}
	return newContents()
}

// chainOf returns the name of our chain that stands at a hook.
func chainOf(hook rules.Hook) string { return rules.ChainPrefix + string(hook) }

// hookOf returns the hook that a chain of ours is named after.
func hookOf(chain string) rules.Hook {
	return rules.Hook(strings.TrimPrefix(chain, rules.ChainPrefix))
}

// ICMPv6 by the name that iptables has for it where /etc/protocols is missing,
// and by the one that it prints elsewhere and that a plan has.
var (
	protocolWithoutFile = []byte(" -p icmpv6 ")
	protocolByFile      = []byte(" -p ipv6-icmp ")
)

// parse takes from the text of iptables-save our chains and what leads to them.
func parse(saved []byte) state {
	s := make(state)
	var c *contents
	var position map[string]int
	for line := range bytes.Lines(saved) {
		if len(line) < 2 {
			continue
		}
		switch line[0] {
		case '*':
			c, position = newContents(), make(map[string]int)
			s[rules.Table(bytes.TrimSpace(line[1:]))] = c
		case ':':
			chain, _, _ := bytes.Cut(line[1:], []byte(" "))
			if rules.OwnsChain(string(chain)) {
				c.chains[string(chain)] = nil
			}
		case '-': // -A CHAIN RULE
			name, rule, _ := bytes.Cut(bytes.TrimPrefix(line, []byte("-A ")), []byte(" "))
			if text, ours := c.chains[string(name)]; ours {
				c.chains[string(name)] = append(text, bytes.Replace(line, protocolWithoutFile, protocolByFile, 1)...)
				continue
			}
			chain := string(name)
			position[chain]++
			at := bytes.LastIndex(rule, []byte(" "+rules.ChainPrefix))
			if at < 0 {
				continue
			}
			to := string(bytes.TrimSpace(rule[at+1:]))
			if to == chainOf(rules.Hook(chain)) && string(rule[:at]) == "-j" {
				c.jumps[to] = append(c.jumps[to], position[chain])
			} else {
				c.referenced[to] = true
			}
		}
	}
	return s
}

// holdsRules reports whether any chain of ours has a rule.
func (c *contents) holdsRules() bool {
	for _, text := range c.chains {
		if len(text) > 0 {
			return true
		}
	}
	return false
}

// holdsAny reports whether any chain of ours is there.
func (s state) holdsAny() bool {
	for _, c := range s {
		if len(c.chains) > 0 {
			return true
		}
	}
	return false
}

// differences says, one line for each chain or jump, where s is not as wanted.
//
// Text that is equal is proof that a chain is as it was loaded. Where a version
// of iptables prints another form than it was given, a run loads the same rules
// once more, which costs one restore and changes nothing else.
func (s state) differences(want state) []string {
	if len(want) > 0 && !s.holdsAny() {
		return []string{"none of its chains is there yet"}
	}
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, table := range tablesOf(s, want) {
		have, want := s.of(table), want.of(table)
		inTree := 0
		sayOf := func(chain, what string) {
			if rules.IsTreeChain(chain) {
				inTree++ // there may be thousands
				return
			}
			say("chain %s of table %s %s", chain, table, what)
		}
		for _, chain := range slices.Sorted(maps.Keys(want.chains)) {
			if text, there := have.chains[chain]; !there {
				sayOf(chain, "is missing")
			} else if !bytes.Equal(text, want.chains[chain]) {
				sayOf(chain, "holds other rules")
			}
		}
		for _, chain := range slices.Sorted(maps.Keys(have.chains)) {
			if _, wanted := want.chains[chain]; !wanted {
				sayOf(chain, "is not in use")
			}
		}
		if inTree > 0 {
			say("of the chains %sTCP… and %[1]sUDP… of table %s, %d are not as wanted", rules.ChainPrefix, table, inTree)
		}
		for _, chain := range chainsOf(have, want) {
			hook := hookOf(chain)
			switch {
			case slices.Equal(have.jumps[chain], want.jumps[chain]):
			case len(have.jumps[chain]) == 0:
				say("the jump from %s to %s of table %s is missing", hook, chain, table)
			case len(want.jumps[chain]) == 0:
				say("the jump from %s to %s of table %s is not in use", hook, chain, table)
			default:
				say("the jump from %s to %s of table %s is not the first rule, or not the only jump", hook, chain, table)
			}
		}
	}
	return found
}

// script returns the iptables-restore input that gets from s to want; nothing
// where they are the same. The kernel takes it table by table, each as a whole.
func (s state) script(want state) []byte {
	var b []byte
	tables := tablesOf(s, want)
	if !want.of(rules.NAT).holdsRules() {
		// Redirects go before the rules that guard them.
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
			text, wanted := want.chains[chain]
			old, there := have.chains[chain]
			switch {
			case !wanted && there:
				gone = append(gone, chain)
				b = fmt.Appendf(b, "-F %s\n", chain)
			case wanted && (!there || !bytes.Equal(old, text)):
				// Makes the chain, or empties it.
				b = fmt.Appendf(b, ":%s - [0:0]\n", chain)
				size += len(text)
			}
		}
		b = slices.Grow(b, size)
		for _, chain := range chains {
			if text, wanted := want.chains[chain]; wanted && !bytes.Equal(have.chains[chain], text) {
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

// tablesOf returns the tables of both states, filter and mangle before nat: rules
// that guard stand before those that redirect.
func tablesOf(a, b state) []rules.Table {
	tables := make(map[rules.Table]bool)
	for table := range a {
		tables[table] = true
	}
	for table := range b {
		tables[table] = true
	}
	return slices.Sorted(maps.Keys(tables))
}

// chainsOf returns the chains and the jumped-to chains of both, sorted.
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
