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

// A builder makes the parts of a lab.
type builder struct {
	*Lab
	client, far, router, node, outside *netlink.Handle

	index     int // of the last link
	veths     []veth
	addresses []address
	routes    []route
}

// A veth is a pair of links, of which one is in the node.
type veth struct {
	name, peer string
	ns         *netns.Namespace
	h          *netlink.Handle // of ns
	bridged    bool
}

// An address is one of a link.
type address struct {
	h      *netlink.Handle
	link   string
	prefix netip.Prefix
}

// A route is the default route of a link's namespace.
type route struct {
	h    *netlink.Handle
	link string
	via  netip.Addr
}

// build is New without the clean-up after an error.
func (l *Lab) build() error {
	// The kernel numbers links from 1 in every namespace, and treats a link whose index
	// equals its peer's index as a link without a peer: it then reports the peer's
	// carrier up to a second late (net/core/link_watch.c, linkwatch_urgent_event).
	// Indexes from 101 differ from those of all peers.
	b := &builder{Lab: l, index: 100}
	defer b.close()
	for _, step := range []func() error{b.makeNamespaces, b.makeLinks, b.makeMacvlan, b.configure, b.await} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) close() {
	for _, h := range []*netlink.Handle{b.client, b.far, b.router, b.node, b.outside} {
		if h != nil {
			h.Close()
		}
	}
}

func (b *builder) makeNamespaces() error {
	for _, n := range []struct {
		ns     **netns.Namespace
		handle **netlink.Handle
	}{{&b.Client, &b.client}, {&b.Far, &b.far}, {&b.Router, &b.router}, {&b.Node, &b.node}, {&b.Outside, &b.outside}} {
		var err error
		if *n.ns, err = netns.New(); err != nil {
			return err
		}
		if err := (*n.ns).Do(func() error { return kernelDefaults(b.IPv6) }); err != nil {
			return err
		}
		if *n.handle, err = b.Netlink(*n.ns); err != nil {
			return err
		}
		if err := setUp(*n.handle, "lo"); err != nil {
			return err
		}
	}
	if err := b.SetSysctl(b.Node, "net/ipv4/ip_forward", "1"); err != nil || !b.IPv6 {
		return err
	}
	return b.SetSysctl(b.Node, "net/ipv6/conf/all/forwarding", "1")
}

// attrs returns the attributes of a new link.
func (b *builder) attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	b.index++
	a.Name, a.Index = name, b.index
	return a
}

func (b *builder) makeLinks() error {
	bridge := &netlink.Bridge{LinkAttrs: b.attrs(Bridge)}
	if err := b.node.LinkAdd(bridge); err != nil {
		return fmt.Errorf("creating bridge %q: %w", Bridge, err)
	}
	b.veths = []veth{
		{ClientPort, ClientLink, b.Client, b.client, true},
		{FarPort, ClientLink, b.Far, b.far, false},
		{RouterPort, b.ClusterName, b.Router, b.router, true},
		{NIC, LANLink, b.Outside, b.outside, false},
	}
	for _, v := range b.veths {
		veth := netlink.NewVeth(b.attrs(v.name))
		veth.PeerName = v.peer
		veth.PeerNamespace = netlink.NsFd(v.ns.Fd())
		if err := b.node.LinkAdd(veth); err != nil {
			return fmt.Errorf("creating veth %q with peer %q: %w", v.name, v.peer, err)
		}
		if v.bridged {
			if err := b.node.LinkSetMaster(veth, bridge); err != nil {
				return fmt.Errorf("adding %q to bridge %q: %w", v.name, Bridge, err)
			}
		}
		if err := setUp(v.h, v.peer); err != nil {
			return err
		}
		if err := setUp(b.node, v.name); err != nil {
			return err
		}
	}
	return setUp(b.node, Bridge)
}

