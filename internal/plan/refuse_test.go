package plan

import (
	"net/netip"
	"testing"

	"github.com/egress-router/egress-router/internal/spec"
)

// A gateway of the cluster side is an error, unless both interfaces are in one network.
func TestDoubt(t *testing.T) {
	t.Parallel()
	const cluster = 2 // index of eth0
	prefix := netip.MustParsePrefix
	onLink := func(index int, to string) Route {
		return Route{Destination: prefix(to), Index: index, Scope: ScopeLink}
	}
	via := func(index int, to, gateway string) Route {
		return Route{Destination: prefix(to), Gateway: netip.MustParseAddr(gateway), Index: index}
	}
	kept := onLink(cluster, "192.168.12.0/25")
	kept.Kept = true
	copied := via(cluster, "0.0.0.0/0", "10.128.0.1")
	copied.Table = 4711
	for name, test := range map[string]struct {
		source, gateway string
		routes          []Route
		have            State
		refused         bool
	}{
		"of the physical network":     {"192.168.12.99/24", "192.168.12.1", []Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, State{}, false},
		"outside of the subnet":       {"192.168.12.99/24", "192.168.77.1", []Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, State{}, false},
		"without a length":            {"192.168.12.99/32", "192.168.12.1", []Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, State{}, false},
		"no cluster side":             {"192.168.12.99/32", "192.168.12.1", nil, State{}, false},
		"next hop":                    {"192.168.12.99/24", "10.128.0.1", []Route{via(cluster, "0.0.0.0/0", "10.128.0.1"), onLink(cluster, "10.128.0.0/23")}, State{}, true},
		"next hop, after another run": {"192.168.12.99/24", "10.128.0.1", nil, State{Cluster: ClusterState{Table: []Route{copied}}}, true},
		"next hop, host route":        {"192.168.12.99/24", "169.254.1.1", []Route{via(cluster, "0.0.0.0/0", "169.254.1.1"), onLink(cluster, "169.254.1.1/32")}, State{}, true},
		"next hop of another route":   {"192.168.12.99/24", "192.168.13.1", []Route{via(cluster, "10.0.0.0/8", "192.168.13.1")}, State{}, false},
		"next hop of the egress side": {"192.168.12.99/32", "192.168.12.1", []Route{via(1, "0.0.0.0/0", "192.168.12.1")}, State{}, false},
		"cluster network":             {"192.168.12.99/32", "10.128.0.71", []Route{onLink(cluster, "10.128.0.0/23")}, State{}, true},
		"wide cluster network":        {"192.168.12.99/24", "10.131.0.1", []Route{onLink(cluster, "10.128.0.0/14")}, State{}, true},
		"route that a run added":      {"192.168.12.99/32", "192.168.12.1", []Route{kept}, State{}, false},
		"one network":                 {"192.168.12.99/24", "192.168.12.1", []Route{via(cluster, "0.0.0.0/0", "192.168.12.1"), onLink(cluster, "192.168.12.0/24")}, State{}, false},
		"one network, no length":      {"192.168.12.99/32", "192.168.12.1", []Route{via(cluster, "0.0.0.0/0", "192.168.12.1"), onLink(cluster, "192.168.12.0/24")}, State{}, false},
		"one network, other address": {
			"192.168.13.99/32", "192.168.12.1",
			[]Route{onLink(cluster, "192.168.12.0/24")}, State{Addresses: []netip.Prefix{prefix("192.168.12.50/24")}}, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: prefix(test.source), Gateway: netip.MustParseAddr(test.gateway)}}}
			have := test.have
			have.Index, have.Cluster.Index, have.Routes = 1, cluster, test.routes
			if err := doubts(want, have); (err != nil) != test.refused {
				t.Errorf("error %v, want one: %v", err, test.refused)
			}
		})
	}
}
