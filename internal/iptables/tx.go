package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Tx changes the rules of one network namespace. It knows what the kernel
// held when it began and after each change of its own.
type Tx struct {
	backend *Backend
	now     state
	notes   []string

	// The texts of the chains of the plan in hand: rendering thousands of
	// rules takes about as long as everything else here.
	rendered map[rules.Table]map[string]text
}

// text is a chain's rules and what iptables-save makes of them.
type text struct {
	rules []rules.Rule
	saved []byte
}

// saved returns the rules of a chain as iptables-save prints them.
func (tx *Tx) saved(chain rules.Chain) []byte {
	same := func(a, b []rules.Rule) bool { return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) }
	if t, done := tx.rendered[chain.Table][chain.Name]; done && same(t.rules, chain.Rules) {
		return t.saved
	}
	t := text{chain.Rules, chain.AppendSaved(nil)}
	if len(chain.Rules) > 0 {
		if tx.rendered == nil {
			tx.rendered = make(map[rules.Table]map[string]text)
		}
		if tx.rendered[chain.Table] == nil {
			tx.rendered[chain.Table] = make(map[string]text)
		}
		tx.rendered[chain.Table][chain.Name] = t
	}
	return t.saved
}

// A state is what the kernel holds, or shall hold, of ours: table by table.
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

