package cni_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A fault is a call that fails.
type fault struct {
	name  string
	verbs string // that fail because of it
	do    func(*pod)
	code  uint
	msg   string
	hint  string
}

// faults of the call and of the configuration. All verbs but DEL report them.
var faults = []fault{
	{"no container", "ADD CHECK", func(p *pod) { delete(p.Vars, "CNI_CONTAINERID") }, 4, "CNI_CONTAINERID is not set", "runtime"},
	{"invalid container", "ADD CHECK", func(p *pod) { p.Vars["CNI_CONTAINERID"] = "a/b" }, 4, `CNI_CONTAINERID is "a/b": `, ""},
	{"no namespace", "ADD CHECK", func(p *pod) { delete(p.Vars, "CNI_NETNS") }, 4, "CNI_NETNS is not set", ""},
	{"no interface", "ADD CHECK", func(p *pod) { delete(p.Vars, "CNI_IFNAME") }, 4, "CNI_IFNAME is not set", ""},
	{"long interface", "ADD CHECK", func(p *pod) { p.Vars["CNI_IFNAME"] = "macvlan012345678" }, 4, `CNI_IFNAME is "macvlan012345678": `, ""},
	{"interface with a number of the kernel's choice", "ADD CHECK", func(p *pod) { p.Vars["CNI_IFNAME"] = "net%d" }, 4, `CNI_IFNAME is "net%d": it contains '%'`, ""},
	{"interface with the name of sysctls", "ADD CHECK", func(p *pod) { p.Vars["CNI_IFNAME"] = "all" }, 4, `CNI_IFNAME is "all": the kernel does not allow it`, ""},
	{"interface that is a pattern", "ADD CHECK", func(p *pod) { p.Vars["CNI_IFNAME"] = "net+" }, 4, `CNI_IFNAME is "net+": it contains '+'`, ""},
	{"namespace gone", "ADD CHECK", func(p *pod) { p.Vars["CNI_NETNS"] = "/run/netns/gone" }, 8, `CNI_NETNS is "/run/netns/gone": `, ""},
	{"another file", "ADD CHECK", func(p *pod) { p.Vars["CNI_NETNS"] = "/proc/self/exe" }, 8, "not a network namespace", ""},
	{"pipe as a namespace", "ADD CHECK", func(p *pod) {
		p.Vars["CNI_NETNS"] = filepath.Join(p.TempDir(), "pipe")
		if err := unix.Mkfifo(p.Vars["CNI_NETNS"], 0o600); err != nil {
			p.Fatal(err)
		}
	}, 8, "not a network namespace", ""},
	{"directory as a namespace", "ADD CHECK", func(p *pod) { p.Vars["CNI_NETNS"] = p.TempDir() }, 8, "not a network namespace", ""},
	{"namespace of the plugin", "ADD CHECK", func(p *pod) { p.Vars["CNI_NETNS"] = labtest.File(p.Lab.Node) }, 8, "expected that of a pod", ""},
	{"version of the future", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["cniVersion"] = "9.0.0" }, 1, `cniVersion is "9.0.0": expected one of [0.1.0 0.2.0 0.3.0 0.3.1 0.4.0 1.0.0 1.1.0]`, ""},
	{"version is a number", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["cniVersion"] = 1 }, 6, "cniVersion is 1: expected a text", ""},
	{"no name", "ADD CHECK STATUS GC", func(p *pod) { delete(p.Conf, "name") }, 7, `name is "": expected letters`, ""},
	{"no ip", "ADD CHECK STATUS", func(p *pod) { delete(p.Conf, "ip") }, 7, "ip is missing: add addresses, gateway and destinations", ""},
	{"ip is a text", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["ip"] = "192.168.12.99" }, 7, "ip is a text: expected an object", ""},
	{"ip is a list", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["ip"] = []string{} }, 7, "ip is a list: expected an object", ""},
	{"gateway is a number", "ADD CHECK STATUS GC", func(p *pod) { p.ip()["gateway"] = 7 }, 7, "ip.gateway is a number: expected a list of texts", ""},
	{"mtu is an object", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"mtu": p.ip()} }, 7, "interfaceArgs.mtu is an object: expected a text", ""},
	{"capability is a number", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["capabilities"] = map[string]any{"mac": 1} }, 7, "capabilities is a number: expected true or false", ""},
	{"attachments are an object", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["cni.dev/valid-attachments"] = p.ip() }, 7, "cni.dev/valid-attachments is an object: expected a list of objects", ""},
	{"no addresses", "ADD CHECK STATUS", func(p *pod) { p.ip()["addresses"] = []string{} }, 7, "ip.addresses is empty: add the reserved address", ""},
	{"address foo", "ADD CHECK STATUS", func(p *pod) { p.ip()["addresses"] = []string{"foo"} }, 7, `ip.addresses[0] is "foo": expected an IPv4 or IPv6 address`, ""},
	{"addresses are no list", "ADD CHECK STATUS GC", func(p *pod) { p.ip()["addresses"] = 7 }, 7, "ip.addresses is a number: expected a list of texts", ""},
	{"gateway 01.2.3.1", "ADD CHECK STATUS", func(p *pod) { p.ip()["gateway"] = "01.2.3.1" }, 7, `ip.gateway is "01.2.3.1": an IPv4 address is four numbers`, ""},
	{"gateway is the address", "ADD CHECK STATUS", func(p *pod) { p.ip()["gateway"] = "192.168.12.99" }, 7, `ip.gateway is "192.168.12.99": `, ""},
	{"third destination", "ADD CHECK STATUS", func(p *pod) {
		p.ip()["destinations"] = []string{"80 TCP 203.0.113.25", "81 TCP 203.0.113.25", "82 TCP 203.0.113.256"}
	}, 7, `ip.destinations[2]: address is "203.0.113.256"`, ""},
	{"protocol", "ADD CHECK STATUS", func(p *pod) { p.ip()["destinations"] = []string{"80 ICMP 203.0.113.25"} }, 7, `ip.destinations[0]: protocol is "ICMP": expected TCP, UDP or SCTP`, ""},
	{"fields", "ADD CHECK STATUS", func(p *pod) { p.ip()["destinations"] = []string{"80 TCP"} }, 7, `ip.destinations[0] is "80 TCP": expected PORT PROTOCOL IP`, ""},
	{"family", "ADD CHECK STATUS", func(p *pod) { p.ip()["fallbackIP"] = "2001:db8::27" }, 7, `ip.fallbackIP is "2001:db8::27"`, ""},
	{"several", "ADD CHECK STATUS", func(p *pod) { p.ip()["gateway"], p.ip()["fallbackIP"] = "g", "f" }, 7, `ip.gateway is "g"`, `also: ip.fallbackIP is "f"`},
	{"mode", "ADD CHECK STATUS", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"mode": "ring"} }, 7, `interfaceArgs.mode is "ring": expected one of bridge, private, vepa, passthru`, ""},
	{"mtu", "ADD CHECK STATUS", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"mtu": "big"} }, 7, `interfaceArgs.mtu is "big"`, ""},
	{"small mtu", "ADD CHECK STATUS", func(p *pod) {
		p.Conf["interfaceArgs"] = map[string]any{"mtu": 1279}
		p.ip()["addresses"], p.ip()["gateway"] = []string{"2001:db8:12::99/64"}, "2001:db8:12::1"
		p.ip()["destinations"], p.ip()["fallbackIP"] = []string{}, ""
	}, 7, `interfaceArgs.mtu is "1279": IPv6 needs at least 1280 bytes`, ""},
	{"large mtu", "ADD", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"mtu": 1501} }, cni.CodeNIC, "invalid argument", "which is 1500 for nic0: expected no more, found 1501"},
	{"type", "ADD CHECK STATUS", func(p *pod) { p.Conf["interfaceType"] = "ipvlan" }, 7, `interfaceType is "ipvlan": expected macvlan`, ""},
	{"conflict", "ADD CHECK STATUS", func(p *pod) { p.Conf["conflict"] = "fight" }, 7, `conflict is "fight": expected warn, refuse or defend`, ""},
	{"hardware address", "ADD CHECK STATUS", func(p *pod) { p.Conf["runtimeConfig"] = map[string]any{"mac": "01:00:5e:00:00:01"} }, 7, `runtimeConfig.mac is "01:00:5e:00:00:01": expected the hardware address of one host`, ""},
	{"ips", "ADD CHECK STATUS", func(p *pod) { p.Conf["runtimeConfig"] = map[string]any{"ips": []string{"bar"}} }, 7, `ip.addresses[0] is "bar"`, ""},
	{"prevResult", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["prevResult"] = map[string]any{"ips": "none"} }, 6, "decode prevResult: ", ""},
	{"null among interfaces", "ADD CHECK STATUS GC", func(p *pod) {
		p.Conf["prevResult"] = map[string]any{"interfaces": []any{map[string]any{"name": "eth0"}, nil}}
	}, 6, "decode prevResult: interfaces[1] is null: expected an object", ""},
	{"null among addresses", "ADD CHECK STATUS GC", func(p *pod) { p.Conf["prevResult"] = map[string]any{"ips": []any{nil}} }, 6, "decode prevResult: ips[0] is null", ""},
	{"master", "ADD CHECK", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"master": "eth9"} }, cni.CodeNIC, `the host has no interface "eth9"; usable interfaces: `, "set interfaceArgs.master (EgressRouter: spec.networkInterface.macvlan.master) to a NIC of the host, or remove it for the NIC in the subnet of the address"},
	{"master", "STATUS", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"master": "eth9"} }, 50, `the host has no interface "eth9"; usable interfaces: `, "set interfaceArgs.master (EgressRouter: spec.networkInterface.macvlan.master) to a NIC of the host, or remove it for the NIC in the subnet of the address"},
	{"master is lo", "ADD CHECK", func(p *pod) { p.Conf["interfaceArgs"] = map[string]any{"master": "lo"} }, cni.CodeNIC, "expected Ethernet", ""},
	{"gateway of the node", "ADD CHECK", func(p *pod) { p.ip()["gateway"] = "192.168.12.10" }, cni.CodeNIC, "192.168.12.10 is an address of the host's", "set ip.gateway (EgressRouter: spec.addresses[].gateway) to a router"},
	{"address of the node", "ADD CHECK", func(p *pod) { p.ip()["addresses"] = []string{"192.168.12.10/24"} }, cni.CodeNIC, "check reserved address: 192.168.12.10 is an address of the host's", "set ip.addresses (EgressRouter: spec.addresses[].ip) to an address that no other host has"},
	{"gateway of the cluster", "ADD", func(p *pod) { p.ip()["gateway"], p.ip()["addresses"] = "10.128.0.1", []string{"192.168.12.99/32"} }, 7, "expected the router of the physical network, found the cluster side's gateway", "set ip.gateway"},
	{"address of the pod", "ADD", func(p *pod) { p.ip()["addresses"] = []string{"10.128.0.98/23"} }, 7, "found the pod's cluster address", ""},
	{"no prevResult", "CHECK", func(p *pod) { delete(p.Conf, "prevResult") }, 7, "prevResult is missing", "the runtime has to pass the result of ADD"},
	{"another interface", "CHECK", func(p *pod) {
		p.Conf["prevResult"].(map[string]any)["interfaces"].([]any)[0].(map[string]any)["name"] = "net9"
	}, cni.CodeDrift, "prevResult has no interface macvlan0", ""},
	{"CHECK of 0.3.1", "CHECK", func(p *pod) { p.Conf["cniVersion"] = "0.3.1" }, 1, `cniVersion is "0.3.1", which has no CHECK`, "0.4.0"},
	{"STATUS of 1.0.0", "STATUS", func(p *pod) { p.Conf["cniVersion"] = "1.0.0" }, 1, `cniVersion is "1.0.0", which has no STATUS`, "1.1.0"},
	{"GC of 1.0.0", "GC", func(p *pod) { p.Conf["cniVersion"] = "1.0.0" }, 1, `cniVersion is "1.0.0", which has no GC`, "1.1.0"},
	{"unknown verb", "MAKE", func(*pod) {}, 4, `CNI_COMMAND is "MAKE": expected ADD, DEL, CHECK, STATUS, GC or VERSION`, ""},
}

