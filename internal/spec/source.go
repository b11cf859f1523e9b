package spec

import (
	"net/netip"
	"slices"
	"strings"
)

// A Source is an address of the physical network that is reserved for the router:
// connections to that network have it as their source.
type Source struct {
	Prefix  netip.Prefix // the address with its length
	Gateway netip.Addr   // of its family, on the physical network
}

// Sources are the reserved addresses, in the order of the user. The first one of a family
// is the source of the routes.
type Sources []Source

// Of returns the sources of IPv6, or of IPv4.
func (s Sources) Of(ipv6 bool) Sources {
	return slices.DeleteFunc(slices.Clone(s), func(a Source) bool { return a.Prefix.Addr().Is6() != ipv6 })
}

// Families returns the first source of each family that has one, IPv4 before IPv6.
func (s Sources) Families() Sources {
	var first Sources
	for _, ipv6 := range []bool{false, true} {
		if of := s.Of(ipv6); len(of) > 0 {
			first = append(first, of[0])
		}
	}
	return first
}

// Addresses returns the addresses.
func (s Sources) Addresses() []netip.Addr {
	var all []netip.Addr
	for _, a := range s {
		all = append(all, a.Prefix.Addr())
	}
	return all
}

// Prefixes returns the addresses with their lengths.
func (s Sources) Prefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, a := range s {
		all = append(all, a.Prefix)
	}
	return all
}

// Have reports whether a is a source.
func (s Sources) Have(a netip.Addr) bool {
	return slices.ContainsFunc(s, func(have Source) bool { return have.Prefix.Addr() == a })
}

// HaveGateway reports whether a is a gateway.
func (s Sources) HaveGateway(a netip.Addr) bool {
	return slices.ContainsFunc(s, func(have Source) bool { return have.Gateway == a })
}

// String returns the addresses with their lengths.
func (s Sources) String() string {
	var all []string
	for _, a := range s {
		all = append(all, a.Prefix.String())
	}
	return strings.Join(all, ", ")
}

// Gateways returns the gateways of the families.
func (s Sources) Gateways() string {
	var all []string
	for _, a := range s.Families() {
		all = append(all, a.Gateway.String())
	}
	return strings.Join(all, ", ")
}
