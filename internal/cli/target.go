package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/probe"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// The probes of destinations, all at a time.
const (
	// mostProbed is the number of servers that are probed; of more, a sample.
	mostProbed = 64
	// connectLimit is the time for the answer of a server: that of three SYN segments, by
	// the kernel's first pauses of 1 and 2 s (RFC 6298); since Linux 6.5 of four, by three
	// pauses of 1 s (tcp_syn_linear_timeouts, ip-sysctl.rst).
	connectLimit = 3300 * time.Millisecond
	// resetLimit is the time after the handshake in which a reset may come.
	resetLimit    = 250 * time.Millisecond
	datagramLimit = time.Second
	echoLimit     = time.Second // of each of two rounds
)

// A noTargetError means that no destination is the one that was asked for.
type noTargetError struct{ of string }

func (e *noTargetError) Error() string {
	return fmt.Sprintf("diagnose %q: no destination has this address, name or port", e.of)
}

// Hint returns the remedy.
func (e *noTargetError) Hint(wording.Names) string {
	return "egress-router plan prints the destinations; an address with a port, such as 203.0.113.26:443, is probed in any case"
}

// targets returns the servers to probe, a sample of them if there are many, and their
// number.
func (w *observer) targets() (targets []diagnose.Destination, configured int, err error) {
	var all []diagnose.Destination
	type server struct {
		protocol string
		to       netip.AddrPort
	}
	seen := make(map[server]bool)
	for _, r := range w.c.Set.Redirects {
		for a := range r.All() {
			if !a.IsValid() {
				continue // a name without an address
			}
			d := diagnose.Destination{Protocol: r.Protocol.String(), Local: r.LocalPorts(), To: netip.AddrPortFrom(a, r.Server(r.Port).Port()), Name: r.Name()}
			switch {
			case r.Protocol != rules.TCP && r.Protocol != rules.UDP:
				d.Probe.Unknown = "there is no probe of " + d.Protocol
			case !r.ToOnePort():
				d.Probe.Unknown = "which ports of the range are open is not known"
			}
			if at := (server{d.Protocol, d.To}); !seen[at] && w.asked(d, r) {
				seen[at] = true
				all = append(all, d)
			}
		}
	}
	for _, a := range w.c.Set.Fallbacks() {
		if w.at.of == "" || w.at.of == a.String() {
			all = append(all, diagnose.Destination{To: netip.AddrPortFrom(a, 0)})
		}
	}
	if len(all) == 0 && w.at.of != "" {
		if all = w.other(); len(all) == 0 {
			return nil, 0, &noTargetError{w.at.of}
		}
	}
	return sample(all, mostProbed), len(all), nil
}

// asked reports whether a destination is the one that was asked for.
func (w *observer) asked(d diagnose.Destination, r rules.Redirect) bool {
	of := w.at.of
	if port, err := strconv.ParseUint(of, 10, 16); err == nil {
		return r.Contains(r.Protocol, rules.Port(port))
	}
	return of == "" || of == d.To.Addr().String() || of == d.To.String() || strings.EqualFold(of, d.Name)
}

// other returns the server of a port that only the fallback has, or one that no line has.
func (w *observer) other() (all []diagnose.Destination) {
	if to, err := netip.ParseAddrPort(w.at.of); err == nil && len(w.c.Sources.Of(to.Addr().Is6())) > 0 {
		return []diagnose.Destination{{Protocol: "tcp", To: to}}
	}
	port, err := strconv.ParseUint(w.at.of, 10, 16)
	if err != nil || port == 0 {
		return nil
	}
	for _, a := range w.c.Set.Fallbacks() {
		all = append(all, diagnose.Destination{Protocol: "tcp", Local: w.at.of, To: netip.AddrPortFrom(a, uint16(port))})
	}
	return all
}

// sample returns at most n of all, spread over the whole list.
func sample[T any](all []T, n int) []T {
	if len(all) <= n {
		return all
	}
	some := make([]T, 0, n)
	for i := range n {
		some = append(some, all[i*len(all)/n])
	}
	return some
}

// probe probes the servers and the gateways, all at a time.
func (w *observer) probe(ctx context.Context, targets []diagnose.Destination) {
	watches := w.watch()
	echoes := w.echoes(targets)
	var all sync.WaitGroup
	for i := range targets {
		d := &targets[i]
		source := w.source(d.To.Addr())
		if r, known, err := w.kernel.RouteTo(source, d.To.Addr()); err == nil {
			d.RouteKnown = w.present(source)
			if known {
				d.Route, d.Astray = r.String(), r.Index != w.look.Index
			}
		}
		all.Go(func() { w.connect(ctx, d, source) })
	}
	for to, e := range echoes {
		all.Go(func() { *e = w.echo(ctx, to) })
	}
	all.Wait()
	for _, stray := range watches {
		stray.watch.Close()
	}
	for i := range targets {
		d := &targets[i]
		d.Echo = *echoes[d.To.Addr()]
		for _, on := range watches {
			switch {
			case on.egress:
				d.Probe.TTL = cmp.Or(d.Probe.TTL, on.watch.ResetTTL(d.To))
			case d.Probe.Outcome == diagnose.Silent && on.watch.Seen(d.To.Addr()):
				d.Stray = on.name
			}
		}
	}
	w.o.Probed, w.gatewayEchoes = targets, echoes
}