// Each verb reports each fault with its code, a sentence and what to do, and changes nothing.
func TestFaults(t *testing.T) {
	t.Parallel()
	without, with := newPod(t, lab.Options{}), newPod(t, lab.Options{})
	with.add()
	for _, at := range []*pod{without, with} {
		before, node := at.before(), at.Inventory(at.Lab.Node)
		conf := at.stdin()
		for _, f := range faults {
			for verb := range strings.FieldsSeq(f.verbs) {
				if (verb == "CHECK") != (at == with) {
					continue
				}
				p := *at
				p.Conf, p.Vars = nil, map[string]string{}
				if err := json.Unmarshal([]byte(conf), &p.Conf); err != nil {
					t.Fatal(err)
				}
				if verb == "STATUS" || verb == "GC" {
					p.Conf["cniVersion"] = "1.1.0"
				}
				maps.Copy(p.Vars, at.Vars)
				f.do(&p)
				r := p.call(verb)
				if r.Result.Code != 1 || r.Code != f.code || !strings.Contains(r.Msg, f.msg) || !strings.Contains(r.Details, f.hint) || r.CNIVersion == "" {
					t.Errorf("%s, %s: exit code %d, version %q, error %d\n %s (%s)\nwant 1, %d\n %s (%s)", verb, f.name, r.Result.Code, r.CNIVersion, r.Code, r.Msg, r.Details, f.code, f.msg, f.hint)
				}
				if line := fmt.Sprintf("[error] %s: %s", verb, r.Msg); f.name != "version is a number" && verb != "MAKE" && !strings.Contains(at.logged(), line) {
					t.Errorf("%s, %s: log lacks %q:\n%s", verb, f.name, line, labtest.Tail(at.logged()))
				}
			}
		}
		at.wantBefore("after all faults", before)
		at.WantInventory(at.Lab.Node, "node", node)
	}
}

