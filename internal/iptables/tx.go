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
	tables  map[rules.Table]*contents
	undo    []func() error // of what was changed, in the order of the changes
}

// contents is what matters to us of one table.
type contents struct {
	chains map[string][]string // ours: chain -> rules, as iptables-save prints them
	jumps  map[string][]int    // chain -> positions, from 1, of the jumps to it in its hook
}

// String names the program that the rules go in by: its version and flavour.
func (tx *Tx) String() string { return tx.backend.version }

// parse takes from the text of iptables-save our chains and the jumps to them,
// by table.
func parse(saved []byte) map[rules.Table]*contents {
	tables := make(map[rules.Table]*contents)
	var c *contents
	var position map[string]int
	for line := range bytes.Lines(saved) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if len(line) == 0 {
			continue
		}
		switch text := string(line[1:]); line[0] {
		case '*':
			c = &contents{chains: make(map[string][]string), jumps: make(map[string][]int)}
			tables[rules.Table(text)], position = c, make(map[string]int)
		case ':':
			if chain, _, _ := strings.Cut(text, " "); strings.HasPrefix(chain, rules.ChainPrefix) {
				c.chains[chain] = nil
			}
		case '-': // -A CHAIN RULE
			chain, rule, _ := strings.Cut(strings.TrimPrefix(text, "A "), " ")
			position[chain]++
			if strings.HasPrefix(chain, rules.ChainPrefix) {
				c.chains[chain] = append(c.chains[chain], rule)
			} else if rule == "-j "+ourChain(chain) {
				c.jumps[ourChain(chain)] = append(c.jumps[ourChain(chain)], position[chain])
			}
		}
	}
	return tables
}

// of returns what a table holds; nothing where it does not exist.
func (tx *Tx) of(name rules.Table) *contents {
	if tx.tables[name] == nil {
		tx.tables[name] = &contents{chains: make(map[string][]string), jumps: make(map[string][]int)}
	}
	return tx.tables[name]
}

// ourChain returns the name of our chain that stands at a built-in chain.
func ourChain(builtin string) string { return rules.ChainPrefix + builtin }

// hooked reports whether the jump to chain stands once and in front.
func (c *contents) hooked(chain string) bool { return slices.Equal(c.jumps[chain], []int{1}) }

// Differs says, one line for each chain or jump, where the kernel is not as
// plan wants it. The rules are compared with what iptables-save printed of
// them; the plan is rendered in the same form. Where a version of iptables
// prints another form, the rules are loaded once more than needed: text that is
// equal is proof, text that is not costs one restore.
func (tx *Tx) Differs(plan rules.Plan) []string {
	var found []string
	for _, chain := range plan.Chains {
		have := tx.of(chain.Table)
		lines, there := have.chains[chain.Name]
		switch {
		case !there:
			found = append(found, fmt.Sprintf("chain %s of table %s is missing", chain.Name, chain.Table))
		case !equal(lines, chain.Rules):
			found = append(found, fmt.Sprintf("chain %s of table %s holds other rules", chain.Name, chain.Table))
		}
		if positions := have.jumps[chain.Name]; len(positions) == 0 {
			found = append(found, fmt.Sprintf("the jump from %s to %s is missing", chain.Hook, chain.Name))
		} else if !have.hooked(chain.Name) {
			found = append(found, fmt.Sprintf("the jump from %s to %s is not the first rule, or not the only one", chain.Hook, chain.Name))
		}
	}
	for _, table := range plan.Tables() {
		for _, name := range stale(plan, table, tx.of(table).chains) {
			found = append(found, fmt.Sprintf("chain %s of table %s is not in use", name, table))
		}
	}
	return found
}

// equal reports whether lines are the rules.
func equal(lines []string, want []rules.Rule) bool {
	if len(lines) != len(want) {
		return false
	}
	var b []byte
	for i, r := range want {
		if b = r.AppendSaved(b[:0]); string(b) != lines[i] {
			return false
		}
	}
	return true
}

// stale returns the chains, sorted, that are there and not in the plan.
func stale(plan rules.Plan, name rules.Table, chains map[string][]string) []string {
	var names []string
	for _, chain := range slices.Sorted(maps.Keys(chains)) {
		if !slices.ContainsFunc(plan.Chains, func(c rules.Chain) bool { return c.Table == name && c.Name == chain }) {
			names = append(names, chain)
		}
	}
	return names
}

// Apply makes the kernel hold plan, and does nothing where it does already. It
// returns the way back to what was there before this call. On an error it has
// gone that way already.
//
// Jumps are set while our chains redirect nothing, those of late hooks first,
// so that at no time a redirect stands without the rest of the plan.
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	begin := len(tx.undo)
	undo = func() error { return tx.backTo(begin) }
	if err := tx.apply(ctx, plan); err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

func (tx *Tx) apply(ctx context.Context, plan rules.Plan) error {
	hooked := func(c rules.Chain) bool { return tx.of(c.Table).hooked(c.Name) }
	if !slices.ContainsFunc(plan.Chains, func(c rules.Chain) bool { return !hooked(c) }) {
		return tx.load(ctx, plan)
	}
	if err := tx.load(ctx, plan.Guard()); err != nil {
		return err
	}
	for _, chain := range slices.Backward(plan.Chains) {
		if !hooked(chain) {
			if err := tx.hook(ctx, chain); err != nil {
				return err
			}
		}
	}
	return tx.load(ctx, plan)
}

