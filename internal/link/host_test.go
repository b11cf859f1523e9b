package link_test

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// promiscuity is the kernel's count of users that need all frames of a link. A
// macvlan that is up counts on a parent that cannot filter by address
// (macvlan_open), such as a veth.
var promiscuity = regexp.MustCompile(` promisc \d+`)

// wantSameHost checks that the host has not changed, except for the count of users
// of its NIC.
func wantSameHost(p *labtest.Pod, want string) {
	p.Helper()
	same := func(inventory string) string { return promiscuity.ReplaceAllString(inventory, "") }
	if diff := cmp.Diff(same(want), same(p.Inventory(p.Lab.Node))); diff != "" {
		p.Errorf("the host (-want +got):\n%s", diff)
	}
}

// macvlan returns the egress interface.
func macvlan(p *labtest.Pod) *netlink.Macvlan {
	p.Helper()
	l, err := p.Handle(p.Lab.Router).LinkByName("macvlan0")
	if err != nil {
		p.Fatal(err)
	}
	m, ok := l.(*netlink.Macvlan)
	if !ok {
		p.Fatalf("macvlan0 is of type %s, want macvlan", l.Type())
	}
	return m
}

var macvlanModes = map[string]netlink.MacvlanMode{
	"":         netlink.MACVLAN_MODE_PRIVATE,
	"private":  netlink.MACVLAN_MODE_PRIVATE,
	"bridge":   netlink.MACVLAN_MODE_BRIDGE,
	"vepa":     netlink.MACVLAN_MODE_VEPA,
	"passthru": netlink.MACVLAN_MODE_PASSTHRU,
}

// The router creates an interface of each mode, of the NIC of the default route and
// of a named one. A second run changes nothing, and the host stays as it was.
func TestMacvlanOfEachMode(t *testing.T) {
	t.Parallel()
	for mode, want := range macvlanModes {
		for _, parent := range []string{"true", lab.NIC} {
			t.Run(fmt.Sprintf("mode %q of %s", mode, parent), func(t *testing.T) {
				t.Parallel()
				p := labtest.NewWithoutMacvlan(t)
				p.Env["EGRESS_MACVLAN_MODE"], p.Env["EGRESS_MACVLAN_PARENT"] = mode, parent
				before := p.Inventory(p.Lab.Node)
				r := p.OK()
				if step := "create macvlan0, a macvlan of the host's nic0 in mode " + modeName(want); !strings.Contains(r.Stderr, step) {
					t.Errorf("stderr lacks %q:\n%s", step, r.Stderr)
				}
				if warned := strings.Contains(r.Stderr, "passthru cuts off host addresses"); warned != (mode == "passthru") {
					t.Errorf("warning that host addresses are cut off: %v, want %v", warned, mode == "passthru")
				}
				p.WantExample()
				if m := macvlan(p); m.Mode != want || m.MTU != 1500 {
					t.Errorf("mode %d, MTU %d; want %d, 1500", m.Mode, m.MTU, want)
				}
				wantSameHost(p, before)
				state, inventory := p.State(), p.Inventory(p.Lab.Router)
				p.WantUnchanged(p.OK())
				p.WantState(state)
				p.WantInventory(p.Lab.Router, "the pod", inventory)
				p.WantExample()

				if err := p.Handle(p.Lab.Router).LinkDel(macvlan(p)); err != nil {
					t.Fatal(err)
				}
				p.WantInventory(p.Lab.Node, "the host", before)
				p.OK() // creates it again
				p.WantExample()
			})
		}
	}
}

func modeName(mode netlink.MacvlanMode) string {
	for name, m := range macvlanModes {
		if m == mode && name != "" {
			return name
		}
	}
	return ""
}

// With the host's process numbers only the parent has to be set.
func TestMacvlanWithHostPID(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	delete(p.Env, "EGRESS_HOST_NETNS")
	before := p.Inventory(p.Lab.Node)
	cmd := p.Command("as-host-process")
	pod, err := os.Open(labtest.File(p.Lab.Router))
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	cmd.ExtraFiles = []*os.File{pod}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if err := p.Lab.Run(p.Lab.Node, cmd); err != nil {
		t.Fatalf("%v:\n%s", err, &stderr)
	}
	p.WantExample()
	wantSameHost(p, before)
}

