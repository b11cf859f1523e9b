package config

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// extendedSources is what the extended grammar accepts in place of one IPv4 address.
const extendedSources = "IPv4 and IPv6 addresses, with commas between them, for example 192.168.12.99/24, 2001:db8:12::99/64"

// parseExtendedSource parses EGRESS_SOURCE in the extended grammar: addresses of both
// families, each with or without a length. One IPv4 address means the same as in the legacy
// grammar.
func (c *Config) parseExtendedSource(s string) *Error {
	bad := func(format string, args ...any) *Error {
		return &Error{"EGRESS_SOURCE", "EGRESS_SOURCE unspecified or invalid", remedy(format, args...)}
	}
	if s == "" {
		return bad("EGRESS_SOURCE is not set: set it to reserved addresses: %s", extendedSources)
	}
	for word := range strings.SplitSeq(s, ",") {
		word = strings.TrimSpace(word)
		p, why := parseSourceWord(word)
		if why == "" && c.Mode != UnitTest {
			if is := unusableSource(p); is != "" {
				why = is + " cannot be the source of connections"
			}
		}
		switch {
		case word == "":
			return bad("EGRESS_SOURCE is %s: an address is missing beside a comma", quote(s))
		case why != "":
			return bad("EGRESS_SOURCE contains %s: %s", quote(word), why)
		case c.Sources.Have(p.Addr()):
			return bad("EGRESS_SOURCE contains %s twice: remove one", p.Addr())
		}
		c.Sources = append(c.Sources, spec.Source{Prefix: p})
		// The rules that spread clients over the sources of a family have a limit.
		if n := len(c.Sources.Of(p.Addr().Is6())); n > rules.MostSources {
			return bad("EGRESS_SOURCE has more than %d addresses of one family: clients are spread over at most so many", rules.MostSources)
		}
	}
	return nil
}

// parseSourceWord parses an address with or without a length, or returns why it is none.
func parseSourceWord(word string) (p netip.Prefix, why string) {
	address, length, given := strings.Cut(word, "/")
	a, why := parseAddress(address)
	if why != "" {
		return p, why
	}
	bits := a.BitLen()
	if given {
		n, err := parseLength(length, bits)
		if err != nil {
			return p, fmt.Sprintf("the length after the slash is a number from 0 to %d", bits)
		}
		bits = n
	}
	return netip.PrefixFrom(a, bits), ""
}

// parseAddress parses an address, or returns why it is none.
func parseAddress(s string) (a netip.Addr, why string) {
	a, err := netip.ParseAddr(s)
	switch m := mistake(s); {
	case m != "":
		return a, m
	case err != nil && strings.Contains(s, " "):
		return a, "write commas between addresses"
	case err != nil:
		return a, "expected an IPv4 or IPv6 address"
	case a.Zone() != "":
		return a, "an address has no zone: the interface is known, write " + a.WithZone("").String()
	case a.Is4In6():
		return a, "an IPv4 address within IPv6: write " + a.Unmap().String()
	}
	return a, ""
}

// unusableSource is unusable for a source of either family. The address of a link is not
// routed (RFC 4291, section 2.5.6), and the first address of an IPv6 subnet is that of
// every router in it (section 2.6.1; RFC 6164 excepts a length of 127).
func unusableSource(p netip.Prefix) string {
	a := p.Addr()
	if a.Is4() {
		return unusable(a, p)
	}
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.IsLoopback():
		return "the loopback address"
	case a.IsMulticast():
		return "a multicast address"
	case a.IsLinkLocalUnicast():
		return "a link-local address"
	case p.Bits() < 127 && a == p.Masked().Addr():
		return "the address of all routers of " + p.Masked().String()
	}
	return ""
}

