package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/sysctl"
)

// overhead is the length of the headers in front of a packet in the tunnel, in bytes: IPv4,
// UDP, VXLAN (RFC 7348, section 5) and Ethernet.
const overhead = 20 + 8 + 8 + 14

// tunnelAddress is the address of the tunnel's interface (RFC 3927), which no packet has: an
// interface without one takes packets only if they come by the route to their source
// (net/ipv4/fib_frontend.c, __fib_validate_source).
var tunnelAddress = netip.MustParsePrefix("169.254.94.68/32")

// The priorities of the routing rules of a tunnel. Packets that the holder sends back have the
// address as their destination, which is a local one, too: the rules for them are first, before
// the one for the table of local addresses, which gets the next priority. Packets for the holder
// are routed behind that, before replies.
const (
	backPriority  = 0
	localPriority = 1
	steerPriority = 19990
)

// carrySysctls are the settings of the tunnel's interface. Packets of other routers have a
// local address as their source, and come from anywhere (ip-sysctl.rst).
func carrySysctls(name string) []struct {
	name, value string
	optional    bool
} {
	conf := "net/ipv4/conf/" + name + "/"
	return []struct {
		name, value string
		optional    bool
	}{
		{conf + "accept_local", "1", false},
		{conf + "rp_filter", "2", false},
		{conf + "accept_redirects", "0", true},
		{conf + "send_redirects", "0", true},
		{"net/ipv6/conf/" + name + "/disable_ipv6", "1", true}, // without IPv6, the sysctl is missing
	}
}

// CarryMTU returns the largest packet that fits into the tunnel, in bytes.
func (k *Kernel) CarryMTU(c plan.Carry) (int, error) {
	l, err := k.find(c.Cluster)
	if err != nil {
		return 0, err
	}
	return l.Attrs().MTU - overhead, nil
}

// CarryDiffers returns the differences of the kernel from a tunnel, one line each.
func (k *Kernel) CarryDiffers(c plan.Carry) (found []string, err error) {
	say := func(format string, args ...any) { found = append(found, "tunnel: "+fmt.Sprintf(format, args...)) }
	mtu, err := k.CarryMTU(c)
	if err != nil {
		return nil, err
	}
	l, err := k.find(c.Interface)
	if _, missing := errors.AsType[*MissingError](err); missing {
		return []string{"tunnel: missing"}, nil
	}
	if err != nil {
		return nil, err
	}
	if !isTunnel(l, c) {
		return []string{"tunnel: another kind of link"}, nil
	}
	if l.Attrs().MTU != mtu || l.Attrs().Flags&net.FlagUp == 0 {
		say("down, or another MTU than %d", mtu)
	}
	for _, s := range carrySysctls(c.Interface) {
		if value, err := sysctl.Read(s.name); !s.optional && (err != nil || value != s.value) {
			say("%s is %q", s.name, value)
		}
	}
	addresses, err := k.addresses(netlink.FAMILY_V4, l)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %q: %w", c.Interface, err)
	}
	if len(addresses) != 1 || prefix(addresses[0].IPNet) != tunnelAddress {
		say("another address than %s", tunnelAddress)
	}
	peers, err := k.tunnelPeers(l.Attrs().Index)
	if err != nil {
		return nil, err
	}
	if want := peerAddresses(c); !slices.Equal(peers, want) {
		say("leads to %v instead of %v", peers, want)
	}
	routes, err := k.tunnelRoutes(c)
	if err != nil {
		return nil, err
	}
	for table, want := range tunnelTables(c) {
		if routes[table] != want {
			say("table %d leads to %q instead of %q", table, text(routes[table]), text(want))
		}
	}
	_, _, right, err := k.tunnelRules(c)
	if err != nil {
		return nil, err
	}
	if !right {
		say("other routing rules")
	}
	return found, nil
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// isTunnel reports whether a link is the tunnel, apart from what can be changed.
func isTunnel(l netlink.Link, c plan.Carry) bool {
	v, is := l.(*netlink.Vxlan)
	mac := plan.HardwareAddress(c.Own)
	return is && v.VxlanId == plan.VNI && v.Port == int(c.UDP) && !v.Learning && !v.FlowBased && v.SrcAddr.Equal(c.Own.AsSlice()) && len(v.Group) == 0 &&
		slices.Equal(v.HardwareAddr, mac[:])
}

