package spec

import (
	"math"
	"net/netip"
	"slices"

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A Fault is what is wrong with a field of a description.
type Fault struct {
	Field wording.Field
	// Index of the value within the field: of a source, of a network, or of an entry of the
	// destinations, of which the fallbacks are the last ones. Zero for other fields.
	Index   int
	Why     wording.Text // what was found, and expected
	Hint    wording.Text // what to do; may be empty
	Warning bool         // a router can be like that, and is hardly meant to be
}

// Validate returns the faults of a description. Without faults other than warnings a router
// can be made of it.
func (r Router) Validate() []Fault {
	return slices.Concat(r.Sources.Validate(), r.Sources.ValidateGateways(), r.ValidateDestinations(), r.ValidateHealthPort(), r.ValidateStandby(),
		r.validateInterfaces(), r.validateReply(), r.ValidateClusterDestinations())
}

// mostOfBoth is the largest number of reserved addresses.
const mostOfBoth = 2 * rules.MostSources

// Validate returns the faults of the addresses.
func (s Sources) Validate() []Fault {
	if len(s) == 0 {
		return []Fault{{Field: wording.Source, Why: wording.Textf("there is no reserved address")}}
	}
	var faults []Fault
	fault := func(i int, format string, args ...any) {
		faults = append(faults, Fault{Field: wording.Source, Index: i, Why: wording.Textf(format, args...)})
	}
	for i, a := range s[:min(len(s), mostOfBoth+1)] { // the last one is too many
		if is := unusableSource(a.Prefix); is != "" {
			fault(i, "%s cannot be the source of connections", is)
		}
		if s[:i].Have(a.Prefix.Addr()) {
			fault(i, "it is there twice: remove one")
		}
		// The rules that spread clients over the sources of a family have a limit.
		if len(s[:i].Of(a.Prefix.Addr().Is6())) == rules.MostSources {
			fault(i, "it is one of more than %d addresses of one family: clients are spread over at most so many", rules.MostSources)
		}
	}
	return faults
}

// ValidateGateways returns the faults of the gateways.
func (s Sources) ValidateGateways() []Fault {
	if len(s) > mostOfBoth { // a fault of Validate
		return nil
	}
	var faults []Fault
	seen := make(map[bool]netip.Addr) // by whether the family is IPv6
	for i, a := range s {
		family := a.Prefix.Addr().Is6()
		fault := Fault{Field: wording.Gateway, Index: i}
		first, again := seen[family]
		why, unusable := s.unusableGateway(a.Gateway)
		switch {
		case !a.Gateway.IsValid() || a.Gateway.Is6() != family:
			fault.Why = wording.Textf("there is no %s gateway for %s: add one", familyName(a.Prefix.Addr()), a.Prefix.Addr())
		case again && a.Gateway != first:
			fault.Why = wording.Textf("%s and %s are gateways of one family, which has one: remove one", first, a.Gateway)
		case unusable && !again:
			fault.Why = why
		case !unusable && !a.Prefix.IsSingleIP() && !a.Prefix.Contains(a.Gateway) && (!family || !a.Gateway.IsLinkLocalUnicast()):
			// Legal, because the router adds a route to the gateway, and probably a mistake.
			fault.Why = wording.Textf("%s is outside of the subnet of %s, %s: check both, and the length", a.Gateway, wording.Source, a.Prefix.Masked())
			fault.Warning = true
		default:
			seen[family] = a.Gateway
			continue
		}
		seen[family] = a.Gateway
		faults = append(faults, fault)
	}
	return faults
}

// unusableGateway returns why an address is no gateway.
func (s Sources) unusableGateway(a netip.Addr) (why wording.Text, unusable bool) {
	if s.Have(a) {
		return wording.Textf("it is the same as %s: the gateway is another host", wording.Source), true
	}
	for _, other := range s.Of(a.Is6()) {
		is := ""
		switch {
		case a.Is4():
			is = Unusable(a, other.Prefix)
		case !a.IsLinkLocalUnicast():
			is = unusableSource(netip.PrefixFrom(a, 128)) // a gateway may be the first of its subnet
		}
		if is != "" {
			return wording.Textf("%s cannot be a gateway", is), true
		}
	}
	return wording.Text{}, false
}

// ValidateDestinations returns the faults of the destinations, among them a warning for
// each that no external server has. The original accepted such.
func (r Router) ValidateDestinations() []Fault {
	var faults []Fault
	add := func(i int, warning bool, why, hint wording.Text) {
		faults = append(faults, Fault{wording.Destinations, i, why, hint, warning})
	}
	without := len(r.Sources) > 0 && len(r.Sources.Of(false)) == 0
	without6 := len(r.Sources) > 0 && len(r.Sources.Of(true)) == 0
	for i, a := range r.Set.All() {
		is, lost := r.Sources.unusableDestination(a), "connections redirected to it fail"
		if r.Sources.Have(a) {
			is, lost = "the reserved address", "connections redirected to it end in the pod"
		}
		switch {
		case a.Is4() && without || a.Is6() && without6:
			add(i, false, wording.Textf("it is for %s, and %s has no %[1]s address", familyName(a), wording.Source),
				wording.Textf("connections leave with a source of the same family: remove it, or reserve an address for them"))
		case is != "":
			add(i, true, wording.Textf("%s is %s: %s", a, is, lost), wording.Text{})
		}
	}
	return faults
}

// ValidateHealthPort returns a fault if a redirect has the port that the namespace itself
// answers.
func (r Router) ValidateHealthPort() []Fault {
	taken := func(redirect rules.Redirect) bool { return redirect.Contains(rules.TCP, r.HealthPort) }
	if r.HealthPort == 0 || !slices.ContainsFunc(r.Set.Redirects, taken) {
		return nil
	}
	return []Fault{{Field: wording.HealthListen, Why: wording.Textf("%s has port %d, which is also a local port of the destinations: choose another port", wording.HealthListen, r.HealthPort)}}
}

// ValidateStandby returns a fault if a redirect has the port by which the routers with the
// same addresses speak with each other.
func (r Router) ValidateStandby() []Fault {
	if r.Standby == nil {
		return nil
	}
	ports := []rules.Port{rules.Port(r.Standby.Port)}
	if r.Standby.Carry != nil {
		ports = append(ports, CarryPort)
	}
	var faults []Fault
	for _, port := range ports {
		if slices.ContainsFunc(r.Set.Redirects, func(redirect rules.Redirect) bool { return redirect.Contains(rules.UDP, port) }) {
			faults = append(faults, Fault{Field: wording.Standby, Why: wording.Textf("the routers of one address speak with each other by UDP port %d, which is also a local port of the destinations: redirect another port", port)})
		}
	}
	return faults
}

// unusableDestination returns why no external server has an address.
func (s Sources) unusableDestination(a netip.Addr) string {
	if a.Is6() {
		return unusableSource(netip.PrefixFrom(a, a.BitLen()))
	}
	for _, other := range s {
		if is := Unusable(a, other.Prefix); is != "" {
			return is
		}
	}
	return Unusable(a, netip.Prefix{})
}

// validateInterfaces returns the faults of the two sides.
func (r Router) validateInterfaces() []Fault {
	var faults []Fault
	for _, side := range []struct {
		field wording.Field
		name  string
	}{{wording.Interface, r.Egress}, {wording.ClusterInterface, r.Cluster}} {
		if side.name == Loopback {
			faults = append(faults, Fault{Field: side.field, Why: wording.Textf("%q is the loopback interface: expected one that leads to a network", side.name)})
		}
		if why := FaultOfInterface(side.name); why != "" {
			faults = append(faults, Fault{Field: side.field, Why: wording.Textf("%q is not an interface name: %s", side.name, why)})
		}
	}
	if r.Egress == r.Cluster {
		faults = append(faults, Fault{Field: wording.ClusterInterface, Why: wording.Textf("%q is also %s", r.Cluster, wording.Interface),
			Hint: wording.Textf("the cluster side and the egress side need an interface each")})
	}
	return faults
}

// validateReply returns the faults of the reply path.
func (r Router) validateReply() []Fault {
	var faults []Fault
	if r.ReplyMark == 0 {
		faults = append(faults, Fault{Field: wording.ReplyMark, Why: wording.Textf("0 is no mark")})
	}
	if !UsableTable(r.ReplyTable) {
		faults = append(faults, Fault{Field: wording.ReplyTable, Why: wording.Textf("%d is not a table to use: expected a number from 1 to %d, other than 253, 254 and 255", r.ReplyTable, math.MaxInt32)})
	}
	return faults
}

// UsableTable reports whether a routing table may be used: 253 to 255 are the kernel's own
// (linux/rtnetlink.h, rt_class_t).
func UsableTable(n int) bool { return n > 0 && n <= math.MaxInt32 && (n < 253 || n > 255) }

// ValidateClusterDestinations returns the faults of the networks of the cluster side. One
// that contains the gateway or a destination would send redirected connections back there.
func (r Router) ValidateClusterDestinations() []Fault {
	var faults []Fault
	for i, p := range r.ClusterDestinations {
		fault := Fault{Field: wording.ClusterDestinations, Index: i}
		is := ""
		if p.IsValid() {
			is = Unusable(p.Addr(), netip.Prefix{})
		}
		switch inside, ok := r.insideOf(p); {
		case !p.IsValid() || p.Addr().Is4In6() || p.Addr().Is6() && len(r.Sources.Of(true)) == 0 || p.Bits() == 0:
			fault.Why = wording.Textf("expected an IPv4 network such as 10.96.0.0/12")
		case p != p.Masked():
			fault.Why = wording.Textf("the network with that length is %s", p.Masked())
			fault.Hint = wording.Textf("write %s, or %s/%d for that address alone", p.Masked(), p.Addr(), p.Addr().BitLen())
		case is != "":
			fault.Why = wording.Textf("it begins with %s", is)
			fault.Hint = wording.Textf("leave it out: it is not a network of hosts")
		case ok:
			fault.Why = inside
			fault.Hint = wording.Textf("write smaller networks that do not contain it: their addresses are reached by the cluster side")
		default:
			continue
		}
		faults = append(faults, fault)
	}
	return faults
}

// insideOf says what of the physical network is inside of a network of the cluster side.
func (r Router) insideOf(p netip.Prefix) (wording.Text, bool) {
	for _, s := range r.Sources {
		if p.Contains(s.Gateway) {
			return wording.Textf("it contains %s (%s), which is on the physical network", wording.Gateway, s.Gateway), true
		}
	}
	for _, to := range r.Set.All() {
		if p.Contains(to) {
			return wording.Textf("it contains the destination %s", to), true
		}
	}
	return wording.Text{}, false
}
