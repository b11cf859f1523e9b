package router_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// clusterSide is the cluster side of eth0, with a destination outside of its routes.
var clusterSide = plan.ClusterSide{
	Interface: "eth0", Mark: 0x1000, Table: 4711, Destinations: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
}

var errInjected = errors.New("injected failure")

// A failingNetwork is the kernel's network in which one required change fails.
type failingNetwork struct {
	router.Network
	left  *int // changes before the failing one
	steps *[]string
}

func (n failingNetwork) Do(s plan.Change) error {
	if !s.Optional {
		*n.left--
		if *n.left == 0 {
			return fmt.Errorf("%s: %w", s, errInjected)
		}
	}
	*n.steps = append(*n.steps, s.String())
	return n.Network.Do(s)
}

func newRouter(t *testing.T, set string, left *int, steps *[]string) *router.Router {
	t.Helper()
	destinations, err := rules.Parse(set, nil)
	if err != nil {
		t.Fatal(err)
	}
	wanted := rules.NewPlan(destinations, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{lab.Source}, Mark: rules.Mark(clusterSide.Mark)})
	return &router.Router{
		Want: plan.Want{
			Network: plan.Network{
				Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}, Cluster: clusterSide,
			},
			Rules: wanted, Forward: true,
		},
		Log: slog.New(slog.DiscardHandler),
		Network: func() (router.Network, error) {
			kernel, err := link.Open()
			return failingNetwork{kernel, left, steps}, err
		},
		Rules: func(ctx context.Context, _ rules.Plan) (router.Rules, error) {
			backend, err := iptables.Find(ctx, rules.IPv4, rules.IPv6)
			if err != nil {
				return nil, err
			}
			return backend.Begin(ctx, wanted)
		},
		Next:   func(context.Context, router.Rules, error) (router.Rules, error) { return nil, nil },
		Strays: func(context.Context, router.Rules) ([]router.Stray, error) { return nil, nil },
	}
}

// inRouter runs fn in the router's namespace.
func inRouter(t *testing.T, l *lab.Lab, fn func() error) error {
	t.Helper()
	return l.Router.Do(fn)
}

