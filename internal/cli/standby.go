package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/endpoints"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/standby"
)

// roles are the roles of the plan.
var roles = map[election.State]plan.Role{election.Standby: plan.Standby, election.Claiming: plan.Claiming, election.Active: plan.Active, election.Resuming: plan.Active}

// A gate is the kernel's gate for a router.
type gate struct{ partial bool } // the kernel has no egress hook

func (g gate) of(want plan.Gate) nft.Gate {
	return nft.Gate{
		Interface: want.Interface, Sources: want.Sources, Witnesses: []netip.Addr{want.Witness}, Mark: want.Mark,
		Ticket: want.Ticket, Permit: want.Permit, WithoutEgress: g.partial,
		Steers: want.Steers, SteerMark: want.SteerMark, SteerMask: want.SteerMask,
	}
}

// Differs returns the differences of the gate in the kernel.
func (g gate) Differs(want *plan.Gate) ([]string, error) {
	if want != nil {
		return g.of(*want).Differs()
	}
	loaded, err := nft.GateLoaded()
	if err != nil || !loaded {
		return nil, err
	}
	return []string{"a gate is there"}, nil
}

// Load loads a gate, shut.
func (g gate) Load(want plan.Gate) error { return g.of(want).Load() }

// Remove removes the gate.
func (g gate) Remove() error {
	_, err := nft.RemoveGate()
	return err
}

// notFenced is what a kernel without the egress hook cannot hold back. The process answers ARP
// itself, but the kernel goes on asking the gateway for a while (arp_solicit in net/ipv4/arp.c), and
// a packet behind the gate may wait for the gateway's hardware address or for the link.
const notFenced = "the kernel has no netdev egress hook (Linux 5.16): ARP requests and waiting packets of a router that has just lost the addresses are not held back, and the gateway may take it for the holder for some seconds"

// newGate returns the gate for the kernel. It is an error if the kernel cannot fence what the
// configuration requires.
func newGate(c config.Config, log *slog.Logger) (gate, error) {
	if c.Standby == nil {
		return gate{}, nil
	}
	has, err := nft.HasEgressHook()
	switch {
	case err != nil:
		return gate{}, fmt.Errorf("look for the netdev egress hook: %w", err)
	case has:
		return gate{}, nil
	case c.Standby.Fence == spec.FenceRequire:
		return gate{}, fmt.Errorf("EGRESS_STANDBY_FENCE=require: %s", notFenced)
	}
	log.Warn("not fenced", "effect", notFenced)
	return gate{partial: true}, nil
}

// standBy makes r one of several routers, if the configuration says so.
func (w *watch) standBy(r *router.Router) error {
	g, err := newGate(w.config, w.log)
	if err != nil {
		return err
	}
	r.Gate, w.tunnel = g, new(tunnel)
	r.Tunnel = w.tunnel
	if w.config.Standby == nil {
		return nil
	}
	r.Want.Gate.Partial, w.partial = g.partial, g.partial
	r.Want = r.Want.WithRole(plan.Standby)
	if w.standby, w.service, err = newStandby(w.config, r, w.keeper, w.log); err != nil {
		return err
	}
	w.keeper.Holds = func() bool { return w.standby.Status().Role == election.Active }
	w.keeper.Peer = func(mac net.HardwareAddr) bool { return len(mac) == 6 && w.standby.PeerMAC([6]byte(mac)) }
	return nil
}

