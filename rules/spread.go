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

// Addresses are further addresses of a redirect. The zero value is none. They have the
// size of a pointer, since nearly all redirects have none, and are comparable, since
// redirects are.
type Addresses struct {
	packed unique.Handle[string] // their bytes; zero: none
}

// Equal reports whether both are the same addresses in the same order.
func (a Addresses) Equal(other Addresses) bool { return a == other }

// Spread returns r to addresses of one family, of which each new connection gets one at
// random.
func (r Redirect) Spread(to []netip.Addr) Redirect {
	r.To, r.More = to[0], Addresses{}
	if len(to) == 1 {
		return r
	}
	var packed []byte
	for _, a := range to[1:] {
		packed, _ = a.AppendBinary(packed) // no error is possible
	}
	r.More.packed = unique.Make(string(packed))
	return r
}

// Several reports whether r has more than one address.
func (r Redirect) Several() bool { return r.More != Addresses{} }

// Number returns the number of addresses.
func (r Redirect) Number() int {
	if !r.Several() {
		return 1
	}
	return 1 + len(r.More.packed.Value())/(r.To.BitLen()/8)
}

// All returns the addresses, in the order of the line.
func (r Redirect) All() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		if !yield(r.To) || !r.Several() {
			return
		}
		for bytes := range slices.Chunk([]byte(r.More.packed.Value()), r.To.BitLen()/8) {
			if a, ok := netip.AddrFromSlice(bytes); !ok || !yield(a) {
				return
			}
		}
	}
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

// Destination returns the addresses as the grammar writes them.
func (r Redirect) Destination() string {
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
