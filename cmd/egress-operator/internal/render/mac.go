package render

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
)

// MAC returns the hardware address that a router requests by its annotation, empty if it
// requests none. Switches and hypervisors with port security admit known hardware
// addresses only; a pod otherwise gets a random one.
//
// The address is derived from the first reserved address, so that it stays the same over
// new pods, other nodes and another operator, and differs between routers. It is unicast
// and locally administered (IEEE 802, clause 8.4): 02:e6 and the four bytes of an IPv4
// address, 06:e6 and the first four bytes of a hash of an IPv6 address.
func MAC(router *api.EgressRouter) (string, error) {
	switch value := router.Annotations[MACAnnotation]; value {
	case "":
		return "", nil
	case "auto":
	default:
		return "", fmt.Errorf("metadata.annotations[%s] is %q: expected auto", MACAnnotation, value)
	}
	all := Addresses(router)
	if len(all) == 0 {
		return "", nil
	}
	mac := net.HardwareAddr{0x02, 0xe6}
	if a := all[0]; a.Is4() {
		mac = append(mac, a.AsSlice()...)
	} else {
		sum := sha256.Sum256(a.AsSlice())
		mac = append(net.HardwareAddr{0x06, 0xe6}, sum[:4]...)
	}
	return mac.String(), nil
}

// Addresses returns the reserved addresses of a router. It leaves out invalid ones.
func Addresses(router *api.EgressRouter) []netip.Addr {
	var all []netip.Addr
	for _, address := range router.Spec.Addresses {
		if p, err := netip.ParsePrefix(address.IP); err == nil {
			all = append(all, p.Addr())
		} else if a, err := netip.ParseAddr(address.IP); err == nil {
			all = append(all, a)
		}
	}
	return all
}
