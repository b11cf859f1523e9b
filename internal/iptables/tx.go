package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Tx changes the rules of one network namespace. It knows what the kernel
// held when it began and after each change of its own.
type Tx struct {
	backend  *Backend
	families []*familyTx // that the kernel has, IPv4 first
}

// A familyTx is the part of a Tx that is about one family, which has programs
// and tables of its own.
type familyTx struct {
	backend *Backend
	family  rules.Family
	now     state
	notes   []string
}

// text returns the chains of a plan as text.
func (b *Backend) text(plan rules.Plan) []rules.TextChain {
	if !plan.Equal(b.plan) {
		b.plan, b.chains = plan, plan.IPTables()
	}
	return b.chains
}

// wanted returns the state in which the kernel holds the chains of one family
// that are in chains: each as planned, the jump to it once and in front, since
// in the nat table the first rule that matches decides and a masquerading rule
// in front of ours would choose another source address. Other chains of ours
// are gone, or empty where a rule of somebody else leads to them.
func (f *familyTx) wanted(chains []rules.TextChain) state {
	want := make(state)
	for _, chain := range chains {
		if chain.Family != f.family {
			continue
		}
		if want[chain.Table] == nil {
			want[chain.Table] = newContents()
		}
		want[chain.Table].chains[chain.Name] = chain.Saved
		if chain.Hook != "" {
			want[chain.Table].jumps[chain.Name] = []int{1}
		}
	}
	for table, have := range f.now {
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

// RestoreInput returns the iptables-restore input for plan in a namespace that
// has nothing of ours yet, or that of ip6tables-restore.
func RestoreInput(plan rules.Plan, family rules.Family) []byte {
	nothing := familyTx{family: family}
	return nothing.now.script(nothing.wanted(plan.IPTables()))
}

// String names the program that the rules go in by: its version and flavour.
func (tx *Tx) String() string { return tx.backend.version }

// Differs says, one line each, where the kernel is not as plan wants it.
func (tx *Tx) Differs(plan rules.Plan) []string {
	var found []string
	for _, f := range tx.families {
		for _, line := range f.now.differences(f.wanted(tx.backend.text(plan))) {
			if f.family != rules.IPv4 {
				line = f.family.String() + ": " + line
			}
			found = append(found, line)
		}
	}
	return found
}

// Redirects reports whether the kernel holds redirects of ours.
func (tx *Tx) Redirects() bool {
	for _, f := range tx.families {
		for _, c := range f.now {
			for _, text := range c.chains {
				if bytes.Contains(text, []byte(" -j "+rules.DNAT+" ")) {
					return true
				}
			}
		}
	}
	return false
}

// tries is how often a change is worked out anew because another program
// changed the same tables between reading and writing them.
const tries = 3

// Apply makes the kernel hold plan, and does nothing where it does already. It
// returns the way back to what was there before this call; with an error, where
// not all is as it was.
//
// Chains and jumps go in together, by one restore for each family: go-iptables,
// whose calls change one rule each, would leave moments in which a chain is
// reached and not complete, and takes a process for every jump.
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	before := make(map[*familyTx]state)
	for _, f := range tx.families {
		before[f] = f.now
	}
	// The way back is taken also when ctx has ended.
	undo = func() error {
		return become(context.WithoutCancel(ctx), tx.families, func(f *familyTx) state { return before[f] }, 1)
	}
	chains := tx.backend.text(plan)
	if err := become(ctx, tx.families, func(f *familyTx) state { return f.wanted(chains) }, 1); err != nil {
		for _, f := range tx.families {
			if len(f.now.script(before[f])) > 0 {
				return undo, err
			}
		}
		return nil, err
	}
	return undo, nil
}

// become makes the kernel hold what want returns for each family, at the same
// time.
func become(ctx context.Context, families []*familyTx, want func(*familyTx) state, try int) error {
	var waits []func() error
	for _, f := range families {
		waits = append(waits, f.load(ctx, want(f)))
	}
	var failed []error
	for i, f := range families {
		err := waits[i]()
		if err == nil {
			continue
		}
		// The kernel says what holds now: some tables may have been changed,
		// by the restore or by somebody else.
		known := f.now
		if again := f.read(context.WithoutCancel(ctx))(); again != nil {
			err = errors.Join(err, again)
		} else if try < tries && len(known.script(f.now)) > 0 {
			err = become(ctx, []*familyTx{f}, want, try+1)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// load begins to make the kernel hold target. What it returns waits for that.
func (f *familyTx) load(ctx context.Context, target state) (wait func() error) {
	input := f.now.script(target)
	if len(input) == 0 {
		return func() error { return nil }
	}
	if err := ctx.Err(); err != nil {
		return func() error { return err }
	}
	// Once started it is not interrupted: killed, it would leave open whether
	// the kernel has taken its input.
	finish := f.backend.start(context.WithoutCancel(ctx), input, f.program("restore"), "--noflush", "-w", fmt.Sprint(lockSeconds))
	return func() error {
		if _, _, err := finish(); err != nil {
			return fmt.Errorf("loading rules: %w", err)
		}
		f.now = target
		return nil
	}
}

// program returns the name of one of the family's programs.
func (f *familyTx) program(what string) string { return f.backend.program(f.family, what) }

// read begins to take the state from the kernel. What it returns waits for that.
func (f *familyTx) read(ctx context.Context) (wait func() error) {
	finish := f.backend.start(ctx, nil, f.program("save"))
	return func() error {
		saved, printed, err := finish()
		if err != nil {
			return fmt.Errorf("reading the rules: %w", err)
		}
		f.now, f.notes = parse(saved), notes(printed)
		return nil
	}
}

// notes returns what iptables-save warns of.
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
func (tx *Tx) Notes() []string {
	var all []string
	for _, f := range tx.families {
		all = append(all, f.notes...)
	}
	return all
}
