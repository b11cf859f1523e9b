package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Tx changes the rules of one network namespace. Its state is that of the kernel
// when it began, and after each change of its own.
type Tx struct {
	backend  *Backend
	families []*familyTx // families of the kernel, IPv4 first
}

// A familyTx is the part of a Tx for one family, which has its own programs and
// tables.
type familyTx struct {
	backend  *Backend
	family   rules.Family
	spelling *spelling // spelling of the backend
	now      state
	notes    []string
}

// text returns the chains of a plan as text.
func (b *Backend) text(plan rules.Plan) []rules.TextChain {
	if plan.Equal(b.plan) {
		return b.chains
	}
	return plan.IPTables()
}

// wanted returns the planned state of one family: each chain with its rules, and
// one jump to it, the first rule of its hook. In the nat table the first rule that
// matches decides: a masquerading rule in front would choose another source
// address. Other chains of the router are removed, or emptied if a rule of another
// program leads to them.
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

// RestoreInput returns the input of iptables-restore, or of ip6tables-restore, for
// plan in a namespace without rules of the router.
func RestoreInput(plan rules.Plan, family rules.Family) []byte {
	nothing := familyTx{family: family}
	return nothing.now.script(nothing.wanted(plan.IPTables()))
}

// String returns the version and flavour of the programs.
func (tx *Tx) String() string { return tx.backend.version }

// Differs returns the differences between the kernel and plan, a line each.
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

// Redirects reports whether the kernel has redirects of the router, in any printed
// form.
func (tx *Tx) Redirects() bool {
	for _, f := range tx.families {
		for _, text := range f.now.of(rules.NAT).chains {
			if bytes.Contains(text, []byte(" "+rules.DNAT+" ")) {
				return true
			}
		}
	}
	return false
}

// Named returns the addresses of the redirects to names, by name. An address may be there
// several times.
func (tx *Tx) Named() map[string][]netip.Addr {
	named := make(map[string][]netip.Addr)
	for _, f := range tx.families {
		for _, text := range f.now.of(rules.NAT).chains {
			for line := range bytes.Lines(text) {
				name, to := valueOf(line, " --comment "), valueOf(line, " --to-destination ")
				name = strings.Trim(name, `"`)
				if a, err := netip.ParseAddr(hostOf(to)); err == nil && name != "" {
					named[name] = append(named[name], a)
				}
			}
		}
	}
	return named
}

// Sources returns the reserved addresses of the rules: those for which the pod answers
// echo requests, in any mode.
func (tx *Tx) Sources() []netip.Addr {
	var found []netip.Addr
	for _, f := range tx.families {
		for line := range bytes.Lines(f.now.of(rules.Filter).chains[chainOf(rules.Input)]) {
			if p, err := netip.ParsePrefix(valueOf(line, " -d ")); err == nil && p.IsSingleIP() && !slices.Contains(found, p.Addr()) {
				found = append(found, p.Addr())
			}
		}
	}
	return found
}

// valueOf returns the word behind an option in a rule, empty if the rule does not have it.
func valueOf(rule []byte, option string) string {
	_, value, _ := bytes.Cut(rule, []byte(option))
	value, _, _ = bytes.Cut(bytes.TrimSpace(value), []byte(" "))
	return string(value)
}

// hostOf returns the address of a destination, which may have ports: those of IPv6 stand
// behind an address in brackets.
func hostOf(destination string) string {
	if rest, six := strings.CutPrefix(destination, "["); six {
		destination, _, _ = strings.Cut(rest, "]")
	} else if strings.Count(destination, ":") == 1 {
		destination, _, _ = strings.Cut(destination, ":")
	}
	return destination
}

// tries is the number of attempts at a change that fails because another program
// changes the same tables at the same time.
const tries = 3

