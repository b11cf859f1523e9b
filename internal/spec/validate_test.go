package spec

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/rules"
)

// good is a router without a fault.
func good() Router {
	return Router{
		Sources: Sources{
			{netip.MustParsePrefix("192.168.12.99/24"), netip.MustParseAddr("192.168.12.1")},
			{netip.MustParsePrefix("2001:db8:12::99/64"), netip.MustParseAddr("fe80::1")},
		},
		Egress: "net1", Cluster: "eth0", Forward: true,
		Set: rules.Set{
			Redirects: []rules.Redirect{
				{Protocol: rules.TCP, Port: 80, To: netip.MustParseAddr("203.0.113.25")},
				{Protocol: rules.UDP, Port: 53, To: netip.MustParseAddr("2001:db8::25")},
			},
			Fallback: netip.MustParseAddr("203.0.113.26"),
		},
		ReplyMark: DefaultReplyMark, ReplyTable: DefaultReplyTable,
		ClusterDestinations: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/112")},
	}
}

// Each fault is found, alone, in its field and at its index.
func TestValidate(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Router)
		want   string
	}{
		"good":            {func(*Router) {}, ""},
		"no source":       {func(r *Router) { r.Sources, r.Set, r.ClusterDestinations = nil, rules.Set{}, nil }, "source 0: there is no reserved address"},
		"loopback source": {func(r *Router) { r.Sources[0].Prefix = netip.MustParsePrefix("127.0.0.1/8") }, "source 0: a loopback address cannot be the source of connections\nwarning: gateway 0: 192.168.12.1 is outside of the subnet of source, 127.0.0.0/8: check both, and the length"},
		"broadcast":       {func(r *Router) { r.Sources[0].Prefix = netip.MustParsePrefix("192.168.12.255/24") }, "source 0: the broadcast address of 192.168.12.0/24 cannot be the source of connections"},
		"all routers":     {func(r *Router) { r.Sources[1].Prefix = netip.MustParsePrefix("2001:db8:12::/64") }, "source 1: the address of all routers of 2001:db8:12::/64 cannot be the source of connections"},
		"source twice":    {func(r *Router) { r.Sources = append(r.Sources, r.Sources[0]) }, "source 2: it is there twice: remove one"},
		"too many sources": {func(r *Router) {
			for i := range rules.MostSources {
				r.Sources = append(r.Sources, Source{netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, 12, byte(100 + i)}), 24), r.Sources[0].Gateway})
			}
		}, "source 33: it is one of more than 32 addresses of one family: clients are spread over at most so many"},
		"gateway is source": {func(r *Router) { r.Sources[0].Gateway = r.Sources[0].Prefix.Addr() }, "gateway 0: it is the same as source: the gateway is another host"},
		"gateway of all":    {func(r *Router) { r.Sources[0].Gateway = netip.MustParseAddr("192.168.12.0") }, "gateway 0: the network address of 192.168.12.0/24 cannot be a gateway"},
		"no gateway":        {func(r *Router) { r.Sources[1].Gateway = netip.Addr{} }, "gateway 1: there is no IPv6 gateway for 2001:db8:12::99: add one"},
		"other family":      {func(r *Router) { r.Sources[1].Gateway = r.Sources[0].Gateway }, "gateway 1: there is no IPv6 gateway for 2001:db8:12::99: add one"},
		"two gateways": {func(r *Router) {
			r.Sources = append(r.Sources, Source{netip.MustParsePrefix("192.168.12.100/24"), netip.MustParseAddr("192.168.12.2")})
		}, "gateway 2: 192.168.12.1 and 192.168.12.2 are gateways of one family, which has one: remove one"},
		"gateway outside": {func(r *Router) { r.Sources[0].Gateway = netip.MustParseAddr("192.168.13.1") }, "warning: gateway 0: 192.168.13.1 is outside of the subnet of source, 192.168.12.0/24: check both, and the length"},
		"second one outside": {func(r *Router) {
			r.Sources = append(r.Sources, Source{netip.MustParsePrefix("192.168.77.2/24"), r.Sources[0].Gateway})
		}, "warning: gateway 2: 192.168.12.1 is outside of the subnet of source, 192.168.77.0/24: check both, and the length"},
		"no source of family": {func(r *Router) { r.Sources, r.ClusterDestinations = r.Sources[:1], nil }, "destinations 1: it is for IPv6, and source has no IPv6 address (connections leave with a source of the same family: remove it, or reserve an address for them)"},
		"unreachable":         {func(r *Router) { r.Set.Redirects[0].To = netip.MustParseAddr("224.0.0.1") }, "warning: destinations 0: 224.0.0.1 is a multicast address: connections redirected to it fail"},
		"reserved":            {func(r *Router) { r.Set.Fallback = r.Sources[0].Prefix.Addr() }, "warning: destinations 2: 192.168.12.99 is the reserved address: connections redirected to it end in the pod"},
		"health port":         {func(r *Router) { r.HealthPort = 80 }, "health address 0: health address has port 80, which is also a local port of the destinations: choose another port"},
		"no name":             {func(r *Router) { r.Egress = "" }, `interface 0: "" is not an interface name: it is empty`},
		"long name":           {func(r *Router) { r.Egress = "a123456789abcdef" }, `interface 0: "a123456789abcdef" is not an interface name: it has more than 15 bytes`},
		"number":              {func(r *Router) { r.Egress = "eth%d" }, `interface 0: "eth%d" is not an interface name: it contains '%'`},
		"name of sysctls":     {func(r *Router) { r.Egress = "default" }, `interface 0: "default" is not an interface name: the kernel does not allow it`},
		"pattern":             {func(r *Router) { r.Cluster = "eth+" }, `cluster interface 0: "eth+" is not an interface name: it contains '+'`},
		"loopback":            {func(r *Router) { r.Cluster = "lo" }, `cluster interface 0: "lo" is the loopback interface: expected one that leads to a network`},
		"one side":            {func(r *Router) { r.Cluster = "net1" }, `cluster interface 0: "net1" is also interface (the cluster side and the egress side need an interface each)`},
		"no mark":             {func(r *Router) { r.ReplyMark = 0 }, "reply mark 0: 0 is no mark"},
		"main table":          {func(r *Router) { r.ReplyTable = 254 }, "reply table 0: 254 is not a table to use: expected a number from 1 to 2147483647, other than 253, 254 and 255"},
		"everything":          {func(r *Router) { r.ClusterDestinations[0] = netip.MustParsePrefix("0.0.0.0/0") }, "cluster networks 0: expected an IPv4 network such as 10.96.0.0/12"},
		"bits":                {func(r *Router) { r.ClusterDestinations[0] = netip.MustParsePrefix("10.96.0.1/12") }, "cluster networks 0: the network with that length is 10.96.0.0/12 (write 10.96.0.0/12, or 10.96.0.1/32 for that address alone)"},
		"no hosts":            {func(r *Router) { r.ClusterDestinations[0] = netip.MustParsePrefix("224.0.0.0/4") }, "cluster networks 0: it begins with a multicast address (leave it out: it is not a network of hosts)"},
		"gateway's":           {func(r *Router) { r.ClusterDestinations[0] = netip.MustParsePrefix("192.168.0.0/16") }, "cluster networks 0: it contains gateway (192.168.12.1), which is on the physical network (write smaller networks that do not contain it: their addresses are reached by the cluster side)"},
		"destination's":       {func(r *Router) { r.ClusterDestinations[1] = netip.MustParsePrefix("2001:db8::/64") }, "cluster networks 1: it contains the destination 2001:db8::25 (write smaller networks that do not contain it: their addresses are reached by the cluster side)"},
	} {
		t.Run(name, func(t *testing.T) {
			r := good()
			test.change(&r)
			var lines []string
			for _, f := range r.Validate() {
				line := fmt.Sprintf("%s %d: %s", f.Field, f.Index, f.Why.In(nil))
				if hint := f.Hint.In(nil); hint != "" {
					line += " (" + hint + ")"
				}
				if f.Warning {
					line = "warning: " + line
				}
				lines = append(lines, line)
			}
			if got := strings.Join(lines, "\n"); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// A description without faults has rules that both backends can load.
func TestValidHasPlan(t *testing.T) {
	for _, forward := range []bool{true, false} {
		r := good()
		if r.Forward = forward; !forward {
			r.Set = rules.Set{}
		}
		if faults := r.Validate(); len(faults) > 0 {
			t.Errorf("faults %v", faults)
		}
		if err := r.Plan().Validate(); err != nil {
			t.Errorf("forward %v: %v", forward, err)
		}
	}
}

// Without Spread the first source of a family is that of all clients.
func TestSidesHaveFirstSources(t *testing.T) {
	r := good()
	r.Sources = append(r.Sources, Source{netip.MustParsePrefix("192.168.12.100/24"), r.Sources[0].Gateway})
	for spread, want := range map[bool]int{false: 2, true: 3} {
		r.Spread = spread
		if got := r.Sides().Sources; len(got) != want {
			t.Errorf("spread %v: sources %v, want %d", spread, got, want)
		}
	}
}
