package link

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
)

// FindNIC returns the NIC of the host on the network of an address: the only one with an
// address of its own in that network, otherwise that of the default route. k is the
// host's namespace.
func (k *Kernel) FindNIC(a netip.Addr) (string, error) {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	links, err := k.links()
	if err != nil {
		return "", fmt.Errorf("list host interfaces: %w", err)
	}
	list, err := k.addresses(family, nil)
	if err != nil {
		return "", fmt.Errorf("list host addresses: %w", err)
	}
	routes, err := k.routesOf(family, unix.RT_TABLE_MAIN)
	if err != nil {
		return "", fmt.Errorf("list host routes: %w", err)
	}
	var on []string
	for _, l := range links {
		near := func(own netlink.Addr) bool {
			p := prefix(own.IPNet)
			return own.LinkIndex == l.Attrs().Index && !p.IsSingleIP() && p.Contains(a)
		}
		if l.Attrs().EncapType == "ether" && slices.ContainsFunc(list, near) {
			on = append(on, l.Attrs().Name)
		}
	}
	if len(on) == 1 {
		return on[0], nil
	}
	var standard []string
	for _, index := range defaultNICs(routes) {
		standard = append(standard, linkName(links, index))
	}
	if len(standard) == 1 && (len(on) == 0 || slices.Contains(on, standard[0])) {
		return standard[0], nil
	}
	found := "no NIC has an address in its network"
	if len(on) > 0 {
		found = "NICs with an address in its network: " + strings.Join(on, ", ")
	}
	if len(standard) == 0 {
		found += "; there is no default route"
	} else {
		found += "; NICs of the default route: " + strings.Join(standard, ", ")
	}
	return "", macvlanError(wording.Textf("set %s to the NIC of the node on the network of %s", wording.MacvlanParent, wording.Source),
		"find macvlan parent for %s: %s", a, found)
}

// DefaultGateway returns the gateway of the host's default route of a family by a NIC, the
// zero Addr if there is none. k is the host's namespace.
func (k *Kernel) DefaultGateway(nic string, ipv6 bool) (netip.Addr, error) {
	family := netlink.FAMILY_V4
	if ipv6 {
		family = netlink.FAMILY_V6
	}
	l, err := k.find(nic)
	if err != nil {
		return netip.Addr{}, err
	}
	routes, err := k.table(family, unix.RT_TABLE_MAIN, map[int]string{})
	if err != nil {
		return netip.Addr{}, err
	}
	var gateway netip.Addr
	metric := 0
	for _, r := range routes {
		if r.Index == l.Attrs().Index && r.IsDefault() && r.Type == 0 && r.Gateway.IsValid() && (!gateway.IsValid() || r.Metric < metric) {
			gateway, metric = r.Gateway, r.Metric
		}
	}
	return gateway, nil
}

// ClusterInterface returns the interface by which clients connect to a pod: eth0, as
// container runtimes name it, otherwise that of the default route, or of the routes in the
// table of replies after a router has replaced it, otherwise the only one besides the egress
// interface and lo. The error is a *MissingError.
func (k *Kernel) ClusterInterface(egress string, table int) (string, error) {
	const usual = "eth0"
	links, err := k.links()
	if err != nil {
		return "", fmt.Errorf("list interfaces: %w", err)
	}
	names := make(map[int]string)
	var others []string
	for _, l := range links {
		if a := l.Attrs(); a.Name != egress && a.Flags&net.FlagLoopback == 0 {
			names[a.Index], others = a.Name, append(others, a.Name)
		}
	}
	if slices.Contains(others, usual) && egress != usual {
		return usual, nil
	}
	for _, t := range []int{unix.RT_TABLE_MAIN, table} {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := k.routesOf(family, t)
			if err != nil {
				return "", fmt.Errorf("list routes: %w", err)
			}
			for _, index := range defaultNICs(routes) {
				if name, other := names[index]; other {
					return name, nil
				}
			}
		}
	}
	if len(others) == 1 {
		return others[0], nil
	}
	slices.Sort(others)
	return "", &MissingError{Interface: usual, Present: others}
}

// SetAlias sets the alias of an interface (ip-link(8)); empty: none.
func (k *Kernel) SetAlias(name, alias string) error {
	l, err := k.find(name)
	if err == nil {
		err = k.handle.LinkSetAlias(l, alias)
	}
	if err != nil {
		return fmt.Errorf("set alias of %q: %w", name, err)
	}
	return nil
}

// Addresses returns the addresses of an interface, of both families.
func (k *Kernel) Addresses(name string) ([]netip.Prefix, error) {
	l, err := k.find(name)
	if err != nil {
		return nil, err
	}
	return k.prefixes(netlink.FAMILY_ALL, l)
}

// ParentIndex returns the index of the NIC that a macvlan on an interface of this namespace
// has below it: the kernel puts one on a macvlan beside that (macvlan.c, macvlan_common_newlink).
func (k *Kernel) ParentIndex(name string) (int, error) {
	l, err := k.find(name)
	if err != nil {
		return 0, err
	}
	if l.Type() == "macvlan" {
		return l.Attrs().ParentIndex, nil
	}
	return l.Attrs().Index, nil
}

// An Interface is what is known of an interface by its name.
type Interface struct {
	Name    string
	MAC     net.HardwareAddr
	MTU     int // in bytes
	Alias   string
	Macvlan bool
	Marked  bool // it is in MacvlanGroup
	Parent  int  // index of the NIC below a macvlan, in the namespace of that; 0: it is none
}

// Interfaces returns the interfaces of the namespace.
func (k *Kernel) Interfaces() ([]Interface, error) {
	links, err := k.links()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var found []Interface
	for _, l := range links {
		a := l.Attrs()
		i := Interface{Name: a.Name, MAC: a.HardwareAddr, MTU: a.MTU, Alias: a.Alias, Macvlan: l.Type() == "macvlan", Marked: a.Group == MacvlanGroup}
		if i.Macvlan {
			i.Parent = a.ParentIndex
		}
		found = append(found, i)
	}
	return found, nil
}
