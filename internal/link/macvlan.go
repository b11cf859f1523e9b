package link

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Macvlan is the egress interface where the router makes it itself, in
// place of a CNI plugin or a container engine: a macvlan of a NIC that is in
// the network namespace of the host.
type Macvlan struct {
	Interface string // its name in the pod
	Parent    string // NIC of the host; empty: that of its IPv4 default route
	Mode      string // as ip-link(8) has it: private, bridge, vepa or passthru
	HostNetns string // file of the host's network namespace
}

// String returns the making of m as a sentence in the imperative, without a
// full stop.
func (m Macvlan) String() string {
	nic := "the NIC of the host's IPv4 default route"
	if m.Parent != "" {
		nic = "the host's " + m.Parent
	}
	return fmt.Sprintf("create %s, a macvlan of %s in mode %s, with its MTU", m.Interface, nic, m.Mode)
}

// macvlanModes are the modes that a macvlan can have. Source is in none of our
// variables; it is here to be named.
var macvlanModes = map[string]netlink.MacvlanMode{
	"private":  netlink.MACVLAN_MODE_PRIVATE,
	"bridge":   netlink.MACVLAN_MODE_BRIDGE,
	"vepa":     netlink.MACVLAN_MODE_VEPA,
	"passthru": netlink.MACVLAN_MODE_PASSTHRU,
	"source":   netlink.MACVLAN_MODE_SOURCE,
}

func modeName(mode netlink.MacvlanMode) string {
	for name, m := range macvlanModes {
		if m == mode {
			return name
		}
	}
	return fmt.Sprintf("number %d", mode)
}

// A MacvlanError says why the egress interface cannot be made.
type MacvlanError struct {
	Err  error
	hint string
}

func (e *MacvlanError) Error() string { return e.Err.Error() }

// Unwrap returns what was found.
func (e *MacvlanError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *MacvlanError) Hint() string { return e.hint }

func macvlanError(hint, format string, args ...any) *MacvlanError {
	return &MacvlanError{fmt.Errorf(format, args...), hint}
}

// A Parent is the NIC that a macvlan is made of.
type Parent struct {
	Name  string
	Index int // in the host's namespace
	MTU   int // bytes
	// Addresses are the NIC's own, IPv4, each as a prefix of one address. A
	// macvlan cannot reach them: what it sends goes out by the NIC and is not
	// seen by the host that the NIC belongs to, and the other way round.
	Addresses []netip.Prefix

	// below is the NIC that the kernel takes in its place.
	below lowerLink
	// master is the interface that takes all of its frames, or empty.
	master string
}

// A lowerLink is an interface that a macvlan stands on.
type lowerLink struct {
	index int
	// namespace is the number of its namespace in the one it is seen from
	// (RTM_GETNSID); -1: the same one.
	namespace int
}

// FindParent finds the parent of m. k is the host's namespace.
//
// Of a parent that is a macvlan itself the kernel takes the NIC below for the
// new one (macvlan_common_newlink in drivers/net/macvlan.c), so the two are
// siblings.
func (k *Kernel) FindParent(m Macvlan) (Parent, error) {
	links, err := k.links()
	if err != nil {
		return Parent{}, fmt.Errorf("list host interfaces: %w", err)
	}
	routes, err := k.routesOf(unix.RT_TABLE_MAIN)
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
	list, err := k.addresses(nil)
	if err != nil {
		return nil, fmt.Errorf("list host addresses: %w", err)
	}
	addresses := map[int][]netip.Prefix{}
	for _, a := range list {
		addresses[a.LinkIndex] = append(addresses[a.LinkIndex], prefix(a.IPNet))
	}
	return addresses, nil
}

const parentHint = "set EGRESS_MACVLAN_PARENT to a NIC of the host, or to true for the NIC of the host's IPv4 default route"

// chooseParent returns the NIC called name, or, if that is empty, the one of
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
			return nil, macvlanError("set EGRESS_MACVLAN_PARENT to a NIC of the host, or check that EGRESS_HOST_NETNS is the host's namespace",
				"find macvlan parent: the host has no IPv4 default route in its main table; %s", others())
		case len(nics) > 1:
			return nil, macvlanError("set EGRESS_MACVLAN_PARENT to the NIC on the network of EGRESS_GATEWAY",
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
	// macvlan_port_create in drivers/net/macvlan.c.
	if kind := links[at].Attrs().EncapType; kind != "ether" {
		return nil, macvlanError(parentHint, "find macvlan parent: the host's %q: expected Ethernet, found type %s; %s", name, kind, others())
	}
	return links[at], nil
}

// defaultNICs returns the interfaces by which the default route with the lowest
// metric leaves: more than one if it is of several paths (ip-route(8),
// nexthop). Of equal routes the first one counts, as it does for the kernel.
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
// On a node of a cluster most interfaces are one end of a veth to a pod; one
// that stands for a NIC, as in a node that is a container, has the address of a
// network.
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

