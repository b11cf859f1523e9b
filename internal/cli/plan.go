package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// asksKernelPlan reports whether the arguments are plan --kernel.
func asksKernelPlan(args []string) bool { return slices.Equal(args, []string{"plan", "--kernel"}) }

// runPlan prints the effect of a run, its steps in a fresh pod, and the rules. It reads
// only the variables, and looks up no name: the name servers of this machine may be others
// than those of the pod. With --kernel it reads the kernel, looks the names up, and prints
// the steps that a run would take now.
func runPlan(ctx context.Context, p Process) error {
	c, err := parse(p)
	if err != nil {
		return err
	}
	log := logger(p.Stderr, config.Log{JSON: c.Log.JSON, Level: max(c.Log.Level, slog.LevelWarn)})
	text := ""
	if asksKernelPlan(p.Args) && c.Mode != config.UnitTest {
		text, err = missingText(ctx, c, log)
	} else {
		text = planText(c)
	}
	if err != nil {
		return err
	}
	_, err = io.WriteString(p.Stdout, text)
	return err
}

// missingText returns the steps that a run would take now. It changes nothing.
func missingText(ctx context.Context, c config.Config, log *slog.Logger) (string, error) {
	if err := checkPrivilege(c); err != nil {
		return "", err
	}
	if err := placeCarry(&c); err != nil {
		return "", err
	}
	if _, err := settleFlowtable(&c, log); err != nil {
		return "", err
	}
	keepNameServers(&c, log)
	r := newRouter(c, log)
	resolveOnce(ctx, &c, r, log)
	r.Want = wanted(c)
	missing, err := r.Check(ctx)
	if err != nil {
		return "", advised(c, err)
	}
	var b strings.Builder
	writeSummary(&b, c, missing.Backend, true)
	if len(missing.Steps) == 0 {
		b.WriteString("nothing is missing: the namespace is as configured\n")
	} else {
		b.WriteString("steps of a run now:\n")
		writeSteps(&b, missing.Steps)
	}
	return b.String(), nil
}

func planText(c config.Config) string {
	var b strings.Builder
	writeSummary(&b, c, string(c.Backend), false)
	if c.Mode == config.UnitTest {
		b.Write(rules.UnitTest(c.Set, c.Sides()))
		return b.String()
	}
	e := exampleOf(c)
	c.PlaceCarry(e.address.Addr())
	want := plan.WantOf(c.Router)
	want.Start = true
	want.Network.Cluster.Destinations = append(slices.Clone(want.Network.Cluster.Destinations), netip.PrefixFrom(e.nameServer, 32))
	six := ""
	if len(c.Sources.Of(true)) > 0 {
		six = fmt.Sprintf(", and of IPv6 %s and the gateway %s", exampleAddress6, exampleGateway6)
	}
	fmt.Fprintf(&b, "steps in a fresh pod with the defaults of the kernel, for example with %s on %s, its gateway %s and the name server %s%s:\n", e.address, c.Cluster, e.gateway, e.nameServer, six)
	writeSteps(&b, plan.Steps(want, e.fresh(want)))
	if c.Standby != nil {
		fmt.Fprintf(&b, "then stand by, and take the address over when no other router holds it: open the gate as %s answers\n", c.Standby.Witness)
	}
	if c.Mode.Stays() {
		b.WriteString("then repair drift as soon as the kernel notifies of a change")
		if c.Health.Interval > 0 {
			fmt.Fprintf(&b, "; reconcile everything every %s", c.Health.Interval)
		}
		b.WriteString("\n")
	}
	until := ""
	if len(c.Set.Names()) > 0 {
		until = " until the names have addresses"
	}
	fmt.Fprintf(&b, "\nrules%s:\n%s", until, want.Rules)
	return b.String()
}

// writeSummary writes the configuration and its effect. resolved is set if names have been
// looked up.
func writeSummary(b *strings.Builder, c config.Config, backend string, resolved bool) {
	for _, w := range c.Warnings {
		fmt.Fprintf(b, "warning    %s\n", w)
	}
	fmt.Fprintf(b, "mode       %s: %s\n", c.Mode, modeDocs[c.Mode])
	if c.Mode == config.UnitTest {
		return
	}
	fmt.Fprintf(b, "interface  %s on the physical network, %s on the cluster network\n", c.Egress, c.Cluster)
	if c.Standby != nil {
		fmt.Fprintf(b, "address    %s, while no other router of %s holds it\n", c.Sources, strings.Join(c.Peers.Names, ", "))
	} else {
		fmt.Fprintf(b, "address    %s, announced to the physical network\n", c.Sources)
	}
	fmt.Fprintf(b, "backend    %s\n\n", backend)
	if c.Mode.Redirects() {
		b.WriteString(effect(c.Set, c.Sources, resolved) + "\n")
	}
}

