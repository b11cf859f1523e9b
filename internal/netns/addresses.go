package netns

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// Addresses caches the addresses of the process's network namespace, since listing them
// takes as long as a request. Its zero value is ready.
type Addresses struct {
	mu    sync.Mutex
	until time.Time
	addrs map[netip.Addr]bool
	err   error
}

// addressesAge is how long the addresses are cached. They rarely change while a
// program runs.
const addressesAge = time.Second

// Has reports whether an address is one of this network namespace.
func (o *Addresses) Has(a netip.Addr) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.After(o.until) {
		o.addrs, o.err = interfaceAddresses()
		o.until = now.Add(addressesAge)
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
