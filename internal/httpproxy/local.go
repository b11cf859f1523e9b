package httpproxy

import "net/netip"

// isLocal reports whether an address is local on any host: loopback, on which other
// containers of the pod listen (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.3),
// link-local, on which clouds serve credentials (RFC 3927, RFC 4291 section 2.5.6), or
// the unspecified address, which Linux treats as loopback (ip(7)).
func isLocal(a netip.Addr) bool {
	return a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified()
}

// names reports whether the network of a rule is meant for a local address: it is that
// address itself, or contains only local ones, unlike 0.0.0.0/0.
func names(p netip.Prefix, a netip.Addr) bool {
	if !p.IsValid() || !p.Contains(a) {
		return false
	}
	switch {
	case p.IsSingleIP():
		return true
	case p.Addr().IsLoopback():
		return p.Bits() >= 8 // 127.0.0.0/8; ::1 is alone
	case p.Addr().IsLinkLocalUnicast():
		return p.Addr().Is4() && p.Bits() >= 16 || p.Addr().Is6() && p.Bits() >= 10
	}
	return false
}
