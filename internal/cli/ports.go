package cli

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/health"
)

const (
	// fewPorts is the part of the ports of a reserved address towards one server, in
	// percent, from which on they are few: when all are in use, new connections fail.
	fewPorts = 80
	// portsInterval is the time between two looks at them, besides those for metrics.
	portsInterval = time.Minute
)

// A portWatch warns of reserved addresses with few ports left.
type portWatch struct {
	log *slog.Logger

	mu    sync.Mutex
	few   map[conntrack.Ports]int // ports in use, by address and server
	since time.Time
}

// check logs the addresses that have few ports left since the last report.
func (w *portWatch) check(ports []conntrack.Ports) {
	w.mu.Lock()
	defer w.mu.Unlock()
	few := make(map[conntrack.Ports]int)
	for _, p := range ports {
		n := p.InUse
		if n*100 < fewPorts*conntrack.PortLimit {
			continue
		}
		p.InUse = 0
		if few[p] = n; w.few[p] == 0 {
			w.log.Warn("source ports nearly used up", "source", p.Reserved.String(), "protocol", p.Protocol.String(), "destination", p.Server.String(),
				"ports", n, "limit", conntrack.PortLimit, "hint", "add addresses to EGRESS_SOURCE (with EGRESS_GRAMMAR=extended), or let clients keep connections open")
		}
	}
	if (len(few) > 0) != (len(w.few) > 0) {
		w.since = time.Now()
	}
	w.few = few
}

// report adds a check, if an address has few ports left.
func (w *portWatch) report(r *health.Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var parts []string
	var fault diagnose.Fault
	for p, n := range w.few {
		if diagnose.Exhausted(n, conntrack.PortLimit) {
			fault = diagnose.PortsExhausted
		}
		parts = append(parts, fmt.Sprintf("%s uses %d of %d ports to %s %s", p.Reserved, n, conntrack.PortLimit, p.Protocol, p.Server))
	}
	if len(parts) == 0 {
		return
	}
	detail := parts[0]
	if more := len(parts) - 1; more > 0 {
		detail += fmt.Sprintf(", and %d more", more)
	}
	r.Checks = append(r.Checks, health.Check{Name: "ports", State: health.Warning, Since: w.since, Detail: detail, Fault: string(fault)})
}

// watchPorts looks at the ports in use until ctx ends.
func (w *watch) watchPorts(ctx context.Context, t *conntrack.Tracker) {
	ticker := time.NewTicker(portsInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if report, err := t.Counts(); err == nil { // an error is logged with the metrics
				w.ports.check(report.Ports)
			}
		}
	}
}
