package plan

import (
	"fmt"
	"slices"

	"net/netip"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
)

// A RefusedError reports a namespace in which the router cannot work as configured.
type RefusedError struct {
	Gateway netip.Addr // that it is about; the zero Addr: none
	text    string
	hint    wording.Text
}

func (e *RefusedError) Error() string { return e.text }

// Hint returns advice for the user.
func (e *RefusedError) Hint(names wording.Names) string { return e.hint.In(names) }

// Refuse returns a *RefusedError if the reserved address or the gateway is the pod's own,
// otherwise nil.
func (n Network) Refuse(have State) error {
	for _, s := range n.Sources {
		isGateway := func(p netip.Prefix) bool { return p.Addr() == s.Gateway }
		cluster := have.of(s.Gateway.Is6()).Cluster.Addresses
		if slices.ContainsFunc(have.Addresses, isGateway) || slices.Contains(cluster, s.Gateway) {
			return &RefusedError{
				s.Gateway,
				fmt.Sprintf("gateway %s: expected the router of the physical network, found an address of the pod", s.Gateway),
				wording.Textf("set %s to the router of the network of %s, for example the default gateway of the node (ip route show default)", wording.Gateway, wording.Source),
			}
		}
		if slices.Contains(cluster, s.Prefix.Addr()) {
			return &RefusedError{
				netip.Addr{},
				fmt.Sprintf("reserved address %s: expected an unused address of the physical network, found the pod's cluster address", s.Prefix.Addr()),
				wording.Textf("set %s to an address of the physical network that is reserved for this pod", wording.Source),
			}
		}
	}
	return nil
}

// doubts returns an error for each gateway that is that of the cluster side, or in its
// network, by which servers would see the pod's own address. Both interfaces may be in one
// network: then the reserved address is in it, too, or the gateway answers on the physical
// side. A link-local gateway is in the network of its interface.
func doubts(want Network, have State) []*RefusedError {
	var all []*RefusedError
	for _, first := range want.Sources.Families() {
		if first.Gateway.Is6() && first.Gateway.IsLinkLocalUnicast() {
			continue
		}
		if e := doubt(want, first, have.of(first.Gateway.Is6())); e != nil {
			all = append(all, e)
		}
	}
	return all
}

func doubt(want Network, first spec.Source, have State) *RefusedError {
	source, gateway := first.Prefix.Addr(), first.Gateway
	contains := func(a netip.Prefix) bool { return a.Contains(gateway) }
	if slices.ContainsFunc(want.Sources, func(s spec.Source) bool { return contains(s.Prefix) }) || slices.ContainsFunc(have.Addresses, contains) {
		return nil
	}
	found := ""
	if next, known := have.ClusterDefault(); known && next.Gateway == gateway {
		found = "the cluster side's gateway"
	}
	for _, r := range have.Routes {
		switch {
		case r.Index != have.Cluster.Index || r.Type != 0 || r.Gateway.IsValid() || r.Kept || r.IsDefault() || r.Destination.IsSingleIP():
		case r.Destination.Contains(source):
			return nil
		case r.Destination.Contains(gateway) && found == "":
			found = "an address of the cluster side's network " + r.Destination.String()
		}
	}
	if found == "" {
		return nil
	}
	return &RefusedError{
		gateway,
		fmt.Sprintf("gateway %s: expected the router of the physical network, found %s", gateway, found),
		wording.Textf("set %s to the router of the physical network; if both interfaces are in one network, set %s with its length, for example 192.168.12.99/24", wording.Gateway, wording.Source),
	}
}
