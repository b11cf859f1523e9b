package router_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A router with a tunnel sets it up again after another program has deleted a part of it, and is
// then quiet; nothing of it remains after its removal, nor with a configuration without it.
func TestCarry(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Router)
		if err := h.LinkSetUp(p.Link(h, p.Lab.MacvlanName)); err != nil { // a set interface stays up
			p.Fatal(err)
		}
		before, rules := p.State(), p.Tool("ip", "rule")
		p.Env["EGRESS_STANDBY"], p.Env["EGRESS_STANDBY_PEERS"] = "true", lab.ClientAddr.String()
		p.Env["EGRESS_HEALTH_LISTEN"] = fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Env["EGRESS_STANDBY_CARRY"], p.Env["EGRESS_STANDBY_INTERVAL"], p.Env["EGRESS_HEALTH_INTERVAL"] = "vxlan", "500ms", "100ms"
		r := p.Start("legacy")
		r.AwaitLog(1, "role=active")
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		const done = `msg="tunnel set up"`
		for _, damage := range [][]string{
			{"ip", "link", "delete", "egress-carry"},
			{"nft", "delete", "table", "ip", "egress-router-carry"},
			{"ip", "link", "set", "egress-carry", "down"},
		} {
			n := strings.Count(r.Logged(), done)
			p.Tool(damage[0], damage[1:]...)
			r.AwaitLog(n+1, done)
			r.AwaitComparisons(3)
			if again := strings.Count(r.Logged(), done); again != n+1 {
				p.Errorf("after %v: set up %d times:\n%s", damage, again-n, r.Logged())
			}
		}
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		r.Terminate()
		remove(p)
		p.WantState(before)
		if after := p.Tool("ip", "rule"); after != rules {
			p.Errorf("rules after removal:\n%s\nbefore:\n%s", after, rules)
		}
		wantNothingToRemove(p)
	})
}

// Nothing of a tunnel remains after a start without it, also if the process before was killed and
// another program has removed its rules, or the tunnel's link.
func TestCarryLeft(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		rules, carry := p.Tool("ip", "rule"), map[string]string{
			"EGRESS_STANDBY": "true", "EGRESS_STANDBY_PEERS": lab.ClientAddr.String(), "EGRESS_STANDBY_CARRY": "vxlan", "EGRESS_STANDBY_INTERVAL": "500ms",
		}
		for _, damage := range [][]string{
			{"nft", "flush", "ruleset"},
			{"ip", "link", "delete", "egress-carry"},
		} {
			maps.Copy(p.Env, carry)
			p.Env["EGRESS_ROUTER_MODE"] = "legacy"
			r := &labtest.Running{Pod: p, Cmd: p.Command("egress-router")}
			r.Cmd.Stderr = r
			if err := p.Lab.Start(p.Lab.Router, r.Cmd); err != nil {
				p.Fatal(err)
			}
			r.AwaitLog(1, "role=active")
			_ = r.Cmd.Process.Kill() // an error: it has ended
			_ = r.Cmd.Wait()
			p.Tool("ip", "link", "show", "egress-carry")
			p.Tool("nft", "flush", "ruleset")
			if damage[0] != "nft" {
				p.Tool(damage[0], damage[1:]...)
			}
			for name := range carry {
				delete(p.Env, name)
			}
			p.Env["EGRESS_ROUTER_MODE"] = "init"
			p.OK()
			if after := p.Tool("ip", "rule"); after != rules {
				p.Errorf("%v: routing rules:\n%s\nwant:\n%s", damage, after, rules)
			}
			for _, args := range []string{"link show egress-carry", "route show table 4713"} {
				if out, err := p.TryTool("ip", strings.Fields(args)...); err == nil && out != "" {
					p.Errorf("%v: ip %s:\n%s", damage, args, out)
				}
			}
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
		}
	})
}