// writeSteps writes steps, one a line, and sysctls that follow each other as one step.
func writeSteps(b *strings.Builder, groups []plan.Group) {
	number, sysctls := 0, false
	for _, g := range groups {
		for _, s := range g.Steps {
			c, change := s.(plan.Change)
			if change && c.Optional && c.Op == plan.WriteSysctl {
				if !sysctls {
					number++
					fmt.Fprintf(b, "%2d. set sysctls:\n", number)
				}
				sysctls = true
				fmt.Fprintf(b, "      %s = %s\n", c.Sysctl, c.Value)
				continue
			}
			sysctls = false
			number++
			fmt.Fprintf(b, "%2d. %s\n", number, s)
		}
	}
}

// An example is the cluster side of a fresh pod.
type example struct {
	address    netip.Prefix
	gateway    netip.Addr
	nameServer netip.Addr
}

// The IPv6 of an example (RFC 4193), for a pod with an IPv6 source.
var (
	exampleAddress6 = netip.MustParsePrefix("fd00:1234::2/64")
	exampleGateway6 = netip.MustParseAddr("fd00:1234::1")
)

// exampleOf returns an example with addresses for documentation (RFC 5737) that the
// configuration does not have.
func exampleOf(c config.Config) example {
	var free []netip.Addr
	for _, a := range []string{"198.51.100.0", "192.0.2.0", "203.0.113.0"} {
		network := netip.PrefixFrom(netip.MustParseAddr(a), 24)
		if !slices.ContainsFunc(c.Sources, func(s spec.Source) bool {
			return network.Contains(s.Prefix.Addr()) || network.Contains(s.Gateway)
		}) {
			free = append(free, network.Addr())
		}
	}
	at := func(network netip.Addr, host byte) netip.Addr {
		b := network.As4()
		b[3] = host
		return netip.AddrFrom4(b)
	}
	return example{netip.PrefixFrom(at(free[0], 2), 24), at(free[0], 1), at(free[min(1, len(free)-1)], 53)}
}

// fresh returns the state of a pod whose egress interface is down and without an address.
func (e example) fresh(want plan.Want) plan.Have {
	const cluster, egress = 2, 3 // indices of the interfaces
	n := want.Network
	route := func(to netip.Prefix, gateway, source netip.Addr) plan.Route {
		return plan.Route{Destination: to, Gateway: gateway, Source: source, Index: cluster, Interface: n.Cluster.Interface}
	}
	subnet := route(e.address.Masked(), netip.Addr{}, e.address.Addr())
	subnet.Scope = plan.ScopeLink
	var six *plan.IPv6State
	if len(n.Sources.Of(true)) > 0 {
		network, other := route(exampleAddress6.Masked(), netip.Addr{}, netip.Addr{}), route(netip.PrefixFrom(netip.IPv6Unspecified(), 0), exampleGateway6, netip.Addr{})
		network.Metric, other.Metric = 256, 1024 // the kernel's
		six = &plan.IPv6State{
			Routes:  []plan.Route{network, other},
			Cluster: plan.ClusterState{Index: cluster, Addresses: []netip.Addr{exampleAddress6.Addr()}},
		}
	}
	var gate []string
	if want.Gate != nil {
		gate = []string{"there is none"}
	}
	var tunnel []string
	if want.Carry != nil {
		tunnel = []string{"there is none"}
	}
	var shortcut []string
	if want.Flowtable != nil {
		shortcut = []string{"there is none"}
	}
	return plan.Have{
		Missing: want.Macvlan != nil, Gate: gate, Carry: tunnel, Flowtable: shortcut,
		State: plan.State{
			Index: egress, Carrier: true, Sysctls: n.Defaults(),
			Routes:  []plan.Route{route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), e.gateway, netip.Addr{}), subnet},
			Cluster: plan.ClusterState{Index: cluster, Addresses: []netip.Addr{e.address.Addr()}},
			IPv6:    six,
		},
		Differs: []string{""}, // the reason is plain
	}
}
