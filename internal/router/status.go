package router

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/plan"
)

// A RepairKind is the part of the namespace that a repair changes.
type RepairKind string

// The kinds of repairs.
const (
	RepairInterface    RepairKind = "interface"     // the egress interface was missing
	RepairLink         RepairKind = "link"          // it was down
	RepairAddress      RepairKind = "address"       // the reserved address was missing
	RepairGatewayRoute RepairKind = "gateway-route" // the route to the gateway
	RepairDefaultRoute RepairKind = "default-route" // missing, changed, or not the only one
	RepairRoute        RepairKind = "route"         // any other of the main table, or the routing rule for a table of the kernel
	RepairReplyPath    RepairKind = "reply-path"    // the table of replies, and its routing rules
	RepairForwarding   RepairKind = "forwarding"    // net.ipv4.ip_forward, and forwarding of the two interfaces
	RepairSysctl       RepairKind = "sysctl"        // any other sysctl
	RepairRules        RepairKind = "rules"         // rules of the backend in use
	RepairStrays       RepairKind = "strays"        // rules of ours in other backends
)

// RepairKinds lists every kind.
var RepairKinds = []RepairKind{
	RepairInterface, RepairLink, RepairAddress, RepairGatewayRoute, RepairDefaultRoute, RepairRoute, RepairReplyPath,
	RepairForwarding, RepairSysctl, RepairRules, RepairStrays,
}

// kindOf returns the kind of repair that a step of the network is.
func kindOf(s plan.Change, want plan.Network) RepairKind {
	switch s.Op {
	case plan.SetUp, plan.SetDown:
		return RepairLink
	case plan.AddAddress, plan.RemoveAddress:
		return RepairAddress
	case plan.AddRule, plan.DeleteRule:
		if s.Rule.Table == want.Cluster.Table {
			return RepairReplyPath
		}
	case plan.WriteSysctl:
		if strings.HasSuffix(s.Sysctl, "forward") || strings.HasSuffix(s.Sysctl, "forwarding") {
			return RepairForwarding
		}
		return RepairSysctl
	case plan.ReplaceRoute, plan.AppendRoute, plan.DeleteRoute:
		switch {
		case s.Route.Table != 0:
			return RepairReplyPath
		case s.Route.IsDefault():
			return RepairDefaultRoute
		case s.Route.Destination.IsSingleIP() && want.Sources.HaveGateway(s.Route.Destination.Addr()):
			return RepairGatewayRoute
		}
	}
	return RepairRoute
}

// A Status is the state of a router that stays. Its counters start with the
// process.
type Status struct {
	Backend string // name; empty before the first comparison

	// The last comparison with the kernel.
	InSync  bool      // there is no drift
	Failure string    // error of the reconcile; empty: none
	Since   time.Time // time of the last change of InSync
	// Contested is a repair that another program reverts repeatedly; empty: none.
	Contested      string
	ContestedSince time.Time
	contestedAt    time.Time // time of its last repair

	Link LinkStatus

	Compared       time.Time // time of the last full comparison
	Comparisons    uint64    // including those after events
	Repairs        map[RepairKind]uint64
	RepairFailures uint64
	Announcements  uint64

	Destinations   int // number of redirects and fallback
	Reloads        uint64
	ReloadFailures uint64
	ReloadError    string    // error of the last reload; empty: none
	ReloadSince    time.Time // time of the last change of destinations, or of the first error of a reload

	Surroundings []Surroundings // for each family with a source, IPv4 first
	Closed       string         // why no IPv6 packet crosses although there is an IPv6 source; empty: no such reason
	ClosedSince  time.Time      // time of the last change of Closed
	Probes       []Probe
	ProbesSince  time.Time // time since which all are reachable, or some are not; zero: no probe yet
	Connects     Connects

	NotReady []string // reasons, one line each; empty: it is ready
}

// A LinkStatus is the state of the egress interface in the last comparison.
type LinkStatus struct {
	Found   bool             // false: the interface is missing
	MAC     net.HardwareAddr // its own
	Carrier bool             // false: the NIC below has no link
	Since   time.Time        // time of the last change of Found or Carrier; zero: no comparison yet
}

// reasons sets NotReady: a ready router forwards new connections.
func (s *Status) reasons(want plan.Network, probes bool) {
	if !s.InSync {
		s.NotReady = append(s.NotReady, s.Failure)
	}
	if s.Link.Found && !s.Link.Carrier {
		s.NotReady = append(s.NotReady, fmt.Sprintf("egress interface %s without carrier", want.Interface))
	}
	// While one family works, the router is ready: a failed readiness probe would keep
	// clients from that one, too.
	var closed []string
	families := want.Sources.Families()
	for i, first := range families {
		switch ipv6 := first.Gateway.Is6(); {
		case ipv6 && s.Closed != "":
			closed = append(closed, s.Closed)
		case s.Surroundings[i].silent():
			closed = append(closed, fmt.Sprintf("gateway %s does not answer %s", first.Gateway, ProtocolOf(first.Gateway)))
		}
	}
	if len(closed) == len(families) {
		s.NotReady = append(s.NotReady, closed...)
	}
	up := func(p Probe) bool { return p.Err == "" }
	if probes && len(s.Probes) > 0 && !slices.ContainsFunc(s.Probes, up) {
		s.NotReady = append(s.NotReady, "no destination reachable: "+Failing(s.Probes))
	}
}

// Failing returns the numbers of the failed probes by their outcome, such as "1 refused, 2
// silent".
func Failing(probes []Probe) string {
	n := make(map[string]int)
	for _, p := range probes {
		if p.unreachable() {
			n[string(p.Outcome)]++
		}
	}
	var parts []string
	for _, outcome := range slices.Sorted(maps.Keys(n)) {
		parts = append(parts, fmt.Sprintf("%d %s", n[outcome], outcome))
	}
	return strings.Join(parts, ", ")
}

// silent reports whether the gateway does not answer.
func (s Surroundings) silent() bool {
	return !s.Gateway.Reachable && (s.Gateway.Known || s.Gateway.Misses > 0)
}

// clone returns an independent copy.
func (s Status) clone() Status {
	s.Repairs = maps.Clone(s.Repairs)
	return s
}
