package link

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
)

// macvlanModes are the modes of a macvlan. Only messages use source: it cannot be
// configured.
var macvlanModes = map[spec.MacvlanMode]netlink.MacvlanMode{
	"private":  netlink.MACVLAN_MODE_PRIVATE,
	"bridge":   netlink.MACVLAN_MODE_BRIDGE,
	"vepa":     netlink.MACVLAN_MODE_VEPA,
	"passthru": netlink.MACVLAN_MODE_PASSTHRU,
	"source":   netlink.MACVLAN_MODE_SOURCE,
}

func modeName(mode netlink.MacvlanMode) string {
	for name, m := range macvlanModes {
		if m == mode {
			return string(name)
		}
	}
	return fmt.Sprintf("number %d", mode)
}

// A MacvlanError reports why the egress interface cannot be created.
type MacvlanError struct {
	Err  error
	hint wording.Text
}

func (e *MacvlanError) Error() string { return e.Err.Error() }

// Unwrap returns the underlying error.
func (e *MacvlanError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *MacvlanError) Hint(names wording.Names) string { return e.hint.In(names) }

func macvlanError(hint wording.Text, format string, args ...any) *MacvlanError {
	return &MacvlanError{fmt.Errorf(format, args...), hint}
}

// A Parent is the NIC of a macvlan.
type Parent struct {
	Name  string
	Index int // in the host's namespace
	MTU   int // bytes
	// Addresses are the NIC's own IPv4 addresses, each as a prefix of full length.
	// The macvlan and the NIC's host cannot reach each other: the NIC sends the
	// macvlan's frames to the network without passing them to the host, and vice
	// versa.
	Addresses []netip.Prefix

	// below is the NIC that the kernel uses in its place.
	below lowerLink
	// master is the interface that receives all of its frames; empty: none.
	master string
}

// A lowerLink is the interface below a macvlan.
type lowerLink struct {
	index int
	// namespace is the ID of its namespace (RTM_GETNSID); -1: the same namespace.
	namespace int
}

// FindParent finds the parent of m. k is the host's namespace.
//
// If the parent is itself a macvlan, the kernel uses the NIC below it
// (macvlan_common_newlink in drivers/net/macvlan.c), so that the two are siblings.
func (k *Kernel) FindParent(m plan.Macvlan) (Parent, error) {
	links, err := k.links()
	if err != nil {
		return Parent{}, fmt.Errorf("list host interfaces: %w", err)
	}
	routes, err := k.routesOf(netlink.FAMILY_V4, unix.RT_TABLE_MAIN)
	if err != nil {
		return Parent{}, fmt.Errorf("list host routes: %w", err)
	}
	addresses, err := k.hostAddresses()
	if err != nil {
		return Parent{}, err
	}
	nic, err := chooseParent(m.Parent, links, routes, addresses)
	if err != nil {
		return Parent{}, err
	}
	attrs := nic.Attrs()
	p := Parent{Name: attrs.Name, Index: attrs.Index, MTU: attrs.MTU, below: lowerLink{attrs.Index, -1}}
	p.Addresses = addresses[attrs.Index]
	if kind := nic.Type(); kind == "macvlan" || kind == "macvtap" {
		p.below = lowerLink{attrs.ParentIndex, attrs.NetNsID}
		if attrs.NetNsID < 0 {
			p.Addresses = slices.Concat(p.Addresses, addresses[attrs.ParentIndex])
		}
	}
	for i, a := range p.Addresses {
		p.Addresses[i] = netip.PrefixFrom(a.Addr(), a.Addr().BitLen())
	}
	if attrs.MasterIndex != 0 {
		p.master = linkName(links, attrs.MasterIndex)
	}
	return p, nil
}

// hostAddresses returns the IPv4 addresses of every interface, by its index.
func (k *Kernel) hostAddresses() (map[int][]netip.Prefix, error) {
	list, err := k.addresses(netlink.FAMILY_V4, nil)
	if err != nil {
		return nil, fmt.Errorf("list host addresses: %w", err)
	}
	addresses := map[int][]netip.Prefix{}
	for _, a := range list {
		addresses[a.LinkIndex] = append(addresses[a.LinkIndex], prefix(a.IPNet))
	}
	return addresses, nil
}

var parentHint = wording.Textf("set %s to a NIC of the host, or to true for the NIC of the host's IPv4 default route", wording.MacvlanParent)

