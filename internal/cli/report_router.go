package cli

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/standby"
	"github.com/egress-router/egress-router/rules"
)

// stuckAfter is the delay of a comparison after which the process counts as stuck:
// longer than its pause after failed repairs.
const stuckAfter = 2 * time.Minute

// notHolder is the reason of a router that stands by, without a Service of its own.
const notHolder = "another router holds the addresses"

func (w *watch) reporter(p Process) reporter {
	return reporter{
		program: health.Router, mode: string(w.config.Mode), listen: w.config.Health.Listen, logs: p.logs,
		report: func(r *health.Report) {
			reportRouter(r, w.keeper.Status(), w.config, time.Now())
			if w.names != nil {
				states, _, _ := w.names.States()
				reportNames(r, states)
			}
			reportDrops(r, w.keeper.Drops())
			w.ports.report(r)
			reportTable(r, tableNow(), time.Time{})
			reportUntracked(r, w.failed.Load())
			reportFlowtable(r, w.config, w.slow, tableNow().Entries)
			if w.standby != nil {
				s := w.standby.Status()
				left, err := w.standby.PermitLeft()
				if err != nil && s.Role == election.Active {
					s.Trouble, s.TroubleAt = err.Error(), time.Now()
				}
				reportStandby(r, w.config, s, left, time.Now())
				holds := s.Role == election.Active || s.Role == election.Resuming
				reportFence(r, w.partial)
				carries := false
				if carry := w.config.Standby.Carry; carry != nil {
					own, failed := standby.Ports{First: uint16(carry.First), Last: uint16(carry.Last)}, w.tunnel.err()
					carries = carriesNow(s, failed, time.Now().Add(-election.Settings{Interval: w.config.Standby.Interval}.GiveUp()))
					reportCarry(r, own, s.Carry, failed)
					if !holds { // clients that enter here would reach nothing
						r.Reasons = append(r.Reasons, cannotCarry(own, s.Carry, failed)...)
					}
				}
				if s.Draining {
					r.Reasons = append(r.Reasons, "the addresses are handed over, connections are drained")
				}
				switch {
				case w.service != nil:
					reportEndpoints(r, w.config.Peers.Endpoints, w.service.Status(), time.Now())
				case !holds && !carries: // otherwise clients may enter here
					r.Reasons = append(r.Reasons, notHolder)
				}
			}
			if err := w.alive(); err != nil {
				r.Reasons = append(r.Reasons, err.Error())
			}
		},
		alive:   w.alive,
		table:   metrics.Router,
		collect: w.collect,
		events:  p.events,
		show:    (&viewer{watch: w, view: w.view}).show,
	}
}

// alive returns an error if the router is stuck.
func (w *watch) alive() error {
	interval, s := w.config.Health.Interval, w.keeper.Status()
	compared := s.Compared
	if compared.IsZero() {
		compared = s.Since // the start of the process
	}
	if late := time.Since(compared); interval > 0 && late > 3*interval+stuckAfter {
		return fmt.Errorf("no reconcile for %s", late.Round(time.Second))
	}
	return nil
}

