package cni_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// ADD makes a router, CHECK finds nothing right after it, and DEL leaves the namespace as it
// was, also the second time. The node's namespace does not change.
func TestAddCheckDel(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{}, {IPv6: true}, {ClusterName: "net0"}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			t.Parallel()
			p := newPod(t, o)
			before, node := p.before(), p.Inventory(p.Lab.Node)
			for range 2 {
				p.add()
				p.WantExample()
				a, err := p.Ask(p.Lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)) // from another subnet
				if err != nil || a.Peer.Addr() != lab.Source {
					p.Errorf("client in another subnet: answer %v, error %v; want one that saw %s", a, err, lab.Source)
				}
				p.ok("CHECK")
				p.del()
				p.wantBefore("after DEL", before)
			}
			p.del()
			p.wantBefore("after another DEL", before)
			p.WantInventory(p.Lab.Node, "node", node)
		})
	}
}

// Each protocol and family has its servers, each port one of each protocol, and every other
// port is refused without a fallback.
func TestFamiliesAndProtocols(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{IPv6: true})
	for _, proto := range []string{"tcp", "udp"} {
		p.Serve(p.Lab.Outside, proto, "[2001:db8::26]:80")
		p.Serve(p.Lab.Outside, proto, "[2001:db8::27]:81")
	}
	p.ip()["destinations"] = []string{"80 TCP 203.0.113.26", "53 udp 203.0.113.25", "53 TCP 203.0.113.26 80", "80 Tcp 2001:db8::26", "80 UDP 2001:db8::26/64", "132 SCTP 203.0.113.26", "53 SCTP 203.0.113.27 3869", "132 sctp 2001:db8::26 133"}
	delete(p.ip(), "fallbackIP")
	p.add()
	p.WantAnswer("tcp", 80, "203.0.113.26:80")
	p.WantAnswer("udp", 53, "203.0.113.25:53")
	p.WantAnswer("tcp", 53, "203.0.113.26:80")
	p.WantRefused("tcp", 81)
	for _, proto := range []string{"tcp", "udp"} {
		a, err := p.Ask(p.Lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr6, 80))
		if err != nil || a.Peer.Addr() != lab.Source6 {
			p.Errorf("%s with IPv6: answer %v, error %v; want one that saw %s", proto, a, err, lab.Source6)
		}
	}
	p.WantSCTP(53, 3869) // beside TCP and UDP on one port
	if rules := p.Rules(); !strings.Contains(rules, "sctp . 132 : 203.0.113.26 . 132") || !strings.Contains(rules, "sctp . 132 : 2001:db8::26 . 133") {
		p.Errorf("SCTP is not redirected:\n%s", rules)
	}
	p.ok("CHECK")
	p.del()
	// The fallback of each family.
	for fallback, port := range map[string]uint16{"203.0.113.27": 9000, "2001:db8::27": 81} {
		p.ip()["fallbackIP"] = fallback
		p.add()
		to := netip.AddrPortFrom(lab.RouterAddr, port)
		if strings.Contains(fallback, ":") {
			to = netip.AddrPortFrom(lab.RouterAddr6, port)
		}
		if a, err := p.Ask(p.Lab.Client, "tcp", to); err != nil || a.Server.Addr() != netip.MustParseAddr(fallback) {
			p.Errorf("fallback %s: answer %v, error %v", fallback, a, err)
		}
		p.del()
	}
}