// chooseParent returns the NIC called name, or, if the name is empty, the NIC of
// the default route.
func chooseParent(name string, links []netlink.Link, routes []netlink.Route, addresses map[int][]netip.Prefix) (netlink.Link, error) {
	others := func() string {
		if names := candidates(links, addresses); len(names) > 0 {
			return "usable interfaces: " + strings.Join(names, ", ")
		}
		return "the host has no usable interface"
	}
	var index int
	if name == "" {
		nics := defaultNICs(routes)
		var names []string
		for _, n := range nics {
			names = append(names, linkName(links, n))
		}
		switch {
		case len(nics) == 0:
			return nil, macvlanError(wording.Textf("set %s to a NIC of the host, or check that %s is the host's namespace", wording.MacvlanParent, wording.HostNetns),
				"find macvlan parent: the host has no IPv4 default route in its main table; %s", others())
		case len(nics) > 1:
			return nil, macvlanError(wording.Textf("set %s to the NIC on the network of %s", wording.MacvlanParent, wording.Gateway),
				"find macvlan parent: the host's IPv4 default route has several NICs: %s", strings.Join(names, ", "))
		}
		name, index = names[0], nics[0]
	}
	at := slices.IndexFunc(links, func(l netlink.Link) bool {
		return l.Attrs().Name == name && (index == 0 || l.Attrs().Index == index)
	})
	if at < 0 {
		return nil, macvlanError(parentHint, "find macvlan parent: the host has no interface %q; %s", name, others())
	}
	// See macvlan_port_create in drivers/net/macvlan.c.
	if kind := links[at].Attrs().EncapType; kind != "ether" {
		return nil, macvlanError(parentHint, "find macvlan parent: the host's %q: expected Ethernet, found type %s; %s", name, kind, others())
	}
	return links[at], nil
}

// defaultNICs returns the interfaces of the default route with the lowest metric:
// several if the route has several nexthops (ip-route(8)). The first of equal
// routes counts, as in the kernel.
func defaultNICs(routes []netlink.Route) []int {
	var best *netlink.Route
	for i, r := range routes {
		if prefix(r.Dst).Bits() != 0 || r.Type != unix.RTN_UNICAST || r.Tos != 0 {
			continue
		}
		if best == nil || r.Priority < best.Priority {
			best = &routes[i]
		}
	}
	if best == nil {
		return nil
	}
	if len(best.MultiPath) == 0 {
		return []int{best.LinkIndex}
	}
	var nics []int
	for _, hop := range best.MultiPath {
		if !slices.Contains(nics, hop.LinkIndex) {
			nics = append(nics, hop.LinkIndex)
		}
	}
	return nics
}

// candidates returns the names of the interfaces that can be a parent, sorted.
// Most interfaces of a cluster's node are veth ends of pods. A veth that serves as
// a NIC, as in a node that is a container, has the address of a network.
func candidates(links []netlink.Link, addresses map[int][]netip.Prefix) []string {
	var names []string
	for _, l := range links {
		a := l.Attrs()
		network := slices.ContainsFunc(addresses[a.Index], func(p netip.Prefix) bool { return !p.IsSingleIP() })
		if a.EncapType == "ether" && a.MasterIndex == 0 && (l.Type() != "veth" || network) {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return names
}

func linkName(links []netlink.Link, index int) string {
	for _, l := range links {
		if l.Attrs().Index == index {
			return l.Attrs().Name
		}
	}
	return fmt.Sprintf("interface %d", index)
}

// Suits returns nil if a macvlan of p works for want. A macvlan and its parent's
// host cannot connect to each other in any mode, and neither an ARP request nor a
// probe reveals the reason.
func (p Parent) Suits(want plan.Network) error {
	for _, a := range p.Addresses {
		switch {
		case want.Sources.HaveGateway(a.Addr()):
			return macvlanError(wording.Textf("set %s to a router of the physical network, for example the host's own gateway (ip route show default)", wording.Gateway),
				"check gateway: %s is an address of the host's %q, which its macvlan cannot reach", a.Addr(), p.Name)
		case want.Sources.Have(a.Addr()):
			return macvlanError(wording.Textf("set %s to an address that no other host has", wording.Source),
				"check reserved address: %s is an address of the host's %q", a.Addr(), p.Name)
		}
	}
	return nil
}

// HasMacvlan reports whether the interface exists as m describes it. An interface
// that differs is an error. k is the pod's namespace, host the host's, and hostFd
// its descriptor.
func (k *Kernel) HasMacvlan(m plan.Macvlan, p Parent, host *Kernel, hostFd int) (bool, error) {
	l, err := k.linkByName(m.Interface)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("get interface %q: %w", m.Interface, err)
	}
	hostID, err := k.handle.GetNetNsIdByFd(hostFd)
	if err != nil {
		return false, fmt.Errorf("get ID of the host network namespace: %w", err)
	}
	if isMacvlan(l, m.Mode, p, hostID) {
		return true, nil
	}
	name := ""
	if a := l.Attrs(); a.NetNsID >= 0 && a.NetNsID == hostID {
		if below, err := dump(func() (netlink.Link, error) { return host.handle.LinkByIndex(a.ParentIndex) }); err == nil {
			name = below.Attrs().Name
		}
	}
	return false, macvlanError(
		wording.Textf("to keep the interface, unset %s; to replace it, delete it (ip link delete %s), or choose another name in %s", wording.MacvlanParent, m.Interface, wording.Interface),
		"create %q: expected a macvlan of the host's %q in mode %s, found %s", m.Interface, p.Name, m.Mode, describe(l, name))
}

// isMacvlan reports whether a link of the pod is a macvlan of p in the given mode.
// hostID is the ID of the host's namespace in the pod's; -1: none, and then no
// interface of the pod has a NIC of the host below it.
func isMacvlan(l netlink.Link, mode spec.MacvlanMode, p Parent, hostID int) bool {
	have, ok := l.(*netlink.Macvlan)
	if !ok || have.Mode != macvlanModes[mode] || have.ParentIndex != p.below.index {
		return false
	}
	if p.below.namespace >= 0 {
		// The parent is itself a macvlan of a NIC in a third namespace, which has
		// another ID in the pod. Any other namespace than the pod's must suffice.
		return have.NetNsID >= 0
	}
	return hostID >= 0 && have.NetNsID == hostID
}

// describe describes a link of the pod; below is the name of the host's NIC below
// it, or empty.
func describe(l netlink.Link, below string) string {
	m, ok := l.(*netlink.Macvlan)
	switch {
	case !ok:
		return "an interface of type " + l.Type()
	case below != "":
		return fmt.Sprintf("a macvlan of the host's %q in mode %s", below, modeName(m.Mode))
	case m.NetNsID < 0:
		return fmt.Sprintf("a macvlan of the pod's own interface %d in mode %s", m.ParentIndex, modeName(m.Mode))
	}
	return fmt.Sprintf("a macvlan of interface %d of a third network namespace in mode %s", m.ParentIndex, modeName(m.Mode))
}

// MacvlanGroup is the group (ip-link(8)) of a macvlan that is to have an alias, by which its
// owner knows it also if the creation ended before the alias: the kernel takes a group along
// with the creation, and an alias after it (rtnl_create_link in net/core/rtnetlink.c). Few
// programs use groups, and those count from 1.
const MacvlanGroup = 4711

// CreateMacvlan creates m from p in the namespace with the descriptor podFd. k is
// the host's. A single request creates it inside the pod, so the host's namespace
// never contains it, needs no cleanup, and may have an interface of the same name.
func (k *Kernel) CreateMacvlan(m plan.Macvlan, p Parent, podFd int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.MTU, attrs.Namespace = m.Interface, p.Index, cmp.Or(m.MTU, p.MTU), netlink.NsFd(podFd)
	attrs.HardwareAddr = m.MAC
	if m.Alias != "" {
		attrs.Group = MacvlanGroup
	}
	err := k.handle.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: macvlanModes[m.Mode]})
	if err != nil {
		return macvlanError(creationHint(m, p, err), "create %q, a macvlan of the host's %q in mode %s: %w", m.Interface, p.Name, m.Mode, err)
	}
	return nil
}

