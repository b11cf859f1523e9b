package labtest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// loaded is what the command load-rules loads.
type loaded struct {
	List  string // destinations, in the extended grammar
	Sides rules.Sides
}

// loadVariable is the variable with a loaded for the command.
const loadVariable = "LOAD_RULES"

// Mark is the mark of connections from the cluster side in plans of [Pod.Load].
const Mark rules.Mark = spec.DefaultReplyMark

// Load loads the rules for a list of destinations and sources with the pod's backend, and
// the source guard. It checks that the kernel then has them, and reports whether it had
// them before.
func (p *Pod) Load(list string, sources ...netip.Addr) (unchanged bool) {
	p.Helper()
	in, err := json.Marshal(loaded{list, rules.Sides{Cluster: p.Lab.ClusterName, Egress: p.Lab.MacvlanName, Sources: sources, Mark: Mark}})
	if err != nil {
		p.Fatal(err)
	}
	q := *p
	q.Env = map[string]string{loadVariable: string(in)}
	unchanged = true
	p.Until("the rules are loaded", func() bool {
		r := q.Exec("load-rules")
		// The programs of both families wait for the same lock, on a busy machine for longer
		// than they are patient.
		if r.Code != 0 && !strings.Contains(r.Stderr, "xtables lock") {
			p.Fatalf("load rules: %s", Tail(r.Stderr))
		}
		unchanged = unchanged && r.Stdout == ""
		return r.Code == 0
	})
	return unchanged
}

// A transaction is a backend's.
type transaction interface {
	Apply(context.Context, rules.Plan) (undo func() error, err error)
	Differs(rules.Plan) []string
}

// loadRules is the command, in the namespace of the router. It prints the differences of
// the kernel before.
func loadRules() {
	ctx := context.Background()
	families := []rules.Family{rules.IPv4, rules.IPv6}
	err := func() error {
		var in loaded
		if err := json.Unmarshal([]byte(os.Getenv(loadVariable)), &in); err != nil {
			return err
		}
		set, err := rules.ParseExtended(in.List, nil)
		if err != nil {
			return err
		}
		plan := rules.NewPlan(set, in.Sides)
		for _, begin := range []func() (transaction, error){
			func() (transaction, error) { return nft.BeginGuard(ctx, families...) },
			func() (transaction, error) {
				if os.Getenv("EGRESS_ROUTER_BACKEND") == "nftables" {
					return nft.Begin(ctx, families...)
				}
				backend, err := iptables.Find(ctx, families...)
				if err != nil {
					return nil, err
				}
				return backend.Begin(ctx, plan)
			},
		} {
			tx, err := begin()
			if err != nil {
				return err
			}
			for _, line := range tx.Differs(plan) {
				fmt.Fprintln(os.Stdout, line)
			}
			if _, err := tx.Apply(ctx, plan); err != nil {
				return err
			}
			if tx, err = begin(); err != nil {
				return err
			}
			if found := tx.Differs(plan); len(found) > 0 {
				return fmt.Errorf("loaded and listed otherwise: %q", found)
			}
		}
		return nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Connect makes the pod's links and routes those of a router with some reserved addresses,
// as the program would make them: an address each, the gateways, and a table for replies to
// the cluster side.
func (p *Pod) Connect(sources ...netip.Addr) {
	p.Helper()
	const table = 4711
	h := p.Handle(p.Lab.Router)
	macvlan, eth := p.Link(h, p.Lab.MacvlanName), p.Link(h, p.Lab.ClusterName)
	must := func(err error) {
		p.Helper()
		if err != nil {
			p.Fatal(err)
		}
	}
	must(h.LinkSetUp(macvlan))
	for key, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/eth0/rp_filter": "2",
		"net/ipv6/conf/macvlan0/accept_ra": "0", "net/ipv6/conf/macvlan0/accept_dad": "0",
	} {
		must(p.Lab.SetSysctl(p.Lab.Router, key, value))
	}
	for _, s := range sources {
		bits := lab.LAN.Bits()
		if s.Is6() {
			bits = lab.LAN6.Bits()
		}
		must(h.AddrAdd(macvlan, &netlink.Addr{IPNet: &net.IPNet{IP: s.AsSlice(), Mask: net.CIDRMask(bits, s.BitLen())}}))
	}
	p.Until("the addresses are valid", func() bool {
		list, err := h.AddrList(macvlan, netlink.FAMILY_ALL)
		must(err)
		for _, a := range list {
			if a.Flags&unix.IFA_F_TENTATIVE != 0 {
				return false
			}
		}
		return true
	})
	for _, f := range []struct {
		family               int
		everywhere           string
		gateway, clusterSide netip.Addr
	}{
		{netlink.FAMILY_V4, "0.0.0.0/0", lab.GatewayAddr, lab.NodeAddr},
		{netlink.FAMILY_V6, "::/0", lab.GatewayAddr6, lab.NodeAddr6},
	} {
		to := IPNet(f.everywhere)
		must(h.RouteDel(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: to, Gw: f.clusterSide.AsSlice()}))
		route := &netlink.Route{LinkIndex: macvlan.Attrs().Index, Dst: to, Gw: f.gateway.AsSlice()}
		if at := slices.IndexFunc(sources, func(s netip.Addr) bool { return s.Is4() == f.gateway.Is4() }); at >= 0 {
			route.Src = sources[at].AsSlice()
		}
		must(h.RouteAdd(route))
		must(h.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: to, Gw: f.clusterSide.AsSlice(), Table: table}))
		mask := uint32(Mark)
		rule := netlink.NewRule()
		rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = f.family, uint32(Mark), &mask, table, 100
		must(h.RuleAdd(rule))
	}
}