// peerAddresses returns the addresses of the peers, sorted.
func peerAddresses(c plan.Carry) (all []netip.Addr) {
	for _, p := range c.Peers {
		all = append(all, p.Address)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// tunnelPeers returns the sorted addresses to which the tunnel leads: those of neighbours whose
// hardware address leads there.
func (k *Kernel) tunnelPeers(index int) (peers []netip.Addr, err error) {
	neighbours, err := k.neighbours(index, false)
	if err != nil {
		return nil, fmt.Errorf("list neighbours of the tunnel: %w", err)
	}
	forward, err := k.forwarding(index)
	if err != nil {
		return nil, err
	}
	for _, n := range neighbours {
		a := addressOf(n.IP)
		mac := [6]byte{}
		copy(mac[:], n.HardwareAddr)
		if n.State&netlink.NUD_PERMANENT == 0 || !a.Is4() || mac != plan.HardwareAddress(a) {
			continue
		}
		if slices.ContainsFunc(forward, func(f netlink.Neigh) bool { return slices.Equal(f.HardwareAddr, mac[:]) && f.IP.Equal(n.IP) }) {
			peers = append(peers, a)
		}
	}
	if len(forward) != len(peers) {
		peers = append(peers, netip.IPv4Unspecified()) // another program's entry
	}
	slices.SortFunc(peers, netip.Addr.Compare)
	return peers, nil
}

// forwarding lists where the tunnel sends frames, by their hardware addresses.
func (k *Kernel) forwarding(index int) ([]netlink.Neigh, error) {
	found, err := k.forwardings(index)
	if err != nil {
		return nil, fmt.Errorf("list forwarding of the tunnel: %w", err)
	}
	return found, nil
}

// tunnelTables returns the gateways of the routing tables, by their numbers; the zero Addr: the
// table is empty.
func tunnelTables(c plan.Carry) map[int]netip.Addr {
	tables := map[int]netip.Addr{c.Table: c.Toward}
	for i := range spec.MostCarryPeers {
		tables[c.Table+1+i] = netip.Addr{}
		if i < len(c.Peers) {
			tables[c.Table+1+i] = c.Peers[i].Address
		}
	}
	return tables
}

// tunnelRoutes returns the gateways that the kernel's tables have.
func (k *Kernel) tunnelRoutes(c plan.Carry) (map[int]netip.Addr, error) {
	found := make(map[int]netip.Addr)
	routes, err := k.routesOf(netlink.FAMILY_V4, unix.RT_TABLE_UNSPEC) // all tables
	if err != nil {
		return nil, fmt.Errorf("list routes of the tunnel: %w", err)
	}
	for _, r := range routes {
		if r.Table >= c.Table && r.Table <= c.Table+spec.MostCarryPeers {
			found[r.Table] = addressOf(r.Gw)
		}
	}
	return found, nil
}

// tunnelRules returns the routing rules of a tunnel that are missing and those that are too
// many, and whether all are in their order.
func (k *Kernel) tunnelRules(c plan.Carry) (missing, extra []netlink.Rule, right bool, err error) {
	have, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return nil, nil, false, fmt.Errorf("list routing rules: %w", err)
	}
	mask := uint32(plan.CarryMask)
	marked := func(priority int, arrival string, mark uint32, table int) netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Mark, r.Mask, r.Table = netlink.FAMILY_V4, priority, arrival, mark, &mask, table
		return *r
	}
	want := []netlink.Rule{marked(steerPriority, c.Cluster, plan.SteerMark, c.Table)}
	for i := range c.Peers {
		want = append(want, marked(backPriority, c.Egress, c.Mark(i), c.Table+1+i))
	}
	same := func(a, b netlink.Rule) bool {
		return max(a.Priority, 0) == max(b.Priority, 0) && a.IifName == b.IifName && a.Mark == b.Mark && a.Mask != nil && b.Mask != nil && *a.Mask == *b.Mask && a.Table == b.Table
	}
	local := false
	first := false
	for _, r := range have {
		switch {
		case leads(r, c.Table) || ofTunnel(r):
			if !slices.ContainsFunc(want, func(w netlink.Rule) bool { return same(r, w) }) {
				extra = append(extra, r)
			}
		case isLocal(r):
			local = local || r.Priority == localPriority
			first = first || r.Priority <= backPriority
		}
	}
	for _, w := range want {
		if !slices.ContainsFunc(have, func(r netlink.Rule) bool { return same(r, w) }) {
			missing = append(missing, w)
		}
	}
	return missing, extra, local && !first && len(missing) == 0 && len(extra) == 0, nil
}