// The pod of the documentation has its routes, and the log on the node its lines.
func TestDocumentedPod(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{MacvlanName: "net1"})
	p.Vars["CNI_IFNAME"] = "net1"
	p.Conf["ip"] = map[string]any{
		"addresses": []string{"192.168.12.99/24"}, "gateway": "192.168.12.1",
		"destinations": []string{"80 UDP 10.0.0.99/30", "8080 TCP 203.0.113.26/30 80", "8443 TCP 203.0.113.27/30 443"},
	}
	index := p.Link(p.Handle(p.Lab.Router), "eth0").Attrs().Index
	p.add()
	if want := `[debug] Called CNI ADD
[debug] Gateway: 192.168.12.1
[debug] IP Source Addresses: [192.168.12.99/24]
[debug] IP Destinations: [80 UDP 10.0.0.99/30 8080 TCP 203.0.113.26/30 80 8443 TCP 203.0.113.27/30 443]
[debug] Created macvlan interface
[debug] Renamed macvlan to "net1"
[debug] Adding route to gateway 192.168.12.1 on macvlan interface
` + fmt.Sprintf("[debug] deleted default route {Ifindex: %d Dst: <nil> Src: <nil> Gw: 10.128.0.1 Flags: [] Table: 254}\n", index) + `[debug] Added new default route with gateway 192.168.12.1
[debug] Added iptables rule: iptables -t nat PREROUTING -i eth0 -p UDP --dport 80 -j DNAT --to-destination 10.0.0.99
[debug] Added iptables rule: iptables -t nat PREROUTING -i eth0 -p TCP --dport 8080 -j DNAT --to-destination 203.0.113.26:80
[debug] Added iptables rule: iptables -t nat PREROUTING -i eth0 -p TCP --dport 8443 -j DNAT --to-destination 203.0.113.27:443
[debug] Added iptables rule: iptables -t nat -o net1 -j SNAT --to-source 192.168.12.99
`; withoutWarnings(p.logged()) != want {
		p.Errorf("log:\n%s", diff(want, p.logged()))
	}
	var routes []string
	for line := range strings.Lines(p.State()) {
		if strings.HasPrefix(line, "route ") && !strings.Contains(line, " table ") {
			routes = append(routes, strings.TrimSpace(line))
		}
	}
	if want := []string{
		"route 10.128.0.0/23 dev eth0 scope link src 10.128.0.98",
		"route 192.168.12.0/24 dev net1 scope link src 192.168.12.99",
		"route 192.168.12.1 dev net1 scope link src 192.168.12.99",
		"route default via 192.168.12.1 dev net1 src 192.168.12.99",
	}; !slices.Equal(routes, want) {
		p.Errorf("routes:\n%s", diff(strings.Join(want, "\n"), strings.Join(routes, "\n")))
	}
	p.WantAnswer("tcp", 8080, "203.0.113.26:80")
	p.WantRefused("tcp", 9000)
}

// The result has the form of each version of the specification.
func TestResultOfEachVersion(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Conf["dns"] = map[string]any{"nameservers": []string{"10.96.0.10"}}
	for version, want := range map[string]string{
		"":      `{"cniVersion":"0.1.0","dns":{"nameservers":["10.96.0.10"]},"ip4":{"gateway":"192.168.12.1","ip":"192.168.12.99/24"}}`,
		"0.1.0": `{"cniVersion":"0.1.0","dns":{"nameservers":["10.96.0.10"]},"ip4":{"gateway":"192.168.12.1","ip":"192.168.12.99/24"}}`,
		"0.2.0": `{"cniVersion":"0.2.0","dns":{"nameservers":["10.96.0.10"]},"ip4":{"gateway":"192.168.12.1","ip":"192.168.12.99/24"}}`,
		"0.3.0": `{"cniVersion":"0.3.0","dns":{"nameservers":["10.96.0.10"]},"interfaces":[{"mac":MAC,"name":"macvlan0","sandbox":NETNS}],"ips":[{"address":"192.168.12.99/24","gateway":"192.168.12.1","interface":0,"version":"4"}]}`,
		"0.3.1": `{"cniVersion":"0.3.1","dns":{"nameservers":["10.96.0.10"]},"interfaces":[{"mac":MAC,"name":"macvlan0","sandbox":NETNS}],"ips":[{"address":"192.168.12.99/24","gateway":"192.168.12.1","interface":0,"version":"4"}]}`,
		"0.4.0": `{"cniVersion":"0.4.0","dns":{"nameservers":["10.96.0.10"]},"interfaces":[{"mac":MAC,"name":"macvlan0","sandbox":NETNS}],"ips":[{"address":"192.168.12.99/24","gateway":"192.168.12.1","interface":0,"version":"4"}]}`,
		"1.0.0": `{"cniVersion":"1.0.0","dns":{"nameservers":["10.96.0.10"]},"interfaces":[{"mac":MAC,"mtu":1500,"name":"macvlan0","sandbox":NETNS}],"ips":[{"address":"192.168.12.99/24","gateway":"192.168.12.1","interface":0}]}`,
		"1.1.0": `{"cniVersion":"1.1.0","dns":{"nameservers":["10.96.0.10"]},"interfaces":[{"mac":MAC,"mtu":1500,"name":"macvlan0","sandbox":NETNS}],"ips":[{"address":"192.168.12.99/24","gateway":"192.168.12.1","interface":0}]}`,
	} {
		p.Conf["cniVersion"] = version
		r := p.add()
		mac := p.Link(p.Handle(p.Lab.Router), "macvlan0").Attrs().HardwareAddr.String()
		want = strings.NewReplacer("MAC", `"`+mac+`"`, "NETNS", `"`+p.Vars["CNI_NETNS"]+`"`).Replace(want)
		var value map[string]any
		if err := json.Unmarshal([]byte(r.Stdout), &value); err != nil {
			t.Fatal(err)
		}
		if got, _ := json.Marshal(value); string(got) != want {
			t.Errorf("version %q:\n got %s\nwant %s", version, got, want)
		}
		if version >= "0.4.0" {
			p.ok("CHECK")
		}
		p.del()
	}
}

