package labtest

import (
	"fmt"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// File returns a file that stands for a namespace.
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

// NewWithoutMacvlan returns a pod without an egress interface, whose router is to
// make it from the NIC of the default route of the lab's node.
//
// The node's namespace is always named. By its default the variable would name
// that of the machine that the tests run on.
func NewWithoutMacvlan(t *testing.T) *Pod {
	t.Helper()
	p := New(t, lab.Options{NoMacvlan: true}, IptablesNFT)
	p.Env["EGRESS_MACVLAN_PARENT"] = "true"
	p.Env["EGRESS_HOST_NETNS"] = File(p.Lab.Node)
	return p
}
