package router_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/nft"
)

// The changes of a gate as a router claims its addresses start no comparison. Another program's
// deletion of the gate does, and is repaired.
func TestGateStartsNoComparison(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_ANNOUNCE_INTERVAL"], p.Env["EGRESS_HEALTH_INTERVAL"] = "0", "0"
		p.Env["EGRESS_HEALTH_LISTEN"] = fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Env["EGRESS_STANDBY"], p.Env["EGRESS_STANDBY_PEERS"] = "true", lab.ClientAddr.String()
		p.Env["EGRESS_STANDBY_INTERVAL"] = "500ms" // a busy machine loses the addresses less often
		inRouter := func(fn func() error) {
			p.Helper()
			if err := p.Lab.Router.Do(fn); err != nil {
				p.Fatal(err)
			}
		}
		r := p.Start("legacy")
		r.AwaitLog(1, "role=active")
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		compared := p.Comparisons()
		p.NFT("add table ip foreign")
		p.Until("a foreign table is compared", func() bool { return p.Comparisons() > compared })
		// A change of the role is compared, too, and one more comparison may be due.
		roles := func() int { return strings.Count(r.Logged(), `msg="role changed"`) }
		changed, before := roles(), p.Comparisons()
		gate := nft.Gate{Interface: p.Lab.MacvlanName}
		for n := range 100 {
			inRouter(func() error { return gate.Claim(time.Minute) })
			if n%20 == 0 { // a request takes as long as a comparison
				p.Comparisons()
			}
		}
		if more := p.Comparisons() - before; more > 1+roles()-changed {
			p.Errorf("%d comparisons for the changes of a gate", more)
		}
		p.NFT("delete table netdev " + nft.GateTable)
		p.Until("the gate is loaded again", func() bool {
			var loaded bool
			inRouter(func() (err error) { loaded, err = nft.GateLoaded(); return err })
			return loaded
		})
		p.Until("the router holds the address again", func() bool {
			_, err := p.TryTool("nft", "get element netdev "+nft.GateTable+" permit { macvlan0 }")
			return err == nil
		})
	})
}
