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
	names names         // of its objects
	has   []reservation // of its attachment as it is in the cluster
}

// A reservation is an address on a NIC of the nodes, empty if the node chooses it. The same
// address on two NICs, which may be in different networks, is two reservations.
type reservation struct {
	address netip.Addr
	master  string
}

// meets reports whether two reservations may be the same address in the same network.
func (r reservation) meets(other reservation) bool {
	return r.address == other.address && (r.master == other.master || r.master == "" || other.master == "")
}

// covers reports whether a router that has a reservation has the other one too.
func (r reservation) covers(other reservation) bool {
	return r.address == other.address && (r.master == other.master || r.master == "")
}

// wanted returns the reservations of a resource. It leaves out invalid addresses.
func wanted(router *api.EgressRouter) (all []reservation) {
	for _, a := range render.Addresses(router) {
		all = append(all, reservation{a, router.Spec.NetworkInterface.Macvlan.Master})
	}
	return all
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
	for _, w := range wanted(router.EgressRouter) {
		mine := slices.ContainsFunc(router.has, func(r reservation) bool { return r.covers(w) })
		for _, other := range all {
			if other.UID == router.UID {
				continue
			}
			its := slices.ContainsFunc(other.has, w.meets)
			wants := other.DeletionTimestamp == nil && slices.ContainsFunc(wanted(other.EgressRouter), w.meets)
			if its && !mine || wants && its == mine && before(other.EgressRouter, router.EgressRouter) {
				return other.EgressRouter, w.address
			}
		}
	}
	return nil, netip.Addr{}
}