// reportRouter reports the router's state. Ages are relative to now.
func reportRouter(r *health.Report, s router.Status, c config.Config, now time.Time) {
	r.Reasons = append(r.Reasons, s.NotReady...)
	add := func(name string, state health.State, since time.Time, format string, args ...any) *health.Check {
		r.Checks = append(r.Checks, health.Check{Name: name, State: state, Since: since, Detail: fmt.Sprintf(format, args...)})
		return &r.Checks[len(r.Checks)-1]
	}

	switch repairs := total(s.Repairs); {
	case !s.InSync:
		add("kernel", health.Failed, s.Since, "%s", s.Failure)
	case s.Contested != "":
		add("kernel", health.Warning, s.ContestedSince, "repair contested by another program: %s", s.Contested)
	default:
		add("kernel", health.OK, s.Since, "no drift, backend %s, %d repairs", s.Backend, repairs)
	}

	switch l := s.Link; {
	case l.Since.IsZero():
		add("interface", health.OK, r.Started, "%s, not read yet", c.Egress)
	case !l.Found:
		add("interface", health.Failed, l.Since, "%s not found", c.Egress).Fault = string(diagnose.InterfaceMissing)
	case !l.Carrier:
		add("interface", health.Failed, l.Since, "%s at %s, without carrier", c.Egress, l.MAC).Fault = string(diagnose.NoCarrier)
	default:
		add("interface", health.OK, l.Since, "%s at %s", c.Egress, l.MAC)
	}

	for i, first := range c.Sources.Families() {
		suffix := "" // of the checks of the second family
		if i > 0 {
			suffix = "-ipv6"
		}
		around := s.Surroundings[i]
		state, since, detail := gatewayCheck(around, first.Gateway, r.Started, now)
		if gateway := add("gateway"+suffix, state, since, "%s", detail); state == health.Failed {
			gateway.Fault = string(diagnose.GatewaySilent)
		}
		sources := c.Sources.Of(first.Prefix.Addr().Is6())
		switch {
		case first.Prefix.Addr().Is6() && s.Closed != "":
			add("address"+suffix, health.Failed, s.ClosedSince, "%s, %s", sources, s.Closed)
		case around.Conflicts == 0:
			add("address"+suffix, health.OK, r.Started, "%s, no conflict", sources)
		case len(sources) == 1:
			add("address"+suffix, health.Warning, around.ConflictAt, "%s, claimed by %s, %d conflicts", sources, around.ConflictMAC, around.Conflicts).Fault = string(diagnose.WrongMAC)
		default:
			add("address"+suffix, health.Warning, around.ConflictAt, "%s, %s claimed by %s, %d conflicts", sources, around.Conflicting, around.ConflictMAC, around.Conflicts).Fault = string(diagnose.WrongMAC)
		}
	}

	destinations := fmt.Sprintf("%d destinations", s.Destinations)
	if s.Destinations == 1 {
		destinations = "1 destination"
	}
	if s.ReloadError != "" {
		add("destinations", health.Warning, s.ReloadSince, "%s, reload failed: %s", destinations, s.ReloadError)
	} else {
		add("destinations", health.OK, s.ReloadSince, "%s", destinations)
	}

	if c.Health.Probe {
		r.Checks = append(r.Checks, serversCheck(s, r.Started))
	}
}

// serversCheck returns the result of the probes.
func serversCheck(s router.Status, started time.Time) health.Check {
	check := health.Check{Name: "servers", State: health.OK, Since: s.ProbesSince}
	down := slices.DeleteFunc(slices.Clone(s.Probes), func(p router.Probe) bool { return p.Err == "" })
	out, leftOut := slices.DeleteFunc(slices.Clone(s.Probes), func(p router.Probe) bool { return !p.Out }), ""
	if len(out) > 0 {
		leftOut = fmt.Sprintf("; %d left out: %s", len(out), out[0].To)
		if len(out) > 1 {
			leftOut += " and others"
		}
	}
	switch {
	case s.ProbesSince.IsZero():
		check.Since, check.Detail = started, "not probed yet"
	case len(down) > 0:
		reasons := router.Failing(down)
		if len(down) > 1 {
			leftOut = "; " + reasons + leftOut
		}
		check.State, check.Fault = health.Warning, string(down[0].Outcome.Fault())
		check.Detail = fmt.Sprintf("%d of %d unreachable: %s: %s: %s%s", len(down), len(s.Probes), down[0].To, down[0].Outcome, down[0].Err, leftOut)
	default:
		check.Detail = fmt.Sprintf("%d reachable%s", len(s.Probes), leftOut)
	}
	return check
}

// reportTable reports the kernel's table of connections, if it has little room.
func reportTable(r *health.Report, t diagnose.Table, since time.Time) {
	if !t.NearlyFull() {
		return
	}
	check := health.Check{Name: "conntrack", State: health.Warning, Since: since, Detail: fmt.Sprintf("%d of %d entries", t.Entries, t.Limit)}
	if t.Full() {
		check.Fault = string(diagnose.TableFull)
		check.Detail += ": the kernel drops new connections"
	}
	r.Checks = append(r.Checks, check)
}

// reportUntracked reports why connections are not tracked; nil: they are, or need not be.
func reportUntracked(r *health.Report, why *string) {
	if why != nil {
		r.Checks = append(r.Checks, health.Check{Name: "tracking", State: health.Warning, Detail: "connections are neither counted nor logged: " + *why})
	}
}