// leads reports whether a routing rule selects one of the tables of a tunnel.
func leads(r netlink.Rule, table int) bool {
	return r.Table >= table && r.Table <= table+spec.MostCarryPeers
}

// ofTunnel reports whether a routing rule is one of a tunnel with any tables, of which an earlier run
// may have had others: it has the priority and the mark of such a rule.
func ofTunnel(r netlink.Rule) bool {
	if r.Mask == nil || *r.Mask != uint32(plan.CarryMask) || r.Mark&^uint32(plan.CarryMask) != 0 {
		return false
	}
	switch max(r.Priority, 0) {
	case backPriority:
		return r.Mark != 0 && r.Mark != plan.SteerMark
	case steerPriority:
		return r.Mark == plan.SteerMark
	}
	return false
}

// isLocal reports whether a rule selects the table of local addresses for every packet.
func isLocal(r netlink.Rule) bool {
	return r.Table == unix.RT_TABLE_LOCAL && r.Mark == 0 && r.IifName == "" && r.OifName == "" && r.Src == nil && r.Dst == nil
}

func localRule(priority int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = netlink.FAMILY_V4, priority, unix.RT_TABLE_LOCAL
	return r
}

// moveLocal moves the rule for the table of local addresses, of which there is one at any time.
func (k *Kernel) moveLocal(to int) error {
	have, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	there := func(r netlink.Rule) bool { return isLocal(r) && max(r.Priority, 0) == to }
	if !slices.ContainsFunc(have, there) {
		if err := k.handle.RuleAdd(localRule(to)); err != nil {
			return fmt.Errorf("add routing rule for local addresses: %w", err)
		}
	}
	for _, r := range have {
		if isLocal(r) && !there(r) && (r.Priority <= backPriority || r.Priority == localPriority) {
			if err := k.handle.RuleDel(localRule(max(r.Priority, 0))); err != nil {
				return fmt.Errorf("delete routing rule for local addresses: %w", err)
			}
		}
	}
	return nil
}

