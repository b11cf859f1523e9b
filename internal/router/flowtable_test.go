package router_test

import (
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/nft"
)

// A kernel that can has the flowtable; another one is refused, or does without, and the log and
// health say so. The flowtable goes with the router. Without the variable the flowtable of an earlier run goes.
func TestFlowtableOfThisKernel(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		const unused = `msg="flowtable not used"`
		var flows, hook bool
		if err := p.Lab.Router.Do(func() (err error) {
			if flows, err = nft.HasFlowtables(); err == nil {
				hook, err = nft.HasEgressHook()
			}
			return err
		}); err != nil {
			p.Fatal(err)
		}
		if want, known := labtest.HasNetdevEgress(p.T); known && (hook != want || !flows) {
			p.Fatalf("found flowtables %v and the egress hook %v", flows, hook)
		}
		has := flows && hook
		loaded := func() bool { return strings.Contains(p.Tool("nft", "list", "tables"), "egress-router-flowtable\n") }
		p.Env["EGRESS_FLOWTABLE"] = "require"
		if !has {
			before := p.State()
			p.WantRefusal("", "EGRESS_FLOWTABLE=require: the kernel has no ", "")
			p.WantState(before)
		}
		p.Env["EGRESS_FLOWTABLE"] = "auto"
		if r := p.OK(); strings.Contains(r.Stderr, unused) == has || loaded() != has {
			p.Errorf("the kernel can: %v; the table is there: %v; log:\n%s", has, loaded(), r.Stderr)
		}
		p.WantExample()
		p.WantUnchanged(p.OK())
		if r := p.Exec("egress-router", "remove"); r.Code != 0 || loaded() {
			p.Errorf("after remove, exit code %d, the table is there: %v\n%s", r.Code, loaded(), r.Stderr)
		}
		p.OK()
		delete(p.Env, "EGRESS_FLOWTABLE")
		if p.OK(); loaded() {
			p.Error("the flowtable of an earlier run is there")
		}
		p.WantExample()

		p.Env["EGRESS_FLOWTABLE"], p.Env["EGRESS_HEALTH_LISTEN"] = "auto", labtest.HealthAddr.String()
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		text := "flowtable    ok"
		if !has {
			text = "flowtable    warning"
		}
		p.Until("health has the flowtable", func() bool {
			_, stdout := p.Health()
			return strings.Contains(stdout, "flowtable") && strings.Contains(strings.Join(strings.Fields(stdout), " "), strings.Join(strings.Fields(text), " "))
		})
	})
}