func (b *builder) makeMacvlan() error {
	if b.IPv6 { // the router's macvlan0 has the kernel's default
		if err := b.SetSysctl(b.Router, "net/ipv6/conf/default/accept_dad", "1"); err != nil {
			return err
		}
	}
	if b.NoMacvlan {
		return nil
	}
	parent, err := b.node.LinkByName(NIC)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", NIC, err)
	}
	a := b.attrs(b.MacvlanName)
	a.ParentIndex = parent.Attrs().Index
	a.MTU = parent.Attrs().MTU
	a.Namespace = netlink.NsFd(b.Router.Fd())
	// Private, as in the original's documentation: macvlans of one parent cannot
	// reach each other.
	if err := b.node.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_PRIVATE}); err != nil {
		return fmt.Errorf("creating macvlan %q on %q: %w", b.MacvlanName, NIC, err)
	}
	return nil
}

// configure adds the addresses and the default routes.
func (b *builder) configure() error {
	b.addresses = []address{
		{b.client, ClientLink, netip.PrefixFrom(ClientAddr, Cluster.Bits())},
		{b.far, ClientLink, netip.PrefixFrom(FarAddr, FarCluster.Bits())},
		{b.node, FarPort, netip.PrefixFrom(FarGateway, FarCluster.Bits())},
		{b.router, b.ClusterName, netip.PrefixFrom(RouterAddr, Cluster.Bits())},
		{b.node, Bridge, netip.PrefixFrom(NodeAddr, Cluster.Bits())},
		{b.node, NIC, netip.PrefixFrom(NICAddr, LAN.Bits())},
		{b.outside, LANLink, netip.PrefixFrom(GatewayAddr, LAN.Bits())},
		{b.outside, LANLink, netip.PrefixFrom(LANServer, LAN.Bits())},
		{b.outside, "lo", netip.PrefixFrom(Remote[0], 32)},
		{b.outside, "lo", netip.PrefixFrom(Remote[1], 32)},
		{b.outside, "lo", netip.PrefixFrom(Remote[2], 32)},
	}
	b.routes = []route{
		{b.client, ClientLink, NodeAddr},
		{b.far, ClientLink, FarGateway},
		{b.router, b.ClusterName, NodeAddr},
		{b.node, NIC, GatewayAddr},
	}
	if b.IPv6 {
		b.addIPv6()
	}
	for _, a := range b.addresses {
		if err := addAddr(a.h, a.link, a.prefix); err != nil {
			return err
		}
	}
	for _, r := range b.routes {
		if err := addDefault(r.h, r.link, r.via); err != nil {
			return err
		}
	}
	return nil
}

// addIPv6 adds what configure adds of IPv6.
func (b *builder) addIPv6() {
	b.addresses = append(b.addresses, []address{
		{b.client, ClientLink, netip.PrefixFrom(ClientAddr6, Cluster6.Bits())},
		{b.far, ClientLink, netip.PrefixFrom(FarAddr6, FarCluster6.Bits())},
		{b.node, FarPort, netip.PrefixFrom(FarGateway6, FarCluster6.Bits())},
		{b.router, b.ClusterName, netip.PrefixFrom(RouterAddr6, Cluster6.Bits())},
		{b.node, Bridge, netip.PrefixFrom(NodeAddr6, Cluster6.Bits())},
		{b.node, NIC, netip.PrefixFrom(NICAddr6, LAN6.Bits())},
		{b.outside, LANLink, netip.PrefixFrom(GatewayAddr6, LAN6.Bits())},
		{b.outside, LANLink, netip.PrefixFrom(GatewayLinkLocal, 64)},
		{b.outside, LANLink, netip.PrefixFrom(LANServer6, LAN6.Bits())},
		{b.outside, "lo", netip.PrefixFrom(Remote6[0], 128)},
		{b.outside, "lo", netip.PrefixFrom(Remote6[1], 128)},
		{b.outside, "lo", netip.PrefixFrom(Remote6[2], 128)},
	}...)
	b.routes = append(b.routes, []route{
		{b.client, ClientLink, NodeAddr6},
		{b.far, ClientLink, FarGateway6},
		{b.router, b.ClusterName, NodeAddr6},
		{b.node, NIC, GatewayAddr6},
	}...)
}

// await waits until the links are up, and the addresses usable.
func (b *builder) await() error {
	if err := awaitUp(b.node, Bridge); err != nil {
		return err
	}
	for _, v := range b.veths {
		if err := awaitUp(b.node, v.name); err != nil {
			return err
		}
		if err := awaitUp(v.h, v.peer); err != nil {
			return err
		}
	}
	for _, a := range b.addresses {
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