// Apply changes the kernel's rules into those of plan; equal rules stay. It returns
// the rollback to the rules before this call. With an error the rollback is nil if
// the rules are as before. An invalid plan is an error ([rules.Plan.Validate]).
//
// One restore for each family loads chains and jumps together. go-iptables changes
// one rule a call: a chain would be reached before it is complete, and every jump
// would take a process.
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	if err := plan.Validate(); err != nil {
		return nil, err
	}
	before := make(map[*familyTx]state)
	for _, f := range tx.families {
		before[f] = f.now
	}
	// The rollback runs also after the end of ctx.
	undo = func() error {
		return become(context.WithoutCancel(ctx), tx.families, func(f *familyTx) state { return before[f] }, 1)
	}
	chains := tx.backend.text(plan)
	if err := become(ctx, tx.families, func(f *familyTx) state { return f.wanted(chains) }, 1); err != nil {
		for _, f := range tx.families {
			if _, named := errors.AsType[*rules.HelperError](err); !named && f.wanted(chains)[rules.Raw] != nil {
				err = f.missingHelper(ctx, plan.HelpersOf(f.family), err)
			}
		}
		for _, f := range tx.families {
			if len(f.now.script(before[f])) > 0 {
				return undo, err
			}
		}
		return nil, err
	}
	return undo, nil
}

// become changes the rules of each family into the state that want returns, all
// families at the same time.
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
		// The restore, or another program, may have changed some tables.
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

// load starts to change the rules into target. The returned function waits for
// the end.
func (f *familyTx) load(ctx context.Context, target state) (wait func() error) {
	input := f.now.script(target)
	if len(input) == 0 {
		return func() error { return nil }
	}
	if err := ctx.Err(); err != nil {
		return func() error { return err }
	}
	finish := f.restore(ctx, input)
	return func() error {
		if err := finish(); err != nil {
			return fmt.Errorf("loading rules: %w", err)
		}
		f.now = target
		f.spelling.loads++
		return nil
	}
}

// restore starts iptables-restore with the given input. The returned function
// waits for its end. The end of ctx does not interrupt it: whether the kernel has
// taken the input of a killed program is unknown.
func (f *familyTx) restore(ctx context.Context, input []byte) (wait func() error) {
	finish := f.backend.start(context.WithoutCancel(ctx), input, f.program("restore"), "--noflush", "-w", fmt.Sprint(lockSeconds))
	return func() error {
		_, _, err := finish()
		return err
	}
}

// missingHelper returns the error of a load with helpers: a *rules.HelperError if the
// kernel lacks one of them, which a load into a scratch chain shows.
func (f *familyTx) missingHelper(ctx context.Context, helpers []rules.Helper, err error) error {
	works := func(rule string) bool {
		chain := rules.ScratchName(chainOf(rules.Prerouting))
		input := fmt.Appendf(nil, "*%s\n:%s - [0:0]\n", rules.Raw, chain)
		if rule != "" {
			input = fmt.Appendf(input, "-A %s %s\n-F %[1]s\n", chain, rule)
		}
		return f.restore(ctx, fmt.Appendf(input, "-X %s\nCOMMIT\n", chain))() == nil
	}
	for i, h := range helpers {
		if i == 0 && !works("") {
			return err // for another reason
		}
		if !works(fmt.Sprintf("-p %s -j CT --helper %s", h.Protocol, h.Name)) {
			return &rules.HelperError{Helper: h, Err: err}
		}
	}
	return err
}

// program returns the name of one of the family's programs.
func (f *familyTx) program(what string) string { return f.backend.program(f.family, what) }

// read starts to read the state from the kernel. The returned function waits for
// the end.
func (f *familyTx) read(ctx context.Context) (wait func() error) {
	// A file outside of this process's memory: a megabyte of text with thousands of redirects.
	saved, err := inMemory(f.program("save"), nil)
	if err != nil {
		return func() error { return err }
	}
	finish := f.backend.startTo(ctx, saved, nil, f.program("save"))
	return func() error {
		defer saved.Close()
		printed, err := finish()
		if err != nil {
			return fmt.Errorf("reading the rules: %w", err)
		}
		p := parser{found: make(state), jump: f.spelling.jump, planned: f.backend.planned[f.family]}
		if err := p.read(io.NewSectionReader(saved, 0, math.MaxInt64)); err != nil {
			return fmt.Errorf("reading the output of %s: %w", f.program("save"), err)
		}
		f.now, f.notes = f.spelling.allLoaded(p.found), notes(printed)
		return nil
	}
}

// notes returns the warnings of iptables-save.
func notes(printed []byte) []string {
	var found []string
	for line := range strings.Lines(string(printed)) {
		if _, text, warning := strings.Cut(line, "Warning: "); warning {
			found = append(found, strings.TrimSpace(text))
		}
	}
	return found
}

// Notes returns the warnings of iptables-save about the rules that it read.
func (tx *Tx) Notes() []string {
	var all []string
	for _, f := range tx.families {
		all = append(all, f.notes...)
	}
	return all
}