// gatewayCheck returns the state of a gateway.
func gatewayCheck(around router.Surroundings, gateway netip.Addr, started, now time.Time) (state health.State, since time.Time, detail string) {
	protocol, last := router.ProtocolOf(gateway), "no answer yet"
	if g := around.Gateway; !g.Answered.IsZero() {
		last = fmt.Sprintf("last answer %s ago by %s", health.Age(g.Answered, now), g.MAC)
	}
	answers, silent := fmt.Sprintf("%s answers %s, %s", gateway, protocol, last), fmt.Sprintf("%s does not answer %s, %s", gateway, protocol, last)
	switch g := around.Gateway; {
	case around.Unwatched != "":
		return health.Warning, around.UnwatchedSince, fmt.Sprintf("%s, %s watch not running: %s", gateway, protocol, around.Unwatched)
	case !g.Known && g.Misses == 0:
		return health.OK, started, fmt.Sprintf("%s, %s", gateway, last)
	case !g.Known:
		return health.Failed, started, silent
	case g.Reachable:
		return health.OK, g.Since, answers
	default:
		return health.Failed, g.Since, silent
	}
}

// reportDrops reports dropped packets, if there are any. They are no fault.
func reportDrops(r *health.Report, drops map[rules.Reason]uint64) {
	var parts []string
	for _, reason := range rules.Reasons {
		if n := drops[reason]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, reason))
		}
	}
	if len(parts) > 0 {
		r.Checks = append(r.Checks, health.Check{Name: "drops", State: health.OK, Since: r.Started, Detail: "packets: " + strings.Join(parts, ", ")})
	}
}

func total(repairs map[router.RepairKind]uint64) (n uint64) {
	for _, count := range repairs {
		n += count
	}
	return n
}

// noticed are the faults that a router notices while it runs.
var noticed = []diagnose.Fault{
	diagnose.InterfaceMissing, diagnose.NoCarrier, diagnose.WrongMAC, diagnose.GatewaySilent, diagnose.TableFull, diagnose.PortsExhausted,
	diagnose.NameFailed, diagnose.DroppedBeyond, diagnose.ServerRefuses, diagnose.ResetBetween, diagnose.ServerUnreachable,
}

func (w *watch) collect(emit metrics.Emit, r health.Report) {
	const name = "egress_router_"
	s := w.keeper.Status()
	emit(name+"info", 1, r.Version, r.Mode, s.Backend, w.config.Sources.String(), w.config.Sources.Gateways())
	emit(name+"ready", oneIf(r.Ready))
	faults := noticed
	if w.standby != nil {
		faults = slices.Concat(noticed, noticedOfSeveral)
	}
	for _, fault := range faults {
		emit(name+"fault", oneIf(slices.ContainsFunc(r.Checks, func(c health.Check) bool { return c.Fault == string(fault) })), string(fault))
	}
	if !s.Compared.IsZero() {
		emit(name+"last_comparison_timestamp_seconds", float64(s.Compared.UnixMilli())/1000)
	}
	emit(name+"comparisons_total", float64(s.Comparisons))
	for _, kind := range router.RepairKinds {
		emit(name+"repairs_total", float64(s.Repairs[kind]), string(kind))
	}
	emit(name+"repair_failures_total", float64(s.RepairFailures))
	emit(name+"announcements_total", float64(s.Announcements))
	conflicts, known, reachable := 0, false, true
	for _, around := range s.Surroundings {
		conflicts += around.Conflicts
		known = known || around.Gateway.Known
		reachable = reachable && (around.Gateway.Reachable || !around.Gateway.Known)
	}
	emit(name+"address_conflicts_total", float64(conflicts))
	if known {
		emit(name+"gateway_reachable", oneIf(reachable))
	}
	emit(name+"reloads_total", float64(s.Reloads))
	emit(name+"reload_failures_total", float64(s.ReloadFailures))
	w.collectNames(emit)
	if w.config.Health.Probe {
		collectProbes(emit, s)
	}
	if w.standby != nil {
		s := w.standby.Status()
		collectStandby(emit, s)
		if w.config.Standby.Carry != nil {
			collectCarry(emit, s)
		}
	}
	drops := w.keeper.Drops()
	for _, reason := range rules.Reasons {
		emit(name+"dropped_packets_total", float64(drops[reason]), string(reason))
	}

	t := w.tracker.Load()
	if t == nil {
		return
	}
	report, err := t.Counts()
	if err != nil {
		w.log.Warn("connection counters not read", "error", err)
		return
	}
	w.ports.check(report.Ports)
	collectLines(emit, report, s.Probes, w.addresses)
	emit(name+"source_ports_limit", float64(portLimit(w.ports.ranged, w.config.Sources[0].Prefix.Addr())))
	emit(name+"event_overruns_total", float64(report.Overruns))
	if entries, limit, err := t.Fill(); err == nil {
		emit(name+"conntrack_entries", float64(entries))
		emit(name+"conntrack_limit", float64(limit))
	}
}

