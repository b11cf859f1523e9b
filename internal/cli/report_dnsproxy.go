package cli

import (
	"fmt"
	"strconv"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/tcpproxy"
)

// listCheck is the name of the destination list's check.
const listCheck = "destinations"

// setListOK sets the check of the list to OK: the list is in effect.
func (d *dnsProxy) setListOK() {
	from := "EGRESS_DNS_PROXY_DESTINATION"
	if d.env.DestinationFile != "" {
		from = d.env.DestinationFile
	}
	d.board.Set(listCheck, health.OK, fmt.Sprintf("%d from %s", len(d.list), from))
}

func (d *dnsProxy) reporter(p Process, c config.DNSProxyConfig) reporter {
	return reporter{
		program: health.DNSProxy, listen: c.Health, logs: p.logs,
		report:  d.report,
		table:   metrics.DNSProxy,
		collect: d.collect,
		events:  p.events,
		show:    d.show,
	}
}

// report adds the proxy's checks to a report. The proxy is ready when it listens on
// the ports of the list with which it started. A fault of a later list or of a name
// server affects only its check, since the other destinations work.
func (d *dnsProxy) report(r *health.Report) {
	if !d.listening.Load() {
		r.Reasons = append(r.Reasons, "not listening yet")
	}
	r.Checks = append(r.Checks, d.board.Checks()...)
	r.Checks = append(r.Checks, health.Check{Name: "connections", State: health.OK, Since: r.Started, Detail: fmt.Sprintf("%d open", d.proxy.Open())})
	for _, s := range d.proxy.Status() {
		r.Checks = append(r.Checks, portCheck(s))
	}
}

// portCheck returns the check of one destination.
func portCheck(s tcpproxy.Status) health.Check {
	c := health.Check{Name: fmt.Sprintf("port %d", s.Destination.Port), Since: s.Since}
	switch {
	case s.Err != nil:
		c.State = health.Failed
	case s.Condition != tcpproxy.Usable:
		c.State = health.Warning // a restart does not help
	}
	count := fmt.Sprintf("%d addresses", s.Addresses)
	if s.Addresses == 1 {
		count = "1 address"
	}
	switch {
	case s.Err != nil:
		count = "not listening: " + s.Err.Error()
	case s.Addresses == 0 && s.LookupErr != nil:
		count = "no address: " + s.LookupErr.Error()
	case s.Addresses == 0 && s.Looked:
		count = "no address"
	case s.Addresses == 0:
		count = "not looked up yet"
	case s.Aside > 0:
		count += fmt.Sprintf(", %d unreachable", s.Aside)
	}
	if s.Addresses > 0 && s.LookupErr != nil {
		count += ", lookup failed: " + s.LookupErr.Error()
	}
	c.Detail = s.Destination.Target() + ": " + count
	return c
}

func (d *dnsProxy) collect(emit metrics.Emit, r health.Report) {
	const name = "egress_dns_proxy_"
	emit(name+"info", 1, r.Version)
	emit(name+"ready", oneIf(r.Ready))
	emit(name+"reloads_total", float64(d.reloads.Load()))
	emit(name+"reload_failures_total", float64(d.refused.Load()))
	for _, s := range d.proxy.Status() {
		port, target := strconv.Itoa(int(s.Destination.Port)), s.Destination.Target()
		emit(name+"listening", oneIf(s.Err == nil), port, target)
		for suffix, n := range map[string]int64{
			"connections_total":      s.Connections,
			"open_connections":       s.Open,
			"connect_failures_total": s.Failed,
			"sent_bytes_total":       s.Sent,
			"received_bytes_total":   s.Received,
			"addresses":              int64(s.Addresses),
			"addresses_aside":        int64(s.Aside),
			"lookups_total":          s.Lookups,
			"lookup_failures_total":  s.LookupFailures,
		} {
			emit(name+suffix, float64(n), port, target)
		}
	}
}
