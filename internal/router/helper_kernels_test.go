//go:build kernels

package router_test

import (
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// The kernel loads the module that reads a protocol's messages by itself, and not the one that
// translates them: the router does not start without it, and leaves nothing.
func TestHelperNeedsTranslator(t *testing.T) {
	for _, loaded := range []bool{false, true} {
		name := "without"
		if loaded {
			name = "with"
			labtest.LoadModules(t, "nf_nat_irc")
		}
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_HELPERS"] = "irc"
				if loaded {
					p.OK()
					return
				}
				before := p.State()
				p.WantRefusal("", `the kernel does not translate the messages of "irc" for tcp: module nf_nat_irc is not loaded`, "modprobe -a nf_conntrack_irc nf_nat_irc")
				p.WantState(before)
			})
		})
	}
}