// Without the host's process numbers the first process is the container's own.
func TestMacvlanWithoutHostPIDIsRefused(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	before := p.Inventory(p.Lab.Router)
	delete(p.Env, "EGRESS_HOST_NETNS")
	cmd := p.Command("as-first-process")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := p.Lab.Run(p.Lab.Router, cmd); err == nil {
		t.Error("exit code 0, want 1")
	}
	r := labtest.Result{Stderr: stderr.String()}
	if want := `egress-router: open host network namespace: "/proc/1/ns/net" is the pod's own`; r.Last() != want {
		t.Errorf("last line:\n got %s\nwant %s", r.Last(), want)
	}
	for _, want := range []string{"hostPID: true", "--pid=host", "EGRESS_HOST_NETNS=/host/proc/1/ns/net"} {
		if !strings.Contains(r.Stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, r.Stderr)
		}
	}
	p.WantInventory(p.Lab.Router, "the pod", before)
}

// The interface has the MTU of its parent.
func TestMacvlanHasMTUOfParent(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	h := p.Handle(p.Lab.Node)
	nic, err := h.LinkByName(lab.NIC)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetMTU(nic, 1400); err != nil {
		t.Fatal(err)
	}
	p.OK()
	p.WantExample()
	if m := macvlan(p); m.MTU != 1400 {
		t.Errorf("MTU %d, want 1400", m.MTU)
	}
}

// An interface that matches stays, with its configuration, whichever program
// created it.
func TestMatchingMacvlanIsKept(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	before := macvlan(p)
	r := p.OK()
	if strings.Contains(r.Stderr, "create macvlan0") {
		t.Errorf("stderr has the creation of macvlan0, want none:\n%s", r.Stderr)
	}
	p.WantExample()
	if m := macvlan(p); m.Index != before.Index || m.HardwareAddr.String() != before.HardwareAddr.String() {
		t.Errorf("interface %d with %s, want %d with %s", m.Index, m.HardwareAddr, before.Index, before.HardwareAddr)
	}
}

// It stays also if a later step fails.
func TestMatchingMacvlanIsKeptOnFailure(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	before := p.Inventory(p.Lab.Router)
	p.Env["EGRESS_ROUTER_BACKEND"] = "iptables"
	if r := p.Exec("without-iptables"); r.Code != 1 {
		t.Errorf("exit code %d, want 1:\n%s", r.Code, r.Stderr)
	}
	p.WantInventory(p.Lab.Router, "the pod", before)
}