// Text that is no JSON has the code of the specification.
func TestGarbageOnStdin(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	for _, verb := range []string{"ADD", "CHECK", "STATUS", "GC"} {
		for _, text := range []string{"", "{", "[]", `"x"`, "\x00\xff"} {
			if r := p.run(p.Lab.Node, p.command(verb, text)); r.Code != 6 || r.CNIVersion != "1.1.0" {
				t.Errorf("%s of %q: version %q, error %d %s", verb, text, r.CNIVersion, r.Code, r.Msg)
			}
		}
	}
}

// Faults of the pod and the node.
func TestFaultsOfSite(t *testing.T) {
	t.Parallel()
	for _, f := range []struct {
		name    string
		options lab.Options
		do      func(*pod) error
		code    uint
		msg     string
		hint    string
	}{
		{"no cluster side", lab.Options{}, func(p *pod) error {
			h := p.Handle(p.Lab.Router)
			return h.LinkDel(p.Link(h, "eth0"))
		}, cni.CodeCluster, `find cluster side: interface "eth0" not found; interfaces: lo only`, "first interface"},
		{"interface exists", lab.Options{}, func(p *pod) error {
			p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
			return nil
		}, cni.CodeInterface, `create "macvlan0": an interface of that name exists already`, "DEL"},
		{"another router", lab.Options{}, func(p *pod) error {
			p.NFT("add table ip egress-router; add chain ip egress-router nat-prerouting")
			return nil
		}, cni.CodeOther, "the namespace has those of another egress-router: table ip egress-router of nftables", "one router"},
		{"no gateway", lab.Options{}, func(p *pod) error {
			delete(p.ip(), "gateway")
			h := p.Handle(p.Lab.Node)
			return h.RouteDel(&netlink.Route{Dst: labtest.Everywhere()})
		}, 7, "ip.gateway is missing for 192.168.12.99/24: the node's nic0 has no default gateway", "add the gateway"},
		{"gateway of another subnet", lab.Options{}, func(p *pod) error {
			delete(p.ip(), "gateway")
			p.ip()["addresses"] = []string{"192.168.13.99/24"}
			return nil
		}, 7, "ip.gateway is missing for 192.168.13.99/24: the default gateway of the node's nic0, 192.168.12.1, is not in it", ""},
		{"no NIC", lab.Options{}, func(p *pod) error {
			p.ip()["addresses"], p.ip()["gateway"] = []string{"192.168.13.99/24"}, "192.168.13.1"
			h := p.Handle(p.Lab.Node)
			return h.RouteDel(&netlink.Route{Dst: labtest.Everywhere()})
		}, cni.CodeNIC, "find macvlan parent for 192.168.13.99: no NIC has an address in its network; there is no default route", "set interfaceArgs.master"},
		{"two NICs", lab.Options{}, func(p *pod) error {
			h := p.Handle(p.Lab.Node)
			if err := h.RouteDel(&netlink.Route{Dst: labtest.Everywhere()}); err != nil {
				return err
			}
			return h.AddrAdd(p.Link(h, lab.Bridge), labtest.Addr("192.168.12.11/24"))
		}, cni.CodeNIC, "find macvlan parent for 192.168.12.99: NICs with an address in its network: tun0, nic0", ""},
	} {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, f.options)
			if err := f.do(p); err != nil {
				t.Fatal(err)
			}
			before := p.before()
			r := p.wantFault("ADD", f.code, f.msg)
			if !strings.Contains(r.Details, f.hint) {
				t.Errorf("hint %q, want %q", r.Details, f.hint)
			}
			p.wantBefore("after ADD", before)
			p.ok("DEL")
		})
	}
}

