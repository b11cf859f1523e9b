package router_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A script records the actions of a router, in their order. It is the network and
// the rules of a namespace in which every step takes effect.
type script struct {
	state     plan.State
	redirects bool
	loaded    rules.Plan
	stray     bool
	done      []string
}

func (s *script) Observe(plan.Network) (plan.State, error) { return s.state, nil }
func (s *script) Watched() bool                            { return false }
func (s *script) Holds() bool                              { return false }
func (s *script) Named() map[string][]netip.Addr           { return nil }
func (s *script) Sources() []netip.Addr                    { return nil }
func (s *script) Exists(string) error                      { return nil }
func (s *script) Close()                                   {}

func (s *script) DeleteMacvlan(string) error { return nil }

func (s *script) Initial(plan.Network) (plan.Sysctls, error) { return nil, nil }

func (s *script) Do(step plan.Change) error {
	s.done = append(s.done, step.String())
	switch step.Op {
	case plan.AddAddress:
		s.state.Addresses = append(s.state.Addresses, step.Address)
		s.state.Routes = append(s.state.Routes, plan.Route{
			Destination: step.Address.Masked(), Index: s.state.Index, Source: step.Address.Addr(), Scope: plan.ScopeLink,
		})
	case plan.SetUp:
		s.state.Up = true
	case plan.ReplaceRoute:
		if step.Old != nil {
			s.state.Routes = slices.DeleteFunc(s.state.Routes, func(r plan.Route) bool { return r.String() == step.Old.String() })
		}
		s.state.Routes = append(s.state.Routes, step.Route)
	case plan.WriteSysctl:
		s.state.Forwards = true
	}
	return nil
}

func (s *script) Forget(bool, func(link.Connection) bool) (int, error) {
	s.done = append(s.done, "forget connections")
	return 0, nil
}

func (s *script) String() string  { return "script" }
func (s *script) Notes() []string { return nil }
func (s *script) Redirects() bool { return s.redirects }

func (s *script) Drops(context.Context, rules.Plan) (rules.Drops, error) { return nil, nil }

func (s *script) Differs(want rules.Plan) []string {
	if s.loaded.Equal(want) {
		return nil
	}
	return []string{"other rules"}
}

func (s *script) Apply(ctx context.Context, want rules.Plan) (func() error, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s.loaded.Equal(want) {
		return func() error { return nil }, nil
	}
	s.loaded, s.redirects = want, len(want.Destinations()) > 0
	text := "load rules without redirects"
	if s.redirects {
		text = "load all rules"
	}
	s.done = append(s.done, text)
	return func() error { return nil }, nil
}

func (s *script) next(context.Context, router.Rules, error) (router.Rules, error) { return nil, nil }

// strays returns the rules of another backend, once.
func (s *script) strays(context.Context, router.Rules) ([]router.Stray, error) {
	if !s.stray {
		return nil, nil
	}
	return []router.Stray{s}, nil
}

func (s *script) Remove(context.Context) (func() error, error) {
	s.done, s.stray = append(s.done, "remove the stray"), false
	return nil, nil
}

