package cli

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/health"
)

// errNotReady is why health exits with 1 although it has said everything.
var errNotReady = errors.New("not ready")

// asksHealthJSON reports whether health is to print JSON. It is the one command
// with an option.
func asksHealthJSON(args []string) bool { return slices.Equal(args, []string{"health", "-o", "json"}) }

// runHealth asks the programs that run here how they are, for a person or an
// exec probe. It is an error if none answers, or one that is there does not, or
// one is not ready.
func runHealth(ctx context.Context, p Process) error {
	reports, err := health.Ask(ctx)
	var written error
	switch {
	case len(reports) == 0:
	case asksHealthJSON(p.Args):
		written = health.WriteJSON(p.Stdout, reports)
	default:
		written = health.WriteTable(p.Stdout, reports, time.Now())
	}
	if err = errors.Join(err, written); err != nil {
		return err
	}
	if slices.ContainsFunc(reports, func(r health.Report) bool { return !r.Ready }) {
		return errNotReady
	}
	return nil
}