// LoadCarry sets a tunnel up, or changes it to what it shall be.
func (k *Kernel) LoadCarry(c plan.Carry) error {
	mtu, err := k.CarryMTU(c)
	if err != nil {
		return err
	}
	l, err := k.tunnel(c, mtu)
	if err != nil {
		return err
	}
	index := l.Attrs().Index
	for _, s := range carrySysctls(c.Interface) {
		if value, err := sysctl.Read(s.name); err == nil && value == s.value {
			continue
		}
		if err := sysctl.Write(s.name, s.value); err != nil && !s.optional {
			return fmt.Errorf("set sysctl %s = %s: %w", s.name, s.value, err)
		}
	}
	addresses, err := k.addresses(netlink.FAMILY_V4, l)
	if err != nil {
		return fmt.Errorf("list addresses of %q: %w", c.Interface, err)
	}
	// A change without need would wake the reconcile loop, again and again if the rest fails.
	there := false
	for _, a := range addresses {
		if prefix(a.IPNet) == tunnelAddress {
			there = true
		} else if err := k.handle.AddrDel(l, &a); err != nil {
			return fmt.Errorf("delete address %s of %q: %w", a.IPNet, c.Interface, err)
		}
	}
	if !there {
		if err := k.handle.AddrAdd(l, &netlink.Addr{IPNet: ipNet(tunnelAddress), Broadcast: net.IPv4zero}); err != nil {
			return fmt.Errorf("add address %s to %q: %w", tunnelAddress, c.Interface, err)
		}
	}
	if l.Attrs().MTU != mtu {
		if err := k.handle.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set MTU of %q to %d: %w", c.Interface, mtu, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := k.handle.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %q up: %w", c.Interface, err)
		}
	}
	if err := k.reachPeers(c, index); err != nil {
		return err
	}
	routes, err := k.tunnelRoutes(c)
	if err != nil {
		return err
	}
	for table, toward := range tunnelTables(c) {
		if routes[table] == toward {
			continue
		}
		if err := k.lead(index, table, toward); err != nil {
			return err
		}
	}
	missing, extra, _, err := k.tunnelRules(c)
	if err != nil {
		return err
	}
	for _, r := range extra {
		if err := k.handle.RuleDel(&r); err != nil {
			return fmt.Errorf("delete routing rule of the tunnel: %w", err)
		}
		if leads(r, c.Table) {
			continue
		}
		if err := k.lead(index, r.Table, netip.Addr{}); err != nil { // of an earlier run
			return err
		}
	}
	for _, r := range missing {
		if err := k.handle.RuleAdd(&r); err != nil {
			return fmt.Errorf("add routing rule of the tunnel: %w", err)
		}
	}
	return k.moveLocal(localPriority)
}

// tunnel returns the tunnel's link, which it creates if it is missing or of another kind.
func (k *Kernel) tunnel(c plan.Carry, mtu int) (netlink.Link, error) {
	l, err := k.find(c.Interface)
	if err == nil && isTunnel(l, c) {
		return l, nil
	}
	if err == nil {
		if err := k.handle.LinkDel(l); err != nil {
			return nil, fmt.Errorf("delete link %q: %w", c.Interface, err)
		}
	} else if _, missing := errors.AsType[*MissingError](err); !missing {
		return nil, err
	}
	a := netlink.NewLinkAttrs()
	mac := plan.HardwareAddress(c.Own)
	a.Name, a.MTU, a.HardwareAddr = c.Interface, mtu, mac[:]
	v := &netlink.Vxlan{LinkAttrs: a, VxlanId: plan.VNI, SrcAddr: c.Own.AsSlice(), Port: int(c.UDP), UDPCSum: true}
	if err := k.handle.LinkAdd(v); err != nil {
		return nil, fmt.Errorf("create VXLAN link %q: %w", c.Interface, err)
	}
	return k.find(c.Interface)
}

// reachPeers makes the peers neighbours in the tunnel, and no others.
func (k *Kernel) reachPeers(c plan.Carry, index int) error {
	neighbours, err := k.neighbours(index, false)
	if err != nil {
		return fmt.Errorf("list neighbours of the tunnel: %w", err)
	}
	forward, err := k.forwarding(index)
	if err != nil {
		return err
	}
	want := peerAddresses(c)
	for _, n := range slices.Concat(neighbours, forward) {
		if slices.Contains(want, addressOf(n.IP)) || n.State&netlink.NUD_PERMANENT == 0 {
			continue
		}
		if err := k.handle.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete neighbour %s of the tunnel: %w", n.IP, err)
		}
	}
	for _, a := range want {
		mac := plan.HardwareAddress(a)
		for _, n := range []netlink.Neigh{
			{LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac[:]},
			{LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: a.AsSlice(), HardwareAddr: mac[:]},
		} {
			if err := k.handle.NeighSet(&n); err != nil {
				return fmt.Errorf("set neighbour %s of the tunnel: %w", a, err)
			}
		}
	}
	return nil
}

