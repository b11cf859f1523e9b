package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
)

// build is New without the clean-up after an error.
func (l *Lab) build() error {
	handles := map[**netns.Namespace]*netlink.Handle{}
	defer func() {
		for _, h := range handles {
			h.Close()
		}
	}()
	for _, n := range []**netns.Namespace{&l.Client, &l.Far, &l.Router, &l.Node, &l.Outside} {
		var err error
		if *n, err = netns.New(); err != nil {
			return err
		}
		if err := (*n).Do(func() error { return kernelDefaults(l.IPv6) }); err != nil {
			return err
		}
		if handles[n], err = l.Netlink(*n); err != nil {
			return err
		}
		if err := setUp(handles[n], "lo"); err != nil {
			return err
		}
	}
	client, far, router, node, outside := handles[&l.Client], handles[&l.Far], handles[&l.Router], handles[&l.Node], handles[&l.Outside]
	if err := l.SetSysctl(l.Node, "net/ipv4/ip_forward", "1"); err != nil {
		return err
	}

	// The kernel numbers links from 1 in every namespace, and treats a link whose index
	// equals its peer's index as a link without a peer: it then reports the peer's
	// carrier up to a second late (net/core/link_watch.c, linkwatch_urgent_event).
	// Indexes from 101 differ from those of all peers.
	index := 100
	attrs := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		index++
		a.Index = index
		return a
	}

	bridge := &netlink.Bridge{LinkAttrs: attrs(Bridge)}
	if err := node.LinkAdd(bridge); err != nil {
		return fmt.Errorf("creating bridge %q: %w", Bridge, err)
	}
	veths := []struct {
		name, peer string
		ns         *netns.Namespace
		h          *netlink.Handle
		master     netlink.Link
	}{
		{ClientPort, ClientLink, l.Client, client, bridge},
		{FarPort, ClientLink, l.Far, far, nil},
		{RouterPort, l.ClusterName, l.Router, router, bridge},
		{NIC, LANLink, l.Outside, outside, nil},
	}
	for _, v := range veths {
		veth := netlink.NewVeth(attrs(v.name))
		veth.PeerName = v.peer
		veth.PeerNamespace = netlink.NsFd(v.ns.Fd())
		if err := node.LinkAdd(veth); err != nil {
			return fmt.Errorf("creating veth %q with peer %q: %w", v.name, v.peer, err)
		}
		if v.master != nil {
			if err := node.LinkSetMaster(veth, v.master); err != nil {
				return fmt.Errorf("adding %q to bridge %q: %w", v.name, Bridge, err)
			}
		}
		if err := setUp(v.h, v.peer); err != nil {
			return err
		}
		if err := setUp(node, v.name); err != nil {
			return err
		}
	}
	if err := setUp(node, Bridge); err != nil {
		return err
	}
	if l.IPv6 {
		if err := l.SetSysctl(l.Node, "net/ipv6/conf/all/forwarding", "1"); err != nil {
			return err
		}
		// The router's macvlan0 has the kernel's default.
		if err := l.SetSysctl(l.Router, "net/ipv6/conf/default/accept_dad", "1"); err != nil {
			return err
		}
	}
	if !l.NoMacvlan {
		parent, err := node.LinkByName(NIC)
		if err != nil {
			return fmt.Errorf("finding link %q: %w", NIC, err)
		}
		a := attrs(l.MacvlanName)
		a.ParentIndex = parent.Attrs().Index
		a.MTU = parent.Attrs().MTU
		a.Namespace = netlink.NsFd(l.Router.Fd())
		// Private, as in the original's documentation: macvlans of one parent cannot
		// reach each other.
		if err := node.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
			return fmt.Errorf("creating macvlan %q on %q: %w", l.MacvlanName, NIC, err)
		}
	}

	type address struct {
		h      *netlink.Handle
		link   string
		prefix netip.Prefix
	}
	addresses := []address{
		{client, ClientLink, netip.PrefixFrom(ClientAddr, Cluster.Bits())},
		{far, ClientLink, netip.PrefixFrom(FarAddr, FarCluster.Bits())},
		{node, FarPort, netip.PrefixFrom(FarGateway, FarCluster.Bits())},
		{router, l.ClusterName, netip.PrefixFrom(RouterAddr, Cluster.Bits())},
		{node, Bridge, netip.PrefixFrom(NodeAddr, Cluster.Bits())},
		{node, NIC, netip.PrefixFrom(NICAddr, LAN.Bits())},
		{outside, LANLink, netip.PrefixFrom(GatewayAddr, LAN.Bits())},
		{outside, LANLink, netip.PrefixFrom(LANServer, LAN.Bits())},
		{outside, "lo", netip.PrefixFrom(Remote[0], 32)},
		{outside, "lo", netip.PrefixFrom(Remote[1], 32)},
		{outside, "lo", netip.PrefixFrom(Remote[2], 32)},
	}
	type route struct {
		h    *netlink.Handle
		link string
		via  netip.Addr
	}
	routes := []route{
		{client, ClientLink, NodeAddr},
		{far, ClientLink, FarGateway},
		{router, l.ClusterName, NodeAddr},
		{node, NIC, GatewayAddr},
	}
	if l.IPv6 {
		addresses = append(addresses, []address{
			{client, ClientLink, netip.PrefixFrom(ClientAddr6, Cluster6.Bits())},
			{far, ClientLink, netip.PrefixFrom(FarAddr6, FarCluster6.Bits())},
			{node, FarPort, netip.PrefixFrom(FarGateway6, FarCluster6.Bits())},
			{router, l.ClusterName, netip.PrefixFrom(RouterAddr6, Cluster6.Bits())},
			{node, Bridge, netip.PrefixFrom(NodeAddr6, Cluster6.Bits())},
			{node, NIC, netip.PrefixFrom(NICAddr6, LAN6.Bits())},
			{outside, LANLink, netip.PrefixFrom(GatewayAddr6, LAN6.Bits())},
			{outside, LANLink, netip.PrefixFrom(GatewayLinkLocal, 64)},
			{outside, LANLink, netip.PrefixFrom(LANServer6, LAN6.Bits())},
			{outside, "lo", netip.PrefixFrom(Remote6[0], 128)},
			{outside, "lo", netip.PrefixFrom(Remote6[1], 128)},
			{outside, "lo", netip.PrefixFrom(Remote6[2], 128)},
		}...)
		routes = append(routes, []route{
			{client, ClientLink, NodeAddr6},
			{far, ClientLink, FarGateway6},
			{router, l.ClusterName, NodeAddr6},
			{node, NIC, GatewayAddr6},
		}...)
	}
	for _, a := range addresses {
		if err := addAddr(a.h, a.link, a.prefix); err != nil {
			return err
		}
	}
	for _, r := range routes {
		if err := addDefault(r.h, r.link, r.via); err != nil {
			return err
		}
	}

	if err := awaitUp(node, Bridge); err != nil {
		return err
	}
	for _, v := range veths {
		if err := awaitUp(node, v.name); err != nil {
			return err
		}
		if err := awaitUp(v.h, v.peer); err != nil {
			return err
		}
	}
	for _, a := range addresses {
		if err := awaitAddr(a.h, a.link, a.prefix.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// kernelDefaults sets the kernel's own defaults in the current namespace. A new namespace
// starts with the machine's IPv4 settings (net.core.devconf_inherit_init_net), and a
// machine that runs containers forwards. Without IPv6 captures contain no neighbour
// discovery. With it, addresses are valid at once (RFC 4862, section 5.4: duplicate address
// detection takes a second).
func kernelDefaults(ipv6 bool) error {
	if err := setSysctl("net/ipv4/ip_forward", "0"); err != nil {
		return err
	}
	for _, scope := range []string{"all", "default"} {
		for _, key := range []string{
			"rp_filter", "arp_accept", "arp_announce", "arp_filter", "arp_ignore", "arp_notify",
			"accept_local", "route_localnet", "src_valid_mark",
		} {
			if err := setSysctl("net/ipv4/conf/"+scope+"/"+key, "0"); err != nil {
				return err
			}
		}
		off := "1"
		if ipv6 {
			off = "0"
			if err := setSysctl("net/ipv6/conf/"+scope+"/accept_dad", "0"); err != nil {
				return err
			}
		}
		err := setSysctl("net/ipv6/conf/"+scope+"/disable_ipv6", off)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	return nil
}

func setSysctl(key, value string) error {
	// os.WriteFile would try to create a file that does not exist.
	f, err := os.OpenFile("/proc/sys/"+key, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("setting sysctl %q: %w", key, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("setting sysctl %q to %q: %w", key, value, err)
	}
	return nil
}

func setUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting link %q up: %w", name, err)
	}
	return nil
}

func addAddr(h *netlink.Handle, name string, prefix netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", name, err)
	}
	ipNet := &net.IPNet{
		IP:   prefix.Addr().AsSlice(),
		Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
	}
	if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet}); err != nil {
		return fmt.Errorf("adding address %q to link %q: %w", prefix, name, err)
	}
	return nil
}

