package rules

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"
)

// The limits of a name and of one of its labels (RFC 1035 section 2.3.4), in characters.
const (
	maxName  = 253
	maxLabel = 63
)

// FaultOfName returns why s is no domain name of labels of letters, digits, hyphens and
// underscores, with or without a final dot, which disables the search list of the resolver;
// empty: it is one.
func FaultOfName(s string) string {
	s = strings.TrimSuffix(s, ".")
	if len(s) > maxName {
		return fmt.Sprintf("it has more than %d bytes", maxName)
	}
	for label := range strings.SplitSeq(s, ".") {
		switch rest := strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-_"); {
		case label == "":
			return "a label is empty"
		case len(label) > maxLabel:
			return fmt.Sprintf("a label has more than %d bytes", maxLabel)
		case label[0] == '-':
			return "a label begins with -"
		case rest != "":
			return fmt.Sprintf("it contains %q", []rune(rest)[0])
		}
	}
	return ""
}

// isName reports whether s is a domain name of at least two labels. One whose last label is a
// number is an invalid address (RFC 3696, section 2).
func isName(s string) bool {
	labels := strings.Split(strings.TrimSuffix(s, "."), ".")
	return len(labels) > 1 && !isDigits(labels[len(labels)-1]) && FaultOfName(s) == ""
}

// named returns r to a name, which has no address yet.
func (r Redirect) named(name string) Redirect {
	r.To, r.More.handle = netip.Addr{}, unique.Make(rest{name: strings.ToLower(name)})
	return r
}

// Name returns the name of a line that has one in place of addresses: in lower case, since
// names are case-insensitive (RFC 4343). Empty: it has addresses.
func (r Redirect) Name() string { return r.More.get().name }

// mostComment is the longest comment that both backends keep: four of the 255 bytes of an
// element's user data in nf_tables are its frame (nft_set_ext_add_length in
// include/net/netfilter/nf_tables.h).
const mostComment = 255 - 4

// Comment returns the comment of the redirect's rules and elements in the kernel: the name,
// for a router that starts while no name server answers. It is empty for a name that a
// comment cannot hold.
func (r Redirect) Comment() string {
	if name := r.Name(); len(name) <= mostComment {
		return name
	}
	return ""
}

// Names returns the names of the lines, each once, sorted.
func (s Set) Names() []string {
	var names []string
	for _, r := range s.Redirects {
		if name := r.Name(); name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// NamesBeside returns the names of the lines that another set does not have.
func (s Set) NamesBeside(other Set) []string {
	has := make(map[Redirect]bool, len(other.Redirects))
	for _, r := range other.Redirects {
		has[r] = true
	}
	return Set{Redirects: slices.DeleteFunc(slices.Clone(s.Redirects), func(r Redirect) bool { return has[r] })}.Names()
}

// A Resolution is the addresses of a name.
type Resolution struct {
	Addresses []netip.Addr // for new connections; none: not known yet
	// Former are addresses that it had. Connections to them stay, except those of a line
	// with drain=no.
	Former []netip.Addr
	// AnyFormer: it may have had any other address, as before a restart of the program.
	AnyFormer bool
}

// Resolve returns the set with the addresses of its names. A line becomes a redirect for
// each family of its addresses. It stays one without an address if none is known; one more
// stands for the existing connections to addresses of a family that it no longer has.
func (s Set) Resolve(of func(name string) Resolution) Set {
	resolved := s
	resolved.Redirects = make([]Redirect, 0, len(s.Redirects))
	for _, r := range s.Redirects {
		name := r.Name()
		if name == "" {
			resolved.Redirects = append(resolved.Redirects, r)
			continue
		}
		found := of(name)
		more := r.More.get()
		if len(found.Addresses) == 0 { // an address that is gone is not known
			more.anyKept = found.AnyFormer
			more.kept = ""
			r.More.handle = unique.Make(more)
			resolved.Redirects = append(resolved.Redirects, r)
			continue
		}
		for _, f := range []Family{IPv4, IPv6} {
			other := func(a netip.Addr) bool { return FamilyOf(a) != f }
			to := slices.DeleteFunc(slices.Clone(found.Addresses), other)
			if len(to) == 0 {
				if !more.ends && slices.ContainsFunc(found.Former, func(a netip.Addr) bool { return FamilyOf(a) == f }) {
					r.To, r.More.handle = netip.Addr{}, unique.Make(rest{name: name, anyKept: true})
					resolved.Redirects = append(resolved.Redirects, r)
				}
				continue
			}
			of := rest{name: more.name, ends: more.ends, more: pack(to[1:])}
			if !more.ends {
				of.kept, of.anyKept = pack(slices.DeleteFunc(slices.Clone(found.Former), other)), found.AnyFormer
			}
			r.To, r.More.handle = to[0], unique.Make(of)
			resolved.Redirects = append(resolved.Redirects, r)
		}
	}
	return resolved
}

// Unresolved reports whether r has a name without an address.
func (r Redirect) Unresolved() bool { return !r.To.IsValid() && r.Name() != "" }

// refused returns the ports of lines with a name that has no address of a family, each with
// the ones that follow, up to the next port without a line: the kernel compares the rest with
// one rule after the other. Their connections must not get the fallback.
func (s Set) refused(f Family) []Redirect {
	resolved := make(map[service]bool)
	var ports []Redirect
	for _, r := range s.Redirects {
		if r.Name() != "" && FamilyOf(r.To) == f {
			resolved[service{f, r.Protocol, r.Port}] = true
		}
	}
	for _, r := range s.Redirects {
		if at := (service{f, r.Protocol, r.Port}); r.Name() != "" && !resolved[at] {
			resolved[at] = true // once
			ports = append(ports, Redirect{Protocol: r.Protocol, Port: r.Port, Last: r.last()})
		}
	}
	slices.SortFunc(ports, func(a, b Redirect) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	var others Lookup
	if len(ports) > 1 {
		others = NewLookup(s.Redirects)
	}
	// redirected reports whether all ports between two have redirects, which precede the
	// refusals: a range may contain them.
	redirected := func(p Protocol, between, and Port) bool {
		for between++; between < and; between++ {
			if _, found := others.Find(f, p, between); !found {
				return false
			}
		}
		return true
	}
	var joined []Redirect
	for _, r := range ports {
		if n := len(joined); n > 0 && joined[n-1].Protocol == r.Protocol && redirected(r.Protocol, joined[n-1].Last, r.Port) {
			joined[n-1].Last = r.Last
		} else {
			joined = append(joined, r)
		}
	}
	for i, r := range joined {
		if r.Last == r.Port {
			joined[i].Last = 0
		}
	}
	return joined
}

// refuse returns the rules that keep connections to names without an address from the
// fallback: the pod itself refuses them.
func (s Set) refuse(f Family, sides Sides) []Rule {
	var rules []Rule
	for _, r := range s.refused(f) {
		rules = append(rules, Rule{In: sides.Cluster, Protocol: r.Protocol, Port: r.Port, Last: r.Last, Target: Return})
	}
	return rules
}

// nameRule returns a rule of unit-test for a line whose name is not looked up.
func (r Redirect) nameRule(in Rule) *Rule {
	to := r.Name()
	if r.ToPort != 0 {
		to += ":" + r.ToPorts()
	}
	if r.Shifts {
		to += fmt.Sprintf("/%d", r.Port)
	}
	in.Protocol, in.Port, in.Last, in.Limits, in.Target = r.Protocol, r.Port, r.Last, r.Limits, Target("DNAT --to-destination "+to)
	return &in
}