// probeFailures are the outcomes of a failed probe.
var probeFailures = []diagnose.Outcome{diagnose.Refused, diagnose.Silent, diagnose.Unreachable, diagnose.Reset, diagnose.Unsent}

// mostZeros is the number of destinations up to which those without a failure have counters
// of failures, so that the first failure is an increase for Prometheus. Of more, only those
// that have failed have them.
const mostZeros = 1000

func collectProbes(emit metrics.Emit, s router.Status) {
	const name = "egress_router_"
	for _, p := range s.Probes {
		if len(p.Failures) == 0 && len(s.Probes) > mostZeros {
			continue
		}
		for _, reason := range probeFailures {
			emit(name+"probe_failures_total", float64(p.Failures[reason]), rules.TCP.String(), p.To.String(), string(reason))
		}
	}
	var bounds []float64
	for _, b := range router.ConnectBounds {
		bounds = append(bounds, b.Seconds())
	}
	emit.Distribution(name+"probe_connect_seconds", s.Connects.Sum.Seconds(), bounds, s.Connects.Counts[:])
}

// mostPorts is the number of servers with metrics of ports in use, those with most
// ports: with the fallback, any number of servers is possible.
const mostPorts = 200

func collectLines(emit metrics.Emit, report conntrack.Report, probes []router.Probe, addresses func(name string) []netip.Addr) {
	const name = "egress_router_"
	up, out := make(map[netip.AddrPort]bool), make(map[netip.AddrPort]bool)
	for _, p := range probes {
		up[p.To], out[p.To] = p.Err == "", p.Out
	}
	for _, l := range report.Lines {
		labels := []string{"any", "fallback", l.To.String()}
		if l.Protocol != 0 {
			to := l.Destination()
			if strings.Contains(to, ":") {
				to = "[" + to + "]" // of IPv6 (RFC 3986, section 3.2.2)
			}
			labels = []string{l.Protocol.String(), l.LocalPorts(), to + ":" + l.ToPorts()}
			probes := l.Protocol == rules.TCP && l.ToOnePort()
			reached, probed, used := false, false, 0
			all := slices.Collect(l.All())
			if name := l.Name(); name != "" {
				all = addresses(name)
			}
			for _, a := range all {
				to := netip.AddrPortFrom(a, l.Server(l.Port).Port())
				is, known := up[to]
				reached, probed = reached || is, probed || known
				if !probes || !out[to] {
					used++
				}
			}
			if probes && probed {
				emit(name+"destination_up", oneIf(reached), labels...)
			}
			if l.Several() || l.Name() != "" {
				emit(name+"destination_addresses", float64(used), labels...)
			}
		}
		emit(name+"connections_total", float64(l.Connections), labels...)
		emit(name+"open_connections", float64(l.Open), labels...)
		if l.Refused+l.Unanswered > 0 || len(report.Lines) <= mostZeros && l.Protocol != rules.UDP {
			emit(name+"connection_failures_total", float64(l.Refused), append(labels, string(diagnose.Refused))...)
			emit(name+"connection_failures_total", float64(l.Unanswered), append(labels, string(diagnose.Silent))...)
		}
		if report.Accounted {
			emit(name+"sent_packets_total", float64(l.PacketsOut), labels...)
			emit(name+"sent_bytes_total", float64(l.BytesOut), labels...)
			emit(name+"received_packets_total", float64(l.PacketsIn), labels...)
			emit(name+"received_bytes_total", float64(l.BytesIn), labels...)
		}
	}
	// With several reserved addresses the first metric is their sum.
	var servers []conntrack.Ports // sorted
	for _, p := range report.Ports {
		if last := len(servers) - 1; last >= 0 && servers[last].Protocol == p.Protocol && servers[last].Server == p.Server {
			servers[last].InUse += p.InUse
		} else {
			servers = append(servers, p)
		}
	}
	for _, p := range mostUsed(servers) {
		emit(name+"snat_ports_in_use", float64(p.InUse), p.Protocol.String(), p.Server.String())
	}
	for _, p := range mostUsed(report.Ports) {
		emit(name+"source_ports_in_use", float64(p.InUse), p.Reserved.String(), p.Protocol.String(), p.Server.String())
	}
}

// mostUsed returns those with most ports in use.
func mostUsed(ports []conntrack.Ports) []conntrack.Ports {
	ports = slices.Clone(ports)
	slices.SortStableFunc(ports, func(a, b conntrack.Ports) int { return cmp.Compare(b.InUse, a.InUse) })
	return ports[:min(len(ports), mostPorts)]
}