// newStandby returns the runner of a router that is one of several, and what leads a Service to
// it; nil: nothing does.
func newStandby(c config.Config, r *router.Router, k *router.Keeper, log *slog.Logger) (*standby.Runner, *endpoints.Writer, error) {
	own, err := clusterAddress(c.Cluster)
	if err != nil {
		return nil, nil, err
	}
	s, g := c.Standby, r.Gate.(gate).of(*r.Want.Gate).Open() // until the process ends
	if c.Peers.Endpoints != "" && c.Peers.APIServer == "" {  // known where a router runs, and not to plan
		return nil, nil, errors.New("EGRESS_STANDBY_ENDPOINTS is set, and there is no API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; unset it outside of Kubernetes")
	}
	var runner *standby.Runner
	service := newEndpoints(c, own, func() (time.Duration, error) { return runner.PermitLeft() }, log)
	o := standby.Options{
		Settings:  election.Settings{Interval: s.Interval, ID: newID(), Priority: c.Peers.Priority},
		Interface: c.Egress, Sources: c.Sources, Witness: s.Witness,
		Gate: func(index int) standby.Gate {
			g := g
			g.Index = index
			return g
		},
		Mark: g.Mark, Answers: g.WithoutEgress,
		Listen: netip.AddrPortFrom(own, s.Port), Peers: lookUpPeers(c, own, log), Only: onlyListed(c), Key: c.Peers.Key, Reference: c.Peers.Reference,
		Reach: func(gateway netip.Addr, mac [6]byte) error {
			kernel, err := link.Open()
			if err != nil {
				return err
			}
			defer kernel.Close()
			return kernel.Reach(c.Egress, gateway, mac[:])
		},
		Ready: k.InSync,
		Changed: func(role election.State) {
			k.SetRole(roles[role])
			lead(service, role)
		},
		Log: log,
	}
	if carry := r.Want.Carry; carry != nil {
		carry.Own = own
		o.Ports = standby.Ports{First: carry.First, Last: carry.Last}
		o.Carry, o.Open = carries(*carry, r.Tunnel.(*tunnel), k, log), func() (int, int, error) { return open(carry.Sources) }
	}
	runner, err = standby.New(o)
	return runner, service, err
}

// lead has the Service lead to this router while it is active.
func lead(service *endpoints.Writer, role election.State) {
	switch {
	case service == nil:
	case role == election.Active:
		service.Hold()
	case role != election.Resuming: // which may be active again in a moment
		service.Release()
	}
}

// newEndpoints returns what leads a Service to the active router, while permit is more than zero; nil:
// nothing does.
func newEndpoints(c config.Config, own netip.Addr, permit func() (time.Duration, error), log *slog.Logger) *endpoints.Writer {
	if c.Peers.Endpoints == "" {
		return nil
	}
	pod, _ := os.Hostname() // of a pod, its name; without it the endpoint has none
	return endpoints.New(endpoints.Options{
		Service: c.Peers.Endpoints, Addresses: []netip.Addr{own}, Pod: pod, Server: c.Peers.APIServer,
		Holds: func() bool {
			left, err := permit()
			return err == nil && left > 0
		},
		Log: log,
	})
}

// newID returns a random number by which peers know this process.
func newID() uint64 {
	for {
		if id := rand.Uint64(); id != 0 {
			return id
		}
	}
}

// clusterAddress returns the address of the cluster side that peers know: of IPv4, if it has
// one.
func clusterAddress(name string) (netip.Addr, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find cluster interface %q: %w", name, err)
	}
	list, err := i.Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses of %q: %w", name, err)
	}
	var all []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
			all = append(all, p.Addr())
		}
	}
	if len(all) == 0 {
		return netip.Addr{}, fmt.Errorf("cluster interface %q has no address: heartbeats need one", name)
	}
	slices.SortStableFunc(all, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return all[0], nil
}

// onlyListed reports whether heartbeats of other addresses than those of EGRESS_STANDBY_PEERS do
// not count: a name may lag behind the routers, and a key shows who is one.
func onlyListed(c config.Config) bool { return len(c.Peers.Key) == 0 && c.Peers.Listed() }

