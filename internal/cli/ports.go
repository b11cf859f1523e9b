package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/config"
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
	log    *slog.Logger
	ranged int // see portLimit

	mu    sync.Mutex
	few   map[conntrack.Ports]int // ports in use, by address and server
	since time.Time
}

// rangedPorts returns the number of source ports of a router that shares those of an IPv4 address
// with others; zero: it has all.
func rangedPorts(c config.Config) int {
	if c.Standby == nil || c.Standby.Carry == nil || c.Standby.Carry.First == 0 {
		return 0
	}
	return int(c.Standby.Carry.Last-c.Standby.Carry.First) + 1
}

// portLimit returns the largest number of connections from a reserved address to one port of a
// server. ranged is that of IPv4 if the router shares the ports with others.
func portLimit(ranged int, reserved netip.Addr) int {
	if ranged != 0 && reserved.Is4() {
		return ranged
	}
	return conntrack.PortLimit
}

// check logs the addresses that have few ports left since the last report.
func (w *portWatch) check(ports []conntrack.Ports) {
	w.mu.Lock()
	defer w.mu.Unlock()
	few := make(map[conntrack.Ports]int)
	for _, p := range ports {
		n := p.InUse
		limit := portLimit(w.ranged, p.Reserved)
		if n*100 < fewPorts*limit {
			continue
		}
		p.InUse = 0
		if few[p] = n; w.few[p] == 0 {
			w.log.Warn("source ports nearly used up", "source", p.Reserved.String(), "protocol", p.Protocol.String(), "destination", p.Server.String(),
				"ports", n, "limit", limit, "hint", "add addresses to EGRESS_SOURCE (with EGRESS_GRAMMAR=extended), or let clients keep connections open")
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
		limit := portLimit(w.ranged, p.Reserved)
		if diagnose.Exhausted(n, limit) {
			fault = diagnose.PortsExhausted
		}
		parts = append(parts, fmt.Sprintf("%s uses %d of %d ports to %s %s", p.Reserved, n, limit, p.Protocol, p.Server))
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
