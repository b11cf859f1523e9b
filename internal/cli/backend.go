package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A backend selects, and combines, the ways to load rules into the kernel.
type backend struct {
	choice   config.Backend
	families []rules.Family
	log      *slog.Logger

	found *iptables.Backend // nil: not searched yet, or failed
	// The choice of auto, which a process keeps.
	chosen  config.Backend
	noGuard bool // the kernel does not support the source guard
	// The parts that the kernel does not support; nil: none.
	unsupported atomic.Pointer[[]rules.Part]
}

// readPatience is the time for iptables' programs to read the rules, and to load and
// read back a canary. The largest list takes a second.
const readPatience = 30 * time.Second

// rules reads the kernel's rules by the chosen backend.
func (b *backend) rules(ctx context.Context, plan rules.Plan) (router.Rules, error) {
	plan = b.supported(plan)
	switch cmp.Or(b.chosen, b.choice) {
	case config.NFTables:
		return b.nftables(ctx)
	case config.IPTables:
		return b.iptables(ctx, plan)
	}
	first, err := b.iptables(ctx, plan)
	if err == nil {
		b.chosen = config.IPTables
		return first, nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if _, failed := errors.AsType[*iptables.CanaryError](err); failed {
		return nil, err // its rules are loaded and work
	}
	next, nextErr := b.nftables(ctx)
	if nextErr != nil {
		// Joined, so that the hint of the first error is used.
		return nil, errors.Join(err, nextErr)
	}
	b.chosen = config.NFTables
	if _, missing := errors.AsType[*iptables.MissingError](err); missing {
		b.log.Debug("iptables missing, using nftables", "error", err)
	} else {
		b.log.Warn("iptables failed, using nftables", "error", err)
	}
	return next, nil
}

// supported returns the part of a plan that the kernel supports.
func (b *backend) supported(plan rules.Plan) rules.Plan {
	if parts := b.unsupported.Load(); parts != nil {
		return plan.WithoutParts(*parts)
	}
	return plan
}

func (b *backend) iptables(ctx context.Context, plan rules.Plan) (router.Rules, error) {
	if b.found == nil {
		found, err := iptables.Find(ctx, b.families...)
		if err != nil {
			return nil, err
		}
		b.found = found
	}
	// A program that hangs must not block the router.
	reading, cancel := context.WithTimeout(ctx, readPatience)
	defer cancel()
	tx, err := b.found.Begin(reading, plan)
	if err != nil {
		b.found = nil // the next attempt searches again
		return nil, err
	}
	return b.withGuard(ctx, tx)
}

// A limitsError means that the limits of destinations cannot be loaded.
type limitsError struct{ err error }

func (e *limitsError) Error() string { return fmt.Sprintf("load limits of destinations: %v", e.err) }

// Unwrap returns the cause.
func (e *limitsError) Unwrap() error { return e.err }

// Hint returns the remedy.
func (e *limitsError) Hint(names wording.Names) string {
	return wording.Textf("limits need nf_tables of Linux 5.10 or later with any backend: modprobe nft_limit nft_connlimit nft_nat on the node, or remove limit, burst and max from %s", wording.Destinations).In(names)
}

// guarded combines the rules of a backend with the source guard and the limits, which are
// always in nftables.
type guarded struct {
	backend *backend
	router.Rules
	guard    router.Rules // nil: the kernel has no nftables
	optional bool         // Rules work without the guard, as those of iptables do
}

func (b *backend) withGuard(ctx context.Context, first router.Rules) (router.Rules, error) {
	_, optional := first.(*iptables.Tx)
	if b.noGuard {
		return &guarded{b, first, nil, optional}, nil
	}
	guard, err := nft.BeginGuard(ctx, b.families...)
	if _, missing := errors.AsType[*nft.KernelError](err); missing {
		b.noGuard = true
		return &guarded{b, first, nil, optional}, nil
	}
	if err != nil {
		return nil, err
	}
	return &guarded{b, first, guard, optional}, nil
}

// isIPTables returns the rules as iptables', if they are.
func isIPTables(r router.Rules) (*iptables.Tx, bool) {
	g, ok := r.(*guarded)
	if !ok {
		return nil, false
	}
	tx, ok := g.Rules.(*iptables.Tx)
	return tx, ok
}

// Notes adds a note if there is no source guard or no MSS clamp.
func (g *guarded) Notes() []string {
	notes := g.Rules.Notes()
	if g.guard == nil {
		notes = append(notes, "no source guard, the kernel lacks nf_tables: while the SNAT rule is missing, new connections leave with another source")
	}
	if parts := g.backend.unsupported.Load(); parts != nil && slices.Contains(*parts, rules.MSSClampPart) {
		notes = append(notes, "no MSS clamp, the kernel refuses its rule: large transfers hang if ICMP is filtered on their path")
	}
	return notes
}

// Differs returns the differences of both from the plan.
func (g *guarded) Differs(plan rules.Plan) []string {
	plan = g.backend.supported(plan)
	differs := g.Rules.Differs(plan)
	if g.guard != nil {
		differs = append(differs, g.guard.Differs(plan)...)
	}
	return differs
}

// Apply loads the plan, or, if the kernel refuses it twice, the plan without a part whose
// rules need modules of their own. If the kernel refuses the plan without all of them, too,
// none is to blame.
func (g *guarded) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	plan = g.backend.supported(plan)
	undo, err = g.apply(ctx, plan)
	_, refused := errors.AsType[*nft.LoadError](err)
	if err == nil || ctx.Err() != nil || errors.Is(err, os.ErrPermission) || !refused && !iptables.IsUnsupported(err) {
		return undo, err
	}
	parts := g.dispensable(plan)
	if len(parts) == 0 {
		return undo, err
	}
	// The first one repeats the whole plan: the cause may have passed.
	for _, without := range [][]rules.Part{nil, parts} {
		if undo != nil && undo() != nil {
			return undo, err
		}
		var again error
		if undo, again = g.apply(ctx, plan.WithoutParts(without)); again != nil {
			continue
		}
		if len(without) > 1 {
			if undo, without, again = g.add(ctx, plan, without, undo); again != nil {
				return undo, again
			}
		}
		for _, part := range without {
			g.backend.log.Warn(notLoaded[part], "error", err)
		}
		if before := g.backend.unsupported.Load(); before != nil {
			without = slices.Concat(*before, without)
		}
		g.backend.unsupported.Store(&without)
		return undo, nil
	}
	return undo, err
}

