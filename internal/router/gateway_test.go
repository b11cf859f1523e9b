package router_test

import (
	"net/netip"
	"testing"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/router"
)

// A gateway of the cluster side is an error, unless both interfaces are in one network.
func TestCheckGateway(t *testing.T) {
	t.Parallel()
	const cluster = 2 // index of eth0
	prefix := netip.MustParsePrefix
	onLink := func(index int, to string) link.Route {
		return link.Route{Destination: prefix(to), Index: index, Scope: link.ScopeLink}
	}
	via := func(index int, to, gateway string) link.Route {
		return link.Route{Destination: prefix(to), Gateway: netip.MustParseAddr(gateway), Index: index}
	}
	kept := onLink(cluster, "192.168.12.0/25")
	kept.Kept = true
	copied := via(cluster, "0.0.0.0/0", "10.128.0.1")
	copied.Table = 4711
	for name, test := range map[string]struct {
		source, gateway string
		routes          []link.Route
		have            link.State
		refused         bool
	}{
		"of the physical network":     {"192.168.12.99/24", "192.168.12.1", []link.Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, link.State{}, false},
		"outside of the subnet":       {"192.168.12.99/24", "192.168.77.1", []link.Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, link.State{}, false},
		"without a length":            {"192.168.12.99/32", "192.168.12.1", []link.Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, link.State{}, false},
		"no cluster side":             {"192.168.12.99/32", "192.168.12.1", nil, link.State{}, false},
		"next hop":                    {"192.168.12.99/24", "10.128.0.1", []link.Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, link.State{}, true},
		"next hop, after another run": {"192.168.12.99/24", "10.128.0.1", nil, link.State{Cluster: link.ClusterState{Table: []link.Route{copied}}}, true},
		"next hop, host route":        {"192.168.12.99/24", "169.254.1.1", []link.Route{via(cluster, "0.0.0.0/0", "169.254.1.1"), onLink(cluster, "169.254.1.1/32")}, link.State{}, true},
		"next hop of another route":   {"192.168.12.99/24", "192.168.13.1", []link.Route{via(cluster, "10.0.0.0/8", "192.168.13.1")}, link.State{}, false},
		"next hop of the egress side": {"192.168.12.99/32", "192.168.12.1", []link.Route{via(1, "0.0.0.0/0", "192.168.12.1")}, link.State{}, false},
		"cluster network":             {"192.168.12.99/32", "10.128.0.71", []link.Route{onLink(cluster, "10.128.0.0/23")}, link.State{}, true},
		"wide cluster network":        {"192.168.12.99/24", "10.131.0.1", []link.Route{onLink(cluster, "10.128.0.0/14")}, link.State{}, true},
		"route that a run added":      {"192.168.12.99/32", "192.168.12.1", []link.Route{kept}, link.State{}, false},
		"one network":                 {"192.168.12.99/24", "192.168.12.1", []link.Route{via(cluster, "0.0.0.0/0", "192.168.12.1"), onLink(cluster, "192.168.12.0/24")}, link.State{}, false},
		"one network, no length":      {"192.168.12.99/32", "192.168.12.1", []link.Route{via(cluster, "0.0.0.0/0", "192.168.12.1"), onLink(cluster, "192.168.12.0/24")}, link.State{}, false},
		"one network, other address": {
			"192.168.13.99/32", "192.168.12.1",
			[]link.Route{onLink(cluster, "192.168.12.0/24")}, link.State{Addresses: []netip.Prefix{prefix("192.168.12.50/24")}}, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := link.Want{Interface: "macvlan0", Address: prefix(test.source), Gateway: netip.MustParseAddr(test.gateway)}
			have := test.have
			have.Index, have.Cluster.Index, have.Routes = 1, cluster, test.routes
			if err := router.CheckGateway(want, have); (err != nil) != test.refused {
				t.Errorf("error %v, want one: %v", err, test.refused)
			}
		})
	}
}
