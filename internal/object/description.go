package object

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A Description is a valid router, as far as a resource or an attachment describes it: its
// Sources and Set. A source without a gateway has that of the node's NIC.
type Description struct {
	spec.Router
	Master string // NIC of the node; empty: the node chooses one
	Mode   string // of the macvlan, in the notation of ip-link(8)
	MTU    int    // of the macvlan, in bytes; zero: that of the NIC
	// Warnings are about accepted but probably unintended input, one line each.
	Warnings []string
}

// Description returns the router that a resource describes. The error is a Faults with every
// invalid field.
func (s Spec) Description() (Description, error) {
	b := builder{paths: resourcePaths}
	b.made.Forward = true
	if s.Mode != "" && s.Mode != ModeRedirect {
		b.fault(mode, 0, "is %q: expected Redirect, the only mode", s.Mode)
	}
	macvlan := s.NetworkInterface.Macvlan
	b.setMacvlan(string(macvlan.Mode), macvlan.Master, []string{string(Bridge), string(Private), string(VEPA), string(Passthru)})
	var ips []string
	var gateways []indexed
	for i, a := range s.Addresses {
		ips = append(ips, a.IP)
		if a.Gateway != "" {
			gateways = append(gateways, indexed{i, a.Gateway})
		}
	}
	b.setSources(ips, gateways)
	if s.Redirect == nil {
		b.fault(redirect, 0, "is missing: add redirectRules, fallbackIP, or both; {} redirects nothing")
		return b.done()
	}
	for i, r := range s.Redirect.RedirectRules {
		w := words{strconv.Itoa(int(r.Port)), string(r.Protocol), r.DestinationIP, ""}
		if r.TargetPort != 0 {
			w.target = strconv.Itoa(int(r.TargetPort))
		}
		b.addRule(i, w)
	}
	b.setFallback(s.Redirect.FallbackIP)
	return b.done()
}

// A builder makes a Description.
type builder struct {
	paths    paths
	made     Description
	faults   Faults
	gateways []indexed
	rules    []int // of each redirect, the index of the rule
	used     map[service]bool
}

func (b *builder) fault(f field, index int, format string, args ...any) {
	b.faults = append(b.faults, b.paths.at(f, index, format, args...))
}

func (b *builder) warn(f field, index int, format string, args ...any) {
	b.made.Warnings = append(b.made.Warnings, b.paths.at(f, index, format, args...).Error())
}

func (b *builder) done() (Description, error) {
	if len(b.faults) == 0 {
		b.validate()
	}
	if err := b.faults.Err(); err != nil {
		return Description{}, err
	}
	return b.made, nil
}

// validate adds the faults and the warnings about the router.
func (b *builder) validate() {
	// RFC 8200, section 5. Below it, Linux has no IPv6 on an interface.
	const least = 1280
	if b.made.MTU != 0 && b.made.MTU < least && len(b.made.Sources.Of(true)) > 0 {
		b.fault(macvlanMTU, 0, "is \"%d\": IPv6 needs at least %d bytes", b.made.MTU, least)
	}
	for _, f := range slices.Concat(b.made.Sources.Validate(), b.made.Sources.ValidateGateways(), b.made.ValidateDestinations()) {
		at, index, value := b.place(f)
		if !value.IsValid() {
			continue // a gateway that is that of the NIC
		}
		why := f.Why.In(b.paths)
		if hint := f.Hint.In(b.paths); hint != "" {
			why += " (" + hint + ")"
		}
		if f.Warning {
			b.warn(at, index, "is %q: %s", value, why)
		} else {
			b.fault(at, index, "is %q: %s", value, why)
		}
	}
}

// place returns the field of a fault, with its index and its value.
func (b *builder) place(f spec.Fault) (at field, index int, value netip.Addr) {
	switch f.Field {
	case wording.Source:
		return addressIP, f.Index, b.made.Sources[f.Index].Prefix.Addr()
	case wording.Gateway:
		value = b.made.Sources[f.Index].Gateway
		i := max(0, slices.IndexFunc(b.gateways, func(g indexed) bool {
			a, _ := spec.ParseAddress(g.text)
			return a == value
		}))
		if len(b.gateways) > 0 {
			index = b.gateways[i].index
		}
		return gateway, index, value
	}
	redirects := b.made.Set.Redirects
	if f.Index < len(redirects) {
		return ruleDestination, b.rules[f.Index], redirects[f.Index].To
	}
	return fallback, 0, b.made.Set.Fallbacks()[f.Index-len(redirects)]
}

// setMacvlan sets the macvlan. modes are the values of the form of description; any case is
// accepted.
func (b *builder) setMacvlan(how, master string, modes []string) {
	if b.made.Mode = strings.ToLower(how); how == "" {
		b.made.Mode = "bridge"
	}
	if !slices.ContainsFunc(modes, func(m string) bool { return strings.EqualFold(m, b.made.Mode) }) {
		b.fault(macvlanMode, 0, "is %q: expected one of %s", how, strings.Join(modes, ", "))
	}
	// The kernel's names of interfaces (dev_valid_name in net/core/dev.c).
	if b.made.Master = master; len(master) > 15 || strings.ContainsAny(master, " \t\n/:") || master == "." || master == ".." {
		b.fault(macvlanMaster, 0, "is %q: expected the name of a NIC of the node, for example eth1", master)
	}
}

