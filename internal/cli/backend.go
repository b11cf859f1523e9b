package cli

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// A backend brings the router together with the way in which its rules get into
// the kernel.
type backend struct {
	choice   config.Backend
	families []rules.Family
	log      *slog.Logger

	found *iptables.Backend // nil: not looked for yet, or not right
	// What auto has become, so that a process goes on with what it began with.
	settled config.Backend
	noLast  bool // the kernel cannot hold what is last
}

// readPatience is how long the programs of iptables may take to read the rules.
// The largest list takes a tenth of a second.
const readPatience = 30 * time.Second

// rules reads the kernel's rules by the backend of choice.
func (b *backend) rules(ctx context.Context, plan rules.Plan) (router.Rules, error) {
	switch cmp.Or(b.settled, b.choice) {
	case config.NFTables:
		return b.nftables(ctx)
	case config.IPTables:
		return b.iptables(ctx, plan)
	}
	first, err := b.iptables(ctx, plan)
	if err == nil {
		b.settled = config.IPTables
		return first, nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	next, nextErr := b.nftables(ctx)
	if nextErr != nil {
		// Not wrapped as one: what to do about the first is what can be done.
		return nil, errors.Join(err, nextErr)
	}
	b.settled = config.NFTables
	if _, missing := errors.AsType[*iptables.MissingError](err); missing {
		b.log.Debug("there is no iptables here: nftables takes its place", "error", err)
	} else {
		b.log.Warn("iptables does not work here: nftables takes its place", "error", err)
	}
	return next, nil
}

func (b *backend) iptables(ctx context.Context, plan rules.Plan) (router.Rules, error) {
	if b.found == nil {
		found, err := iptables.Find(ctx, b.families...)
		if err != nil {
			return nil, err
		}
		b.found = found
	}
	// Programs that hang would keep everything waiting.
	reading, cancel := context.WithTimeout(ctx, readPatience)
	defer cancel()
	tx, err := b.found.Begin(reading, plan)
	if err != nil {
		b.found = nil // the next attempt asks anew
		return nil, err
	}
	return b.withLast(ctx, tx)
}

// withLast are the rules of a backend and what is last, which is always
// nftables'.
type withLast struct {
	backend *backend
	router.Rules
	last *nft.Tx // nil: the kernel has no nftables
}

func (b *backend) withLast(ctx context.Context, first router.Rules) (router.Rules, error) {
	if b.noLast {
		return &withLast{b, first, nil}, nil
	}
	last, err := nft.BeginLast(ctx, b.families...)
	if _, missing := errors.AsType[*nft.KernelError](err); missing {
		b.noLast = true
		return &withLast{b, first, nil}, nil
	}
	if err != nil {
		return nil, err
	}
	return &withLast{b, first, last}, nil
}

// isIPTables returns the rules as those of iptables, if they are.
func isIPTables(r router.Rules) (*iptables.Tx, bool) {
	w, ok := r.(*withLast)
	if !ok {
		return nil, false
	}
	tx, ok := w.Rules.(*iptables.Tx)
	return tx, ok
}

// Notes adds what is missing.
func (w *withLast) Notes() []string {
	if w.last == nil {
		return append(w.Rules.Notes(), "the kernel lacks nf_tables: nothing stops the first packets of connections while somebody has deleted the rule that sets their source")
	}
	return w.Rules.Notes()
}

// Differs says where either is not as planned.
func (w *withLast) Differs(plan rules.Plan) []string {
	differs := w.Rules.Differs(plan)
	if w.last != nil {
		differs = append(differs, w.last.Differs(plan)...)
	}
	return differs
}

// Apply makes both as planned, first those that only take packets away.
func (w *withLast) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	if w.last == nil {
		return w.Rules.Apply(ctx, plan)
	}
	undoLast, err := w.last.Apply(ctx, plan)
	_, refused := errors.AsType[*nft.LoadError](err)
	if _, without := isIPTables(w); without && refused && undoLast == nil && !errors.Is(err, os.ErrPermission) {
		w.backend.log.Warn("the kernel does not take the rules behind those of iptables, which works without", "error", err)
		w.last, w.backend.noLast = nil, true
		return w.Rules.Apply(ctx, plan)
	}
	if err != nil {
		return undoLast, err
	}
	// Not undo itself: what is returned would be what it calls.
	undoFirst, err := w.Rules.Apply(ctx, plan)
	if err != nil && undoFirst == nil {
		return undoLast, err
	}
	return func() error { return errors.Join(undoFirst(), undoLast()) }, err
}

func (b *backend) nftables(ctx context.Context) (router.Rules, error) {
	tx, err := nft.Begin(ctx, b.families...)
	if err != nil {
		return nil, err
	}
	return b.withLast(ctx, tx)
}

// strays finds what earlier runs loaded with others than the backend in use. The
// one without a way back is the last.
func (b *backend) strays(ctx context.Context, inUse router.Rules) ([]router.Stray, error) {
	var found []router.Stray
	var flavour iptables.Flavour
	if tx, ok := isIPTables(inUse); ok {
		flavour = tx.Flavour()
	}
	if flavour != iptables.Legacy {
		stray, err := iptables.FindStray(ctx, b.families)
		if err != nil {
			return nil, err
		}
		if stray != nil {
			found = append(found, stray)
		}
	}
	stray, err := nft.FindStrays(b.families, flavour != "", flavour != iptables.NFTables)
	if err != nil {
		return nil, err
	}
	if stray != nil {
		found = append(found, stray)
	}
	return found, nil
}

// next returns the backend that takes the place of one that could not load the
// rules, nil where none does. A kernel may have the tables of iptables and lack
// what its rules need, which is known only when it is asked to take them.
func (b *backend) next(ctx context.Context, failed router.Rules, why error) (router.Rules, error) {
	if _, ok := isIPTables(failed); !ok || b.choice != config.Auto {
		return nil, nil
	}
	b.settled = config.NFTables
	b.log.Warn("iptables cannot load the rules: nftables takes its place", "backend", failed.String(), "error", why)
	return b.nftables(ctx)
}
