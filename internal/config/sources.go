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
		switch {
		case word == "":
			return bad("EGRESS_SOURCE is %s: an address is missing beside a comma", quote(s))
		case why != "":
			return bad("EGRESS_SOURCE contains %s: %s", quote(word), why)
		}
		c.Sources = append(c.Sources, spec.Source{Prefix: p})
	}
	return nil
}

const commas = "write commas between addresses"

// parseSourceWord parses an address with or without a length, or returns why it is none.
func parseSourceWord(word string) (p netip.Prefix, why string) {
	if strings.ContainsAny(word, "; \t\n") && mistake(word) == "" {
		return p, commas
	}
	address, _, _ := strings.Cut(word, "/")
	if _, why := parseAddress(address); why != "" {
		return p, why
	}
	return spec.ParsePrefix(word)
}

// parseAddress parses an address, or returns why it is none.
func parseAddress(s string) (a netip.Addr, why string) {
	a, why = spec.ParseAddress(s)
	if m := mistake(s); m != "" {
		return a, m
	}
	if why != "" && strings.ContainsAny(s, " ;") {
		return a, commas
	}
	return a, why
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
	return nil
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

// parseSides parses the reserved addresses and their gateways. Like the original, unit-test
// does not check whether hosts can have addresses of the legacy grammar.
func (c *Config) parseSides(source, gateway string) (inSource, inGateway *Error) {
	if c.Spread = c.Grammar == rules.Extended; c.Spread {
		inSource, inGateway = c.parseExtendedSource(source), c.parseExtendedGateway(gateway)
	} else {
		inSource, inGateway = c.parseSource(source), c.parseGateway(gateway)
	}
	if c.Mode != UnitTest || c.Grammar == rules.Extended {
		if inSource == nil {
			inSource = c.sideFault("EGRESS_SOURCE", source, c.Sources.Validate())
		}
		if inGateway == nil {
			inGateway = c.sideFault("EGRESS_GATEWAY", gateway, c.Sources.ValidateGateways())
		}
	}
	if inSource != nil {
		c.Sources = nil
	}
	if c.Grammar == rules.Extended || inSource == nil && inGateway == nil {
		return inSource, inGateway
	}
	other := Config{Mode: c.Mode, Grammar: rules.Extended}
	otherSource, otherGateway := other.parseSides(source, gateway)
	return inSource.orExtended(otherSource == nil), inGateway.orExtended(otherSource == nil && otherGateway == nil)
}

// sideFault returns the error of the first fault, and adds the warnings.
func (c *Config) sideFault(variable, value string, faults []spec.Fault) *Error {
	for _, f := range faults {
		why := f.Why.In(Names{})
		if f.Warning {
			c.Warnings = append(c.Warnings, variable+" "+why)
			continue
		}
		found := fmt.Sprintf("is %s", quote(value))
		if c.Grammar == rules.Extended {
			found = fmt.Sprintf("contains %q", c.sideText(variable, f.Index))
		}
		return &Error{variable, variable + " unspecified or invalid", remedy("%s %s: %s", variable, found, why)}
	}
	return nil
}

// sideText returns a source, or its gateway.
func (c *Config) sideText(variable string, index int) string {
	if variable == "EGRESS_GATEWAY" {
		return c.Sources[index].Gateway.String()
	}
	return c.Sources[index].Prefix.String()
}
