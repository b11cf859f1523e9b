package httpproxy

import (
	"net/netip"
	"strings"
)

// A Host is what a client asks for: a name or an address, never both.
type Host struct {
	Name string     // lower case, no dot at its end
	Addr netip.Addr // no IPv4 address in IPv6 clothes
}

// String returns the host as one would write it.
func (h Host) String() string {
	if h.Addr.IsValid() {
		return h.Addr.String()
	}
	return h.Name
}

// A Destination is a host together with one address to dial for it.
type Destination struct {
	Host Host
	// Addr is the host's own, or one that its name resolves to, or the zero
	// Addr where the name does not resolve.
	Addr netip.Addr
	// Names returns the names of a host that is an address. Only those count
	// that resolve back to it: whoever has an address can give it any name. It
	// is called only if the decision hangs on it.
	Names func() []string
	// Local: the address belongs to the proxy's own side (see local.go). Such a
	// one is allowed by no name and no wildcard, only by a rule that names it.
	Local bool
}

// A Verdict is what the rules say of one destination.
type Verdict struct {
	Allow bool
	Rule  Rule // that decided; the zero Rule where none did
	Local bool // denied only because the address is local
}

// Decide returns what the first rule says that matches a destination.
func (r Rules) Decide(d Destination) Verdict {
	local := false
	for _, rule := range r {
		switch {
		case !rule.matches(d):
		case d.Local && !rule.Deny && !names(rule.Network, d.Addr):
			local = true // what would have allowed it
		default:
			return Verdict{Allow: !rule.Deny, Rule: rule}
		}
	}
	return Verdict{Local: local}
}

// DecideName returns what the rules say of a name before it is resolved, if that
// can be told: what is denied whatever its addresses are is not looked up.
func (r Rules) DecideName(name string) (v Verdict, decided bool) {
	d := Destination{Host: Host{Name: name}}
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
		return d.Addr.IsValid() && r.Network.Contains(d.Addr)
	case d.Host.Name != "":
		return r.matchesName(d.Host.Name)
	case d.Names != nil:
		for _, name := range d.Names() {
			if name, ok := parseName(name); ok && r.matchesName(name) {
				return true
			}
		}
	}
	return false
}

func (r Rule) matchesName(name string) bool {
	if name == r.Name {
		return true
	}
	above, ok := strings.CutSuffix(name, r.Name)
	return r.Below && ok && strings.HasSuffix(above, ".")
}
