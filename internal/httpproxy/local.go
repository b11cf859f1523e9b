package httpproxy

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// isLocal reports whether an address belongs to the proxy's own side whatever
// addresses it has: loopback, where a pod's other containers listen (RFC 1122
// section 3.2.1.3, RFC 4291 section 2.5.3), link-local, where clouds serve
// credentials (RFC 3927, RFC 4291 section 2.5.6), and the unspecified address,
// which Linux connects to itself (ip(7)).
func isLocal(a netip.Addr) bool {
	return a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified()
}

// names reports whether a network of a rule was written with a local address in
// mind: that address itself, or nothing but local ones. 0.0.0.0/0 was not.
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

// ownAddresses remembers the addresses of this network namespace for a moment:
// asking the kernel takes as long as a request.
type ownAddresses struct {
	mu    sync.Mutex
	until time.Time
	addrs map[netip.Addr]bool
	err   error
}

// ownAddressesAge is how old they may be. They hardly ever change while a proxy
// runs.
const ownAddressesAge = time.Second

// has reports whether an address is one of them.
func (o *ownAddresses) has(a netip.Addr) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.After(o.until) {
		o.addrs, o.err = interfaceAddresses()
		o.until = now.Add(ownAddressesAge)
	}
	return o.addrs[a], o.err
}

func interfaceAddresses() (map[netip.Addr]bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	addrs := make(map[netip.Addr]bool, len(list))
	for _, entry := range list {
		if network, ok := entry.(*net.IPNet); ok {
			if a, ok := netip.AddrFromSlice(network.IP); ok {
				addrs[a.Unmap()] = true
			}
		}
	}
	return addrs, nil
}
