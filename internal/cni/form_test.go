package cni_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// macvlan returns the egress interface.
func (p *pod) macvlan() *netlink.Macvlan {
	p.Helper()
	l, err := p.Handle(p.Lab.Router).LinkByName(p.Vars["CNI_IFNAME"])
	if err != nil {
		p.Fatal(err)
	}
	m, is := l.(*netlink.Macvlan)
	if !is {
		p.Fatalf("type %s, want macvlan", l.Type())
	}
	return m
}

// interfaceArgs set the macvlan, as text or as a number.
func TestInterfaceArgs(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	for _, test := range []struct {
		args any
		mode netlink.MacvlanMode
		mtu  int
	}{
		{nil, netlink.MACVLAN_MODE_BRIDGE, 1500},
		{map[string]any{"mode": "private", "mtu": "1400"}, netlink.MACVLAN_MODE_PRIVATE, 1400},
		{map[string]any{"mode": "VEPA", "mtu": 1300, "master": lab.NIC}, netlink.MACVLAN_MODE_VEPA, 1300},
		{map[string]any{"mode": "Passthru", "mtu": "0"}, netlink.MACVLAN_MODE_PASSTHRU, 1500},
	} {
		p.Conf["interfaceType"], p.Conf["interfaceArgs"] = "macvlan", test.args
		p.add()
		if m := p.macvlan(); m.Mode != test.mode || m.MTU != test.mtu {
			t.Errorf("%v: mode %d, MTU %d; want %d, %d", test.args, m.Mode, m.MTU, test.mode, test.mtu)
		}
		p.WantExample()
		p.ok("CHECK")
		p.del()
	}
}

// The capabilities set the hardware address and the reserved addresses.
func TestCapabilities(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Conf["capabilities"] = map[string]bool{"mac": true, "ips": true}
	p.Conf["runtimeConfig"] = map[string]any{"mac": "0a:58:c0:a8:0c:63", "ips": []string{"192.168.12.99/24"}}
	p.ip()["addresses"] = []string{"192.168.12.7/24"}
	p.add()
	if mac := p.macvlan().HardwareAddr.String(); mac != "0a:58:c0:a8:0c:63" {
		t.Errorf("hardware address %s", mac)
	}
	p.WantExample()
	p.ok("CHECK")
}

// Without a master the NIC is that of the network of the address, without a gateway that of
// the NIC.
func TestMasterAndGatewayOfNode(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{IPv6: true})
	delete(p.ip(), "gateway")
	p.add()
	p.WantExample()
	p.ok("CHECK")
	p.del()
	// The NIC with the address counts, not that of the default route.
	h := p.Handle(p.Lab.Node)
	if err := h.RouteReplace(&netlink.Route{Dst: labtest.Everywhere(), Gw: lab.ClientAddr.AsSlice(), LinkIndex: p.Link(h, lab.Bridge).Attrs().Index}); err != nil {
		t.Fatal(err)
	}
	p.ip()["gateway"] = []string{"192.168.12.1", "2001:db8:12::1"}
	p.add()
	p.WantExample()
	if p.macvlan().ParentIndex != p.Link(h, lab.NIC).Attrs().Index {
		t.Error("the macvlan is one of another NIC")
	}
}

// A port that is there twice has a warning, keys that the original never used have no effect,
// and the pod answers ARP for no other address, whatever its namespace begins with.
func TestAcceptedWithWarning(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/default/proxy_arp", "1"); err != nil {
		t.Fatal(err)
	}
	p.Conf["podIP"], p.Conf["ipConfig"] = "10.1.2.3", map[string]any{"type": "host-local"}
	p.ip()["destinations"] = []string{"80 TCP 203.0.113.25", "80 tcp 203.0.113.26", "8080 TCP 203.0.113.26 80", "8443 TCP 203.0.113.26 443"}
	p.add()
	p.WantExample()
	if want := "[warning] ip.destinations[1]: port is 80 of tcp, as an earlier one: the first one is used\n"; !strings.Contains(p.logged(), want) {
		t.Errorf("log lacks %q:\n%s", want, p.logged())
	}
	if value, err := p.Lab.Sysctl(p.Lab.Router, "net/ipv4/conf/macvlan0/proxy_arp"); err != nil || value != "0" {
		t.Errorf("proxy_arp %q, error %v", value, err)
	}
	p.ok("CHECK")
}