// With a read-only /proc/sys, as in some containers of a runtime, ADD reports so, unless the
// pod forwards already.
func TestReadOnlySysctls(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	plugin := p.command("ADD", p.stdin())
	readOnly := func() reply {
		cmd := p.Command("with-read-only-proc")
		cmd.Env, cmd.Stdin = plugin.Env, strings.NewReader(p.stdin())
		return p.run(p.Lab.Node, cmd)
	}
	if r := readOnly(); r.Code != cni.CodeRouter || !strings.Contains(r.Msg, "net.ipv4.ip_forward = 1") || !strings.Contains(r.Details, "writable /proc/sys") {
		t.Errorf("error %d %s (%s)", r.Code, r.Msg, r.Details)
	}
	p.wantBefore("after ADD", before)
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if r := readOnly(); r.Result.Code != 0 {
		t.Errorf("error %d %s (%s)", r.Code, r.Msg, r.Details)
	}
	p.WantExample()
}

// A NIC that disappears during ADD ends it, and the namespace is as before.
func TestNICDisappears(t *testing.T) {
	t.Parallel()
	for ended := false; !ended; { // on a busy machine ADD may end before
		p := newPod(t, lab.Options{})
		before := p.before()
		p.Conf["conflict"] = "refuse" // takes seconds
		cmd := p.command("ADD", p.stdin())
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		inPod, onNode := p.Handle(p.Lab.Router), p.Handle(p.Lab.Node)
		p.Until("the interface is there", func() bool { _, err := inPod.LinkByName("macvlan0"); return err == nil })
		if err := onNode.LinkDel(p.Link(onNode, lab.NIC)); err != nil {
			t.Fatal(err)
		}
		if ended = cmd.Wait() != nil; ended {
			p.wantBefore("after ADD", before)
		}
		p.del()
		if text := p.logged(); strings.Contains(text, "restart the router") {
			t.Errorf("log:\n%s", text)
		}
	}
}

