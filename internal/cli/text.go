package cli

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/rules"
)

// version is set by the linker, to the source's version by git describe.
var version string

// programVersion returns version, or the module version of a go install.
func programVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		return info.Main.Version
	}
	return version
}

func runVersion(_ context.Context, p Process) error {
	_, err := fmt.Fprintf(p.Stdout, "egress-router %s %s %s/%s\n", programVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

// runPlan prints the steps of runMode in a fresh namespace, in their order, and the
// rules. It reads only the variables.
func runPlan(_ context.Context, p Process) error {
	c, err := parse(p)
	if err != nil {
		return err
	}
	_, err = io.WriteString(p.Stdout, planText(c))
	return err
}

func planText(c config.Config) string {
	var b strings.Builder
	for _, w := range c.Warnings {
		fmt.Fprintf(&b, "warning    %s\n", w)
	}
	fmt.Fprintf(&b, "mode       %s: %s\n", c.Mode, modeDocs[c.Mode])
	if c.Mode == config.UnitTest {
		b.Write(rules.UnitTest(c.Set, c.Sides()))
		return b.String()
	}
	want, plan := desired(c), c.Plan()
	fmt.Fprintf(&b, "interface  %s on the physical network, %s on the cluster network\n", c.Egress, c.Cluster)
	fmt.Fprintf(&b, "address    %s, announced to the physical network\n", c.Source)
	fmt.Fprintf(&b, "backend    %s\n\n", c.Backend)
	if c.Mode.Redirects() {
		b.WriteString(effect(c.Set, c.Source.Addr()) + "\n")
	}
	b.WriteString("steps, each skipped if the kernel is in that state already:\n")
	number := 0
	step := func(text string) {
		number++
		fmt.Fprintf(&b, "%2d. %s\n", number, text)
	}
	if m := macvlan(c); m != nil {
		step(m.String())
	}
	if c.Mode.Redirects() {
		step("load the rules below without redirects: they mark connections, set the source address and drop everything else")
	} else {
		step("load the rules below, which drop connections from the physical network")
	}
	step(fmt.Sprintf("set sysctls of %s and %s: no router advertisements, no ICMP redirects, ARP for own addresses only, no reverse-path filter that drops replies, longer times of tracked TCP connections", c.Egress, c.Cluster))
	claim := func(state link.State) {
		for _, s := range link.Claim(want, state) {
			step(s.String())
		}
	}
	claim(link.State{Promotes: true, Addresses: []netip.Prefix{want.Address}})
	step(fmt.Sprintf("probe for another host with %s (EGRESS_CONFLICT=%s)", want.Address.Addr(), c.Conflict))
	claim(link.State{Promotes: true, Up: true})
	step(fmt.Sprintf("announce %s by gratuitous ARP, as reply and as request, and request the gateway by ARP", want.Address.Addr()))
	step(fmt.Sprintf("copy the routes of %s, with its default route, to table %d", c.Cluster, c.ReplyTable))
	step(fmt.Sprintf("add routing rules to that table: for packets with mark %s, and for packets from an address of %s", c.ReplyMark, c.Cluster))
	kept := "the name servers of " + resolvConf + also(c.ClusterDestinations)
	if c.Macvlan != nil {
		kept += ", the addresses of the NIC"
	}
	step("route by the cluster side: " + kept)
	for _, s := range link.Diff(want, link.State{Promotes: true, Up: true, Addresses: []netip.Prefix{want.Address}}) {
		if s.Op == link.AppendRoute {
			continue // the subnet's route, which the kernel adds with the address
		}
		step(s.String())
	}
	step("delete every other default route of the main table")
	if c.Mode.Redirects() {
		step("load all rules")
		for _, s := range link.Forwarding(link.State{}) {
			step(s.String())
		}
	}
	step("remove stale rules of other backends")
	if c.Mode.Stays() {
		text := "repair drift as soon as the kernel notifies of a change"
		if c.Health.Interval > 0 {
			text += fmt.Sprintf("; reconcile everything every %s", c.Health.Interval)
		}
		step(text)
	}
	fmt.Fprintf(&b, "\nrules:\n%s", plan)
	return b.String()
}

func also(networks []netip.Prefix) string {
	var b strings.Builder
	for _, n := range networks {
		fmt.Fprintf(&b, ", %s", n)
	}
	return b.String()
}

// effect describes the redirects for a client.
func effect(set rules.Set, source netip.Addr) string {
	var b strings.Builder
	fmt.Fprintf(&b, "connections to the pod, with %s as their source:\n", source)
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range set.Redirects {
		to := r.ToPort
		if to == 0 {
			to = r.Port
		}
		fmt.Fprintf(table, "  %s port %d\tto %s port %d\n", r.Protocol, r.Port, r.To, to)
	}
	rest := "everything else"
	if len(set.Redirects) == 0 {
		rest = "everything"
	}
	if set.Fallback.IsValid() {
		fmt.Fprintf(table, "  %s\tto %s, same protocol and port\n", rest, set.Fallback)
	} else {
		fmt.Fprintf(table, "  %s\tis not redirected\n", rest)
	}
	table.Flush()
	return b.String()
}
