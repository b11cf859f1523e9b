package router

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
)

// The log messages about the gateway by the protocol of its family, as users search for
// them, and about the link below.
var (
	gatewaySilent  = map[string]string{"ARP": "gateway does not answer ARP", "NDP": "gateway does not answer NDP"}
	gatewayAnswers = map[string]string{"ARP": "gateway answers ARP", "NDP": "gateway answers NDP"}
	notWatched     = map[string]string{"ARP": "ARP watch not started", "NDP": "NDP watch not started"}
)

const (
	noCarrier     = "egress interface without carrier"
	noCarrierHint = "the parent NIC is down or unplugged"
)

// ProtocolOf returns the name of the protocol that finds neighbours with addresses of a's
// family.
func ProtocolOf(a netip.Addr) string {
	if a.Is6() {
		return "NDP"
	}
	return "ARP"
}

// gatewayHint returns advice for the gateway of a family that does not answer.
func (r *Router) gatewayHint(source spec.Source) string {
	hint := wording.Textf("check that %s is right, that the node's NIC is in that network, and that the switch or hypervisor accepts the hardware address of the egress interface", wording.Gateway)
	if !source.Prefix.IsSingleIP() && !source.Prefix.Contains(source.Gateway) && !source.Gateway.IsLinkLocalUnicast() {
		hint = wording.Textf("%s is outside of the subnet of %s, %s: %s", wording.Gateway, wording.Source, source.Prefix.Masked(), hint)
	}
	return hint.In(r.Names)
}

// An answer is the result of a request to a gateway.
type answer struct {
	source spec.Source      // with the gateway
	mac    net.HardwareAddr // nil: there was no answer in time
	err    error
}

// askGateway sends a request to the gateway of a source, whose answer is received while the
// other steps run: closing the socket takes some 10 ms.
func (c *change) askGateway(ctx context.Context, source spec.Source) {
	question, err := arp.AskGateway(c.have.State.Index, c.have.State.MAC, source.Prefix.Addr(), source.Gateway)
	if err != nil {
		c.router.Log.Warn("gateway probe failed", "error", err)
		return
	}
	until, answers := time.Now().Add(patience), make(chan answer, 1)
	go func() {
		mac, err := question.Answer(ctx, until)
		answers <- answer{source, mac, err}
	}()
	c.gateways = append(c.gateways, answers)
}

// awaitGateways waits for the answers to the requests, and logs if there is none. It is
// no error: a gateway may be slow, or start later. The original did not check.
func (c *change) awaitGateways(ctx context.Context) {
	r := c.router
	for _, answers := range c.gateways {
		switch a := <-answers; {
		case a.mac != nil || ctx.Err() != nil:
		case a.err != nil:
			r.Log.Warn("gateway probe failed", "error", a.err)
		default:
			r.start.missed = append(r.start.missed, a.source.Gateway)
			r.Log.Warn(gatewaySilent[ProtocolOf(a.source.Gateway)], "gateway", a.source.Gateway.String(), "within", patience.String(), "hint", r.gatewayHint(a.source))
		}
	}
	c.gateways = nil
}

// doubtPatience is the time for the gateway's answer to that probe. Only a run that fails
// takes it.
const doubtPatience = time.Second

// settle returns the doubt about the gateway, unless the gateway answers a probe on the
// egress side: both interfaces may be in one network, and the reserved address in another
// one, whose packets that gateway forwards. A probe is not answered by proxy ARP
// (arp_process in net/ipv4/arp.c).
func (c *change) settle(ctx context.Context, doubt *plan.RefusedError) error {
	if c.have.State.NoARP {
		return doubt
	}
	question, err := arp.Ask(c.have.State.Index, c.have.State.MAC, doubt.Gateway)
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