// CHECK finds each kind of damage, and DEL leaves nothing of a damaged router.
func TestCheckFindsDamage(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Strict()
	begun := make(map[string]bool) // the first words of names
	for i, d := range p.Damages() {
		// In the short variant the first one of each kind, which its first word names, and
		// every third one.
		kind, _, _ := strings.Cut(d.Name, " ")
		if !nstest.Long() && begun[kind] && i%3 != 0 {
			continue
		}
		begun[kind] = true
		p.add()
		if i == 0 {
			p.ok("CHECK")
		}
		if err := p.Damage(d); err != nil {
			p.Fatalf("damage %q: %v", d.Name, err)
		}
		p.Logf("damage %q", d.Name)
		if r := p.wantFault("CHECK", cni.CodeDrift, "macvlan0 differs from its configuration: "); r.Details == "" {
			p.Error("no hint")
		}
		p.del()
		if text := p.State(); strings.Contains(text, "egress-router") || strings.Contains(text, "192.168.12.99") || strings.Contains(text, "table 4711") || strings.Contains(text, "macvlan0:") {
			p.Errorf("after damage %q remains:\n%s", d.Name, text)
		}
	}
	p.add()
	p.WantExample()
}

// ADD does without the MSS clamp if the kernel refuses it. CHECK finds that the kernel would
// take it by now.
func TestRefusedPart(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	for i := 0; ; i++ {
		n := (i+8)%60 + 1 // of the messages of a thread to nf_tables, whose threads differ
		plugin := p.command("ADD", p.stdin())
		cmd := p.Command("strace", "-f", "-qq", "-o", os.DevNull, "-e", "trace=sendmsg", "-e", fmt.Sprintf("inject=sendmsg:error=ENOENT:when=%d", n), plugin.Path)
		cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
		r := p.run(p.Lab.Node, cmd)
		if r.Result.Code == 0 && strings.Contains(p.logged(), "MSS clamp not loaded") {
			p.keep(r)
			break
		}
		if i == 1200 {
			t.Fatal("ADD does without the clamp after no failure")
		}
		p.del()
	}
	p.WantExample()
	p.wantFault("CHECK", cni.CodeDrift, "load the rules, because ")
	p.del()
}

// The interface itself may be gone, or another one.
func TestCheckFindsOtherInterface(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	h := p.Handle(p.Lab.Router)
	for _, d := range []struct {
		name, want string
		do         func() error
	}{
		{"hardware address", "hardware address 0a:58:c0:a8:0c:63 instead of ", func() error {
			mac := []byte{0x0a, 0x58, 0xc0, 0xa8, 0x0c, 0x63}
			return h.LinkSetHardwareAddr(p.Link(h, "macvlan0"), mac)
		}},
		{"deleted", "create macvlan0, a macvlan of the host's nic0 in mode bridge", func() error { return h.LinkDel(p.Link(h, "macvlan0")) }},
		{"another mode", "", func() error {
			err := h.LinkDel(p.Link(h, "macvlan0"))
			p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_VEPA)
			return err
		}},
	} {
		p.add()
		if err := d.do(); err != nil {
			p.Fatal(err)
		}
		r := p.call("CHECK")
		if r.Result.Code != 1 || !strings.Contains(r.Msg, d.want) {
			p.Errorf("%s: error %d %q, want %q", d.name, r.Code, r.Msg, d.want)
		}
		p.del()
	}
}