// lookUpPeers returns the look-up of the other routers. The queries leave by the cluster side,
// as those of other names.
func lookUpPeers(c config.Config, own netip.Addr, log *slog.Logger) standby.Lookup {
	r := resolver.New(resolver.Options{Log: log})
	return func(ctx context.Context) (addresses []netip.Addr, again time.Time, err error) {
		again = time.Now().Add(resolver.MaxTTL)
		var errs []error
		for _, name := range c.Peers.Names {
			answer, err := r.Lookup(ctx, netip.Addr{}, name)
			missing, _ := errors.AsType[*resolver.Error](err)
			if err != nil && (missing == nil || !missing.NotFound()) { // a headless Service without other pods has no address
				errs = append(errs, err)
			}
			addresses = append(addresses, answer.Addrs...)
			if _, literal := netip.ParseAddr(name); literal != nil && answer.Expires.Before(again) {
				again = answer.Expires
			}
		}
		addresses = slices.DeleteFunc(addresses, func(a netip.Addr) bool { return a.Is4() != own.Is4() || a == own })
		return addresses, again, errors.Join(errs...)
	}
}

// noticedOfSeveral are the faults that a router which is one of several notices while it runs.
var noticedOfSeveral = []diagnose.Fault{diagnose.SameMAC, diagnose.WitnessSilent, diagnose.KeysDiffer, diagnose.PeersSilent}

// recent is how long an event is reported. One that persists is noticed again.
const recent = 2 * time.Minute

// The signs of a witness that answers no pings: so many in a row, the last of them so lately. A
// router that claims in vain tries again within seconds.
const (
	silentPings = 10
	pingedLast  = 10 * time.Second
)

// reportStandby reports who holds the addresses, and the other routers. left is the time that the
// gate stays open without another answer of the witness; zero: it is shut.
func reportStandby(r *health.Report, c config.Config, s standby.Status, left time.Duration, now time.Time) {
	check := health.Check{Name: "standby", State: health.OK, Since: s.Since}
	settings := election.Settings{Interval: c.Standby.Interval}
	holder, known := s.Holder(now.Add(-settings.GiveUp()))
	holds := s.Role == election.Active && left > 0
	detail := s.Role.String() + ": "
	switch silent := s.Unanswered >= silentPings && now.Sub(s.Pinged) < pingedLast; {
	case holds:
		detail += fmt.Sprintf("this router holds the addresses, permit %s old, gate open for %s without another answer", max(0, settings.Permit()-left).Round(time.Millisecond), left.Round(time.Millisecond))
	case s.Role == election.Active:
		detail += "the gate is shut, and opens with the next answer of " + c.Standby.Witness.String()
	case known:
		detail += holder.Address.String() + " holds the addresses"
	case silent:
		check.State, check.Fault = health.Failed, string(diagnose.WitnessSilent)
		detail += fmt.Sprintf("no router holds the addresses: expected %s to answer pings, found %d in a row without an answer", c.Standby.Witness, s.Unanswered)
	default:
		detail += "no router is known to hold the addresses"
	}
	if s.Why != "" {
		detail += "; reason of the role: " + s.Why
	}
	if !s.TakenOver.IsZero() {
		detail += fmt.Sprintf("; last take-over %s ago", health.Age(s.TakenOver, now))
		if s.Gap > 0 {
			detail += fmt.Sprintf(", %s after the last sign of the holder", s.Gap.Round(time.Millisecond))
		}
	}
	if s.Trouble != "" && now.Sub(s.TroubleAt) < recent {
		check.State, detail = max(check.State, health.Warning), detail+"; "+s.Trouble
	}
	check.Detail = detail
	slices.SortFunc(s.Peers, func(a, b standby.Peer) int { return a.Address.Compare(b.Address) })
	r.Checks = append(r.Checks, check, peersCheck(r.Started, c, s, now))
	r.Routers = append(r.Routers, member(s.Own, holds))
	r.Routers[0].Own = true
	for _, p := range s.Peers {
		r.Routers = append(r.Routers, member(p, !holds && known && p == holder))
	}
}

