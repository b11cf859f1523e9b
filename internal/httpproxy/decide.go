package httpproxy

import (
	"net/netip"
	"slices"
	"strings"
)

// A Host is the host of a request: either a name or an address.
type Host struct {
	Name string     // lower case, no dot at its end
	Addr netip.Addr // never an IPv4-mapped IPv6 address

	// Absolute is set for a name that was written with a final dot, to which no
	// search list applies.
	Absolute bool
}

// String returns the name or the address.
func (h Host) String() string {
	if h.Addr.IsValid() {
		return h.Addr.String()
	}
	return h.Name
}

// A Destination is a host together with one address to dial for it.
type Destination struct {
	Host Host
	// Full is the name that the search list made of Host.Name, and by which rules
	// match too. It may be empty.
	Full string
	// Addr is the host's address, or one to which its name resolves, or the zero
	// Addr if the name does not resolve.
	Addr netip.Addr
	// Names returns the names of a host that is an address. It must return only
	// names that resolve to the address, since the owner of an address can give it
	// any reverse name. It is called only if the decision depends on it.
	Names func() []string
	// Local is set for a local address of the proxy (see local.go), which no name
	// and no wildcard allows, only a rule for the address.
	Local bool

	inside []netip.Addr // embedded(Addr), see Decide
}

// A Verdict is the decision of the rules on one destination.
type Verdict struct {
	Allow bool
	Rule  Rule // first rule that matched; the zero Rule: none
	Local bool // denied only because the address is local
}

// Decide returns the decision of the first rule that matches a destination.
func (r Rules) Decide(d Destination) Verdict {
	local := false
	d.inside = embedded(d.Addr)
	for _, rule := range r {
		switch {
		case !rule.matches(d):
		case d.Local && !rule.Deny && !rule.names(d):
			local = true // otherwise it would be allowed
		default:
			return Verdict{Allow: !rule.Deny, Rule: rule}
		}
	}
	return Verdict{Local: local}
}

// DecideName returns the decision on a name before it is resolved. decided is true if
// the name is denied as any of its full names and for any addresses, so that it need not
// be resolved.
func (r Rules) DecideName(name string, full []string) (v Verdict, decided bool) {
	for i := range full {
		one, denied := r.deniesName(Destination{Host: Host{Name: name}, Full: full[i]})
		if !denied {
			return one, false
		}
		if i == 0 {
			v = one
		}
	}
	return v, true
}

func (r Rules) deniesName(d Destination) (v Verdict, decided bool) {
	for _, rule := range r {
		if rule.Network.IsValid() {
			return Verdict{}, false
		}
		if rule.matches(d) {
			return Verdict{Rule: rule}, rule.Deny
		}
	}
	return Verdict{}, true
}

func (r Rule) matches(d Destination) bool {
	switch {
	case r.Any:
		return true
	case r.Network.IsValid():
		return d.Addr.IsValid() && (r.Network.Contains(d.Addr) || r.containsInside(d))
	case d.Host.Name != "":
		return r.matchesName(d.Host.Name) || d.Full != "" && r.matchesName(d.Full)
	case d.Names != nil:
		for _, name := range d.Names() {
			if name, ok := parseName(name); ok && r.matchesName(name) {
				return true
			}
		}
	}
	return false
}

// containsInside reports whether a rule matches an IPv4 address inside the destination's
// IPv6 address. If there may be several, only a rule that denies does.
func (r Rule) containsInside(d Destination) bool {
	return (r.Deny || len(d.inside) == 1) && slices.ContainsFunc(d.inside, r.Network.Contains)
}

// names reports whether a rule names the local address of a destination.
func (r Rule) names(d Destination) bool {
	return names(r.Network, d.Addr) || len(d.inside) == 1 && names(r.Network, d.inside[0])
}

// deniesFamily reports whether a rule denies a whole address family. That one is not
// used by a name that also has addresses of the other.
func (r Rule) deniesFamily() bool { return r.Deny && r.Network.IsValid() && r.Network.Bits() == 0 }

// haveNames reports whether there are rules for names.
func (r Rules) haveNames() bool {
	return slices.ContainsFunc(r, func(rule Rule) bool { return rule.Name != "" })
}

// nameRule reports whether a rule for names matches a name of an address.
func (r Rules) nameRule(name string) bool {
	name, ok := parseName(name)
	return ok && slices.ContainsFunc(r, func(rule Rule) bool { return rule.Name != "" && rule.matchesName(name) })
}

func (r Rule) matchesName(name string) bool {
	if name == r.Name {
		return true
	}
	above, ok := strings.CutSuffix(name, r.Name)
	return r.Below && ok && strings.HasSuffix(above, ".")
}
