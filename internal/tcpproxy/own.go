package tcpproxy

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ownAddresses caches the addresses of this network namespace, since listing them takes
// as long as a connection. They change while the proxy runs: a reserved address, for
// example, is added and removed.
type ownAddresses struct {
	mu    sync.Mutex
	until time.Time
	addrs []netip.Addr
}

// ownAddressesAge is how long the addresses are cached.
const ownAddressesAge = time.Second

// has reports whether connections to an address reach this network namespace. Linux
// treats the unspecified addresses as loopback (ip(7)). If the addresses cannot be
// listed, perhaps for lack of descriptors, the previous ones count.
func (o *ownAddresses) has(a netip.Addr) bool {
	if a.IsLoopback() || a.IsUnspecified() {
		return true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.After(o.until) {
		if list, err := net.InterfaceAddrs(); err == nil {
			o.addrs = o.addrs[:0]
			for _, entry := range list {
				if network, ok := entry.(*net.IPNet); ok {
					own, _ := netip.AddrFromSlice(network.IP)
					o.addrs = append(o.addrs, own.Unmap())
				}
			}
		}
		o.until = now.Add(ownAddressesAge)
	}
	return slices.Contains(o.addrs, a)
}

// A localError is the error of a name that resolves to local addresses only. The owner
// of a name could otherwise reach the other services of the pod, and make the proxy
// connect to itself.
type localError struct {
	host  string
	addrs []netip.Addr
}

func (e *localError) Error() string {
	return fmt.Sprintf("%q resolves to local addresses only, which a destination has to write as an address: %v", e.host, e.addrs)
}

// NotFound makes it an answer without addresses.
func (e *localError) NotFound() bool { return true }
