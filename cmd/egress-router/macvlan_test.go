package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// noSysAdmin gives up what entering a namespace takes, and nothing else.
func noSysAdmin() error {
	return unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0)
}

// ownProc shows the first process of a container its own process numbers.
func ownProc() error {
	if os.Getpid() != 1 {
		return errors.New("it is to be started as the first process")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", 0, "")
}

// hostProcess stands for the first process of a host, in whose network it is
// started: it runs in-pod with the host's process numbers.
func hostProcess() {
	code, err := func() (int, error) {
		if err := ownProc(); err != nil {
			return 0, err
		}
		path, err := exec.LookPath("in-pod")
		if err != nil {
			return 0, err
		}
		cmd := exec.Command(path, os.Args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.ExtraFiles = []*os.File{os.NewFile(3, "pod")}
		err = cmd.Run()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return exit.ExitCode(), nil
		}
		return 0, err
	}()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		code = 99
	}
	os.Exit(code)
}

// inPod runs the program in the network namespace of descriptor 3.
func inPod() {
	pod, err := netns.Open("/proc/self/fd/3")
	if err == nil {
		err = pod.Do(func() error {
			become(func() error { return nil })
			return nil
		})
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
	os.Exit(99)
}

// newMacvlanPod returns a pod without an egress interface, whose router is to
// make it from the NIC of the default route of the lab's node.
//
// The node's namespace is always named. By its default the variable would name
// that of the machine that the tests run on.
func newMacvlanPod(t *testing.T) *pod {
	t.Helper()
	p := newPod(t, lab.Options{NoMacvlan: true}, iptablesNFT)
	p.env["EGRESS_MACVLAN_PARENT"] = "true"
	p.env["EGRESS_HOST_NETNS"] = file(p.lab.Node)
	return p
}

// file returns a file that stands for a namespace.
func file(ns *netns.Namespace) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }

// inventory describes the links, addresses and routes of a namespace.
func (p *pod) inventory(ns *netns.Namespace) string {
	p.Helper()
	h := p.handle(ns)
	links, err := h.LinkList()
	if err != nil {
		p.Fatal(err)
	}
	var lines []string
	for _, l := range links {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("%d %s %s %s mtu %d %s master %d parent %d promisc %d", a.Index, a.Name, l.Type(), a.Flags, a.MTU, a.HardwareAddr, a.MasterIndex, a.ParentIndex, a.Promisc))
		addresses, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			p.Fatal(err)
		}
		for _, a := range addresses {
			lines = append(lines, "  "+a.String())
		}
	}
	routes, err := h.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		p.Fatal(err)
	}
	for _, r := range routes {
		lines = append(lines, r.String())
	}
	return strings.Join(lines, "\n") + "\n"
}

// promiscuity is how many want all frames of a link. The kernel counts a macvlan
// that is up on a parent that cannot filter by address (macvlan_open), such as
// a veth.
var promiscuity = regexp.MustCompile(` promisc \d+`)

// wantSameHost checks that the host is as it was, but for what goes with any
// macvlan of its NIC.
func (p *pod) wantSameHost(want string) {
	p.Helper()
	if got := p.inventory(p.lab.Node); promiscuity.ReplaceAllString(got, "") != promiscuity.ReplaceAllString(want, "") {
		p.Errorf("the host is not as it was.\n--- was\n%s--- is\n%s", want, got)
	}
}

// wantInventory checks that a namespace is as it was.
func (p *pod) wantInventory(ns *netns.Namespace, name, want string) {
	p.Helper()
	if got := p.inventory(ns); got != want {
		p.Errorf("%s is not as it was.\n--- was\n%s--- is\n%s", name, want, got)
	}
}

// macvlan returns the egress interface.
func (p *pod) macvlan() *netlink.Macvlan {
	p.Helper()
	l, err := p.handle(p.lab.Router).LinkByName("macvlan0")
	if err != nil {
		p.Fatal(err)
	}
	m, ok := l.(*netlink.Macvlan)
	if !ok {
		p.Fatalf("macvlan0 is of type %s", l.Type())
	}
	return m
}