// parseExtendedGateway parses EGRESS_GATEWAY in the extended grammar: one gateway for each
// family that has a source.
func (c *Config) parseExtendedGateway(s string) *Error {
	bad := func(format string, args ...any) *Error {
		return &Error{"EGRESS_GATEWAY", "EGRESS_GATEWAY unspecified or invalid", remedy(format, args...)}
	}
	if s == "" {
		return bad("EGRESS_GATEWAY is not set: set it to the address of the physical network's gateway, for each family of EGRESS_SOURCE, for example 192.168.12.1, fe80::1")
	}
	var gateways [2]netip.Addr // of IPv4 and IPv6
	for word := range strings.SplitSeq(s, ",") {
		word = strings.TrimSpace(word)
		a, why := parseAddress(word)
		switch {
		case word == "":
			return bad("EGRESS_GATEWAY is %s: an address is missing beside a comma", quote(s))
		case strings.Contains(word, "/"):
			return bad("EGRESS_GATEWAY contains %s: a gateway is one address, without a length", quote(word))
		case why != "":
			return bad("EGRESS_GATEWAY contains %s: %s", quote(word), why)
		case c.Sources == nil: // another error
			continue
		}
		if why := c.unusableGateway(a); why != "" && c.Mode != UnitTest {
			return bad("EGRESS_GATEWAY contains %q: %s", word, why)
		}
		of := &gateways[index(a)]
		switch {
		case len(c.Sources.Of(a.Is6())) == 0:
			return bad("EGRESS_GATEWAY contains %s, and EGRESS_SOURCE no %s address: add one, or remove the gateway", a, familyName(a))
		case of.IsValid():
			return bad("EGRESS_GATEWAY contains %s and %s: a family has one gateway", *of, a)
		}
		*of = a
	}
	for i, s := range c.Sources {
		a := s.Prefix.Addr()
		if c.Sources[i].Gateway = gateways[index(a)]; !c.Sources[i].Gateway.IsValid() {
			return bad("EGRESS_GATEWAY contains no %s address for EGRESS_SOURCE %s: add the gateway of that family", familyName(a), a)
		}
	}
	for _, first := range c.Sources.Families() {
		c.warnOfSubnet(first)
	}
	return nil
}

// warnOfSubnet adds a warning if a gateway is outside of the subnets of its family's
// sources: legal, because the router adds a route to the gateway, and probably a mistake.
func (c *Config) warnOfSubnet(first spec.Source) {
	gateway := first.Gateway
	if c.Mode == UnitTest || gateway.Is6() && gateway.IsLinkLocalUnicast() {
		return
	}
	for _, s := range c.Sources.Of(gateway.Is6()) {
		if s.Prefix.IsSingleIP() || s.Prefix.Contains(gateway) {
			return
		}
	}
	c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_GATEWAY %s is outside of the subnet of EGRESS_SOURCE, %s: check both, and the length", gateway, first.Prefix.Masked()))
}

// unusableGateway returns why an address is no gateway.
func (c *Config) unusableGateway(a netip.Addr) string {
	if c.Sources.Have(a) {
		return "the same as in EGRESS_SOURCE: the gateway is another host"
	}
	for _, s := range c.Sources.Of(a.Is6()) {
		is := ""
		switch {
		case a.Is4():
			is = unusable(a, s.Prefix)
		case !a.IsLinkLocalUnicast():
			is = unusableSource(netip.PrefixFrom(a, 128)) // a gateway may be the first of its subnet
		}
		if is != "" {
			return is + " cannot be a gateway"
		}
	}
	return ""
}

// index returns 0 for IPv4, and 1 for IPv6.
func index(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

func familyName(a netip.Addr) string { return [2]string{"IPv4", "IPv6"}[index(a)] }

// orExtended adds to an error of the legacy grammar that the extended one accepts the value,
// if it does.
func (e *Error) orExtended(accepts bool) *Error {
	if e != nil && accepts {
		e.Hint += "; EGRESS_GRAMMAR=extended accepts this value"
	}
	return e
}

// parseSides parses the reserved addresses and their gateways.
func (c *Config) parseSides(source, gateway string) (inSource, inGateway *Error) {
	if c.Grammar == rules.Extended {
		inSource = c.parseExtendedSource(source)
		if inSource != nil {
			c.Sources = nil
		}
		return inSource, c.parseExtendedGateway(gateway)
	}
	inSource = c.parseSource(source)
	inGateway = c.parseGateway(gateway)
	if inSource == nil && inGateway == nil {
		return nil, nil
	}
	other := Config{Mode: c.Mode}
	acceptsSource := other.parseExtendedSource(source) == nil
	acceptsGateway := acceptsSource && other.parseExtendedGateway(gateway) == nil
	return inSource.orExtended(acceptsSource), inGateway.orExtended(acceptsGateway)
}
