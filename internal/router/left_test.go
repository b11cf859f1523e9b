package router_test

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A sourced is a configuration of sources.
type sourced struct {
	name, sources, gateways, mode string
	answers                       bool // the servers answer
}

// use sets a configuration of sources.
func (c sourced) use(p *labtest.Pod) {
	p.Helper()
	p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_ROUTER_MODE"] = "extended", c.mode
	p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"], p.Env["EGRESS_DESTINATION"] = c.sources, c.gateways, "# none\n"
	if strings.Contains(c.sources, ".") {
		p.Env["EGRESS_DESTINATION"] += "80 tcp 203.0.113.25\n"
	}
	if strings.Contains(c.sources, ":") {
		p.Env["EGRESS_DESTINATION"] += "81 tcp 2001:db8::25 80\n"
	}
}

// addressing returns addresses, routes and routing rules of both families, sorted.
func addressing(p *labtest.Pod) string {
	p.Helper()
	var all []string
	for _, args := range []string{
		"-4 address show dev macvlan0", "-6 address show dev macvlan0", "-4 rule", "-6 rule", "-4 route", "-6 route", "-4 route show table 4711", "-6 route show table 4711",
	} {
		out, err := p.TryTool("ip", strings.Fields(args)...)
		if err != nil { // no such table
			out = ""
		}
		var lines []string
		for line := range strings.Lines(out) {
			line = strings.Join(strings.Fields(line), " ")
			if strings.Contains(line, "fe80::") && strings.Contains(line, "inet6") || strings.Contains(line, "valid_lft") || strings.Contains(line, "mtu") {
				continue
			}
			lines = append(lines, args+": "+regexp.MustCompile(` proto \w+| pref medium| secondary| tentative`).ReplaceAllString(line, ""))
		}
		slices.Sort(lines)
		all = append(all, lines...)
	}
	return strings.Join(all, "\n")
}