// Multus replaces the default route after ADD by one without a source, and some versions
// delete that of eth0 before.
func TestCheckWithRoutesOfMultus(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{IPv6: true})
	before := p.before()
	h := p.Handle(p.Lab.Router)
	all := netlink.Route{Dst: labtest.Everywhere()}
	for _, early := range []bool{false, true} {
		if early {
			if err := h.RouteDel(&all); err != nil {
				p.Fatal(err)
			}
			before = p.before()
		}
		p.add()
		if err := h.RouteDel(&all); err != nil {
			p.Fatal(err)
		}
		index := p.Link(h, "macvlan0").Attrs().Index
		if err := h.RouteAdd(&netlink.Route{Dst: labtest.Everywhere(), Gw: lab.GatewayAddr.AsSlice(), LinkIndex: index}); err != nil {
			p.Fatal(err)
		}
		p.ok("CHECK")
		p.WantExample()
		p.del()
		p.wantBefore("after DEL", before)
	}
}

// DEL needs neither a valid call nor a complete router.
func TestDelNeverFails(t *testing.T) {
	t.Parallel()
	six := newPod(t, lab.Options{IPv6: true}) // whose ADD takes seconds
	p := newPod(t, lab.Options{})
	before := map[*pod]string{p: p.before(), six: six.before()}
	for name, change := range map[string]func(cmd *exec.Cmd){
		"garbage":               func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("\x00{") },
		"nothing":               func(cmd *exec.Cmd) { cmd.Stdin = nil },
		"no configuration":      func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("{}") },
		"version of the future": func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader(`{"cniVersion": "9.0.0", "name": "x", "ip": 7}`) },
		"null in prevResult": func(cmd *exec.Cmd) {
			cmd.Stdin = strings.NewReader(`{"cniVersion": "1.1.0", "name": "x", "prevResult": {"interfaces": [null], "ips": [null]}}`)
		},
		"no container":      func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "CNI_CONTAINERID=") },
		"no interface":      func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "CNI_IFNAME=") },
		"invalid interface": func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "CNI_IFNAME=../all") },
	} {
		p := p
		if name == "garbage" {
			p = six
		}
		p.add()
		cmd := p.command("DEL", p.stdin())
		change(cmd)
		if r := p.run(p.Lab.Node, cmd); r.Result.Code != 0 || r.Stdout != "" || r.Stderr != "" {
			p.Errorf("%s: exit code %d, stdout %q, stderr %q", name, r.Result.Code, r.Stdout, r.Stderr)
		}
		p.wantBefore(name, before[p])
		delete(p.Conf, "prevResult")
	}
	// The interface is gone already, with its name.
	p.add()
	h := p.Handle(p.Lab.Router)
	if err := h.LinkDel(p.Link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	p.Vars["CNI_IFNAME"] = ""
	p.del()
	if text := p.State(); strings.Contains(text, "egress-router") || strings.Contains(text, "4711") || !strings.Contains(text, "default via 10.128.0.1 dev eth0") {
		t.Errorf("after DEL remains:\n%s", text)
	}
	for name, file := range map[string]string{"none": "", "gone": "/run/netns/gone", "the node's": "/proc/self/ns/net", "no namespace": "/proc/self/exe"} {
		node := p.Inventory(p.Lab.Node)
		p.Vars["CNI_NETNS"] = file
		if r := p.call("DEL"); r.Result.Code != 0 || r.Stdout != "" {
			p.Errorf("namespace %s: exit code %d, stdout %q", name, r.Result.Code, r.Stdout)
		}
		p.WantInventory(p.Lab.Node, "node", node)
	}
}

