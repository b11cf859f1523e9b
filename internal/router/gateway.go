package router

import (
	"context"
	"net"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// The log messages about the gateway and the link below.
const (
	gatewaySilent = "gateway does not answer ARP"
	noCarrier     = "egress interface without carrier"
	noCarrierHint = "the parent NIC is down or unplugged"
)

// gatewayHint returns advice for a gateway that does not answer.
func (r *Router) gatewayHint(want plan.Network) string {
	hint := spec.Textf("check that %s is right, that the node's NIC is in that network, and that the switch or hypervisor accepts the hardware address of the egress interface", spec.Gateway)
	if source := want.Sources[0]; !source.Prefix.IsSingleIP() && !source.Prefix.Contains(source.Gateway) {
		hint = spec.Textf("%s is outside of the subnet of %s, %s: %s", spec.Gateway, spec.Source, source.Prefix.Masked(), hint)
	}
	return hint.In(r.Names)
}

// An answer is the result of a request to the gateway.
type answer struct {
	mac net.HardwareAddr // nil: there was no answer in time
	err error
}

// askGateway sends a request to the gateway, whose answer is received while the other
// steps run: closing the socket takes some 10 ms.
func (c *change) askGateway(ctx context.Context) {
	c.have.Asked = true
	question, err := arp.AskGateway(c.have.State.Index, c.have.State.MAC, c.want.Network.Sources[0].Prefix.Addr(), c.want.Network.Sources[0].Gateway)
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
		r.Log.Warn(gatewaySilent, "gateway", c.want.Network.Sources[0].Gateway.String(), "within", patience.String(), "hint", r.gatewayHint(c.want.Network))
	}
}

// doubtPatience is the time for the gateway's answer to that probe. Only a run that fails
// takes it.
const doubtPatience = time.Second

// settle returns the doubt about the gateway, unless the gateway answers a probe on the
// egress side: both interfaces may be in one network, and the reserved address in another
// one, whose packets that gateway forwards. A probe is not answered by proxy ARP
// (arp_process in net/ipv4/arp.c).
func (c *change) settle(ctx context.Context, doubt error) error {
	if c.have.State.NoARP {
		return doubt
	}
	question, err := arp.Ask(c.have.State.Index, c.have.State.MAC, c.want.Network.Sources[0].Gateway)
	if err != nil {
		return doubt
	}
	mac, err := question.Answer(ctx, time.Now().Add(doubtPatience))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil || mac == nil:
		return doubt
	}
	c.have.Trusted = true
	return nil
}