// Whatever sources and gateways an earlier run had, a run leaves the addresses, routes and
// routing rules of a first run. An address of another program stays. Meanwhile no packet has
// another source than those of before and after.
func TestFormerSourcesLeave(t *testing.T) {
	t.Parallel()
	const two, dual = "192.168.12.97/24, 192.168.12.98/24, 192.168.12.99/24", "192.168.12.99/24, 2001:db8:12::99/64"
	configurations := []sourced{
		{"one", "192.168.12.99/24", "192.168.12.1", "init", true},
		{"another", "192.168.12.98/24", "192.168.12.1", "init", true},
		{"several", two, "192.168.12.1", "init", true},
		{"without the second", "192.168.12.97/24, 192.168.12.99/24", "192.168.12.1", "init", true},
		{"without the first", "192.168.12.99/24", "192.168.12.1", "init", true},
		{"both families", dual, "192.168.12.1, 2001:db8:12::2", "init", false},
		{"other gateways", dual, "192.168.12.2, fe80::1", "init", false},
		{"without IPv6", "192.168.12.99/24", "192.168.12.1", "init", true},
		{"two of IPv6", dual + ", 2001:db8:12::97/64", "192.168.12.1, fe80::1", "init", true},
		{"without IPv4", "2001:db8:12::99/64", "fe80::1", "init", true},
		{"another subnet", "192.168.14.7/24", "192.168.12.1", "init", false},
		{"proxy", "192.168.12.99/24", "192.168.12.1", "http-proxy", false},
		{"another proxy", "192.168.12.98/24", "192.168.12.1", "http-proxy", false},
	}
	prepare := func(p *labtest.Pod) {
		p.Helper()
		h := p.Handle(p.Lab.Router)
		macvlan := p.Link(h, "macvlan0")
		for _, a := range []string{"192.168.12.50/24", "2001:db8:12::50/64"} {
			if err := h.AddrAdd(macvlan, labtest.Addr(a)); err != nil {
				p.Fatal(err)
			}
		}
		if err := h.LinkSetUp(macvlan); err != nil {
			p.Fatal(err)
		}
	}
	wants := make([]string, len(configurations))
	t.Run("first runs", func(t *testing.T) {
		for i, c := range configurations {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				p := labtest.New(t, lab.Options{IPv6: true}, labtest.Nftables)
				prepare(p)
				c.use(p)
				p.OK()
				wants[i] = addressing(p)
			})
		}
	})
	labtest.EachBackendInTurn(t, 1, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		prepare(p)
		p.Serve(p.Lab.Outside, "tcp", "[2001:db8::25]:80")
		var before []netip.Addr
		for i, c := range configurations {
			w := p.Watch(p.Lab.Router, "macvlan0")
			c.use(p)
			plan := p.Exec("egress-router", "plan", "--kernel").Stdout
			r := p.OK()
			if got := addressing(p); got != wants[i] {
				t.Errorf("%s, %s: - as after a first run, + found:\n%s\n%s", p.Backend.Name, c.name, cmp.Diff(strings.Split(wants[i], "\n"), strings.Split(got, "\n")), r.Stderr)
			}
			for _, step := range regexp.MustCompile(`step="((?:remove|delete) [^"]*)"`).FindAllStringSubmatch(r.Stderr, -1) {
				if step, _, _ := strings.Cut(step[1], " src "); !strings.Contains(plan, step) { // an earlier step may set the source
					t.Errorf("%s, %s: plan --kernel lacks %q:\n%s", p.Backend.Name, c.name, step, plan)
				}
			}
			p.WantUnchanged(p.OK())
			if plan := p.Exec("egress-router", "plan", "--kernel").Stdout; !strings.Contains(plan, "nothing is missing") {
				t.Errorf("%s, %s: plan --kernel afterwards:\n%s", p.Backend.Name, c.name, plan)
			}
			var now []netip.Addr
			for s := range strings.SplitSeq(c.sources, ", ") {
				now = append(now, netip.MustParsePrefix(s).Addr())
			}
			ask := func(pod string) {
				t.Helper()
				if a, err := p.Ask(p.Lab.Client, "tcp", netip.MustParseAddrPort(pod)); err != nil || !slices.Contains(now, a.Peer.Addr()) {
					t.Errorf("%s, %s: %v, %v", p.Backend.Name, c.name, a, err)
				}
			}
			if c.answers && strings.Contains(c.sources, ".") {
				ask("10.128.0.98:80")
			}
			if c.answers && strings.Contains(c.sources, ":") {
				ask("[fd00:10:128::98]:81")
				wantSources6(p, w.Captures["macvlan0"], slices.Concat(before, now)...)
			}
			for _, f := range w.Outgoing("macvlan0") {
				if ip, _ := f.IPv4(); !slices.Contains(slices.Concat(before, now), ip.Src.Addr()) {
					t.Errorf("%s, %s: frame with another source: %s", p.Backend.Name, c.name, f)
				}
			}
			before = now
		}
	})
}

// Without promote_secondaries the kernel deletes the new address with the former one of its
// subnet, and the run adds it again.
func TestFormerSourceTakesTheNewOneAlong(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		p.Tool("sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=0", "net.ipv4.conf.macvlan0.promote_secondaries=0")
		p.Env["EGRESS_SOURCE"] = "192.168.12.98/24"
		if r := p.Exec("with-read-only-proc"); r.Code != 0 || strings.Count(r.Stderr, `step="add address 192.168.12.98/24 to macvlan0"`) != 2 {
			p.Errorf("exit code %d, want 0 and an address that is added twice:\n%s", r.Code, r.Stderr)
		}
		if out := p.Tool("ip", "-4", "address", "show", "dev", "macvlan0"); strings.Count(out, "inet ") != 1 || !strings.Contains(out, "192.168.12.98/24") {
			p.Errorf("addresses:\n%s", out)
		}
		a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		if err != nil || a.Peer.Addr().String() != "192.168.12.98" {
			p.Errorf("%v, %v", a, err)
		}
		p.WantUnchanged(p.Exec("with-read-only-proc"))
	})
}
