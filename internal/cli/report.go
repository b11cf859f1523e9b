package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/logqueue"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/page"
)

// A reporter serves the health and metrics of a running program.
type reporter struct {
	program string // name in package health
	mode    string
	listen  netip.AddrPort // address for HTTP; port 0: none
	logs    *logqueue.Writer

	// report adds the program's checks, and the reasons why it is not ready.
	report func(*health.Report)
	alive  func() error // returns an error if it is stuck; nil: it never is

	table   []metrics.Metric
	collect func(metrics.Emit, health.Report)

	events *page.Events
	show   func(*page.Page, page.Query) // adds the program's parts to the page
}

// start serves requests until the returned function is called. The program is not
// ready after ctx ends.
func (r reporter) start(ctx context.Context, log *slog.Logger) (stop func(), err error) {
	started := time.Now()
	report := func() health.Report {
		h := health.Report{Program: r.program, Version: programVersion(), Mode: r.mode, Started: started}
		r.report(&h)
		r.reportLog(&h)
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

// serve serves HTTP requests.
func (r reporter) serve(ctx context.Context, report func() health.Report, log *slog.Logger) (wait func(), err error) {
	numbers, err := metrics.Handler(r.table, func(emit metrics.Emit) { r.emit(emit, report()) }, log)
	if err != nil {
		return nil, err
	}
	others := map[string]http.Handler{"/": page.Handler(r.page(report)), "/metrics": numbers}
	return health.Listen(ctx, r.listen, health.Handler(report, r.alive, others), log)
}

// page returns the page for a query.
func (r reporter) page(report func() health.Report) func(page.Query) page.Page {
	host, _ := os.Hostname() // the name of the pod, without which the page is complete
	return func(q page.Query) page.Page {
		p := page.Page{Report: report(), Host: host, Advice: advice, Events: r.events.All(), Now: time.Now()}
		r.show(&p, q)
		return p
	}
}

// emit exports the program's metrics, and those that all programs have.
func (r reporter) emit(emit metrics.Emit, h health.Report) {
	r.collect(emit, h)
	lines, _, _ := r.logs.Dropped()
	emit("egress_"+strings.ReplaceAll(r.program, "-", "_")+"_log_lines_dropped_total", float64(lines))
}

// reportLog adds a check of the log if lines were dropped.
func (r reporter) reportLog(h *health.Report) {
	lines, losing, changed := r.logs.Dropped()
	if lines == 0 {
		return
	}
	c := health.Check{Name: "log", State: health.OK, Since: changed, Detail: fmt.Sprintf("%d lines dropped", lines)}
	if losing {
		c.State, c.Detail = health.Warning, c.Detail+", the reader of the log does not read"
	}
	h.Checks = append(h.Checks, c)
}

// oneIf returns the metric value of a condition.
func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
