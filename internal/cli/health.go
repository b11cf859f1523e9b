package cli

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/health"
)

// errNotReady makes health exit with 1 after it has printed the reports.
var errNotReady = errors.New("not ready")

// asksHealthJSON reports whether the arguments are those for JSON: health -o json.
func asksHealthJSON(args []string) bool { return slices.Equal(args, []string{"health", "-o", "json"}) }

// runHealth prints the health of the programs that run in this container or network
// namespace, for a person or an exec probe. It returns an error if none runs, if one
// that runs does not answer, or if one is not ready.
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