// state describes the state that the router changes.
func state(t *testing.T, l *lab.Lab) string {
	t.Helper()
	var b strings.Builder
	err := l.Router.Do(func() error {
		kernel, err := link.Open()
		if err != nil {
			return err
		}
		defer kernel.Close()
		s, err := kernel.Observe(plan.Network{Interface: "macvlan0", Cluster: clusterSide})
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, s.Up, s.Forwards, s.Promotes, s.Addresses)
		for _, r := range slices.Concat(s.Routes, s.Cluster.Table, s.AdvertisedRoutes) {
			fmt.Fprintln(&b, r)
		}
		for _, a := range s.Advertised {
			fmt.Fprintln(&b, a.Prefix)
		}
		fmt.Fprintln(&b, s.Cluster.Rules, s.Lost, s.Sysctls)
		backend, err := iptables.Find(t.Context(), rules.IPv4, rules.IPv6)
		if err != nil {
			return err
		}
		tx, err := backend.Begin(t.Context(), rules.Plan{})
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, tx.Differs(rules.NewPlan(rules.Set{}, rules.Sides{})))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Each change of the network fails once, in several kinds of pods; each time
// everything is rolled back in its order, and the next run succeeds.
func TestApplyRollsBack(t *testing.T) {
	for name, prepare := range map[string]func(l *lab.Lab, h *netlink.Handle, macvlan, eth netlink.Link) error{
		"fresh": func(*lab.Lab, *netlink.Handle, netlink.Link, netlink.Link) error { return nil },
		"another address, down": func(_ *lab.Lab, h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.AddrAdd(macvlan, parseAddr("192.168.12.50/24"))
		},
		"another address and its default route": func(_ *lab.Lab, h *netlink.Handle, macvlan, eth netlink.Link) error {
			if err := h.AddrAdd(macvlan, parseAddr("192.168.12.50/24")); err != nil {
				return err
			}
			if err := h.LinkSetUp(macvlan); err != nil {
				return err
			}
			return h.RouteAdd(&netlink.Route{Gw: lab.GatewayAddr.AsSlice(), LinkIndex: macvlan.Attrs().Index, Priority: 10})
		},
		"many default routes": func(_ *lab.Lab, h *netlink.Handle, _, eth netlink.Link) error {
			for _, r := range []netlink.Route{
				{Gw: lab.ClientAddr.AsSlice(), Priority: 0, MTU: 1400},
				{Gw: lab.ClientAddr.AsSlice(), Priority: 7, Protocol: 4},
				{Gw: lab.NodeAddr.AsSlice(), Priority: 7, Src: lab.RouterAddr.AsSlice()},
			} {
				r.LinkIndex = eth.Attrs().Index
				if err := h.RouteAppend(&r); err != nil {
					return err
				}
			}
			return nil
		},
		"default route with next hops on both sides": func(_ *lab.Lab, h *netlink.Handle, macvlan, eth netlink.Link) error {
			if err := h.AddrAdd(macvlan, parseAddr("192.168.12.50/24")); err != nil {
				return err
			}
			if err := h.LinkSetUp(macvlan); err != nil {
				return err
			}
			return h.RouteReplace(&netlink.Route{Dst: labtest.Everywhere(), MultiPath: []*netlink.NexthopInfo{
				{LinkIndex: macvlan.Attrs().Index, Gw: lab.GatewayAddr.AsSlice()}, {LinkIndex: eth.Attrs().Index, Gw: lab.NodeAddr.AsSlice(), Hops: 1},
			}})
		},
		"halves of the default route": func(_ *lab.Lab, h *netlink.Handle, _, eth netlink.Link) error {
			for _, to := range []string{"0.0.0.0/1", "128.0.0.0/1"} {
				if err := h.RouteAdd(&netlink.Route{Dst: labtest.IPNet(to), LinkIndex: eth.Attrs().Index, Gw: lab.NodeAddr.AsSlice()}); err != nil {
					return err
				}
			}
			return nil
		},
		"router advertisement, no routing rules": func(l *lab.Lab, h *netlink.Handle, macvlan, _ netlink.Link) error {
			for name, value := range map[string]string{
				"net/ipv6/conf/macvlan0/disable_ipv6": "0", "net/ipv6/conf/macvlan0/accept_ra": "1", "net/ipv4/conf/all/accept_redirects": "0",
				"net/ipv4/conf/macvlan0/accept_redirects": "1", "net/netfilter/nf_conntrack_tcp_timeout_established": "600",
			} {
				if err := l.SetSysctl(l.Router, name, value); err != nil {
					return err
				}
			}
			if err := h.LinkSetUp(macvlan); err != nil {
				return err
			}
			address := parseAddr("2001:db8::99/64")
			address.ValidLft, address.PreferedLft, address.Flags = 3600, 3600, unix.IFA_F_NODAD
			if err := h.AddrAdd(macvlan, address); err != nil {
				return err
			}
			if err := h.RouteAdd(&netlink.Route{Dst: labtest.IPNet("2001:db8:1::/64"), LinkIndex: macvlan.Attrs().Index, Protocol: unix.RTPROT_RA}); err != nil {
				return err
			}
			for table, priority := range map[int]int{unix.RT_TABLE_LOCAL: 0, unix.RT_TABLE_MAIN: 32766} {
				rule := netlink.NewRule()
				rule.Table, rule.Priority = table, priority
				if err := h.RuleDel(rule); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := lab.New(lab.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(l.Close)
			h, err := l.Netlink(l.Router)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			macvlan, err := h.LinkByName("macvlan0")
			if err != nil {
				t.Fatal(err)
			}
			eth, err := h.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			if err := prepare(l, h, macvlan, eth); err != nil {
				t.Fatal(err)
			}

			before := state(t, l)
			failures := 0
			for n := 1; ; n++ {
				left, steps := n, []string(nil)
				r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
				err := inRouter(t, l, func() error { return r.Apply(t.Context()) })
				if err == nil {
					break
				}
				if failures++; failures > 50 {
					t.Fatalf("no run succeeds: %v", err)
				}
				if !errors.Is(err, errInjected) {
					t.Errorf("change %d: %v", n, err)
				}
				if diff := cmp.Diff(before, state(t, l)); diff != "" {
					t.Fatalf("change %d (%v) after %v: - was, + is:\n%s", n, err, steps, diff)
				}
			}
			if failures < 5 {
				t.Errorf("only %d changes could fail", failures)
			}
			after := state(t, l)
			left, steps := 0, []string(nil)
			r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
			if err := inRouter(t, l, func() error { return r.Apply(t.Context()) }); err != nil || len(steps) > 0 {
				t.Errorf("again: error %v, changes %v; want none", err, steps)
			}
			if diff := cmp.Diff(after, state(t, l)); diff != "" {
				t.Errorf("again: - was, + is:\n%s", diff)
			}
		})
	}
}

func parseAddr(s string) *netlink.Addr {
	a, err := netlink.ParseAddr(s)
	if err != nil {
		panic(err)
	}
	return a
}

// An interrupted run restores the state before it.
func TestApplyInterrupted(t *testing.T) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	before := state(t, l)
	left, steps := 0, []string(nil)
	r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
	ctx, cancel := context.WithCancel(t.Context())
	open := r.Network
	r.Network = func() (router.Network, error) {
		n, err := open()
		return cancelAfter{n, cancel}, err
	}
	err = inRouter(t, l, func() error { return r.Apply(ctx) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	if diff := cmp.Diff(before, state(t, l)); diff != "" {
		t.Errorf("- was, + is:\n%s", diff)
	}
}

// cancelAfter is a network whose run is interrupted at the first change of a
// route.
type cancelAfter struct {
	router.Network
	cancel func()
}

func (n cancelAfter) Do(s plan.Change) error {
	if s.Op == plan.ReplaceRoute {
		n.cancel()
	}
	return n.Network.Do(s)
}