// add replaces a plan that is loaded without some parts by one that lacks a single part, if
// the kernel accepts one. It returns the rollback of both loads and the parts that are left
// out.
func (g *guarded) add(ctx context.Context, plan rules.Plan, without []rules.Part, undo func() error) (func() error, []rules.Part, error) {
	for _, part := range without {
		alone := []rules.Part{part}
		undoMore, err := g.apply(ctx, plan.WithoutParts(alone))
		both := func() error { return errors.Join(undoMore(), undo()) }
		switch {
		case err == nil:
			return both, alone, nil
		case undoMore != nil && undoMore() != nil:
			return both, nil, err
		case ctx.Err() != nil:
			return undo, nil, err
		}
	}
	return undo, without, nil
}

// dispensable returns the parts that may be left out of a plan. Instead of the MSS clamp,
// automatic choice leaves iptables, if the kernel has nf_tables.
func (g *guarded) dispensable(plan rules.Plan) []rules.Part {
	parts := plan.Parts()
	if _, ok := isIPTables(g); ok && g.backend.choice == config.Auto && !g.backend.noGuard {
		parts = slices.DeleteFunc(parts, func(p rules.Part) bool { return p == rules.MSSClampPart })
	}
	return parts
}

// notLoaded are the log messages about parts that the kernel does not support.
var notLoaded = map[rules.Part]string{rules.DropLogPart: "drop log not loaded", rules.MSSClampPart: "MSS clamp not loaded"}