// creationHint returns the probable cause of the kernel's refusal of a macvlan
// (drivers/net/macvlan.c), if known.
func creationHint(m plan.Macvlan, p Parent, err error) wording.Text {
	switch {
	case errors.Is(err, unix.EBUSY) && p.master != "":
		return wording.Textf("%s is a port of %s, which takes its frames: set %s to the interface that has the host's address on that network, or to another NIC", p.Name, p.master, wording.MacvlanParent)
	case errors.Is(err, unix.EBUSY):
		return wording.Textf("another device takes the frames of %s, such as an ipvlan or a bridge: set %s to another NIC", p.Name, wording.MacvlanParent)
	case errors.Is(err, unix.EINVAL) && m.MTU > p.MTU:
		return wording.Textf("a macvlan has at most the MTU of its NIC, which is %d for %s: expected no more, found %d", p.MTU, p.Name, m.MTU)
	case errors.Is(err, unix.EINVAL) && m.Mode == "passthru":
		return wording.Textf("mode passthru allows one macvlan for each NIC, and %s has another", p.Name)
	case errors.Is(err, unix.EINVAL):
		return wording.Textf("mode passthru allows one macvlan for each NIC: %s may have one in that mode", p.Name)
	case errors.Is(err, unix.EOPNOTSUPP):
		return wording.Textf("the host's kernel lacks macvlan: load the module (modprobe macvlan), or install the package that contains it")
	case errors.Is(err, unix.EPERM):
		return wording.Textf(hostPrivilege)
	}
	return wording.Text{}
}

const hostPrivilege = "creating a macvlan of a host NIC requires privilege on the host: securityContext.privileged: true, without a user namespace of the pod's own"

// DeleteMacvlan reverts CreateMacvlan in the pod's namespace. It deletes an interface of no
// other kind.
func (k *Kernel) DeleteMacvlan(name string) error {
	l, err := k.linkByName(name)
	if err == nil && l.Type() != "macvlan" {
		err = fmt.Errorf("expected a macvlan, found type %q", l.Type())
	}
	if err == nil {
		err = k.handle.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("delete interface %q: %w", name, err)
	}
	return nil
}
