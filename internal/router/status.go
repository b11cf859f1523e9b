package router

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/link"
)

// A RepairKind is what of the namespace a repair is about.
type RepairKind string

// The kinds of repairs.
const (
	RepairInterface    RepairKind = "interface"     // the egress interface was gone, and made again
	RepairLink         RepairKind = "link"          // it was down
	RepairAddress      RepairKind = "address"       // it lacked the reserved address
	RepairGatewayRoute RepairKind = "gateway-route" // to the gateway, on it
	RepairDefaultRoute RepairKind = "default-route" // missing, changed, or not the only one
	RepairRoute        RepairKind = "route"         // any other of the main table
	RepairReplyPath    RepairKind = "reply-path"    // the table of replies, and the routing rules that lead to it
	RepairForwarding   RepairKind = "forwarding"    // net.ipv4.ip_forward, and forwarding of the two interfaces
	RepairSysctl       RepairKind = "sysctl"        // rp_filter, promote_secondaries
	RepairRules        RepairKind = "rules"         // of the backend in use
	RepairStrays       RepairKind = "strays"        // rules of ours in another backend
)

// RepairKinds lists every kind.
var RepairKinds = []RepairKind{
	RepairInterface, RepairLink, RepairAddress, RepairGatewayRoute, RepairDefaultRoute, RepairRoute, RepairReplyPath,
	RepairForwarding, RepairSysctl, RepairRules, RepairStrays,
}

// kindOf returns the kind of repair that a step of the network is.
func kindOf(s link.Step, want link.Want) RepairKind {
	switch s.Op {
	case link.SetUp, link.SetDown:
		return RepairLink
	case link.AddAddress, link.RemoveAddress:
		return RepairAddress
	case link.AddRule, link.DeleteRule:
		return RepairReplyPath
	case link.WriteSysctl:
		if strings.HasSuffix(s.Sysctl, "forward") || strings.HasSuffix(s.Sysctl, "forwarding") {
			return RepairForwarding
		}
		return RepairSysctl
	case link.ReplaceRoute, link.AppendRoute, link.DeleteRoute:
		switch {
		case s.Route.Table != 0:
			return RepairReplyPath
		case s.Route.IsDefault():
			return RepairDefaultRoute
		case s.Route.Destination.IsSingleIP() && s.Route.Destination.Addr() == want.Gateway:
			return RepairGatewayRoute
		}
	}
	return RepairRoute
}

// A Status is what a router that stays knows of what it watches over. Counters
// count from its start.
type Status struct {
	Backend string // as it names itself; empty before the first comparison

	// The last comparison with the kernel.
	Right bool      // everything is as wanted
	Wrong string    // why it is not, and could not be made so
	Since time.Time // since when it is so
	// Contested is what something else changes back again and again; empty: nothing.
	Contested   string
	contestedAt time.Time // when that was last repaired

	Compared       time.Time // when everything was last compared
	Comparisons    uint64    // also those that events caused
	Repairs        map[RepairKind]uint64
	RepairFailures uint64
	Announcements  uint64

	Destinations   int // that are redirected to
	Reloads        uint64
	ReloadFailures uint64
	ReloadError    string // of the last reload; empty: it was right, or there was none

	arp.State        // of the physical network
	Unwatched string // why that is not known; empty: it is watched
	Probes    []Probe

	NotReady []string // why not, a line each; empty: it is ready
}

// reasons finds out whether it is ready: connections that come in get out.
func (s *Status) reasons(gateway netip.Addr, probes bool) {
	if !s.Right {
		s.NotReady = append(s.NotReady, s.Wrong)
	}
	if s.Gateway.Known && !s.Gateway.Reachable {
		s.NotReady = append(s.NotReady, fmt.Sprintf("gateway %s does not answer ARP", gateway))
	}
	up := func(p Probe) bool { return p.Err == "" }
	if probes && len(s.Probes) > 0 && !slices.ContainsFunc(s.Probes, up) {
		s.NotReady = append(s.NotReady, "no destination reachable")
	}
}

// clone returns a copy that does not change.
func (s Status) clone() Status {
	s.Repairs = maps.Clone(s.Repairs)
	return s
}
