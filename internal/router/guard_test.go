package router_test

import (
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A router of an earlier version had another table for the source guard. The next
// run in its namespace, as after an image update, deletes that table.
func TestFormerGuardTableIsDeleted(t *testing.T) {
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		state := p.State()
		const former = "ip egress-router-last"
		p.NFT("delete table ip egress-router-guard")
		p.NFT("add table " + former)
		p.NFT("add chain " + former + " last-postrouting { type filter hook postrouting priority 101 ; }")
		p.NFT("add rule " + former + " last-postrouting oifname macvlan0 ip saddr != 192.168.12.99 drop")
		if r := p.OK(); !strings.Contains(r.Stderr, "table "+former+": not in the plan") {
			p.Errorf("the log does not name the former table:\n%s", r.Stderr)
		}
		if tables := p.NFT("list tables"); strings.Contains(tables, former) || !strings.Contains(tables, "ip egress-router-guard") {
			p.Errorf("tables after the run:\n%s", tables)
		}
		p.WantState(state)
		p.WantExample()
		p.WantUnchanged(p.OK())
	})
}
