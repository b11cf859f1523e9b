package router_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/nft"
)

// A gate that claims, opens and shuts starts no comparison. One that another program deletes does.
func TestGateStartsNoComparison(t *testing.T) {
	t.Parallel()
	for _, without := range []bool{false, true} {
		t.Run(fmt.Sprint("without egress hook ", without), func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.Nftables)
			p.Env["EGRESS_ANNOUNCE_INTERVAL"], p.Env["EGRESS_HEALTH_INTERVAL"] = "0", "0"
			p.Env["EGRESS_HEALTH_LISTEN"] = fmt.Sprint(":", labtest.HealthAddr.Port())
			gate := nft.Gate{ // of another interface, so that the router works
				Interface: "lo", Sources: []netip.Addr{lab.Source}, Witnesses: []netip.Addr{lab.GatewayAddr}, Mark: 1,
				Ticket: 30 * time.Millisecond, Permit: 80 * time.Millisecond, WithoutEgress: without,
			}
			change := func(fn func() error) {
				t.Helper()
				if err := p.Lab.Router.Do(fn); err != nil {
					t.Fatal(err)
				}
			}
			change(gate.Load)
			r := p.Start("legacy")
			r.AwaitLog(1, gatewayAnswers)
			p.NFT("add table ip foreign")
			p.Until("that is compared", func() bool { return p.Comparisons() > 0 })
			// One more may be due: the start changes rules and addresses, too.
			before := p.Comparisons()
			for n := range uint32(25) { // a hundred changes
				for _, fn := range []func() error{
					func() error { return gate.Claim(time.Minute) }, func() error { return gate.Arm(time.Minute) }, func() error { return gate.Number(n) }, gate.Shut,
				} {
					change(fn)
				}
				if n%5 == 0 { // a request takes as long as a comparison
					p.Comparisons()
				}
			}
			if more := p.Comparisons() - before; more > 1 {
				t.Errorf("%d comparisons for the changes of a gate", more)
			}
			before = p.Comparisons()
			p.NFT("delete table " + map[bool]string{false: "netdev ", true: "inet "}[without] + nft.GateTable)
			p.Until("the deletion is compared", func() bool { return p.Comparisons() > before })
		})
	}
}