// apply loads the plan into both, the source guard first, since it only drops packets. The
// rules of iptables are loaded without a source guard if the kernel refuses that also
// without the drop log.
func (g *guarded) apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	if g.guard == nil {
		if len(plan.Limits) > 0 {
			return nil, &limitsError{errors.New("the kernel lacks nf_tables, or refused the source guard")}
		}
		return g.Rules.Apply(ctx, plan)
	}
	undoGuard, err := g.guard.Apply(ctx, plan)
	_, refused := errors.AsType[*nft.LoadError](err)
	if refused && len(plan.Limits) > 0 && !errors.Is(err, os.ErrPermission) {
		return undoGuard, &limitsError{err}
	}
	if g.optional && refused && undoGuard == nil && !errors.Is(err, os.ErrPermission) {
		smaller := plan.WithoutParts([]rules.Part{rules.DropLogPart})
		var again error
		switch undoGuard, again = g.guard.Apply(ctx, smaller); {
		case again != nil && undoGuard == nil:
			g.backend.log.Warn("source guard not loaded", "error", err)
			g.guard, g.backend.noGuard = nil, true
			return g.Rules.Apply(ctx, plan)
		case again == nil && smaller.Equal(plan): // the cause has passed
			err = nil
		}
	}
	if err != nil {
		return undoGuard, err
	}
	// Not named undo: the returned function would then call itself.
	undoRules, err := g.Rules.Apply(ctx, plan)
	if err != nil && undoRules == nil {
		return undoGuard, err
	}
	return func() error { return errors.Join(undoRules(), undoGuard()) }, err
}

// Drops returns the counters of both.
func (g *guarded) Drops(ctx context.Context, plan rules.Plan) (rules.Drops, error) {
	plan = g.backend.supported(plan)
	var drops rules.Drops
	var err error
	if tx, ok := isIPTables(g); ok && tx.Flavour() == iptables.NFTables {
		drops, err = nft.IPTablesDrops(g.backend.families, plan)
	} else {
		drops, err = g.Rules.Drops(ctx, plan)
	}
	if err != nil || g.guard == nil {
		return drops, err
	}
	guarded, err := g.guard.Drops(ctx, plan)
	maps.Copy(drops, guarded)
	return drops, err
}

func (b *backend) nftables(ctx context.Context) (router.Rules, error) {
	tx, err := nft.Begin(ctx, b.families...)
	if err != nil {
		return nil, err
	}
	return b.withGuard(ctx, tx)
}

// strays returns the rules of earlier runs with other backends than the one in use; without
// one, all rules. The last one may lack a rollback.
func (b *backend) strays(ctx context.Context, inUse router.Rules) ([]router.Stray, error) {
	var found []router.Stray
	var flavour iptables.Flavour
	if tx, ok := isIPTables(inUse); ok {
		flavour = tx.Flavour()
	}
	var failed error
	if flavour != iptables.Legacy {
		stray, err := iptables.FindStray(ctx, b.families)
		if stray != nil {
			found = append(found, stray)
		}
		failed = err
	}
	find := nft.FindAll
	if inUse != nil {
		find = func(families []rules.Family) (*nft.Stray, error) {
			return nft.FindStrays(families, flavour != "", flavour != iptables.NFTables)
		}
	}
	stray, err := find(b.families)
	if stray != nil {
		found = append(found, stray)
	}
	return found, errors.Join(failed, err)
}

// next returns the backend that replaces one that could not load the rules; nil:
// none. A kernel may have the tables of iptables and lack the modules of its rules,
// which only shows on loading.
func (b *backend) next(ctx context.Context, failed router.Rules, why error) (router.Rules, error) {
	if _, ok := isIPTables(failed); !ok || b.choice != config.Auto {
		return nil, nil
	}
	b.chosen = config.NFTables
	b.log.Warn("iptables load failed, using nftables", "backend", failed.String(), "error", why)
	return b.nftables(ctx)
}
