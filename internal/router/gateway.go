package router

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/spec"
)

// The log messages about the gateway and the link below.
const (
	gatewaySilent = "gateway does not answer ARP"
	noCarrier     = "egress interface without carrier"
	noCarrierHint = "the parent NIC is down or unplugged"
)

// gatewayHint returns advice for a gateway that does not answer.
func (r *Router) gatewayHint(want link.Want) string {
	hint := spec.Textf("check that %s is right, that the node's NIC is in that network, and that the switch or hypervisor accepts the hardware address of the egress interface", spec.Gateway)
	if !want.Address.IsSingleIP() && !want.Address.Contains(want.Gateway) {
		hint = spec.Textf("%s is outside of the subnet of %s, %s: %s", spec.Gateway, spec.Source, want.Address.Masked(), hint)
	}
	return hint.In(r.Names)
}

// An answer is the result of a request to the gateway.
type answer struct {
	mac net.HardwareAddr // nil: there was no answer in time
	err error
}

// askGateway sends a request to the gateway, whose answer is received while the other
// steps run: closing the socket takes some 10 ms. The ARP watch of a router that stays
// does it itself.
func (c *change) askGateway(ctx context.Context) {
	if c.watches || c.have.NoARP || !c.have.Carrier {
		return
	}
	question, err := arp.AskGateway(c.have.Index, c.have.MAC, c.want.Address.Addr(), c.want.Gateway)
	if err != nil {
		c.router.Log.Warn("gateway probe failed", "error", err)
		return
	}
	until, answers := time.Now().Add(patience), make(chan answer, 1)
	go func() {
		mac, err := question.Answer(ctx, until)
		answers <- answer{mac, err}
	}()
	c.gateway = answers
}

// awaitGateway waits for the answer to the request, and logs if there is none. It is
// no error: a gateway may be slow, or start later. The original did not check.
func (c *change) awaitGateway(ctx context.Context) {
	if c.gateway == nil {
		return
	}
	r := c.router
	switch a := <-c.gateway; {
	case a.mac != nil || ctx.Err() != nil:
	case a.err != nil:
		r.Log.Warn("gateway probe failed", "error", a.err)
	default:
		r.start.misses = 1
		r.Log.Warn(gatewaySilent, "gateway", c.want.Gateway.String(), "within", patience.String(), "hint", r.gatewayHint(c.want))
	}
}

// A GatewayError reports a gateway on the cluster side.
type GatewayError struct{ text string }

func (e *GatewayError) Error() string { return e.text }

// Hint returns advice for the user.
func (e *GatewayError) Hint(names spec.Names) string {
	return spec.Textf("set %s to the router of the physical network; if both interfaces are in one network, set %s with its length, for example 192.168.12.99/24", spec.Gateway, spec.Source).In(names)
}

// doubtPatience is the time for the gateway's answer to that probe. Only a run that fails
// takes it.
const doubtPatience = time.Second

// settleDoubt returns the error of checkGateway, unless the gateway answers a probe on
// the egress side: both interfaces may be in one network, and the reserved address in
// another one, whose packets that gateway forwards. A probe is not answered by proxy ARP
// (arp_process in net/ipv4/arp.c).
func (c *change) settleDoubt(ctx context.Context) error {
	if c.doubt == nil || c.have.NoARP {
		return c.doubt
	}
	question, err := arp.Ask(c.have.Index, c.have.MAC, c.want.Gateway)
	if err != nil {
		return c.doubt
	}
	mac, err := question.Answer(ctx, time.Now().Add(doubtPatience))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil || mac == nil:
		return c.doubt
	}
	c.doubt = nil
	return nil
}

// checkGateway returns an error if the gateway is that of the cluster side, or in its
// network, by which servers would see the pod's own address. Both interfaces may be in
// one network: then the reserved address is in it, too, or settleDoubt finds the gateway.
func checkGateway(want link.Want, have link.State) error {
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
	return &GatewayError{fmt.Sprintf("gateway %s: expected the router of the physical network, found %s", gateway, found)}
}