// The host may have an interface of the same name.
func TestMacvlanNameTakenOnHost(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.AddMacvlan(p.Lab.Node, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	before := p.Inventory(p.Lab.Node)
	p.OK()
	p.WantExample()
	wantSameHost(p, before)
}

// If the parent is a macvlan, the kernel takes the NIC below. An interface that was
// created by either name is kept for the other.
func TestMacvlanOfMacvlanUsesNICBelow(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.AddMacvlan(p.Lab.Node, "shim0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	p.Env["EGRESS_MACVLAN_PARENT"] = "shim0"
	p.OK()
	p.WantExample()
	p.WantUnchanged(p.OK())
	p.Env["EGRESS_MACVLAN_PARENT"] = lab.NIC
	p.WantUnchanged(p.OK())
	p.WantExample()

	// A macvlan cannot reach the addresses of the NIC below, either.
	p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_GATEWAY"] = "shim0", lab.NICAddr.String()
	if r := p.Exec(); r.Code != 1 || !strings.Contains(r.Last(), "check gateway: 192.168.12.10 is an address of the host's") {
		t.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
	}
}

// The NIC below may be in a third namespace, on a node that is itself a container.
func TestMacvlanOfMacvlanInContainer(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	// The client's namespace stands for the node.
	p.AddMacvlan(p.Lab.Client, "net0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	h := p.Handle(p.Lab.Client)
	net0, err := h.LinkByName("net0")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(net0); err != nil {
		t.Fatal(err)
	}
	p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_HOST_NETNS"] = "net0", labtest.File(p.Lab.Client)
	p.OK()
	p.WantExample()
	p.WantUnchanged(p.OK())
}

// A parent that is down gives an interface without carrier. The router logs that,
// and the interface works as soon as the parent is up.
func TestMacvlanOfParentThatIsDown(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.Env["EGRESS_MACVLAN_PARENT"] = lab.NIC
	h := p.Handle(p.Lab.Node)
	nic, err := h.LinkByName(lab.NIC)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetDown(nic); err != nil {
		t.Fatal(err)
	}
	if r := p.OK(); !strings.Contains(r.Stderr, "egress interface without carrier") {
		t.Errorf("stderr lacks a warning:\n%s", r.Stderr)
	}
	if err := h.LinkSetUp(nic); err != nil {
		t.Fatal(err)
	}
	// The kernel updates the carrier of both ends up to a second later.
	outside := p.Handle(p.Lab.Outside)
	p.Until("macvlan0 and its gateway's interface are up", func() bool {
		return macvlan(p).OperState == netlink.OperUp && p.Link(outside, lab.LANLink).Attrs().OperState == netlink.OperUp
	})
	p.WantExample()
	p.WantUnchanged(p.OK())
}

// The router refuses each fault with exit code 1, a reason and a hint, and leaves
// both namespaces as they were.
func TestMacvlanFaultsAreRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		prepare func(p *labtest.Pod)
		env     map[string]string
		command string
		last    string // part of the last line
		hint    string // part of the lines before
	}{
		{
			name: "no such NIC", env: map[string]string{"EGRESS_MACVLAN_PARENT": "ens9"},
			last: `find macvlan parent: the host has no interface "ens9"; usable interfaces: nic0, port-far, tun0`,
			hint: "set EGRESS_MACVLAN_PARENT to a NIC of the host, or to true",
		},
		{
			name: "loopback", env: map[string]string{"EGRESS_MACVLAN_PARENT": "lo"},
			last: `the host's "lo": expected Ethernet, found type loopback`,
			hint: "EGRESS_MACVLAN_PARENT",
		},
		{
			name: "bridge port", env: map[string]string{"EGRESS_MACVLAN_PARENT": lab.ClientPort},
			last: `create "macvlan0", a macvlan of the host's "port-client" in mode private: device or resource busy`,
			hint: "port-client is a port of tun0",
		},
		{
			name: "no default route",
			prepare: func(p *labtest.Pod) {
				h := p.Handle(p.Lab.Node)
				nic, err := h.LinkByName(lab.NIC)
				if err != nil {
					p.Fatal(err)
				}
				if err := h.RouteDel(&netlink.Route{LinkIndex: nic.Attrs().Index, Gw: lab.GatewayAddr.AsSlice()}); err != nil {
					p.Fatal(err)
				}
			},
			last: "the host has no IPv4 default route in its main table; usable interfaces: nic0, port-far, tun0",
			hint: "set EGRESS_MACVLAN_PARENT to a NIC of the host",
		},
		{
			name: "multipath default route",
			prepare: func(p *labtest.Pod) {
				h := p.Handle(p.Lab.Node)
				var paths []*netlink.NexthopInfo
				for link, gateway := range map[string]netip.Addr{lab.NIC: lab.GatewayAddr, lab.Bridge: lab.ClientAddr} {
					l, err := h.LinkByName(link)
					if err != nil {
						p.Fatal(err)
					}
					paths = append(paths, &netlink.NexthopInfo{LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice()})
				}
				slices.SortFunc(paths, func(a, b *netlink.NexthopInfo) int { return a.LinkIndex - b.LinkIndex })
				if err := h.RouteReplace(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, MultiPath: paths}); err != nil {
					p.Fatal(err)
				}
			},
			last: "the host's IPv4 default route has several NICs: tun0, nic0",
			hint: "set EGRESS_MACVLAN_PARENT to the NIC on the network of EGRESS_GATEWAY",
		},
		{
			name:    "macvlan of another NIC",
			prepare: func(p *labtest.Pod) { p.AddMacvlan(p.Lab.Router, "macvlan0", lab.Bridge, netlink.MACVLAN_MODE_PRIVATE) },
			last:    `create "macvlan0": expected a macvlan of the host's "nic0" in mode private, found a macvlan of the host's "tun0" in mode private`,
			hint:    "unset EGRESS_MACVLAN_PARENT",
		},
		{
			name:    "macvlan in another mode",
			prepare: func(p *labtest.Pod) { p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE) },
			last:    `expected a macvlan of the host's "nic0" in mode private, found a macvlan of the host's "nic0" in mode bridge`,
			hint:    "ip link delete macvlan0",
		},
		{
			name: "interface of another type",
			prepare: func(p *labtest.Pod) {
				a := netlink.NewLinkAttrs()
				a.Name = "macvlan0"
				if err := p.Handle(p.Lab.Router).LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
					p.Fatal(err)
				}
			},
			last: `expected a macvlan of the host's "nic0" in mode private, found an interface of type bridge`,
			hint: "EGRESS_INTERFACE",
		},
		{
			name: "passthru beside another macvlan", env: map[string]string{"EGRESS_MACVLAN_MODE": "passthru"},
			prepare: func(p *labtest.Pod) { p.AddMacvlan(p.Lab.Outside, "other0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE) },
			last:    `create "macvlan0", a macvlan of the host's "nic0" in mode passthru: invalid argument`,
			hint:    "nic0 has another",
		},
		{
			name:    "another macvlan in passthru",
			prepare: func(p *labtest.Pod) { p.AddMacvlan(p.Lab.Outside, "other0", lab.NIC, netlink.MACVLAN_MODE_PASSTHRU) },
			last:    `create "macvlan0", a macvlan of the host's "nic0" in mode private: invalid argument`,
			hint:    "nic0 may have one",
		},
		{
			name: "gateway is the host", env: map[string]string{"EGRESS_GATEWAY": lab.NICAddr.String()},
			last: `check gateway: 192.168.12.10 is an address of the host's "nic0", which its macvlan cannot reach`,
			hint: "EGRESS_GATEWAY",
		},
		{
			name: "source is the host's", env: map[string]string{"EGRESS_SOURCE": lab.NICAddr.String() + "/24"},
			last: `check reserved address: 192.168.12.10 is an address of the host's "nic0"`,
			hint: "EGRESS_SOURCE",
		},
		{
			name: "namespace of the pod", env: map[string]string{"EGRESS_HOST_NETNS": "/proc/thread-self/ns/net"},
			last: `open host network namespace: "/proc/thread-self/ns/net" is the pod's own`,
			hint: "hostPID: true",
		},
		{
			name: "no such namespace", env: map[string]string{"EGRESS_HOST_NETNS": "/nowhere"},
			last: `opening network namespace "/nowhere": no such file or directory`,
			hint: `hint: the container has no file "/nowhere": check EGRESS_HOST_NETNS, and mount the volume that contains the file`,
		},
		{
			name: "not a namespace", env: map[string]string{"EGRESS_HOST_NETNS": "/dev/null"},
			last: `opening network namespace "/dev/null": not a network namespace`,
			hint: "hostPID: true",
		},
		{
			name: "no privilege", command: "without-privilege",
			last: "check capabilities: NET_ADMIN, NET_RAW, SYS_ADMIN, SYS_PTRACE missing, operation not permitted",
			hint: "securityContext.privileged: true in the container's spec, and hostPID: true",
		},
		{
			name: "no privilege over the host", command: "without-sys-admin",
			last: "operation not permitted",
			hint: "entering the host's network namespace requires privilege",
		},
		// These faults are found after the interface is created.
		{
			name: "no iptables", command: "without-iptables", env: map[string]string{"EGRESS_ROUTER_BACKEND": "iptables"},
			last: "looking for iptables",
			hint: `install the package "iptables"`,
		},
		{
			name: "forwarding off and read-only", command: "with-read-only-proc",
			last: "set sysctl net.ipv4.ip_forward = 1: found 0",
			hint: "net.ipv4.ip_forward=1",
		},
		{
			name: "no eth0", env: map[string]string{"EGRESS_CLUSTER_INTERFACE": "net0"},
			last: `interface "net0" not found; interfaces: eth0`,
			hint: "EGRESS_CLUSTER_INTERFACE",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.NewWithoutMacvlan(t)
			if test.prepare != nil {
				test.prepare(p)
			}
			maps.Copy(p.Env, test.env)
			pod, host := p.Inventory(p.Lab.Router), p.Inventory(p.Lab.Node)
			p.WantRefusal(test.command, test.last, test.hint)
			p.WantInventory(p.Lab.Router, "the pod", pod)
			p.WantInventory(p.Lab.Node, "the host", host)
		})
	}
}

// The init container of a proxy creates the interface, too.
func TestMacvlanInProxyMode(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_MACVLAN_MODE"] = "http-proxy", "bridge"
	p.OK()
	a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
	if err != nil || a.Peer.Addr() != lab.Source {
		t.Errorf("a socket of the pod: answer %v, error %v; want to be seen as %s", a, err, lab.Source)
	}
	p.WantUnchanged(p.OK())
}