// A killed ADD leaves parts of a router at most, which DEL removes: the next ADD works.
func TestKilledAdd(t *testing.T) {
	t.Parallel()
	const calls = "trace=sendto,sendmsg,write" // those that change something
	killed := 0
	p := newPod(t, lab.Options{})
	before := p.before()
	strace := func(options ...string) *exec.Cmd {
		plugin := p.command("ADD", p.stdin())
		cmd := p.Command("strace", slices.Concat([]string{"-f", "-qq", "-o", os.DevNull, "-e", calls}, options, []string{plugin.Path})...)
		cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
		return cmd
	}
	for n := 1; ; n += 1 + n/4 {
		cmd := strace("-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", strings.TrimPrefix(calls, "trace="), n))
		err := p.Lab.Run(p.Lab.Node, cmd)
		p.del()
		p.wantBefore(fmt.Sprintf("killed at call %d, after DEL", n), before)
		if err == nil {
			break // it had fewer calls
		}
		if killed++; killed > 100 {
			t.Fatalf("ADD fails without being killed: %v", err)
		}
		if n%3 == 0 {
			p.add()
			p.WantExample()
			p.ok("CHECK")
			p.del()
		}
	}
	p.add()
	p.WantExample()
	if killed < 10 {
		t.Errorf("killed %d times, want at least 10", killed)
	}
}

// A terminated ADD rolls back.
func TestTerminatedAdd(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	p.Conf["conflict"] = "refuse" // takes seconds
	h := p.Handle(p.Lab.Router)
	for terminated := false; !terminated; { // on a busy machine ADD may end before
		cmd := p.command("ADD", p.stdin())
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		p.Until("the interface is up", func() bool {
			l, err := h.LinkByName("macvlan0")
			return err == nil && l.Attrs().RawFlags&unix.IFF_UP != 0
		})
		_ = cmd.Process.Signal(unix.SIGTERM) // an error: it has ended
		if terminated = cmd.Wait() != nil; !terminated {
			p.del()
		}
	}
	p.wantBefore("after SIGTERM", before)
}

// Many pods of a node can get their routers at a time.
func TestManyAddsAtOnce(t *testing.T) {
	t.Parallel()
	const n = 20
	p := newPod(t, lab.Options{})
	var pods []*pod
	var running []*exec.Cmd
	for i := range n {
		q := *p
		ns := p.newNamespace(i)
		q.Vars = map[string]string{"CNI_CONTAINERID": fmt.Sprintf("c%d", i), "CNI_NETNS": labtest.File(ns), "CNI_IFNAME": "net1"}
		q.ip()["addresses"] = []string{fmt.Sprintf("192.168.12.%d/24", 100+i)}
		cmd := q.command("ADD", q.stdin())
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		pods, running = append(pods, &q), append(running, cmd)
	}
	for i, cmd := range running {
		if err := cmd.Wait(); err != nil {
			t.Errorf("ADD %d: %v", i, err)
		}
	}
	for i := range pods {
		a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(podAddress(i), 8080))
		if want := netip.AddrFrom4([4]byte{192, 168, 12, byte(100 + i)}); err != nil || a.Peer.Addr() != want {
			t.Errorf("pod %d: answer %v, error %v; want one that saw %s", i, a, err, want)
		}
	}
	lines := 0
	for line := range strings.Lines(withoutWarnings(p.logged())) {
		if lines++; !strings.HasPrefix(line, "[debug] ") || !strings.HasSuffix(line, "\n") {
			t.Errorf("line %q", line)
		}
	}
	if want := n * 14; lines != want {
		t.Errorf("%d lines, want %d", lines, want)
	}
}

// withoutWarnings returns the lines of a log without those about a gateway that answers late,
// on a busy machine.
func withoutWarnings(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		if !strings.HasPrefix(line, `[warning] msg="gateway does not answer`) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// podAddress is the address of an additional pod.
func podAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 128, 0, byte(150 + i)}) }

