package httpproxy

import (
	"net/netip"
	"slices"
)

// nat64 are the prefixes for translation to IPv4 (RFC 6052 section 2.1, RFC 8215).
var (
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48")
	sixToFour  = netip.MustParsePrefix("2002::/16")       // RFC 3056 section 2
	teredo     = netip.MustParsePrefix("2001::/32")       // RFC 4380 section 4
	compatible = netip.MustParsePrefix("::/96")           // RFC 4291 section 2.5.5.1
	translated = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 2765 section 2.1
	low        = netip.MustParsePrefix("::/112")          // ::1 and the like, which embed nothing
)

// embedded returns the IPv4 addresses that an IPv6 address may stand for. A translator
// or a tunnel would reach them by it. An address in nat64Local has several: its
// network chooses where the IPv4 address is (RFC 6052 section 2.2).
func embedded(a netip.Addr) []netip.Addr {
	if !a.Is6() {
		return nil
	}
	b := a.As16()
	at := func(i, j, k, l int) netip.Addr { return netip.AddrFrom4([4]byte{b[i], b[j], b[k], b[l]}) }
	switch {
	case low.Contains(a):
	case nat64.Contains(a), compatible.Contains(a), translated.Contains(a):
		return []netip.Addr{at(12, 13, 14, 15)}
	case nat64Local.Contains(a):
		return slices.DeleteFunc([]netip.Addr{at(6, 7, 9, 10), at(7, 9, 10, 11), at(9, 10, 11, 12), at(12, 13, 14, 15)},
			func(a netip.Addr) bool { return a.As4()[0] == 0 }) // padding
	case sixToFour.Contains(a):
		return []netip.Addr{at(2, 3, 4, 5)}
	case teredo.Contains(a):
		return []netip.Addr{netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}), at(4, 5, 6, 7)} // the client, the server
	}
	return nil
}
