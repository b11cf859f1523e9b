package rules

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"unique"
)

// MaxAddresses is the largest number of addresses of a line.
const MaxAddresses = 64

// Addresses are what a redirect has beside its first address. The zero value is nothing.
// They have the size of a pointer, since nearly all redirects have nothing, and are
// comparable, since redirects are.
type Addresses struct {
	handle unique.Handle[rest]
}

// A rest is the bytes of addresses of one family, and the name that has them.
type rest struct {
	more    string // further addresses for new connections
	kept    string // others, for existing connections alone
	anyKept bool   // existing connections keep any address
	name    string // of the line; empty: it has addresses
	ends    bool   // connections to an address that the name no longer has end
}

// Equal reports whether both are the same addresses in the same order.
func (a Addresses) Equal(other Addresses) bool { return a == other }

func (a Addresses) get() rest {
	if a == (Addresses{}) {
		return rest{}
	}
	return a.handle.Value()
}

func pack(all []netip.Addr) string {
	var b []byte
	for _, a := range all {
		b, _ = a.AppendBinary(b) // no error is possible
	}
	return string(b)
}

// Spread returns r to addresses of one family, of which each new connection gets one at
// random.
func (r Redirect) Spread(to []netip.Addr) Redirect { return r.spread(to, nil) }

// spread does the same, with addresses that existing connections keep.
func (r Redirect) spread(to, kept []netip.Addr) Redirect {
	more := r.More.get()
	more.more, more.kept = pack(to[1:]), pack(kept)
	if r.To, r.More = to[0], (Addresses{}); more != (rest{}) {
		r.More.handle = unique.Make(more)
	}
	return r
}

// Several reports whether new connections get more than one address.
func (r Redirect) Several() bool { return r.More.get().more != "" }

// Number returns the number of addresses for new connections.
func (r Redirect) Number() int {
	switch {
	case r.Unresolved():
		return 0
	case !r.Several():
		return 1
	}
	return 1 + len(r.More.get().more)/(r.To.BitLen()/8)
}

// All returns the addresses for new connections, in the order of the line.
func (r Redirect) All() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		if r.To.IsValid() && yield(r.To) && r.More != (Addresses{}) {
			r.each(r.More.get().more, yield)
		}
	}
}

// kept returns the addresses that existing connections keep, and new ones do not get.
func (r Redirect) kept() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) { r.each(r.More.get().kept, yield) }
}

func (r Redirect) each(packed string, yield func(netip.Addr) bool) {
	if packed == "" {
		return
	}
	for bytes := range slices.Chunk([]byte(packed), r.To.BitLen()/8) {
		if a, ok := netip.AddrFromSlice(bytes); !ok || !yield(a) {
			return
		}
	}
}

// keeps reports whether an existing connection to a local port of r may stay at a server.
func (r Redirect) keeps(server netip.AddrPort, local Port) bool {
	return r.Reaches(server, local) ||
		server.Port() == r.Server(local).Port() && (r.More.get().anyKept || slices.Contains(slices.Collect(r.kept()), server.Addr()))
}

// WithoutServers returns the plan without the addresses at which out reports that a server
// of a TCP redirect does not answer, and calls left with each. Existing connections to them
// stay. A redirect whose addresses are all out keeps all of them: that new connections fail
// with certainty would be worse. Ranges of several ports of a server are left alone.
func (p Plan) WithoutServers(out func(netip.AddrPort) bool, left func(netip.AddrPort)) Plan {
	cloned := false
	for i, r := range p.Redirects {
		if !r.Several() || r.Protocol != TCP || !r.ToOnePort() {
			continue
		}
		port := r.Server(r.Port).Port()
		var to, without []netip.Addr
		for a := range r.All() {
			if out(netip.AddrPortFrom(a, port)) {
				without = append(without, a)
			} else {
				to = append(to, a)
			}
		}
		if len(to) == 0 || len(without) == 0 {
			continue
		}
		if !cloned {
			p.Redirects, cloned = slices.Clone(p.Redirects), true
		}
		for _, a := range without {
			left(netip.AddrPortFrom(a, port))
		}
		p.Redirects[i] = r.spread(to, slices.AppendSeq(without, r.kept()))
	}
	return p
}

// Reaches reports whether new connections to a local port of r get a server.
func (r Redirect) Reaches(server netip.AddrPort, local Port) bool {
	for a := range r.All() {
		if server == netip.AddrPortFrom(a, r.Server(local).Port()) {
			return true
		}
	}
	return false
}

// spellOut calls fn with the rule for each address. The rule has the matches that all have,
// and is changed.
func (r Redirect) spellOut(rule *Rule, fn func(*Rule)) {
	rule.Protocol, rule.Port, rule.Last, rule.Target, rule.To, rule.ToPort, rule.Shifts = r.Protocol, r.Port, r.Last, DNAT, r.To, r.ToPort, r.Shifts
	rule.Limits, rule.Name = r.Limits, r.Comment()
	if !r.Several() {
		fn(rule)
		return
	}
	left := r.Number()
	for rule.To = range r.All() {
		if rule.OneOf = uint8(left); left == 1 { //nolint:gosec // at most MaxAddresses
			rule.OneOf = 0
		}
		fn(rule)
		left--
	}
}

// Destination returns the addresses, or the name, as the grammar writes them.
func (r Redirect) Destination() string {
	if name := r.Name(); name != "" {
		return name
	}
	if !r.Several() {
		return r.To.String()
	}
	var b []byte
	for a := range r.All() {
		b = append(a.AppendTo(b), ',')
	}
	return string(b[:len(b)-1])
}

// chances has the probability of a rule for one of n connections, by n, in the form in
// which iptables prints it: the kernel's number has 31 bits (net/netfilter/xt_statistic.c),
// of which iptables prints eleven digits.
var chances = func() (texts [MaxAddresses + 1]string) {
	for n := 2; n <= MaxAddresses; n++ {
		const one = 1 << 31
		texts[n] = fmt.Sprintf("%.11f", float64((one+n/2)/n)/one)
	}
	return texts
}()

// appendOneOf writes the match of one of n connections.
func appendOneOf(b []byte, n uint8) []byte {
	b = append(b, "-m statistic --mode random --probability "...)
	if int(n) >= len(chances) || n < 2 { // printed for its error
		return append(strconv.AppendUint(append(b, "1/"...), uint64(n), 10), ' ')
	}
	return append(append(b, chances[n]...), ' ')
}

// spreads reports whether all addresses of r are ones of packets of its family, and differ.
func (r Redirect) spreads() bool {
	seen := make(map[netip.Addr]bool)
	for a := range r.All() {
		if FamilyOf(a) != FamilyOf(r.To) || a.IsUnspecified() || seen[a] {
			return false
		}
		seen[a] = true
	}
	return len(seen) == r.Number() && len(seen) <= MaxAddresses
}