// newNamespace returns the namespace of another pod on the node.
func (p *pod) newNamespace(i int) *netns.Namespace {
	p.Helper()
	ns, err := netns.New()
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = ns.Close() })
	h, inside := p.Handle(p.Lab.Node), p.Handle(ns)
	a := netlink.NewLinkAttrs()
	a.Name, a.MasterIndex = fmt.Sprintf("port-%d", i), p.Link(h, lab.Bridge).Attrs().Index
	veth := &netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}
	err = h.LinkAdd(veth)
	if err == nil {
		err = h.LinkSetUp(veth)
	}
	if err == nil {
		eth := p.Link(inside, "eth0")
		if err = inside.AddrAdd(eth, labtest.Addr(podAddress(i).String()+"/23")); err == nil {
			err = inside.LinkSetUp(eth)
		}
		if err == nil {
			err = inside.RouteAdd(&netlink.Route{Dst: labtest.Everywhere(), Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}
	}
	if err != nil {
		p.Fatal(err)
	}
	return ns
}

// The plugin runs no program: not one of the node that may be missing, or another version.
func TestNoProgramIsRun(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	for _, verb := range []string{"ADD", "CHECK", "DEL"} {
		trace := filepath.Join(t.TempDir(), "trace")
		plugin := p.command(verb, p.stdin())
		cmd := p.Command("strace", "-f", "-qq", "-o", trace, "-e", "trace=execve,execveat", plugin.Path)
		cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		if verb == "ADD" {
			var result map[string]any
			if err := json.NewDecoder(out).Decode(&result); err != nil {
				t.Fatal(err)
			}
			p.Conf["prevResult"] = result
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", verb, err)
		}
		text, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), "execve"); n != 1 {
			t.Errorf("%s executes %d programs, want itself alone:\n%s", verb, n, text)
		}
	}
}

// ADD waits for the answer to one probe, not for a full one, unless it is asked to.
func TestConflict(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	h := p.Handle(p.Lab.Outside)
	if err := h.AddrAdd(p.Link(h, lab.LANLink), labtest.Addr("192.168.12.99/24")); err != nil {
		t.Fatal(err)
	}
	// The call waits 50 ms for the answer, which comes later at times on a busy machine.
	p.Until("the log has the conflict", func() bool {
		p.add()
		p.del()
		return strings.Contains(p.logged(), `[warning] msg="reserved address already in use" address=192.168.12.99 mac=`)
	})
	p.Conf["conflict"] = "refuse"
	p.wantFault("ADD", cni.CodeConflict, "take reserved address 192.168.12.99: already in use by ")
	p.wantBefore("refused", before)
}

// While a router comes and goes, no packet of a client reaches the physical network with
// another source, or leaves by the cluster side, also if the calls are killed at any step and
// nobody continues them for a while.
func TestSourceUnderTraffic(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	outside, router := p.Watch(p.Lab.Outside, lab.LANLink), p.Watch(p.Lab.Router, "eth0")
	rounds := 2
	if nstest.Long() {
		rounds = 3
	}
	for range rounds {
		p.add()
		traffic := p.Traffic(p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)))
		traffic.Await(5)
		p.del()
		traffic.Await(5)
		p.add()
		traffic.Await(5)
		p.del()
		traffic.Stop()
	}
	wantSource(p, outside, router)
}

// TestSourceUnderTrafficWithKilledCalls is the same with killed calls.
func TestSourceUnderTrafficWithKilledCalls(t *testing.T) {
	t.Parallel()
	const calls = "sendto,sendmsg,write"
	p := newPod(t, lab.Options{})
	outside, router := p.Watch(p.Lab.Outside, lab.LANLink), p.Watch(p.Lab.Router, "eth0")
	kill := func(verb string, n int) (killed bool) {
		plugin := p.command(verb, p.stdin())
		cmd := p.Command("strace", "-f", "-qq", "-o", os.DevNull, "-e", "trace="+calls, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", calls, n), plugin.Path)
		cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
		return p.Lab.Run(p.Lab.Node, cmd) != nil
	}
	p.add()
	conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
	traffic := p.Traffic(conn)
	share := 1
	if nstest.Long() {
		share = 6
	}
	for n, adds, dels := 1, true, true; adds || dels; n += 1 + n/share {
		dels = kill("DEL", n)
		traffic.Await(2)
		p.del()
		adds = kill("ADD", n)
		traffic.Await(2)
		p.del()
		p.add()
	}
	traffic.Stop()
	wantSource(p, outside, router)
}

// wantSource checks that packets to servers had the reserved address, and left by the egress
// side alone.
func wantSource(p *pod, outside, router labtest.Watch) {
	p.Helper()
	seen := 0
	for _, f := range outside.Captures[lab.LANLink].Frames() {
		ip, is := f.IPv4()
		if !is || f.Outgoing || !labtest.ToServers(ip) {
			continue
		}
		if seen++; ip.Src.Addr() != lab.Source {
			p.Errorf("on the physical network: %s", f)
		}
	}
	if seen == 0 {
		p.Error("no packet to a server")
	}
	router.WantNothing("eth0", labtest.ToServers)
}