// source returns the reserved address of the pod's own sockets to a server.
func (w *observer) source(to netip.Addr) netip.Addr {
	for _, s := range w.c.Sources.Of(to.Is6()) {
		return s.Prefix.Addr()
	}
	return netip.Addr{}
}

// A watched is an interface by which packets to the reserved address are recorded.
type watched struct {
	watch  *probe.Watch
	name   string
	egress bool
}

// watch begins to record the packets to the reserved addresses on both sides.
func (w *observer) watch() (all []watched) {
	if w.lack("NET_RAW") != "" {
		return nil
	}
	for _, name := range []string{w.c.Egress, w.c.Cluster} {
		look, err := w.kernel.Look(name)
		if err != nil {
			continue // another check reports it
		}
		for _, s := range w.c.Sources.Families() {
			what := probe.Everything
			if name == w.c.Egress { // all other answers arrive there, too
				what = probe.Resets
			}
			if on, err := probe.Listen(look.Index, s.Prefix.Addr(), what); err == nil {
				all = append(all, watched{on, name, name == w.c.Egress})
			} else {
				w.log.Debug("interface not watched", "interface", name, "error", err)
			}
		}
	}
	return all
}

// echoes returns a result for each host, and for the gateways.
func (w *observer) echoes(targets []diagnose.Destination) map[netip.Addr]*diagnose.Echo {
	all := make(map[netip.Addr]*diagnose.Echo)
	for _, d := range targets {
		all[d.To.Addr()] = new(diagnose.Echo)
	}
	for _, first := range w.c.Sources.Families() {
		all[first.Gateway] = new(diagnose.Echo)
	}
	return all
}

// echo sends echo requests to a host.
func (w *observer) echo(ctx context.Context, to netip.Addr) diagnose.Echo {
	source := w.source(to)
	switch why := w.lack("NET_RAW"); {
	case why != "":
		return diagnose.Echo{Unknown: why}
	case !w.present(source) || !w.look.Up:
		return diagnose.Echo{Unknown: "the reserved address is missing"}
	case to.IsLinkLocalUnicast():
		return diagnose.Echo{Unknown: "not sent to link-local addresses"}
	}
	e, err := probe.Echo(ctx, probe.From{Interface: w.c.Egress, Source: source}, to, w.look.MTU, echoLimit)
	found := diagnose.Echo{Answered: e.Largest > 0, Size: w.look.MTU, Largest: e.Largest, Reported: e.Reported, By: e.By, TTL: e.TTL}
	if err != nil {
		found.Unknown = err.Error()
	}
	return found
}

// connect probes a port of a server.
func (w *observer) connect(ctx context.Context, d *diagnose.Destination, source netip.Addr) {
	from := probe.From{Interface: w.c.Egress, Source: source}
	var r probe.Result
	switch {
	case d.Probe.Unknown != "" || d.Protocol == "":
		return
	case !source.IsValid():
		d.Probe.Unknown = "there is no reserved address of its family"
		return
	case !w.present(source):
		d.Probe.Unknown = "the reserved address is missing"
		return
	case d.Protocol == "udp":
		r = probe.UDP(ctx, from, d.To, datagramLimit)
	default:
		r = probe.TCP(ctx, from, d.To, connectLimit, resetLimit)
	}
	d.PathMTU = r.PathMTU
	d.Probe = diagnose.Probe{Sent: r.Sent, Took: r.Took, By: r.By, At: r.At, Source: r.Local, Outcome: outcome(d.Protocol, r)}
	if r.Err != nil {
		d.Probe.Text = r.Err.Error()
	}
}

// outcome returns how a probe ended.
func outcome(protocol string, r probe.Result) diagnose.Outcome {
	switch {
	case r.Unsent:
		return diagnose.Unsent
	case r.Reset: // before the handshake it is ECONNREFUSED
		return diagnose.Reset
	case errors.Is(r.Err, unix.ECONNREFUSED) && r.By.IsValid() && protocol != "udp":
		return diagnose.Unreachable
	}
	return diagnose.OutcomeOf(r.Err)
}