// addMacvlan adds a macvlan of a node's NIC to a namespace.
func (p *pod) addMacvlan(ns *netns.Namespace, name, parent string, mode netlink.MacvlanMode) {
	p.Helper()
	h := p.handle(p.lab.Node)
	nic, err := h.LinkByName(parent)
	if err != nil {
		p.Fatal(err)
	}
	a := netlink.NewLinkAttrs()
	a.Name, a.ParentIndex, a.Namespace = name, nic.Attrs().Index, netlink.NsFd(ns.Fd())
	if err := h.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: mode}); err != nil {
		p.Fatal(err)
	}
}

var macvlanModes = map[string]netlink.MacvlanMode{
	"":         netlink.MACVLAN_MODE_PRIVATE,
	"private":  netlink.MACVLAN_MODE_PRIVATE,
	"bridge":   netlink.MACVLAN_MODE_BRIDGE,
	"vepa":     netlink.MACVLAN_MODE_VEPA,
	"passthru": netlink.MACVLAN_MODE_PASSTHRU,
}

// The documentation's example, with an interface of each mode that the router
// makes itself, from the NIC of the default route and from one that is named; a
// second run that changes nothing; and a host that is as it was.
func TestMacvlan(t *testing.T) {
	for mode, want := range macvlanModes {
		for _, parent := range []string{"true", lab.NIC} {
			t.Run(fmt.Sprintf("mode %q of %s", mode, parent), func(t *testing.T) {
				p := newMacvlanPod(t)
				p.env["EGRESS_MACVLAN_MODE"], p.env["EGRESS_MACVLAN_PARENT"] = mode, parent
				before := p.inventory(p.lab.Node)
				r := p.ok()
				if step := "create macvlan0, a macvlan of the host's nic0 in mode " + modeName(want); !strings.Contains(r.stderr, step) {
					t.Errorf("stderr lacks %q:\n%s", step, r.stderr)
				}
				if warned := strings.Contains(r.stderr, "the host is cut off"); warned != (mode == "passthru") {
					t.Errorf("a warning that the host is cut off: %v", warned)
				}
				p.wantExample()
				if m := p.macvlan(); m.Mode != want || m.MTU != 1500 {
					t.Errorf("mode %d, MTU %d; want %d, 1500", m.Mode, m.MTU, want)
				}
				p.wantSameHost(before)
				state, inventory := p.state(), p.inventory(p.lab.Router)
				p.wantUnchanged(p.ok())
				p.wantState(state)
				p.wantInventory(p.lab.Router, "the pod", inventory)
				p.wantExample()

				if err := p.handle(p.lab.Router).LinkDel(p.macvlan()); err != nil {
					t.Fatal(err)
				}
				p.wantInventory(p.lab.Node, "the host", before)
				p.ok() // it is made again
				p.wantExample()
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

// With the host's process numbers nothing but the parent has to be set.
func TestMacvlanHostPID(t *testing.T) {
	p := newMacvlanPod(t)
	delete(p.env, "EGRESS_HOST_NETNS")
	before := p.inventory(p.lab.Node)
	cmd := p.command("as-host-process")
	pod, err := os.Open(file(p.lab.Router))
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	cmd.ExtraFiles = []*os.File{pod}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if err := p.lab.Run(p.lab.Node, cmd); err != nil {
		t.Fatalf("%v:\n%s", err, &stderr)
	}
	p.wantExample()
	p.wantSameHost(before)
}

// Without them the first process is the container's own.
func TestMacvlanOwnNamespace(t *testing.T) {
	p := newMacvlanPod(t)
	before := p.inventory(p.lab.Router)
	delete(p.env, "EGRESS_HOST_NETNS")
	cmd := p.command("as-first-process")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := p.lab.Run(p.lab.Router, cmd); err == nil {
		t.Error("the program succeeded")
	}
	r := result{stderr: stderr.String()}
	if want := `egress-router: opening the host's network namespace: "/proc/1/ns/net" is the pod's own`; r.last() != want {
		t.Errorf("last line:\n got %s\nwant %s", r.last(), want)
	}
	for _, want := range []string{"hostPID: true", "--pid=host", "EGRESS_HOST_NETNS=/host/proc/1/ns/net"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, r.stderr)
		}
	}
	p.wantInventory(p.lab.Router, "the pod", before)
}

// The MTU is the parent's.
func TestMacvlanMTU(t *testing.T) {
	p := newMacvlanPod(t)
	h := p.handle(p.lab.Node)
	nic, err := h.LinkByName(lab.NIC)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetMTU(nic, 1400); err != nil {
		t.Fatal(err)
	}
	p.ok()
	p.wantExample()
	if m := p.macvlan(); m.MTU != 1400 {
		t.Errorf("MTU %d, want 1400", m.MTU)
	}
}

// An interface that is as wanted stays, whoever made it, and with it what is
// configured on it.
func TestMacvlanKept(t *testing.T) {
	p := newMacvlanPod(t)
	p.addMacvlan(p.lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	before := p.macvlan()
	r := p.ok()
	if strings.Contains(r.stderr, "create macvlan0") {
		t.Errorf("it was made again:\n%s", r.stderr)
	}
	p.wantExample()
	if m := p.macvlan(); m.Index != before.Index || m.HardwareAddr.String() != before.HardwareAddr.String() {
		t.Errorf("it is another one: %d %s, was %d %s", m.Index, m.HardwareAddr, before.Index, before.HardwareAddr)
	}
}

// It also stays when a later step fails.
func TestMacvlanKeptOnFailure(t *testing.T) {
	p := newMacvlanPod(t)
	p.addMacvlan(p.lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	before := p.inventory(p.lab.Router)
	p.env["EGRESS_ROUTER_BACKEND"] = "iptables"
	if r := p.run("without-iptables"); r.code != 1 {
		t.Errorf("exit code %d, want 1:\n%s", r.code, r.stderr)
	}
	p.wantInventory(p.lab.Router, "the pod", before)
}

// The host may have an interface of the same name.
func TestMacvlanNameTakenOnHost(t *testing.T) {
	p := newMacvlanPod(t)
	p.addMacvlan(p.lab.Node, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	before := p.inventory(p.lab.Node)
	p.ok()
	p.wantExample()
	p.wantSameHost(before)
}

// Of a parent that is a macvlan the kernel takes the NIC below. What was made
// by either name is kept by the other.
func TestMacvlanOfMacvlan(t *testing.T) {
	p := newMacvlanPod(t)
	p.addMacvlan(p.lab.Node, "shim0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	p.env["EGRESS_MACVLAN_PARENT"] = "shim0"
	p.ok()
	p.wantExample()
	p.wantUnchanged(p.ok())
	p.env["EGRESS_MACVLAN_PARENT"] = lab.NIC
	p.wantUnchanged(p.ok())
	p.wantExample()

	// The addresses of the NIC below are out of reach as well.
	p.env["EGRESS_MACVLAN_PARENT"], p.env["EGRESS_GATEWAY"] = "shim0", lab.NICAddr.String()
	if r := p.run(); r.code != 1 || !strings.Contains(r.last(), "checking the gateway: 192.168.12.10 is an address of the host's own") {
		t.Errorf("exit code %d:\n%s", r.code, r.stderr)
	}
}

// A macvlan of a macvlan whose NIC is in a third namespace: a node that is
// itself a container.
func TestMacvlanOfMacvlanInContainer(t *testing.T) {
	p := newMacvlanPod(t)
	// The client's namespace is the node here, and has no other NIC to choose.
	p.addMacvlan(p.lab.Client, "net0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE)
	h := p.handle(p.lab.Client)
	net0, err := h.LinkByName("net0")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(net0); err != nil {
		t.Fatal(err)
	}
	p.env["EGRESS_MACVLAN_PARENT"], p.env["EGRESS_HOST_NETNS"] = "net0", file(p.lab.Client)
	p.ok()
	p.wantExample()
	p.wantUnchanged(p.ok())
}

// A parent that is down makes an interface without carrier, which is said, and
// which works as soon as the parent is up.
func TestMacvlanParentDown(t *testing.T) {
	p := newMacvlanPod(t)
	p.env["EGRESS_MACVLAN_PARENT"] = lab.NIC
	h := p.handle(p.lab.Node)
	nic, err := h.LinkByName(lab.NIC)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetDown(nic); err != nil {
		t.Fatal(err)
	}
	if r := p.ok(); !strings.Contains(r.stderr, "the egress interface has no carrier") {
		t.Errorf("no warning:\n%s", r.stderr)
	}
	if err := h.LinkSetUp(nic); err != nil {
		t.Fatal(err)
	}
	// The kernel tells both ends of their carrier up to a second later.
	outside := p.handle(p.lab.Outside)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		lan, err := outside.LinkByName(lab.LANLink)
		if err != nil {
			t.Fatal(err)
		}
		macvlan := p.macvlan()
		if macvlan.OperState == netlink.OperUp && lan.Attrs().OperState == netlink.OperUp {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("macvlan0 is still %s, its gateway's interface %s", macvlan.OperState, lan.Attrs().OperState)
		}
	}
	p.wantExample()
	p.wantUnchanged(p.ok())
}

// Whatever is wrong: exit code 1, a reason, what to do, and both namespaces as
// they were.
func TestMacvlanRefusals(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(p *pod)
		env     map[string]string
		command string
		last    string // of the last line
		hint    string // part of what stands before
	}{
		{
			name: "no such NIC", env: map[string]string{"EGRESS_MACVLAN_PARENT": "ens9"},
			last: `finding the parent of the macvlan: the host has no interface "ens9"; those of the host that can be one: nic0, port-far, tun0`,
			hint: "EGRESS_MACVLAN_PARENT is the name of a NIC of the host, or true",
		},
		{
			name: "loopback", env: map[string]string{"EGRESS_MACVLAN_PARENT": "lo"},
			last: `the host's "lo" cannot be one, being of type loopback and not Ethernet`,
			hint: "EGRESS_MACVLAN_PARENT",
		},
		{
			name: "a port of a bridge", env: map[string]string{"EGRESS_MACVLAN_PARENT": lab.ClientPort},
			last: `creating "macvlan0", a macvlan of the host's "port-client" in mode private: device or resource busy`,
			hint: "port-client is a port of tun0",
		},
		{
			name: "no default route",
			prepare: func(p *pod) {
				h := p.handle(p.lab.Node)
				nic, err := h.LinkByName(lab.NIC)
				if err != nil {
					p.Fatal(err)
				}
				if err := h.RouteDel(&netlink.Route{LinkIndex: nic.Attrs().Index, Gw: lab.GatewayAddr.AsSlice()}); err != nil {
					p.Fatal(err)
				}
			},
			last: "the host has no IPv4 default route in its main table; those of the host that can be one: nic0, port-far, tun0",
			hint: "name a NIC of the host in EGRESS_MACVLAN_PARENT",
		},
		{
			name: "a default route of two paths",
			prepare: func(p *pod) {
				h := p.handle(p.lab.Node)
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
			last: "the host's IPv4 default route leaves by several NICs: tun0, nic0",
			hint: "name one of them in EGRESS_MACVLAN_PARENT",
		},
		{
			name:    "of another NIC",
			prepare: func(p *pod) { p.addMacvlan(p.lab.Router, "macvlan0", lab.Bridge, netlink.MACVLAN_MODE_PRIVATE) },
			last:    `creating "macvlan0": it is there already as a macvlan of the host's "tun0" in mode private; wanted is a macvlan of the host's "nic0" in mode private`,
			hint:    "unset EGRESS_MACVLAN_PARENT",
		},
		{
			name:    "in another mode",
			prepare: func(p *pod) { p.addMacvlan(p.lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_BRIDGE) },
			last:    `it is there already as a macvlan of the host's "nic0" in mode bridge; wanted is a macvlan of the host's "nic0" in mode private`,
			hint:    "ip link delete macvlan0",
		},
		{
			name: "something else",
			prepare: func(p *pod) {
				a := netlink.NewLinkAttrs()
				a.Name = "macvlan0"
				if err := p.handle(p.lab.Router).LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
					p.Fatal(err)
				}
			},
			last: `it is there already as an interface of type bridge; wanted is a macvlan of the host's "nic0" in mode private`,
			hint: "EGRESS_INTERFACE",
		},
		{
			name: "passthru beside another", env: map[string]string{"EGRESS_MACVLAN_MODE": "passthru"},
			prepare: func(p *pod) { p.addMacvlan(p.lab.Outside, "other0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE) },
			last:    `creating "macvlan0", a macvlan of the host's "nic0" in mode passthru: invalid argument`,
			hint:    "nic0 has another macvlan",
		},
		{
			name:    "beside a passthru",
			prepare: func(p *pod) { p.addMacvlan(p.lab.Outside, "other0", lab.NIC, netlink.MACVLAN_MODE_PASSTHRU) },
			last:    `creating "macvlan0", a macvlan of the host's "nic0" in mode private: invalid argument`,
			hint:    "nic0 may have one",
		},
		{
			name: "the host is the gateway", env: map[string]string{"EGRESS_GATEWAY": lab.NICAddr.String()},
			last: `checking the gateway: 192.168.12.10 is an address of the host's own "nic0", which a macvlan of it cannot reach`,
			hint: "EGRESS_GATEWAY",
		},
		{
			name: "the host has the address", env: map[string]string{"EGRESS_SOURCE": lab.NICAddr.String() + "/24"},
			last: `checking the reserved address: 192.168.12.10 is an address of the host's own "nic0"`,
			hint: "EGRESS_SOURCE",
		},
		{
			name: "the pod's own namespace", env: map[string]string{"EGRESS_HOST_NETNS": "/proc/thread-self/ns/net"},
			last: `opening the host's network namespace: "/proc/thread-self/ns/net" is the pod's own`,
			hint: "hostPID: true",
		},
		{
			name: "no such namespace", env: map[string]string{"EGRESS_HOST_NETNS": "/nowhere"},
			last: `opening network namespace "/nowhere": no such file or directory`,
			hint: "hostPID: true",
		},
		{
			name: "not a namespace", env: map[string]string{"EGRESS_HOST_NETNS": "/dev/null"},
			last: `opening network namespace "/dev/null": it is not a network namespace`,
			hint: "hostPID: true",
		},
		{
			name: "no privilege", command: "without-privilege",
			last: "permission denied",
			hint: "securityContext.privileged: true (of it, the capabilities SYS_ADMIN, and SYS_PTRACE",
		},
		{
			name: "no privilege over the host", command: "without-sys-admin",
			last: "operation not permitted",
			hint: "entering the host's network namespace takes privilege",
		},
		// What is found only after the interface is made.
		{
			name: "no iptables", command: "without-iptables", env: map[string]string{"EGRESS_ROUTER_BACKEND": "iptables"},
			last: "looking for iptables",
			hint: `install the package "iptables"`,
		},
		{
			name: "forwarding off and read-only", command: "with-read-only-proc",
			last: "turning on net.ipv4.ip_forward: it is 0 and cannot be written",
			hint: "net.ipv4.ip_forward=1",
		},
		{
			name: "no eth0", env: map[string]string{"EGRESS_CLUSTER_INTERFACE": "net0"},
			last: `interface "net0" not found; there are: eth0`,
			hint: "EGRESS_CLUSTER_INTERFACE",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newMacvlanPod(t)
			if test.prepare != nil {
				test.prepare(p)
			}
			maps.Copy(p.env, test.env)
			pod, host := p.inventory(p.lab.Router), p.inventory(p.lab.Node)
			p.wantRefusal(test.command, test.last, test.hint)
			p.wantInventory(p.lab.Router, "the pod", pod)
			p.wantInventory(p.lab.Node, "the host", host)
		})
	}
}

// A proxy's init container gets the interface too.
func TestMacvlanProxyMode(t *testing.T) {
	p := newMacvlanPod(t)
	p.env["EGRESS_ROUTER_MODE"], p.env["EGRESS_MACVLAN_MODE"] = "http-proxy", "bridge"
	p.ok()
	a, err := p.lab.Ask(t.Context(), p.lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
	if err != nil || a.Peer.Addr() != source {
		t.Errorf("a socket of the pod: answer %v, error %v; want to be seen as %s", a, err, source)
	}
	p.wantUnchanged(p.ok())
}
