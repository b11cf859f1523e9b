package link

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
)

// everywhere is a default route of the main table.
func everywhere(index, metric int) netlink.Route {
	return netlink.Route{LinkIndex: index, Priority: metric, Type: unix.RTN_UNICAST}
}

func paths(indices ...int) netlink.Route {
	r := netlink.Route{Type: unix.RTN_UNICAST}
	for _, i := range indices {
		r.MultiPath = append(r.MultiPath, &netlink.NexthopInfo{LinkIndex: i})
	}
	return r
}

func with(r netlink.Route, change func(*netlink.Route)) netlink.Route {
	change(&r)
	return r
}

func TestDefaultNICs(t *testing.T) {
	subnet := everywhere(9, 0)
	subnet.Dst = ipNet(netip.MustParsePrefix("10.0.0.0/8"))
	zero := everywhere(4, 5)
	zero.Dst = ipNet(netip.MustParsePrefix("0.0.0.0/0"))
	for name, test := range map[string]struct {
		routes []netlink.Route
		want   []int
	}{
		"none":                       {},
		"no default":                 {[]netlink.Route{subnet}, nil},
		"one":                        {[]netlink.Route{subnet, everywhere(2, 100)}, []int{2}},
		"written as 0.0.0.0/0":       {[]netlink.Route{zero}, []int{4}},
		"the lowest metric":          {[]netlink.Route{everywhere(2, 100), everywhere(3, 50), everywhere(4, 200)}, []int{3}},
		"the first of equals":        {[]netlink.Route{everywhere(2, 100), everywhere(3, 100)}, []int{2}},
		"not one that drops":         {[]netlink.Route{with(everywhere(0, 0), func(r *netlink.Route) { r.Type = unix.RTN_BLACKHOLE }), everywhere(3, 9)}, []int{3}},
		"not one of a service class": {[]netlink.Route{with(everywhere(2, 0), func(r *netlink.Route) { r.Tos = 16 }), everywhere(3, 9)}, []int{3}},
		"two paths":                  {[]netlink.Route{paths(2, 3), everywhere(4, 9)}, []int{2, 3}},
		"two paths by one NIC":       {[]netlink.Route{paths(2, 2)}, []int{2}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, defaultNICs(test.routes)); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

func attrs(index int, name string) netlink.LinkAttrs {
	return netlink.LinkAttrs{Index: index, Name: name, EncapType: "ether", NetNsID: -1}
}

// hostLinks are possible links of a node.
func hostLinks() []netlink.Link {
	lo := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1, Name: "lo", EncapType: "loopback"}}
	port := &netlink.Device{LinkAttrs: attrs(4, "ens4")}
	port.MasterIndex = 5
	return []netlink.Link{
		lo, &netlink.Device{LinkAttrs: attrs(2, "ens3")}, port, &netlink.Bridge{LinkAttrs: attrs(5, "br0")},
		&netlink.Veth{LinkAttrs: attrs(6, "cali1")}, &netlink.Veth{LinkAttrs: attrs(7, "cali2")}, &netlink.Veth{LinkAttrs: attrs(8, "eth0")},
		&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Index: 9, Name: "wg0", EncapType: "none"}},
	}
}

