package iptables

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/egress-router/egress-router/rules"
)

// A spelling is how the iptables in use prints the router's rules of one family,
// as far as it prints them in another form than iptables-restore was given. It
// belongs to the process, and is empty with a version that prints the same form.
type spelling struct {
	plan  rules.Plan // plan whose printed form is known
	loads int        // since the rules were last found as planned

	mu     sync.Mutex // guards chains, which Drops reads at any time
	chains map[chainID]form
	jump   jumpForm
}

// A chainID names a chain of one family.
type chainID struct {
	table rules.Table
	name  string
}

// A form is one content of a chain in both forms. The printed one is a checksum:
// the text of ten thousand redirects has a megabyte.
type form struct {
	printed [sha256.Size]byte
	loaded  []byte // the input of iptables-restore, shared with the plan's text
}

// A jumpForm is the text before and after the chain's name in a rule that jumps to
// a chain and matches every packet, without "-A HOOK ".
type jumpForm struct{ before, after string }

// to returns the rule that jumps to a chain.
func (j jumpForm) to(chain string) string { return j.before + chain + j.after }

// loadedJump is the form in which jumps are loaded.
var loadedJump = jumpForm{before: "-j "}

// suspectLoads is the number of loads in a row, none of them found as planned
// afterwards, after which a known form is tested again: the package manager may
// have replaced the programs.
const suspectLoads = 3

// parse returns the state in the text of iptables-save, with each chain in known
// form as the text that was loaded.
func (s *spelling) parse(saved []byte) state { return s.allLoaded(parse(saved, s.jump)) }

// allLoaded returns a state with each chain in known form as the text that was loaded.
func (s *spelling) allLoaded(found state) state {
	for table, c := range found {
		for chain, text := range c.chains {
			c.chains[chain] = s.loaded(chainID{table, chain}, text)
		}
	}
	return found
}

// loaded returns the rules of a chain as they were loaded, if text is their known
// form, otherwise text.
func (s *spelling) loaded(id chainID, text []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known, ok := s.chains[id]; ok && sha256.Sum256(text) == known.printed {
		return known.loaded
	}
	return text
}

// know replaces the known forms.
func (s *spelling) know(chains map[chainID]form, jump jumpForm) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.chains, s.jump = chains, jump
}

// share makes a known form refer to an equal text, since one copy is enough.
func (s *spelling) share(id chainID, text []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.chains[id]; bytes.Equal(known.loaded, text) {
		s.chains[id] = form{known.printed, text}
	}
}

// A CanaryError means that the scratch chains could not be loaded, read back or
// removed. The rules in the live chains work as before.
type CanaryError struct{ Err error }

func (e *CanaryError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *CanaryError) Unwrap() error { return e.Err }

// recognise makes the state independent of the form in which this iptables
// prints rules. A chain that is neither as planned nor as in the plan before may
// be the plan in an unknown form, which canary finds out.
//
// No form changes the number of rules: a chain with another number, as after most
// changes of the destinations, is not the plan, and its form is found out after a load.
func (f *familyTx) recognise(ctx context.Context, plan rules.Plan, chains, before []rules.TextChain) error {
	s, want, old := f.spelling, f.wanted(chains), f.wanted(before)
	same, unknown, differs := true, false, false
	for table, planned := range want {
		have := f.now.of(table)
		for chain, text := range planned.chains {
			switch found := have.chains[chain]; {
			case bytes.Equal(found, text):
				if len(text) == 0 {
					continue
				}
				have.chains[chain] = text // one copy is enough
				s.share(chainID{table, chain}, text)
			default:
				same = false
				if countRules(found) != countRules(text) {
					differs = true
				} else if !bytes.Equal(found, old.of(table).chains[chain]) {
					unknown = true
				}
			}
		}
		for chain := range planned.jumps {
			if len(have.jumps[chain]) == 0 {
				same, unknown = false, unknown || have.referenced[chain]
			}
		}
	}
	if unknown && !f.scratchInUse() && (!plan.Equal(s.plan) || s.loads >= suspectLoads) {
		if err := f.canary(ctx, want); err != nil {
			return &CanaryError{err}
		}
		same = !differs
	}
	if same {
		s.plan, s.loads = plan, 0
	}
	return nil
}

// countRules returns the number of rules in a text with a line each.
func countRules(text []byte) int { return bytes.Count(text, []byte("\n")) }

// scratchInUse reports whether rules of another program lead to a scratch chain, which
// then cannot be removed, and whose rules packets would meet.
func (f *familyTx) scratchInUse() bool {
	for _, c := range f.now {
		for chain := range c.referenced {
			if strings.HasPrefix(chain, rules.ScratchPrefix) {
				return true
			}
		}
	}
	return false
}