// load makes our chains hold what plan says, by one restore. The kernel takes
// that table by table, in the plan's order, each as a whole.
func (tx *Tx) load(ctx context.Context, plan rules.Plan) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var input, inverse []byte
	after := make(map[rules.Table]map[string][]string)
	for _, table := range plan.Tables() {
		before := tx.of(table).chains
		after[table] = chainsOf(plan, table)
		unused := stale(plan, table, before)
		if len(unused) == 0 && maps.EqualFunc(before, after[table], slices.Equal) {
			continue
		}
		input = plan.AppendRestore(input, table)
		// Emptied first, so that no chain is deleted while another of them
		// jumps to it.
		for _, option := range []string{"-F", "-X"} {
			for _, chain := range unused {
				input = fmt.Appendf(input, "%s %s\n", option, chain)
			}
		}
		input = append(input, "COMMIT\n"...)
		inverse = append(appendInverse(nil, table, before, after[table]), inverse...)
	}
	if len(input) == 0 {
		return nil
	}
	// A restore that fails may have changed the tables in front of the one
	// that failed: the way back is there before it starts.
	tx.undo = append(tx.undo, func() error { return tx.restore(ctx, inverse) })
	if err := tx.restore(ctx, input); err != nil {
		if unchanged, _ := tx.unchanged(ctx); unchanged {
			tx.undo = tx.undo[:len(tx.undo)-1]
		}
		return err
	}
	for table, chains := range after {
		tx.of(table).chains = chains
	}
	return nil
}

// unchanged reports whether the kernel still holds what tx knows.
func (tx *Tx) unchanged(ctx context.Context) (bool, error) {
	now, err := tx.backend.Begin(context.WithoutCancel(ctx))
	if err != nil {
		return false, err
	}
	for table := range tx.tables {
		if !maps.EqualFunc(tx.of(table).chains, now.of(table).chains, slices.Equal) {
			return false, nil
		}
	}
	return true, nil
}

func (tx *Tx) restore(ctx context.Context, input []byte) error {
	// Once started it is not interrupted: killed, it would leave open
	// whether the kernel has taken its input.
	_, err := tx.backend.run(context.WithoutCancel(ctx), input, "iptables-restore", "--noflush", "-w", fmt.Sprint(lockSeconds))
	if err != nil {
		return fmt.Errorf("loading rules: %w", err)
	}
	return nil
}

// chainsOf returns the plan's chains of one table with their rules as
// iptables-save will print them.
func chainsOf(plan rules.Plan, table rules.Table) map[string][]string {
	chains := make(map[string][]string)
	for _, chain := range plan.Chains {
		if chain.Table != table {
			continue
		}
		lines := make([]string, len(chain.Rules))
		for i, r := range chain.Rules {
			lines[i] = string(r.AppendSaved(nil))
		}
		chains[chain.Name] = lines
	}
	return chains
}

// appendInverse appends the restore input that gets one table from the chains
// after to those before.
func appendInverse(b []byte, table rules.Table, before, after map[string][]string) []byte {
	b = fmt.Appendf(b, "*%s\n", table)
	var gone []string
	for _, chain := range slices.Sorted(maps.Keys(after)) {
		if _, there := before[chain]; !there {
			gone = append(gone, chain)
		}
	}
	chains := slices.Sorted(maps.Keys(before))
	for _, chain := range slices.Concat(gone, chains) {
		b = fmt.Appendf(b, ":%s - [0:0]\n", chain)
	}
	for _, chain := range chains {
		for _, line := range before[chain] {
			b = fmt.Appendf(b, "-A %s %s\n", chain, line)
		}
	}
	for _, chain := range gone {
		b = fmt.Appendf(b, "-X %s\n", chain)
	}
	return append(b, "COMMIT\n"...)
}

// hook makes the jump to chain the first rule of its built-in chain, since in
// the nat table the first rule that matches decides: a masquerading rule in
// front of ours would choose another source address.
func (tx *Tx) hook(ctx context.Context, chain rules.Chain) error {
	have := tx.of(chain.Table)
	// From the last one, so that the positions in front of it hold.
	for _, position := range slices.Backward(have.jumps[chain.Name]) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := tx.backend.deleteJump(chain.Table, chain.Hook, chain.Name); err != nil {
			return fmt.Errorf("moving the jump from %s to %s: %w", chain.Hook, chain.Name, err)
		}
		tx.undo = append(tx.undo, func() error {
			return tx.backend.insertJump(chain.Table, chain.Hook, chain.Name, position)
		})
	}
	have.jumps[chain.Name] = nil
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := tx.backend.insertJump(chain.Table, chain.Hook, chain.Name, 1); err != nil {
		return fmt.Errorf("inserting the jump from %s to %s: %w", chain.Hook, chain.Name, err)
	}
	have.jumps[chain.Name] = []int{1}
	tx.undo = append(tx.undo, func() error {
		return tx.backend.deleteJump(chain.Table, chain.Hook, chain.Name)
	})
	return nil
}

// backTo takes back the changes behind the first n. It goes on after a failure
// and returns all of them.
func (tx *Tx) backTo(n int) error {
	var failed []error
	for _, step := range slices.Backward(tx.undo[n:]) {
		failed = append(failed, step())
	}
	tx.undo = tx.undo[:n]
	return errors.Join(failed...)
}