func TestChooseParent(t *testing.T) {
	addresses := map[int][]netip.Prefix{
		1: {netip.MustParsePrefix("127.0.0.1/8")},
		2: {netip.MustParsePrefix("192.168.12.10/24")},
		7: {netip.MustParsePrefix("169.254.1.1/32")},
		8: {netip.MustParsePrefix("172.18.0.2/16")},
	}
	const can = "usable interfaces: br0, ens3, eth0"
	for name, test := range map[string]struct {
		name   string
		routes []netlink.Route
		want   string // name, or the error
	}{
		"by name":                {"ens3", nil, "ens3"},
		"by route":               {"", []netlink.Route{everywhere(5, 0)}, "br0"},
		"a name beats the route": {"ens3", []netlink.Route{everywhere(5, 0)}, "ens3"},
		"missing":                {"ens9", nil, `find macvlan parent: the host has no interface "ens9"; ` + can},
		"no default route":       {"", nil, "find macvlan parent: the host has no IPv4 default route in its main table; " + can},
		"two paths":              {"", []netlink.Route{paths(2, 8)}, "find macvlan parent: the host's IPv4 default route has several NICs: ens3, eth0"},
		"loopback":               {"lo", nil, `find macvlan parent: the host's "lo": expected Ethernet, found type loopback; ` + can},
		"a tunnel":               {"", []netlink.Route{everywhere(9, 0)}, `find macvlan parent: the host's "wg0": expected Ethernet, found type none; ` + can},
		"gone meanwhile":         {"", []netlink.Route{everywhere(77, 0)}, `find macvlan parent: the host has no interface "interface 77"; ` + can},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := chooseParent(test.name, hostLinks(), test.routes, addresses)
			got := ""
			if err != nil {
				got = err.Error()
				if h, ok := err.(*MacvlanError); !ok || !strings.Contains(h.Hint(nil), string(wording.MacvlanParent)) {
					t.Errorf("%v has no hint", err)
				}
			} else {
				got = l.Attrs().Name
			}
			if got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
	if _, err := chooseParent("x", hostLinks()[:1], nil, nil); err == nil || !strings.HasSuffix(err.Error(), "the host has no usable interface") {
		t.Errorf("a host without a NIC: %v", err)
	}
}

func TestIsMacvlan(t *testing.T) {
	const host = 3 // ID of the host's namespace in the pod's
	macvlan := func(index, namespace int, mode netlink.MacvlanMode) netlink.Link {
		a := attrs(4, "macvlan0")
		a.ParentIndex, a.NetNsID = index, namespace
		return &netlink.Macvlan{LinkAttrs: a, Mode: mode}
	}
	plain, nested := Parent{Index: 7, below: lowerLink{7, -1}}, Parent{Index: 7, below: lowerLink{2, 0}}
	for name, test := range map[string]struct {
		have   netlink.Link
		parent Parent
		host   int
		want   bool
		is     string
	}{
		"no drift":                 {macvlan(7, host, netlink.MACVLAN_MODE_PRIVATE), plain, host, true, `a macvlan of interface 7 of a third network namespace in mode private`},
		"of another NIC":           {macvlan(8, host, netlink.MACVLAN_MODE_PRIVATE), plain, host, false, ""},
		"in another mode":          {macvlan(7, host, netlink.MACVLAN_MODE_SOURCE), plain, host, false, "a macvlan of interface 7 of a third network namespace in mode source"},
		"same number, other space": {macvlan(7, host+1, netlink.MACVLAN_MODE_PRIVATE), plain, host, false, ""},
		"of the pod's own":         {macvlan(7, -1, netlink.MACVLAN_MODE_PRIVATE), plain, host, false, "a macvlan of the pod's own interface 7 in mode private"},
		"the pod knows no host":    {macvlan(7, -1, netlink.MACVLAN_MODE_PRIVATE), plain, -1, false, ""},
		"a veth":                   {&netlink.Veth{LinkAttrs: attrs(4, "macvlan0")}, plain, host, false, "an interface of type veth"},
		"below a macvlan":          {macvlan(2, host+1, netlink.MACVLAN_MODE_PRIVATE), nested, host, true, ""},
		"beside that":              {macvlan(7, host, netlink.MACVLAN_MODE_PRIVATE), nested, host, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := isMacvlan(test.have, "private", test.parent, test.host); got != test.want {
				t.Errorf("isMacvlan = %v, want %v", got, test.want)
			}
			if got := describe(test.have, ""); test.is != "" && got != test.is {
				t.Errorf("described as %s, want %s", got, test.is)
			}
		})
	}
}

func TestParentSuits(t *testing.T) {
	p := Parent{Name: "ens3", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.12.10/32"), netip.MustParsePrefix("192.168.12.11/32")}}
	for _, test := range []struct{ source, gateway, fault string }{
		{"192.168.12.99/24", "192.168.12.1", ""},
		{"192.168.12.99/24", "192.168.12.11", `check gateway: 192.168.12.11 is an address of the host's "ens3", which its macvlan cannot reach`},
		{"192.168.12.10/24", "192.168.12.1", `check reserved address: 192.168.12.10 is an address of the host's "ens3"`},
	} {
		err := p.Suits(plan.Network{Interface: "macvlan0", Sources: spec.Sources{{Prefix: netip.MustParsePrefix(test.source), Gateway: netip.MustParseAddr(test.gateway)}}})
		if (err == nil) != (test.fault == "") || err != nil && err.Error() != test.fault {
			t.Errorf("source %s, gateway %s: %v, want %q", test.source, test.gateway, err, test.fault)
		}
	}
}

// Every refusal of the kernel has a hint.
func TestCreationHint(t *testing.T) {
	for _, test := range []struct {
		mode   spec.MacvlanMode
		master string
		err    error
		want   string
	}{
		{"private", "br0", unix.EBUSY, "ens3 is a port of br0"},
		{"private", "", unix.EBUSY, "ipvlan"},
		{"passthru", "", unix.EINVAL, "ens3 has another"},
		{"bridge", "", unix.EINVAL, "ens3 may have one"},
		{"bridge", "", unix.EOPNOTSUPP, "modprobe macvlan"},
		{"bridge", "", unix.EPERM, "privileged: true"},
		{"bridge", "", unix.ENOMEM, ""},
	} {
		got := creationHint(plan.Macvlan{Interface: "macvlan0", Macvlan: spec.Macvlan{Mode: test.mode}}, Parent{Name: "ens3", master: test.master}, fmt.Errorf("wrapped: %w", test.err)).In(nil)
		if !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
			t.Errorf("%v in mode %s: %q, want %q in it", test.err, test.mode, got, test.want)
		}
	}
}

// Every mode has a name that maps back to it.
func TestModeNames(t *testing.T) {
	for name, mode := range macvlanModes {
		if got := modeName(mode); got != string(name) {
			t.Errorf("mode %d is called %q, want %q", mode, got, name)
		}
	}
	if got := modeName(99); got != "number 99" {
		t.Errorf("an unknown mode is called %q", got)
	}
}