// canary finds out how this iptables prints the chains of want that exist with as
// many rules and another text. It loads the same rules into scratch chains, which
// nothing leads to, so that no packet meets them; reads them back; and removes them.
// Live chains stay as they are.
//
// A router that is killed meanwhile leaves scratch chains. They have names of the
// router's own (rules.OwnsChain), so that the next run removes them.
func (f *familyTx) canary(ctx context.Context, want state) error {
	scratch, unknown := make(state), make(map[chainID][]byte)
	for table, planned := range want {
		c := newContents()
		scratch[table] = c
		for chain, text := range planned.chains {
			name := rules.ScratchName(chain)
			c.chains[name] = nil // also if other chains lead to it
			have := f.now.of(table).chains[chain]
			if len(text) > 0 && !bytes.Equal(have, text) && countRules(have) == countRules(text) {
				c.chains[name], unknown[chainID{table, chain}] = toScratch(text), text
			}
		}
	}
	table := tablesOf(scratch, nil)[0]
	jumpTo := slices.Sorted(maps.Keys(scratch[table].chains))[0]
	scratch[table].chains[rules.ScratchJumps] = fmt.Appendf(nil, "-A %s %s\n", rules.ScratchJumps, loadedJump.to(jumpTo))
	saved, err := f.readBack(ctx, scratch)
	if err != nil {
		return fmt.Errorf("reading back rules from scratch chains: %w", err)
	}
	found := parse(saved, jumpForm{})
	// printed returns the rules of a scratch chain in the form found.
	printed := func(table rules.Table, name string) ([]byte, error) {
		text := found.of(table).chains[name]
		if n, loaded := countRules(text), countRules(scratch[table].chains[name]); n != loaded {
			return nil, fmt.Errorf("reading back rules from scratch chain %s of table %s: %s prints %d of %d", name, table, f.program("save"), n, loaded)
		}
		return text, nil
	}
	chains := make(map[chainID]form)
	for id, known := range f.spelling.chains {
		if _, planned := want.of(id.table).chains[id.name]; planned {
			chains[id] = known
		}
	}
	for id, text := range unknown {
		lines, err := printed(id.table, rules.ScratchName(id.name))
		if err != nil {
			return err
		}
		chains[id] = form{sha256.Sum256(fromScratch(lines)), text}
	}
	line, err := printed(table, rules.ScratchJumps)
	if err != nil {
		return err
	}
	_, jump := cutChain(line)
	before, after, _ := strings.Cut(string(jump), jumpTo)
	f.spelling.know(chains, jumpForm{before, after})
	f.now = f.spelling.parse(saved)
	for table, c := range scratch {
		maps.DeleteFunc(f.now.of(table).chains, func(chain string, _ []byte) bool { _, removed := c.chains[chain]; return removed })
	}
	return nil
}

// toScratch returns rules with the names of scratch chains.
func toScratch(text []byte) []byte {
	for _, option := range []string{"-A ", "-j ", "-g "} {
		text = bytes.ReplaceAll(text, []byte(option+rules.ChainPrefix), []byte(option+rules.ScratchPrefix))
	}
	return text
}

// fromScratch returns rules of scratch chains with the names of the chains that
// they represent, in any form of the rules.
func fromScratch(text []byte) []byte {
	return bytes.ReplaceAll(text, []byte(rules.ScratchPrefix), []byte(rules.ChainPrefix))
}

// readBack loads scratch chains, returns what iptables-save prints then, and
// removes them, also after a failure.
func (f *familyTx) readBack(ctx context.Context, scratch state) (saved []byte, err error) {
	var remove []byte
	for _, table := range tablesOf(scratch, nil) {
		remove = fmt.Appendf(remove, "*%s\n", table)
		chains := slices.Sorted(maps.Keys(scratch[table].chains))
		for _, chain := range chains {
			// Without rules, and also if the load has failed.
			remove = fmt.Appendf(remove, ":%s - [0:0]\n", chain)
		}
		for _, chain := range chains {
			remove = fmt.Appendf(remove, "-X %s\n", chain)
		}
		remove = append(remove, "COMMIT\n"...)
	}
	if err = f.restore(ctx, state(nil).script(scratch))(); err == nil {
		saved, _, err = f.backend.start(ctx, nil, f.program("save"))()
	}
	var removal error
	for range tries {
		// After a failure, such as a lock that is held, or a signal, one try is enough:
		// the next run removes what remains.
		if removal = f.restore(ctx, remove)(); removal == nil || err != nil || ctx.Err() != nil {
			break
		}
	}
	return saved, errors.Join(err, removal)
}
