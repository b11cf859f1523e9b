package plan

import (
	"fmt"
	"slices"

	"net/netip"

	"github.com/egress-router/egress-router/internal/spec"
)

// A RefusedError reports a namespace in which the router cannot work as configured.
type RefusedError struct {
	text string
	hint spec.Text
}

func (e *RefusedError) Error() string { return e.text }

// Hint returns advice for the user.
func (e *RefusedError) Hint(names spec.Names) string { return e.hint.In(names) }

// Refuse returns a *RefusedError if the reserved address or the gateway is the pod's own,
// otherwise nil.
func (n Network) Refuse(have State) error {
	isGateway := func(p netip.Prefix) bool { return p.Addr() == n.Gateway }
	if slices.ContainsFunc(have.Addresses, isGateway) || slices.Contains(have.Cluster.Addresses, n.Gateway) {
		return &RefusedError{
			fmt.Sprintf("gateway %s: expected the router of the physical network, found an address of the pod", n.Gateway),
			spec.Textf("set %s to the router of the network of %s, for example the default gateway of the node (ip route show default)", spec.Gateway, spec.Source),
		}
	}
	if slices.Contains(have.Cluster.Addresses, n.Address.Addr()) {
		return &RefusedError{
			fmt.Sprintf("reserved address %s: expected an unused address of the physical network, found the pod's cluster address", n.Address.Addr()),
			spec.Textf("set %s to an address of the physical network that is reserved for this pod", spec.Source),
		}
	}
	return nil
}

// doubt returns an error if the gateway is that of the cluster side, or in its network, by
// which servers would see the pod's own address. Both interfaces may be in one network:
// then the reserved address is in it, too, or the gateway answers on the physical side.
func doubt(want Network, have State) *RefusedError {
	source, gateway := want.Address.Addr(), want.Gateway
	contains := func(a netip.Prefix) bool { return a.Contains(gateway) }
	if contains(want.Address) || slices.ContainsFunc(have.Addresses, contains) {
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
		fmt.Sprintf("gateway %s: expected the router of the physical network, found %s", gateway, found),
		spec.Textf("set %s to the router of the physical network; if both interfaces are in one network, set %s with its length, for example 192.168.12.99/24", spec.Gateway, spec.Source),
	}
}
