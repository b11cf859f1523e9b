package labtest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// File returns the file of a namespace.
func File(ns *netns.Namespace) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }

// AddMacvlan adds a macvlan of a node's NIC to a namespace.
func (p *Pod) AddMacvlan(ns *netns.Namespace, name, parent string, mode netlink.MacvlanMode) {
	p.Helper()
	h := p.Handle(p.Lab.Node)
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

// NewWithoutMacvlan returns a pod without an egress interface, whose router creates
// it as a macvlan of the NIC of the lab's node.
//
// EGRESS_HOST_NETNS is always set to the node's namespace. Its default is that of the
// machine that runs the tests.
func NewWithoutMacvlan(t *testing.T) *Pod {
	t.Helper()
	p := New(t, lab.Options{NoMacvlan: true}, IptablesNFT)
	p.Env["EGRESS_MACVLAN_PARENT"] = "true"
	p.Env["EGRESS_HOST_NETNS"] = File(p.Lab.Node)
	return p
}

// Inventory describes the links, addresses and routes of a namespace.
func (p *Pod) Inventory(ns *netns.Namespace) string {
	p.Helper()
	h := p.Handle(ns)
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

// WantInventory checks that a namespace has not changed.
func (p *Pod) WantInventory(ns *netns.Namespace, name, want string) {
	p.Helper()
	if got := p.Inventory(ns); got != want {
		p.Errorf("%s (-want +got):\n%s", name, diff(want, got))
	}
}
