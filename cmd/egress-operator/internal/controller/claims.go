package controller

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// A claim is what other routers need to know about a router.
type claim struct {
	*api.EgressRouter
	names     names        // of its objects
	addresses []netip.Addr // of its attachment as it is in the cluster
}

// names are the names that the objects of a router have.
type names uint8

const (
	none    names = iota // it has no objects yet
	first                // the frozen ones, of the namespace's first router
	further              // those with the name of the router
)

// before reports whether a router is older than another one. The name decides between
// routers of the same second.
func before(a, b *api.EgressRouter) bool {
	return cmp.Or(
		a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
		cmp.Compare(a.Namespace, b.Namespace),
		cmp.Compare(a.Name, b.Name)) < 0
}

// namesFor returns the names of a router's objects. They stay for the life of the router:
// other names would be another pod. The frozen ones go to the oldest router of a
// namespace, and when it is deleted to the next router that is created.
func namesFor(router claim, all []claim) render.Names {
	if router.names == none {
		router.names = first
		for _, other := range all {
			if other.UID == router.UID || other.Namespace != router.Namespace {
				continue
			}
			if other.names == first || other.names == none && other.DeletionTimestamp == nil && before(other.EgressRouter, router.EgressRouter) {
				router.names = further
			}
		}
	}
	if router.names == first {
		return render.First()
	}
	return render.Further(router.Name)
}

// holder returns another router that has one of the reserved addresses of a router, and
// the address. The one whose attachment has the address already comes first, then the
// older one. Routers with different NICs may be in different networks.
func holder(router claim, all []claim) (*api.EgressRouter, netip.Addr) {
	for _, address := range render.Addresses(router.EgressRouter) {
		for _, other := range all {
			if other.UID == router.UID || separate(router.EgressRouter, other.EgressRouter) {
				continue
			}
			mine, its := slices.Contains(router.addresses, address), slices.Contains(other.addresses, address)
			wanted := other.DeletionTimestamp == nil && slices.Contains(render.Addresses(other.EgressRouter), address)
			if its && !mine || wanted && its == mine && before(other.EgressRouter, router.EgressRouter) {
				return other.EgressRouter, address
			}
		}
	}
	return nil, netip.Addr{}
}

func separate(a, b *api.EgressRouter) bool {
	x, y := a.Spec.NetworkInterface.Macvlan.Master, b.Spec.NetworkInterface.Macvlan.Master
	return x != "" && y != "" && x != y
}