// At no step can a packet leave the wrong way, in any kind of pod.
func TestOrder(t *testing.T) {
	const (
		guard        = "load rules without redirects"
		all          = "load all rules"
		address      = "add address 192.168.12.99/24 to macvlan0"
		up           = "set macvlan0 up"
		gateway      = "add route 192.168.12.1 dev macvlan0 scope link src 192.168.12.99"
		defaultRoute = "replace route default via 10.128.0.1 dev eth0 by default via 192.168.12.1 dev macvlan0 src 192.168.12.99"
		forward      = "set net.ipv4.ip_forward = 1"
		forget       = "forget connections"
		stray        = "remove the stray"
	)
	cluster := plan.Route{
		Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: lab.NodeAddr, Index: 2, Interface: "eth0",
	}
	redirects := rules.NewPlan(rules.Set{Fallback: lab.Remote[0]}, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{lab.Source}})
	proxy := rules.NewProxyPlan(rules.Sides{Egress: "macvlan0"})
	ready := func(s *script) { // as after a run
		want := plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}}
		s.state.Routes = nil
		for _, g := range plan.Steps(plan.Want{Network: want}, plan.Have{State: s.state}) {
			for _, step := range g.Steps {
				if c, is := step.(plan.Change); is {
					_ = s.Do(c)
				}
			}
		}
		s.state.Forwards, s.redirects, s.done = true, true, nil
	}
	for name, test := range map[string]struct {
		start func(*script)
		plan  rules.Plan
		want  []string
	}{
		"fresh":                     {func(*script) {}, redirects, []string{all, up, address, gateway, defaultRoute, forward, forget}},
		"fresh, forwarding already": {func(s *script) { s.state.Forwards = true }, redirects, []string{guard, up, address, gateway, defaultRoute, all, forget}},
		"redirects already, other plan": {
			func(s *script) { s.state.Forwards, s.redirects = true, true }, redirects,
			[]string{guard, up, address, gateway, defaultRoute, all, forget},
		},
		"only other rules in the plan": {ready, redirects, []string{all, forget}},
		"another backend's rules":      {func(s *script) { ready(s); s.stray = true }, redirects, []string{all, stray, forget}},
		"nothing but such rules":       {func(s *script) { ready(s); s.loaded, s.stray = redirects, true }, redirects, []string{stray, forget}},
		"a proxy's rules are first":    {func(*script) {}, proxy, []string{guard, up, address, gateway, defaultRoute}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{state: plan.State{
				Index: 3, Carrier: true, NoARP: true, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Routes: []plan.Route{cluster},
			}}
			test.start(s)
			r := &router.Router{
				Want: plan.Want{
					Network: plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}},
					Rules:   test.plan, Forward: len(test.plan.Destinations()) > 0,
				},
				Log:     slog.New(slog.DiscardHandler),
				Network: func() (router.Network, error) { return s, nil },
				Rules:   func(context.Context, rules.Plan) (router.Rules, error) { return s, nil },
				Next:    s.next,
				Strays:  s.strays,
			}
			if err := r.Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, s.done); diff != "" {
				t.Errorf("- want, + done:\n%s", diff)
			}
			s.done = nil
			if err := r.Apply(t.Context()); err != nil || len(s.done) > 0 {
				t.Errorf("again: error %v, done %v; want nothing", err, s.done)
			}
		})
	}
}

// A run that cannot succeed is refused before any change, as far as possible.
func TestRefusedBeforeChange(t *testing.T) {
	for name, test := range map[string]struct {
		state plan.State
		want  string
	}{
		"the gateway is the pod": {
			plan.State{Index: 3, NoARP: true, Cluster: plan.ClusterState{Index: 2, Addresses: []netip.Addr{lab.GatewayAddr}}},
			"expected the router of the physical network, found an address of the pod",
		},
		"not Ethernet": {plan.State{Index: 3, MAC: make([]byte, 20)}, "expected 6 bytes, found 20"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{state: test.state}
			r := &router.Router{
				Want:    plan.Want{Network: plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}}},
				Log:     slog.New(slog.DiscardHandler),
				Network: func() (router.Network, error) { return s, nil },
			}
			err := r.Apply(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) || len(s.done) > 0 {
				t.Errorf("error %v, done %v; want %q and nothing", err, s.done, test.want)
			}
		})
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	s := &script{state: plan.State{Index: 3, NoARP: true}}
	r := &router.Router{
		Want:    plan.Want{Network: plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr}}}, Rules: rules.NewProxyPlan(rules.Sides{Egress: "macvlan0"})},
		Log:     slog.New(slog.DiscardHandler),
		Network: func() (router.Network, error) { return s, nil },
		Rules:   func(context.Context, rules.Plan) (router.Rules, error) { return s, nil },
		Next:    s.next,
		Strays:  s.strays,
	}
	if err := r.Apply(canceled); !errors.Is(err, context.Canceled) || len(s.done) > 0 {
		t.Errorf("error %v, done %v; want %v and nothing", err, s.done, context.Canceled)
	}
}