func addDefault(h *netlink.Handle, name string, via netip.Addr) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", name, err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("adding default route via %q on link %q: %w", via, name, err)
	}
	return nil
}

// awaitAddr waits until an address can be used. The kernel completes those of IPv6 in a
// work item of its own (net/ipv6/addrconf.c, addrconf_dad_work).
func awaitAddr(h *netlink.Handle, name string, addr netip.Addr) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", name, err)
	}
	if addr.Is4() {
		return nil
	}
	for end := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		list, err := h.AddrList(link, netlink.FAMILY_V6)
		if err == nil && slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IP.Equal(addr.AsSlice()) && a.Flags&unix.IFA_F_TENTATIVE == 0 }) {
			return nil
		}
		if err == nil {
			err = errors.New("not valid")
		}
		if time.Now().After(end) {
			return fmt.Errorf("waiting for address %q of link %q for %s: %w", addr, name, Patience, err)
		}
	}
}

// awaitUp waits until a link passes frames. The kernel sets the flag IFF_UP at once,
// and starts the link's queue in a work item of its own (net/core/link_watch.c).
func awaitUp(h *netlink.Handle, name string) error {
	for end := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("finding link %q: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("waiting for link %q: operational state %s after %s, want up", name, link.Attrs().OperState, Patience)
		}
	}
}