// An indexed is a text of a list.
type indexed struct {
	index int
	text  string
}

// setSources sets the reserved addresses.
func (b *builder) setSources(ips []string, gateways []indexed) {
	if len(ips) == 0 {
		b.fault(addresses, 0, "is empty: add the reserved address with the length of its subnet, for example 192.168.12.99/24")
	}
	if most := 2 * rules.MostSources; len(ips) > most {
		b.fault(addresses, 0, "has %d entries: expected at most %d of each family", len(ips), most/2)
		return
	}
	for i, text := range ips {
		p, why := spec.ParsePrefix(text)
		if why != "" {
			b.fault(addressIP, i, "is %q: %s", text, why)
			continue
		}
		if !strings.Contains(text, "/") {
			b.warn(addressIP, i, "is %q, without the length of its subnet: hosts of the subnet are reached by the gateway", text)
		}
		b.made.Sources = append(b.made.Sources, spec.Source{Prefix: p})
	}
	b.gateways = gateways
	for _, g := range gateways {
		b.setGateway(g)
	}
}

// setGateway sets the gateway of a family.
func (b *builder) setGateway(g indexed) {
	a, why := spec.ParseAddress(g.text)
	if why != "" {
		b.fault(gateway, g.index, "is %q: %s", g.text, why)
		return
	}
	of := b.made.Sources.Of(a.Is6())
	switch {
	case len(b.faults) > 0 && len(of) == 0: // probably for that reason
	case len(of) == 0:
		b.fault(gateway, g.index, "is %q: there is no reserved address of %s", g.text, rules.FamilyOf(a))
	case of[0].Gateway.IsValid() && of[0].Gateway != a:
		b.fault(gateway, g.index, "is %q, and %s before it: the addresses of a family have one gateway", g.text, of[0].Gateway)
	}
	for i, s := range b.made.Sources {
		if s.Prefix.Addr().Is6() == a.Is6() {
			b.made.Sources[i].Gateway = a
		}
	}
}

// words are the parts of a redirect as text.
type words struct{ port, protocol, address, target string }

// addRule adds a redirect.
func (b *builder) addRule(i int, w words) {
	before := len(b.faults)
	var r rules.Redirect
	var ok bool
	if r.Protocol, ok = protocols[strings.ToUpper(w.protocol)]; !ok {
		b.fault(ruleProtocol, i, "is %q: expected TCP, UDP or SCTP", w.protocol)
	}
	if r.Port, ok = parsePort(w.port); !ok {
		b.fault(rulePort, i, "is %s: expected a port from 1 to 65535", w.port)
	}
	if w.target != "" {
		if r.ToPort, ok = parsePort(w.target); !ok {
			b.fault(ruleTarget, i, "is %s: expected a port from 1 to 65535", w.target)
		}
	}
	if r.To = b.parseDestination(ruleDestination, i, w.address); len(b.faults) > before {
		return
	}
	key := service{r.Protocol, r.Port, r.To.Is6()}
	if b.used[key] {
		b.warn(rulePort, i, "is %d of %s, as an earlier one: the first one is used", r.Port, w.protocol)
		return
	}
	if b.used == nil {
		b.used = make(map[service]bool)
	}
	b.used[key] = true
	b.made.Set.Redirects = append(b.made.Set.Redirects, r)
	b.rules = append(b.rules, i)
}

// A service is a port that one redirect may have.
type service struct {
	protocol rules.Protocol
	port     rules.Port
	ipv6     bool
}

// protocols are the protocols by the values of the resource.
var protocols = map[string]rules.Protocol{string(TCP): rules.TCP, string(UDP): rules.UDP, string(SCTP): rules.SCTP}

// setFallback sets the destination of all other ports.
func (b *builder) setFallback(text string) {
	if text == "" {
		return
	}
	a := b.parseDestination(fallback, 0, text)
	if a.Is6() {
		b.made.Set.Fallback6 = a
	} else {
		b.made.Set.Fallback = a
	}
}

// parseDestination parses the address of a server. A length behind it has no meaning.
func (b *builder) parseDestination(f field, i int, text string) netip.Addr {
	address, length, given := strings.Cut(text, "/")
	a, why := spec.ParseAddress(address)
	if why == "" && given {
		if _, why = spec.ParseLength(length, a.BitLen()); why != "" {
			why = "a length is not needed, and this one is none"
		}
	}
	if why != "" {
		b.fault(f, i, "is %q: %s", text, why)
	}
	return a
}

// parsePort parses a decimal number without leading zeros.
func parsePort(s string) (rules.Port, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return rules.Port(n), err == nil && n > 0 && strconv.FormatUint(n, 10) == s
}