// hookOf returns the hook that a chain of ours stands at; none for a chain that
// is not ours.
func hookOf(chain string) (rules.Hook, bool) {
	hook := rules.Hook(strings.TrimPrefix(chain, rules.ChainPrefix))
	return hook, chain == chainOf(hook) && slices.Contains(rules.Hooks, hook)
}

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
			if _, ours := hookOf(string(chain)); ours {
				c.chains[string(chain)] = nil
			}
		case '-': // -A CHAIN RULE
			name, rule, _ := bytes.Cut(bytes.TrimPrefix(line, []byte("-A ")), []byte(" "))
			if text, ours := c.chains[string(name)]; ours {
				c.chains[string(name)] = append(text, line...)
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

// wanted returns the state in which the kernel holds plan: each chain as
// planned, the jump to it once and in front, since in the nat table the first
// rule that matches decides and a masquerading rule in front of ours would
// choose another source address. Chains of ours that the plan does not have are
// gone, or empty where a rule of somebody else leads to them.
func (tx *Tx) wanted(plan rules.Plan) state {
	s, want := tx.now, make(state)
	for _, chain := range plan.Chains {
		if want[chain.Table] == nil {
			want[chain.Table] = newContents()
		}
		want[chain.Table].chains[chain.Name] = tx.saved(chain)
		want[chain.Table].jumps[chain.Name] = []int{1}
	}
	for table, have := range s {
		for chain := range have.chains {
			if _, planned := want.of(table).chains[chain]; !planned && have.referenced[chain] {
				if want[table] == nil {
					want[table] = newContents()
				}
				want[table].chains[chain] = nil
			}
		}
	}
	return want
}

// differences says, one line for each chain or jump, where s is not as wanted.
//
// Text that is equal is proof that a chain is as it was loaded. Where a version
// of iptables prints another form than it was given, a run loads the same rules
// once more, which costs one restore and changes nothing else.
func (s state) differences(want state) []string {
	if len(want) > 0 && !slices.ContainsFunc(slices.Collect(maps.Values(s)), func(c *contents) bool { return len(c.chains) > 0 }) {
		return []string{"none of its chains is there yet"}
	}
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, table := range tablesOf(s, want) {
		have, want := s.of(table), want.of(table)
		for _, chain := range slices.Sorted(maps.Keys(want.chains)) {
			if text, there := have.chains[chain]; !there {
				say("chain %s of table %s is missing", chain, table)
			} else if !bytes.Equal(text, want.chains[chain]) {
				say("chain %s of table %s holds other rules", chain, table)
			}
		}
		for _, chain := range slices.Sorted(maps.Keys(have.chains)) {
			if _, wanted := want.chains[chain]; !wanted {
				say("chain %s of table %s is not in use", chain, table)
			}
		}
		for _, chain := range chainsOf(have, want) {
			hook, _ := hookOf(chain)
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
	for _, table := range tablesOf(s, want) {
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
			hook, _ := hookOf(chain)
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

// tablesOf returns the tables of both states, mangle before nat: rules that
// guard stand before those that redirect.
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

// RestoreInput returns the iptables-restore input for plan in a namespace that
// has nothing of ours yet.
func RestoreInput(plan rules.Plan) []byte {
	var nothing Tx
	return nothing.now.script(nothing.wanted(plan))
}

// String names the program that the rules go in by: its version and flavour.
func (tx *Tx) String() string { return tx.backend.version }

// Differs says, one line each, where the kernel is not as plan wants it.
func (tx *Tx) Differs(plan rules.Plan) []string { return tx.now.differences(tx.wanted(plan)) }

// Redirects reports whether the kernel holds redirects of ours.
func (tx *Tx) Redirects() bool {
	for _, c := range tx.now {
		for _, text := range c.chains {
			if bytes.Contains(text, []byte(" -j "+rules.DNAT+" ")) {
				return true
			}
		}
	}
	return false
}

// tries is how often a change is worked out anew because another program
// changed the same tables between reading and writing them.
const tries = 3

// Apply makes the kernel hold plan, and does nothing where it does already. It
// returns the way back to what was there before this call. On an error it has
// gone that way already.
//
// Chains and jumps go in together, by one restore: go-iptables, whose calls
// change one rule each, would leave moments in which a chain is reached and not
// complete, and takes a process for every jump.
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	before := tx.now
	// The way back is taken also when ctx has ended.
	undo = func() error { return tx.become(context.WithoutCancel(ctx), func() state { return before }) }
	if err := tx.become(ctx, func() state { return tx.wanted(plan) }); err != nil {
		if len(tx.now.script(before)) > 0 {
			err = errors.Join(err, undo())
		}
		return nil, err
	}
	return undo, nil
}

// become makes the kernel hold what want returns.
func (tx *Tx) become(ctx context.Context, want func() state) error {
	for try := 1; ; try++ {
		target := want()
		input := tx.now.script(target)
		if len(input) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		// Once started it is not interrupted: killed, it would leave open
		// whether the kernel has taken its input.
		_, _, err := tx.backend.run(context.WithoutCancel(ctx), input, "iptables-restore", "--noflush", "-w", fmt.Sprint(lockSeconds))
		if err == nil {
			tx.now = target
			return nil
		}
		// The kernel says what holds now: some tables may have been changed,
		// by the restore or by somebody else.
		known := tx.now
		if again := tx.read(context.WithoutCancel(ctx)); again != nil {
			return errors.Join(fmt.Errorf("loading rules: %w", err), again)
		}
		if try == tries || len(known.script(tx.now)) == 0 {
			return fmt.Errorf("loading rules: %w", err)
		}
	}
}

// read takes the state from the kernel.
func (tx *Tx) read(ctx context.Context) error {
	saved, printed, err := tx.backend.run(ctx, nil, "iptables-save")
	if err != nil {
		return fmt.Errorf("reading the rules: %w", err)
	}
	tx.now, tx.notes = parse(saved), notes(printed)
	return nil
}

// notes returns what iptables-save warns of: above all rules of the other
// flavour, of which the last one to come into a namespace decides.
func notes(printed []byte) []string {
	var found []string
	for line := range strings.Lines(string(printed)) {
		if _, text, warning := strings.Cut(line, "Warning: "); warning {
			found = append(found, strings.TrimSpace(text))
		}
	}
	return found
}

// Notes returns what iptables said about the rules that it read.
func (tx *Tx) Notes() []string { return tx.notes }