// A plugin without privilege reports so, with what to do.
func TestWithoutPrivilege(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	for _, f := range []struct {
		verb, command string
		code          uint
	}{{"ADD", "without-sys-admin", cni.CodeRouter}, {"STATUS", "without-net-admin", 50}} {
		p.Conf["cniVersion"] = "1.1.0"
		plugin := p.command(f.verb, p.stdin())
		cmd := p.Command(f.command)
		cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
		r := p.run(p.Lab.Node, cmd)
		if r.Result.Code != 1 || r.Code != f.code || !strings.Contains(r.Msg, "operation not permitted") || !strings.Contains(r.Details, "as root") {
			t.Errorf("%s: error %d %s (%s)", f.verb, r.Code, r.Msg, r.Details)
		}
	}
	p.wantBefore("without privilege", before)
}

// VERSION answers in the version of its caller, STATUS without an error, and GC removes the
// routers of attachments that are not valid any more.
func TestVersionStatusGC(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	for text, want := range map[string]string{`{"cniVersion": "0.3.1"}`: "0.3.1", `{}`: "1.1.0", `x`: "1.1.0"} {
		r := p.run(p.Lab.Node, p.command("VERSION", text))
		if all := `"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"`; r.Result.Code != 0 || !strings.Contains(strings.Join(strings.Fields(r.Stdout), " "), fmt.Sprintf(`{ "cniVersion": %q, "supportedVersions": [ %s ] }`, want, all)) {
			t.Errorf("VERSION with %q prints %s", text, r.Stdout)
		}
	}
	p.Conf["cniVersion"] = "1.1.0"
	if r := p.ok("STATUS"); r.Stdout != "" {
		t.Errorf("STATUS prints %q", r.Stdout)
	}
	before := p.before()
	p.Vars["CNI_TEST_NAMESPACES"] = p.namespaces()
	p.add()
	delete(p.Conf, "prevResult")
	valid := func(container, ifname string) []map[string]string {
		return []map[string]string{{"containerID": container, "ifname": ifname}}
	}
	configured := p.State()
	p.ok("GC")
	p.WantState(configured)
	if log := p.logged(); !strings.Contains(log, "[warning] GC without cni.dev/valid-attachments: nothing is removed\n") {
		t.Errorf("log:\n%s", log)
	}
	p.Conf["cni.dev/valid-attachments"] = valid("c1", "macvlan0")
	p.ok("GC")
	p.Conf["cni.dev/valid-attachments"] = valid("c2", "macvlan0")
	p.Conf["name"] = "another"
	p.ok("GC")
	p.WantState(configured)
	p.Conf["name"] = "egress-router-cni-nad"
	p.ok("GC")
	p.wantBefore("GC of an attachment of the past", before)
	for _, none := range []any{[]any{}, nil} { // no valid attachment, which libcni writes as null
		delete(p.Conf, "cni.dev/valid-attachments")
		p.add()
		delete(p.Conf, "prevResult")
		p.Conf["cni.dev/valid-attachments"] = none
		p.ok("GC")
		p.wantBefore("GC without a valid attachment", before)
	}

	// Names may be longer than an alias.
	p.Conf["name"], p.Vars["CNI_CONTAINERID"] = strings.Repeat("n", 253), strings.Repeat("c", 200)
	p.add()
	delete(p.Conf, "prevResult")
	p.Conf["cni.dev/valid-attachments"] = valid(strings.Repeat("c", 200), "macvlan0")
	p.ok("GC")
	p.WantState(configured)
	p.Conf["cni.dev/valid-attachments"] = valid(strings.Repeat("c", 199), "macvlan0")
	p.ok("GC")
	p.wantBefore("GC of an attachment of the past with a long name", before)
}