// reportFence warns of the limits of the gate on a kernel without the egress hook.
func reportFence(r *health.Report, partial bool) {
	if partial {
		r.Checks = append(r.Checks, health.Check{Name: "fence", State: health.Warning, Since: r.Started, Detail: notFenced})
	}
}

func member(p standby.Peer, holds bool) health.Member {
	m := health.Member{Address: p.Address, Holds: holds, Role: p.State.String(), Ready: p.Healthy, Priority: int(p.Priority), Heard: p.Heard}
	if p.MAC != [6]byte{} {
		m.MAC = net.HardwareAddr(p.MAC[:]).String()
	}
	return m
}

// peersCheck returns the other routers, and what keeps them from hearing each other.
func peersCheck(started time.Time, c config.Config, s standby.Status, now time.Time) health.Check {
	check := health.Check{Name: "peers", State: health.OK, Since: started}
	fault := func(state health.State, f diagnose.Fault, format string, args ...any) health.Check {
		check.State, check.Fault, check.Detail = state, string(f), fmt.Sprintf(format, args...)
		return check
	}
	var all []string
	for _, p := range s.Peers {
		if p.MAC == s.Own.MAC && p.MAC != [6]byte{} {
			return fault(health.Failed, diagnose.SameMAC, "expected a hardware address of its own for each router, found %s of this router for %s too", net.HardwareAddr(p.MAC[:]), p.Address)
		}
		text := fmt.Sprintf("%s %s", p.Address, p.State)
		if !p.Healthy {
			text += " (could not take over)"
		}
		all = append(all, text)
	}
	if u := s.Unkeyed; !u.At.IsZero() && now.Sub(u.At) < recent && slices.Contains(s.Missing, u.Address) {
		found := "without a key"
		switch {
		case u.Keyed && len(c.Peers.Key) > 0:
			found = "of another key"
		case u.Keyed:
			found = "with a key"
		}
		expected := "without a key, since EGRESS_STANDBY_KEY_FILE is not set"
		if len(c.Peers.Key) > 0 {
			expected = "of the key of EGRESS_STANDBY_KEY_FILE"
		}
		check.Since = u.At
		return fault(health.Warning, diagnose.KeysDiffer, "expected heartbeats %s, found those of %s %s", expected, u.Address, found)
	}
	heard := cmp.Or(strings.Join(all, ", "), "none, no router could take over")
	switch {
	case len(s.Missing) > 0:
		var missing []string
		for _, a := range s.Missing {
			missing = append(missing, a.String())
		}
		return fault(health.Warning, diagnose.PeersSilent, "expected heartbeats of %s by UDP port %d, found none; others heard: %s", strings.Join(missing, ", "), c.Standby.Port, heard)
	case len(all) == 0 && s.Refused > 0:
		refused := "that were no heartbeats, had a key, or came from others than EGRESS_STANDBY_PEERS"
		if len(c.Peers.Key) > 0 {
			refused = "without the key of EGRESS_STANDBY_KEY_FILE"
		}
		check.State, check.Detail = health.Warning, fmt.Sprintf("none heard, %d packets refused %s", s.Refused, refused)
	case len(all) == 0:
		check.State, check.Detail = health.Warning, "none heard: no router could take over"
	default:
		check.Detail = heard
	}
	return check
}

// carriesNow reports whether the packets of clients reach the physical network by a router that
// does not hold the addresses: the last heartbeat of the holder, with which it exchanges packets,
// came after a time. failed is the error of the tunnel.
func carriesNow(s standby.Status, failed error, after time.Time) bool {
	holder, known := s.Holder(after)
	return failed == nil && known && slices.ContainsFunc(s.Carry.Peers, func(p standby.CarryPeer) bool { return p.Address == holder.Address })
}