// Several addresses are all there, the first one as the source.
func TestSeveralAddresses(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.ip()["addresses"] = []string{"192.168.12.99/24", "192.168.12.98/24", "192.168.12.97/24"}
	p.add()
	for _, from := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
		if a, err := p.Ask(from, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)); err != nil || a.Peer.Addr() != lab.Source {
			t.Errorf("answer %v, error %v; want one that saw %s", a, err, lab.Source)
		}
	}
	if state := p.State(); !strings.Contains(state, "route default via 192.168.12.1 dev macvlan0 src 192.168.12.99") || strings.Count(state, "\naddress 192.168.12.") != 3 {
		t.Errorf("state:\n%s", state)
	}
	p.ok("CHECK")
}

// In a list of plugins, after one that has made the interface, the plugin adjusts it, and
// leaves it to that one.
func TestChained(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	h := p.Handle(p.Lab.Router)
	if err := h.LinkSetUp(p.Link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	before := p.before()
	previous := map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{
			map[string]any{"name": "host0"},
			map[string]any{"name": "macvlan0", "mac": p.macvlan().HardwareAddr.String(), "sandbox": p.Vars["CNI_NETNS"]},
		},
		"ips":    []any{map[string]any{"address": "192.168.12.99/24", "gateway": "192.168.12.1", "interface": 1}},
		"routes": []any{map[string]any{"dst": "10.9.0.0/16"}},
		"dns":    map[string]any{"domain": "example.com"},
	}
	p.Conf["cniVersion"] = "1.1.0"
	for _, given := range []bool{true, false} {
		if !given { // the addresses are those of the earlier plugin
			delete(p.ip(), "addresses")
			delete(p.ip(), "gateway")
		}
		p.Conf["prevResult"] = previous
		r := p.add()
		for _, text := range []string{`"name": "host0"`, `"dst": "10.9.0.0/16"`, `"domain": "example.com"`} {
			if !strings.Contains(r.Stdout, text) {
				t.Errorf("result lacks %s:\n%s", text, r.Stdout)
			}
		}
		if n := strings.Count(r.Stdout, "192.168.12.99/24"); n != 1 {
			t.Errorf("result has the address %d times:\n%s", n, r.Stdout)
		}
		p.WantExample()
		p.ok("CHECK")
		if p.macvlan().Mode != netlink.MACVLAN_MODE_PRIVATE {
			t.Error("the interface is another one")
		}
		p.del()
		p.wantBefore("after DEL", before)
		if alias := p.macvlan().Alias; alias != "" {
			t.Errorf("alias %q", alias)
		}
	}
	if strings.Contains(p.logged(), "Created macvlan interface") {
		t.Errorf("log:\n%s", p.logged())
	}
	// An ADD that fails leaves the interface as it was, too.
	p.ip()["addresses"], p.ip()["gateway"], p.Conf["prevResult"] = []string{"192.168.12.99/32"}, "10.128.0.1", previous
	p.wantFault("ADD", 7, "found the cluster side's gateway")
	p.wantBefore("after a failure", before)
	if alias := p.macvlan().Alias; alias != "" {
		t.Errorf("alias %q after a failure", alias)
	}
}

// Without the interface in prevResult, the plugin creates it, and appends to the result.
func TestChainedWithoutInterface(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Conf["cniVersion"] = "1.0.0"
	p.Conf["prevResult"] = map[string]any{"cniVersion": "1.0.0", "interfaces": []any{map[string]any{"name": "eth0", "sandbox": p.Vars["CNI_NETNS"]}}, "ips": []any{}}
	r := p.add()
	if !strings.Contains(r.Stdout, `"interface": 1`) || !strings.Contains(r.Stdout, `"name": "eth0"`) {
		t.Errorf("result:\n%s", r.Stdout)
	}
	p.WantExample()
	p.ok("CHECK")
}