// Suits returns nil where a macvlan of p can do what want says. Connections
// between a macvlan and the host of its parent do not come about, whatever the
// mode, and neither an ARP request nor a probe shows why.
func (p Parent) Suits(want Want) error {
	for _, a := range p.Addresses {
		switch a.Addr() {
		case want.Gateway:
			return macvlanError("set EGRESS_GATEWAY to a router of the physical network, for example the host's own gateway (ip route show default)",
				"check EGRESS_GATEWAY: %s is an address of the host's %q, which its macvlan cannot reach", want.Gateway, p.Name)
		case want.Address.Addr():
			return macvlanError("set EGRESS_SOURCE to an address that no other host has",
				"check EGRESS_SOURCE: %s is an address of the host's %q", want.Address.Addr(), p.Name)
		}
	}
	return nil
}

// HasMacvlan reports whether the interface is there as m wants it. One that is
// there and differs is an error. k is the pod's namespace, host the host's, of
// which hostFd is a descriptor.
func (k *Kernel) HasMacvlan(m Macvlan, p Parent, host *Kernel, hostFd int) (bool, error) {
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
		fmt.Sprintf("to keep the interface, unset EGRESS_MACVLAN_PARENT; to replace it, delete it (ip link delete %s), or choose another name in EGRESS_INTERFACE", m.Interface),
		"create %q: expected a macvlan of the host's %q in mode %s, found %s", m.Interface, p.Name, m.Mode, describe(l, name))
}

// isMacvlan reports whether a link of the pod is a macvlan of p in the given
// mode. hostID is the number of the host's namespace in the pod's, -1 where it
// has none: then nothing in the pod stands on a NIC of the host.
func isMacvlan(l netlink.Link, mode string, p Parent, hostID int) bool {
	have, ok := l.(*netlink.Macvlan)
	if !ok || have.Mode != macvlanModes[mode] || have.ParentIndex != p.below.index {
		return false
	}
	if p.below.namespace >= 0 {
		// The parent is itself a macvlan of a NIC in a third namespace, whose
		// number is another one here: that it is not this one has to do.
		return have.NetNsID >= 0
	}
	return hostID >= 0 && have.NetNsID == hostID
}

// describe says what a link of the pod is; below is the name of the host's NIC
// that it stands on, or empty.
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

// CreateMacvlan makes m from p in the namespace that podFd is a descriptor of.
// k is the host's. One request does it: the interface is never in the host's
// namespace, so nothing has to be removed there, and a name that is taken there
// does not matter.
func (k *Kernel) CreateMacvlan(m Macvlan, p Parent, podFd int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.MTU, attrs.Namespace = m.Interface, p.Index, p.MTU, netlink.NsFd(podFd)
	err := k.handle.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: macvlanModes[m.Mode]})
	if err != nil {
		return macvlanError(creationHint(m, p, err), "create %q, a macvlan of the host's %q in mode %s: %w", m.Interface, p.Name, m.Mode, err)
	}
	return nil
}

// creationHint says what the kernel's refusal of a macvlan stands for
// (drivers/net/macvlan.c), as far as it is known.
func creationHint(m Macvlan, p Parent, err error) string {
	switch {
	case errors.Is(err, unix.EBUSY) && p.master != "":
		return fmt.Sprintf("%s is a port of %s, which takes its frames: set EGRESS_MACVLAN_PARENT to the interface that has the host's address on that network, or to another NIC", p.Name, p.master)
	case errors.Is(err, unix.EBUSY):
		return fmt.Sprintf("another device takes the frames of %s, such as an ipvlan or a bridge: set EGRESS_MACVLAN_PARENT to another NIC", p.Name)
	case errors.Is(err, unix.EINVAL) && m.Mode == "passthru":
		return fmt.Sprintf("mode passthru allows one macvlan for each NIC, and %s has another", p.Name)
	case errors.Is(err, unix.EINVAL):
		return fmt.Sprintf("mode passthru allows one macvlan for each NIC: %s may have one in that mode", p.Name)
	case errors.Is(err, unix.EOPNOTSUPP):
		return "the host's kernel lacks macvlan: load the module (modprobe macvlan), or install the package that contains it"
	case errors.Is(err, unix.EPERM):
		return hostPrivilege
	}
	return ""
}

const hostPrivilege = "creating a macvlan of a host NIC requires privilege on the host: securityContext.privileged: true, without a user namespace of the pod's own"

// DeleteMacvlan takes CreateMacvlan back. k is the pod's namespace.
func (k *Kernel) DeleteMacvlan(m Macvlan) error {
	l, err := k.linkByName(m.Interface)
	if err == nil {
		err = k.handle.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("delete interface %q: %w", m.Interface, err)
	}
	return nil
}