// cannotCarry returns the faults of a router with source ports by which it carries nothing. It is no
// fault of its own that the others do not carry yet, or that none holds the addresses: an update of
// routers without a tunnel would never end.
func cannotCarry(own standby.Ports, c standby.Carry, failed error) (reasons []string) {
	if failed != nil {
		reasons = append(reasons, "connections are not carried: "+failed.Error())
	}
	for _, p := range c.Clash {
		if own.Meets(p.Ports) {
			reasons = append(reasons, fmt.Sprintf("connections are not carried: expected source ports of its own, found %s here and %s of %s", own, p.Ports, p.Address))
		}
	}
	return reasons
}

// reportCarry reports with whom a router exchanges the packets of connections.
func reportCarry(r *health.Report, own standby.Ports, c standby.Carry, failed error) {
	check := health.Check{Name: "carry", State: health.OK, Since: r.Started, Detail: "own ports " + own.String()}
	for _, p := range c.Peers {
		check.Detail += fmt.Sprintf(", %s of %s", p.Ports, p.Address)
	}
	if c.Toward.IsValid() {
		check.Detail += fmt.Sprintf("; by %s while the gate is shut", c.Toward)
	}
	switch {
	case failed != nil:
		check.State, check.Detail = health.Warning, failed.Error()
	case len(c.Clash) > 0:
		check.State = health.Warning
		for _, p := range c.Clash {
			check.Detail += fmt.Sprintf("; connections of %s are not carried: its ports %s are also another router's", p.Address, p.Ports)
		}
	case len(c.Peers) == 0:
		check.State, check.Detail = health.Warning, check.Detail+", no other router with EGRESS_STANDBY_CARRY"
	}
	r.Checks = append(r.Checks, check)
}

// reportEndpoints reports the Service that leads to the active router.
func reportEndpoints(r *health.Report, name string, s endpoints.Status, now time.Time) {
	check := health.Check{Name: "endpoints", State: health.OK, Since: cmp.Or(s.Since, r.Started)}
	switch {
	case s.Err != nil:
		check.State, check.Detail = health.Warning, fmt.Sprintf("Service %s: %v", name, s.Err)
	case !s.Holding:
		check.Detail = fmt.Sprintf("Service %s leads to the active router", name)
	case s.Written.IsZero():
		check.Detail = fmt.Sprintf("Service %s not written yet", name)
	default:
		check.Detail = fmt.Sprintf("Service %s leads here since %s ago, %s after the take-over", name, health.Age(s.Written, now), s.Took.Round(time.Millisecond))
	}
	r.Checks = append(r.Checks, check)
}

// collectStandby emits the metrics of a router that is one of several.
func collectStandby(emit metrics.Emit, s standby.Status) {
	const name = "egress_router_standby_"
	for role := election.Standby; role <= election.Resuming; role++ {
		emit(name+"role", oneIf(s.Role == role), role.String())
	}
	for _, reason := range slices.Sorted(maps.Keys(s.TakeOvers)) {
		emit(name+"takeovers_total", float64(s.TakeOvers[reason]), reason)
	}
	if s.Gap > 0 {
		emit(name+"last_gap_seconds", s.Gap.Seconds())
	}
	if !s.Echoed.IsZero() {
		emit(name+"echo_round_trip_seconds", s.RoundTrip.Seconds())
	}
	emit(name+"peers", float64(len(s.Peers)))
	emit(name+"heartbeats_lost_total", float64(s.Lost))
	emit(name+"packets_refused_total", float64(s.Refused))
}

// collectCarry emits the metrics of a router that carries. Without its counters, for which the
// kernel was asked in vain, the rest is there.
func collectCarry(emit metrics.Emit, s standby.Status) {
	const name = "egress_router_standby_"
	if c, err := carried(); err == nil {
		emit(name+"sent_packets_total", float64(c.SentPackets))
		emit(name+"sent_bytes_total", float64(c.SentBytes))
		emit(name+"received_packets_total", float64(c.ReceivedPackets))
		emit(name+"received_bytes_total", float64(c.ReceivedBytes))
	}
	emit(name+"draining_connections", float64(s.Left))
}
