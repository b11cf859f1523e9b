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
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// A script records what a router does, in its order. It is the network and the
// rules of a namespace in which every step takes effect.
type script struct {
	state     link.State
	redirects bool
	loaded    rules.Plan
	done      []string
}

func (s *script) Observe(link.Want) (link.State, error) { return s.state, nil }
func (s *script) Exists(string) error                   { return nil }
func (s *script) Close()                                {}

func (s *script) Do(step link.Step) error {
	s.done = append(s.done, step.String())
	switch step.Op {
	case link.AddAddress:
		s.state.Addresses = append(s.state.Addresses, step.Address)
		s.state.Routes = append(s.state.Routes, link.Route{
			Destination: step.Address.Masked(), Index: s.state.Index, Source: step.Address.Addr(), Scope: link.ScopeLink,
		})
	case link.SetUp:
		s.state.Up = true
	case link.ReplaceRoute:
		if step.Old != nil {
			s.state.Routes = slices.DeleteFunc(s.state.Routes, func(r link.Route) bool { return r.String() == step.Old.String() })
		}
		s.state.Routes = append(s.state.Routes, step.Route)
	case link.WriteSysctl:
		s.state.Forwards = true
	}
	return nil
}

func (s *script) Forget(func(link.Connection) bool) (int, error) {
	s.done = append(s.done, "forget connections")
	return 0, nil
}

func (s *script) String() string  { return "script" }
func (s *script) Notes() []string { return nil }
func (s *script) Redirects() bool { return s.redirects }

func (s *script) Differs(want rules.Plan) []string {
	if s.loaded.Equal(want) {
		return nil
	}
	return []string{"other rules"}
}

func (s *script) Apply(_ context.Context, want rules.Plan) (func() error, error) {
	if s.loaded.Equal(want) {
		return func() error { return nil }, nil
	}
	s.loaded, s.redirects = want, want.Count(rules.DNAT) > 0
	text := "load rules without redirects"
	if s.redirects {
		text = "load all rules"
	}
	s.done = append(s.done, text)
	return func() error { return nil }, nil
}

// The order in which nothing can leave the wrong way, in each kind of pod.
func TestOrder(t *testing.T) {
	const (
		guard    = "load rules without redirects"
		all      = "load all rules"
		address  = "add address 192.168.12.99/24 to macvlan0"
		up       = "set macvlan0 up"
		gateway  = "add route 192.168.12.1 dev macvlan0 scope link src 192.168.12.99"
		standard = "replace route default via 10.128.0.1 dev eth0 by default via 192.168.12.1 dev macvlan0 src 192.168.12.99"
		forward  = "set net.ipv4.ip_forward = 1"
		forget   = "forget connections"
	)
	cluster := link.Route{
		Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: lab.NodeAddr, Index: 2, Interface: "eth0",
	}
	for name, test := range map[string]struct {
		forwards, redirects bool
		want                []string
	}{
		"fresh":                            {false, false, []string{address, up, all, gateway, standard, forward, forget}},
		"fresh, forwarding already":        {true, false, []string{address, up, guard, gateway, standard, all, forget}},
		"redirects already, others wanted": {true, true, []string{guard, address, up, gateway, standard, all, forget}},
	} {
		t.Run(name, func(t *testing.T) {
			plan := rules.NewPlan(rules.Set{Fallback: lab.Remote[0]}, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Source: lab.Source})
			s := &script{
				redirects: test.redirects,
				state: link.State{
					Index: 3, Forwards: test.forwards, Carrier: true, NoARP: true,
					MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Routes: []link.Route{cluster},
				},
			}
			r := &router.Router{
				Link:    link.Want{Interface: "macvlan0", Address: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr},
				Plan:    &plan,
				Log:     slog.New(slog.DiscardHandler),
				Network: func() (router.Network, error) { return s, nil },
				Rules:   func(context.Context) (router.Rules, error) { return s, nil },
			}
			if err := r.Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, s.done); diff != "" {
				t.Errorf("- wanted, + done:\n%s", diff)
			}
			s.done = nil
			if err := r.Apply(t.Context()); err != nil || len(s.done) > 0 {
				t.Errorf("again: error %v, done %v; want nothing", err, s.done)
			}
		})
	}
}

// What can be refused before anything changes is.
func TestRefusesBeforehand(t *testing.T) {
	for name, test := range map[string]struct {
		state link.State
		want  string
	}{
		"the gateway is the pod": {
			link.State{Index: 3, NoARP: true, Cluster: link.ClusterState{Index: 2, Addresses: []netip.Addr{lab.GatewayAddr}}},
			"which is an address of the pod itself",
		},
		"not Ethernet": {link.State{Index: 3, MAC: make([]byte, 20)}, "has 20 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &script{state: test.state}
			r := &router.Router{
				Link:    link.Want{Interface: "macvlan0", Address: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr},
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
	s := &script{state: link.State{Index: 3, NoARP: true}}
	r := &router.Router{
		Link:    link.Want{Interface: "macvlan0", Address: netip.PrefixFrom(lab.Source, 24), Gateway: lab.GatewayAddr},
		Log:     slog.New(slog.DiscardHandler),
		Network: func() (router.Network, error) { return s, nil },
	}
	if err := r.Apply(canceled); !errors.Is(err, context.Canceled) || len(s.done) > 0 {
		t.Errorf("error %v, done %v; want %v and nothing", err, s.done, context.Canceled)
	}
}
