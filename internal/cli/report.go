package cli

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/metrics"
)

// A reporter is a program that says how it is, as long as it runs.
type reporter struct {
	program string // as in package health
	mode    string
	listen  netip.AddrPort // where it is asked by HTTP; port 0: nowhere

	// report fills in whether the program is ready, and its checks.
	report func(*health.Report)
	alive  func() error // why it is stuck; nil: it is not as long as it answers

	table   []metrics.Metric
	collect func(metrics.Emit, health.Report)
}

// start lets the program be asked until the function that it returns is called.
// When ctx ends, the program has been told to stop, and is no longer ready.
func (r reporter) start(ctx context.Context, log *slog.Logger) (stop func(), err error) {
	started := time.Now()
	report := func() health.Report {
		h := health.Report{Program: r.program, Version: programVersion(), Mode: r.mode, Started: started}
		r.report(&h)
		if ctx.Err() != nil {
			h.Reasons = append([]string{"shutting down"}, h.Reasons...)
		}
		h.Ready = len(h.Reasons) == 0
		return h
	}
	serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	wait := func() {}
	if r.listen.Port() != 0 {
		if wait, err = r.serve(serving, report, log); err != nil {
			cancel()
			return nil, err
		}
	}
	waitSocket := health.Serve(serving, r.program, report, log)
	return func() {
		cancel()
		wait()
		waitSocket()
	}, nil
}

// serve lets the program be asked by HTTP.
func (r reporter) serve(ctx context.Context, report func() health.Report, log *slog.Logger) (wait func(), err error) {
	page, err := metrics.Handler(r.table, func(emit metrics.Emit) { r.collect(emit, report()) }, log)
	if err != nil {
		return nil, err
	}
	return health.Listen(ctx, r.listen, health.Handler(report, r.alive, page), log)
}

// oneIf returns what a metric has for yes and no.
func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