// lead makes a routing table lead to a peer, or empties it.
func (k *Kernel) lead(index, table int, to netip.Addr) error {
	route := &netlink.Route{LinkIndex: index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Table: table}
	if !to.IsValid() {
		if err := k.handle.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete the route of table %d: %w", table, err)
		}
		return nil
	}
	route.Gw, route.Flags = to.AsSlice(), unix.RTNH_F_ONLINK
	if err := k.handle.RouteReplace(route); err != nil {
		return fmt.Errorf("lead table %d to %s: %w", table, to, err)
	}
	return nil
}

// Carried are the counters of a tunnel, since it was set up.
type Carried struct{ SentPackets, SentBytes, ReceivedPackets, ReceivedBytes uint64 }

// Carried returns the counters of a tunnel with a name; zero: there is none. Bytes include the IP
// header, and no header of Ethernet or VXLAN (net/ipv4/ip_tunnel_core.c, iptunnel_xmit;
// drivers/net/vxlan/vxlan_core.c, vxlan_rcv).
func (k *Kernel) Carried(name string) (c Carried, err error) {
	l, err := k.find(name)
	if _, missing := errors.AsType[*MissingError](err); missing {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if s := l.Attrs().Statistics; s != nil {
		c = Carried{s.TxPackets, s.TxBytes, s.RxPackets, s.RxBytes}
	}
	return c, nil
}

// HasCarry reports whether the tunnel's link is there, up, and no routing rule leads to other tables
// than its own.
func (k *Kernel) HasCarry(c plan.Carry) (bool, error) {
	l, err := k.find(c.Interface)
	if _, missing := errors.AsType[*MissingError](err); missing {
		return false, nil
	}
	if err != nil || !isTunnel(l, c) || l.Attrs().Flags&net.FlagUp == 0 {
		return false, err
	}
	have, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return false, fmt.Errorf("list routing rules: %w", err)
	}
	return !slices.ContainsFunc(have, func(r netlink.Rule) bool { return ofTunnel(r) && !leads(r, c.Table) }), nil
}

// Steer makes the packets for the holder go to another router. It is LoadCarry for what changes
// while connections wait for it, and does nothing before the tunnel is there.
func (k *Kernel) Steer(c plan.Carry) error {
	l, err := k.find(c.Interface)
	if _, missing := errors.AsType[*MissingError](err); missing || err == nil && !isTunnel(l, c) {
		return nil
	}
	if err != nil {
		return err
	}
	return k.lead(l.Attrs().Index, c.Table, c.Toward)
}

// CarryLeft reports whether any part of a tunnel is there: its link, or one of its routing rules, with
// any tables. Its routes go with the link.
func (k *Kernel) CarryLeft(name string) (bool, error) {
	l, err := k.find(name)
	if _, missing := errors.AsType[*MissingError](err); err != nil && !missing {
		return false, err
	}
	if err == nil && isVXLAN(l) {
		return true, nil
	}
	have, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return false, fmt.Errorf("list routing rules: %w", err)
	}
	return slices.ContainsFunc(have, ofTunnel), nil
}

// isVXLAN reports whether a link is a tunnel of some router of this program.
func isVXLAN(l netlink.Link) bool {
	v, is := l.(*netlink.Vxlan)
	return is && v.VxlanId == plan.VNI && v.Port == int(spec.CarryPort)
}

// RemoveCarry removes a tunnel with a first routing table, its routes and its routing rules, and those
// of an earlier run with other tables. A link of another kind with its name stays.
func (k *Kernel) RemoveCarry(name string, table int) error {
	if err := k.moveLocal(backPriority); err != nil {
		return err
	}
	have, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range have {
		if !leads(r, table) && !ofTunnel(r) {
			continue
		}
		if err := k.handle.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete routing rule of the tunnel: %w", err)
		}
	}
	l, err := k.find(name)
	if _, missing := errors.AsType[*MissingError](err); missing {
		return nil
	}
	if err != nil || !isVXLAN(l) {
		return err
	}
	if err := k.handle.LinkDel(l); err != nil {
		return fmt.Errorf("delete link %q: %w", name, err)
	}
	return nil
}

// addressOf returns an address of netlink; the zero Addr: there is none.
func addressOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
