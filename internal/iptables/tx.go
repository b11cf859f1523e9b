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
	version string
	tables  map[rules.Table]*contents
	undo    []func() error // of what was changed, in the order of the changes
}

// contents is what matters to us of one table.
type contents struct {
	chains map[string][]string // ours: chain -> rules, as iptables-save prints them
	jumps  map[string][]int    // chain -> positions, from 1, of the jumps to it in its hook
}

// String names the program that the rules go in by: its version and flavour.
func (tx *Tx) String() string { return tx.version }

// read takes the contents of one table from iptables-save.
func (tx *Tx) read(ctx context.Context, name rules.Table) error {
	saved, err := tx.backend.run(ctx, nil, "iptables-save", "-t", string(name))
	if err != nil {
		return fmt.Errorf("reading table %q: %w", name, err)
	}
	tx.version = version(saved)
	tx.tables[name] = parse(saved)
	return nil
}

// parse takes from the text of iptables-save our chains and the jumps to them.
func parse(saved []byte) *contents {
	c := &contents{chains: make(map[string][]string), jumps: make(map[string][]int)}
	position := make(map[string]int)
	for line := range bytes.Lines(saved) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if declared, ok := bytes.CutPrefix(line, []byte(":"+rules.ChainPrefix)); ok {
			name, _, _ := strings.Cut(string(declared), " ")
			c.chains[rules.ChainPrefix+name] = nil
			continue
		}
		rule, ok := strings.CutPrefix(string(line), "-A ")
		if !ok {
			continue
		}
		chain, rule, _ := strings.Cut(rule, " ")
		position[chain]++
		if strings.HasPrefix(chain, rules.ChainPrefix) {
			c.chains[chain] = append(c.chains[chain], rule)
		} else if to, ok := strings.CutPrefix(rule, "-j "+rules.ChainPrefix); ok && rules.ChainPrefix+to == ourChain(chain) {
			c.jumps[ourChain(chain)] = append(c.jumps[ourChain(chain)], position[chain])
		}
	}
	return c
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
		have := tx.tables[chain.Table]
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
		for _, name := range tx.stale(plan, table) {
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

// stale returns the chains of ours that are there and not in the plan.
func (tx *Tx) stale(plan rules.Plan, name rules.Table) []string {
	var names []string
	for _, chain := range slices.Sorted(maps.Keys(tx.tables[name].chains)) {
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
	for _, table := range plan.Tables() {
		if tx.allHooked(plan, table) {
			continue
		}
		if err := tx.load(ctx, plan.Guard(), table); err != nil {
			return err
		}
		for _, chain := range slices.Backward(plan.Chains) {
			if chain.Table != table || tx.tables[table].hooked(chain.Name) {
				continue
			}
			if err := tx.hook(ctx, chain); err != nil {
				return err
			}
		}
	}
	for _, table := range plan.Tables() {
		if err := tx.load(ctx, plan, table); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) allHooked(plan rules.Plan, name rules.Table) bool {
	return !slices.ContainsFunc(plan.Chains, func(c rules.Chain) bool {
		return c.Table == name && !tx.tables[name].hooked(c.Name)
	})
}

// load makes our chains of one table hold what plan says, by one restore.
func (tx *Tx) load(ctx context.Context, plan rules.Plan, name rules.Table) error {
	have := tx.tables[name]
	before := maps.Clone(have.chains)
	after := make(map[string][]string)
	same := true
	for _, chain := range plan.Chains {
		if chain.Table != name {
			continue
		}
		lines, there := before[chain.Name]
		same = same && there && equal(lines, chain.Rules)
		after[chain.Name] = saved(chain.Rules)
	}
	stale := tx.stale(plan, name)
	if same && len(stale) == 0 {
		return nil
	}
	input := plan.AppendRestore(nil, name)
	if len(stale) > 0 {
		// Emptied first, so that no chain is deleted while another of them
		// jumps to it.
		input = bytes.TrimSuffix(input, []byte("COMMIT\n"))
		for _, option := range []string{"-F", "-X"} {
			for _, chain := range stale {
				input = fmt.Appendf(input, "%s %s\n", option, chain)
			}
		}
		input = append(input, "COMMIT\n"...)
	}
	if err := tx.restore(ctx, name, input); err != nil {
		return err
	}
	have.chains = after
	tx.undo = append(tx.undo, func() error {
		return tx.restore(context.WithoutCancel(ctx), name, inverse(name, before, after))
	})
	return nil
}

func (tx *Tx) restore(ctx context.Context, name rules.Table, input []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// Once started it is not interrupted: killed, it would leave open
	// whether the kernel has taken its input.
	_, err := tx.backend.run(context.WithoutCancel(ctx), input, "iptables-restore", "--noflush", "-w", fmt.Sprint(lockSeconds))
	if err != nil {
		return fmt.Errorf("loading rules into table %q: %w", name, err)
	}
	return nil
}

// saved returns the rules as iptables-save will print them.
func saved(want []rules.Rule) []string {
	lines := make([]string, len(want))
	for i, r := range want {
		lines[i] = string(r.AppendSaved(nil))
	}
	return lines
}

// inverse returns the restore input that gets from the chains after to those
// before.
func inverse(name rules.Table, before, after map[string][]string) []byte {
	b := fmt.Appendf(nil, "*%s\n", name)
	chains := slices.Sorted(maps.Keys(before))
	for chain := range after {
		if _, there := before[chain]; !there {
			b = fmt.Appendf(b, ":%s - [0:0]\n", chain)
		}
	}
	for _, chain := range chains {
		b = fmt.Appendf(b, ":%s - [0:0]\n", chain)
	}
	for _, chain := range chains {
		for _, line := range before[chain] {
			b = fmt.Appendf(b, "-A %s %s\n", chain, line)
		}
	}
	for _, chain := range slices.Sorted(maps.Keys(after)) {
		if _, there := before[chain]; !there {
			b = fmt.Appendf(b, "-X %s\n", chain)
		}
	}
	return append(b, "COMMIT\n"...)
}

// hook makes the jump to chain the first rule of its built-in chain, since in
// the nat table the first rule that matches decides: a masquerading rule in
// front of ours would choose another source address.
func (tx *Tx) hook(ctx context.Context, chain rules.Chain) error {
	have := tx.tables[chain.Table]
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
