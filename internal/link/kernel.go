// Package link is the adapter to the kernel's links, addresses, routes, routing rules and
// sysctls: it observes their state (Kernel.Observe) and takes the changes of a plan
// (Kernel.Do).
package link

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/sysctl"
)

// A Kernel observes and changes the network namespace in which it was opened. Its
// sysctls are those of the calling thread's namespace.
type Kernel struct {
	handle *netlink.Handle
}

// Open returns the Kernel of the calling thread's network namespace.
func Open() (*Kernel, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	return &Kernel{handle}, nil
}

// Close closes the socket.
func (k *Kernel) Close() { k.handle.Close() }

// A MissingError reports that an interface does not exist.
type MissingError struct {
	Interface string
	Present   []string // existing interfaces without lo, sorted
}

func (e *MissingError) Error() string {
	present := "lo only"
	if len(e.Present) > 0 {
		present = strings.Join(e.Present, ", ")
	}
	return fmt.Sprintf("interface %q not found; interfaces: %s", e.Interface, present)
}

// Exists returns nil if the interface exists, otherwise a *MissingError.
func (k *Kernel) Exists(name string) error {
	_, err := k.find(name)
	return err
}

func (k *Kernel) find(name string) (netlink.Link, error) {
	l, err := k.linkByName(name)
	// The kernel also finds an interface by its alternative names (ip-link(8),
	// altname), which rules and sysctls do not accept.
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing || err == nil && l.Attrs().Name != name {
		e := &MissingError{Interface: name}
		links, err := k.links()
		if err != nil {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if a := l.Attrs(); a.Flags&net.FlagLoopback == 0 {
				e.Present = append(e.Present, a.Name)
			}
		}
		slices.Sort(e.Present)
		return nil, e
	}
	if err != nil {
		return nil, fmt.Errorf("get interface %q: %w", name, err)
	}
	return l, nil
}

// Observe returns the state for want. A missing egress interface is a
// *MissingError, with the state of the rest; a missing cluster interface is no error.
func (k *Kernel) Observe(want plan.Network) (plan.State, error) {
	const attempts = 20
	for attempt := 1; ; attempt++ {
		s, err := k.observe(want)
		// An interface may disappear between two calls. The next attempt does not find
		// it, or finds another one of that name.
		if gone := errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO); !gone || attempt == attempts {
			return s, err
		}
	}
}

func (k *Kernel) observe(want plan.Network) (plan.State, error) {
	var s plan.State
	l, missing := k.find(want.Interface)
	if _, is := errors.AsType[*MissingError](missing); missing != nil && !is {
		return s, missing
	}
	var err error
	if s.Sysctls, err = readSysctls(want.Sysctls(), func(name string) string {
		if missing == nil {
			return name
		}
		// An interface begins with these values (ip-sysctl.rst, conf/default).
		return strings.Replace(name, "/conf/"+want.Interface+"/", "/conf/default/", 1)
	}); err != nil {
		return s, err
	}
	names := make(map[int]string)
	var interfaces []string
	if missing == nil {
		if err := k.observeEgress(&s, l, want); err != nil {
			return plan.State{}, err
		}
		names[s.Index], interfaces = want.Interface, append(interfaces, want.Interface)
	}
	if s.Routes, err = k.table(netlink.FAMILY_V4, unix.RT_TABLE_MAIN, names); err != nil {
		return plan.State{}, err
	}
	if s.Forwards, err = isOn(plan.IPForward); err != nil {
		return plan.State{}, err
	}
	rules, err := k.rules(netlink.FAMILY_V4)
	if err != nil {
		return plan.State{}, fmt.Errorf("list routing rules: %w", err)
	}
	s.Lost = lost(rules, false)
	if want.Cluster.Interface != "" {
		if s.Cluster, err = k.observeCluster(netlink.FAMILY_V4, want.Cluster, names, rules); err != nil {
			return plan.State{}, err
		}
		if s.Cluster.Index != 0 {
			interfaces = append(interfaces, want.Cluster.Interface)
		}
	}
	if six, err := k.hasIPv6(want); err != nil {
		return plan.State{}, err
	} else if six {
		if err := k.observeIPv6(&s, l, want, names); err != nil {
			return plan.State{}, err
		}
	}
	for _, name := range interfaces {
		on, err := isOn(plan.ForwardingOf(name))
		if err != nil {
			return plan.State{}, err
		}
		s.Forwarding = append(s.Forwarding, plan.InterfaceForwarding{Interface: name, On: on})
	}
	return s, missing
}

// hasIPv6 reports whether there is an IPv6 source, or, by the routing rules of replies, one
// of an earlier configuration.
func (k *Kernel) hasIPv6(want plan.Network) (bool, error) {
	if len(want.Sources.Of(true)) > 0 {
		return true, nil
	}
	if want.Cluster.Interface == "" || !HasIPv6() {
		return false, nil
	}
	rules, err := k.rules(netlink.FAMILY_V6)
	if err != nil {
		return false, fmt.Errorf("list IPv6 routing rules: %w", err)
	}
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Table == want.Cluster.Table }), nil
}

// observeEgress reads the state of the egress interface.
func (k *Kernel) observeEgress(s *plan.State, l netlink.Link, want plan.Network) (err error) {
	attrs := l.Attrs()
	s.Index, s.MAC = attrs.Index, attrs.HardwareAddr
	s.Up = attrs.Flags&net.FlagUp != 0
	s.Carrier = attrs.RawFlags&unix.IFF_LOWER_UP != 0
	s.NoARP = attrs.RawFlags&unix.IFF_NOARP != 0
	if s.Addresses, err = k.prefixes(netlink.FAMILY_V4, l); err != nil {
		return err
	}
	if s.Promotes, err = isOn(plan.PromoteSecondaries(want.Interface)); err != nil {
		return err
	}
	if _, hasIPv6 := s.Sysctls[plan.AcceptRA(want.Interface)]; hasIPv6 {
		return k.observeAdvertised(s, l)
	}
	return nil
}

// observeIPv6 reads the state of IPv6. The egress interface is nil if it is missing.
func (k *Kernel) observeIPv6(s *plan.State, egress netlink.Link, want plan.Network, names map[int]string) (err error) {
	if !HasIPv6() {
		return errors.New("read the state of IPv6: the kernel has no IPv6, and there is an IPv6 source")
	}
	s.IPv6 = &plan.IPv6State{}
	if s.Index != 0 {
		addresses, err := k.addressesIPv6(egress)
		if err != nil {
			return fmt.Errorf("list IPv6 addresses of %q: %w", want.Interface, err)
		}
		for _, a := range addresses {
			p := prefix(a.IPNet)
			switch s.Addresses = append(s.Addresses, p); {
			case a.Flags&unix.IFA_F_DADFAILED != 0:
				s.IPv6.Duplicate = append(s.IPv6.Duplicate, p.Addr())
			case a.Flags&unix.IFA_F_TENTATIVE != 0:
				s.IPv6.Tentative = append(s.IPv6.Tentative, p.Addr())
			}
		}
	}
	if s.IPv6.Routes, err = k.table(netlink.FAMILY_V6, unix.RT_TABLE_MAIN, names); err != nil {
		return err
	}
	if s.IPv6.Forwards, err = isOn(plan.IPv6Forward); err != nil {
		return err
	}
	rules, err := k.rules(netlink.FAMILY_V6)
	if err != nil {
		return fmt.Errorf("list IPv6 routing rules: %w", err)
	}
	s.Lost = append(s.Lost, lost(rules, true)...)
	if want.Cluster.Interface != "" {
		s.IPv6.Cluster, err = k.observeCluster(netlink.FAMILY_V6, want.Cluster, names, rules)
	}
	return err
}

// observeCluster returns the state of one family of the cluster side, the zero State if its
// interface does not exist.
func (k *Kernel) observeCluster(family int, want plan.ClusterSide, names map[int]string, rules []netlink.Rule) (plan.ClusterState, error) {
	l, err := k.find(want.Interface)
	if _, missing := errors.AsType[*MissingError](err); missing {
		return plan.ClusterState{}, nil
	}
	if err != nil {
		return plan.ClusterState{}, err
	}
	s := plan.ClusterState{Index: l.Attrs().Index}
	prefixes, err := k.prefixes(family, l)
	if err != nil {
		return plan.ClusterState{}, err
	}
	for _, p := range prefixes { // an address may have several lengths
		if p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
			continue // every interface has the routes to its peers
		}
		if !slices.Contains(s.Addresses, p.Addr()) {
			s.Addresses = append(s.Addresses, p.Addr())
		}
	}
	if s.Table, err = k.table(family, want.Table, names); err != nil {
		return plan.ClusterState{}, err
	}
	for _, r := range rules {
		if r.Table == want.Table {
			s.Rules = append(s.Rules, rule(r))
		}
	}
	return s, nil
}

// lost returns those of the kernel's own routing rules (ip-rule(8)) for the tables of
// local addresses and for the main table that are missing: no rule selects the table
// for every packet. A program may have moved one to another priority.
func lost(rules []netlink.Rule, ipv6 bool) []plan.Rule {
	every := *netlink.NewRule()
	var missing []plan.Rule
	for _, own := range []plan.Rule{{IPv6: ipv6, Priority: 0, Table: unix.RT_TABLE_LOCAL}, {IPv6: ipv6, Priority: plan.MainPriority, Table: unix.RT_TABLE_MAIN}} {
		if !slices.ContainsFunc(rules, func(r netlink.Rule) bool {
			table := r.Table
			r.Priority, r.Table, r.Family, r.Protocol = every.Priority, every.Table, every.Family, every.Protocol
			return table == own.Table && r == every
		}) {
			missing = append(missing, own)
		}
	}
	return missing
}

// observeAdvertised finds what the kernel took from router advertisements before
// accept_ra was off.
//
// Their addresses have a lifetime, which others of an administrator's have not
// (net/ipv6/addrconf.c). Their routes have a protocol of their own, except one to a
// prefix on the link, which the kernel also adds for each permanent address.
func (k *Kernel) observeAdvertised(s *plan.State, l netlink.Link) error {
	name := l.Attrs().Name
	// The routes first: one that is added with an address between the two lists must not
	// appear without it.
	routes, err := k.routesIPv6()
	if err != nil {
		return fmt.Errorf("list IPv6 routes: %w", err)
	}
	addresses, err := k.addressesIPv6(l)
	if err != nil {
		return fmt.Errorf("list IPv6 addresses of %q: %w", name, err)
	}
	own := map[netip.Prefix]bool{linkLocal: true, multicast: true}
	for _, a := range addresses {
		p := prefix(a.IPNet)
		if a.Flags&unix.IFA_F_PERMANENT != 0 || p.Addr().IsLinkLocalUnicast() {
			own[p.Masked()] = true
			if a.Peer != nil { // netlink has the length with it
				peer := prefix(a.Peer)
				own[netip.PrefixFrom(p.Addr(), peer.Bits()).Masked()] = true
				own[netip.PrefixFrom(peer.Addr(), peer.Addr().BitLen())] = true
			}
			continue
		}
		s.Advertised = append(s.Advertised, plan.Advertised{Prefix: p, Kernel: a})
	}
	names := map[int]string{s.Index: name}
	for _, r := range routes {
		if r.LinkIndex != s.Index || r.Dst == nil {
			continue
		}
		if r.Protocol == unix.RTPROT_RA || r.Protocol == unix.RTPROT_KERNEL && r.Type == unix.RTN_UNICAST && !own[prefix(r.Dst)] {
			s.AdvertisedRoutes = append(s.AdvertisedRoutes, k.route(r, names))
		}
	}
	return nil
}

// The destinations of the kernel's own routes of every interface with IPv6 (RFC 4291).
var (
	linkLocal = netip.MustParsePrefix("fe80::/64")
	multicast = netip.MustParsePrefix("ff00::/8")
)

// prefixes returns the addresses of one family of an interface.
func (k *Kernel) prefixes(family int, l netlink.Link) ([]netip.Prefix, error) {
	addresses, err := k.addresses(family, l)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %q: %w", l.Attrs().Name, err)
	}
	var found []netip.Prefix
	for _, a := range addresses {
		found = append(found, prefix(a.IPNet))
	}
	return found, nil
}

// table returns the routes of one family in one table.
func (k *Kernel) table(family, number int, names map[int]string) ([]plan.Route, error) {
	routes, err := k.routesOf(family, number)
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", number, err)
	}
	var found []plan.Route
	for _, r := range routes {
		found = append(found, k.route(r, names))
	}
	return found, nil
}

// protocol marks the routes that keep destinations on the cluster side
// (rtnetlink(7), rtm_protocol). iproute2's rt_protos does not list its number.
const protocol netlink.RouteProtocol = 233

// route converts a listed route and keeps the original for a complete restore.
// names caches the names of interfaces.
func (k *Kernel) route(r netlink.Route, names map[int]string) plan.Route {
	name, known := names[r.LinkIndex]
	if !known && r.LinkIndex != 0 {
		// The name is only for logs, so an error leaves it empty.
		if l, err := dump(func() (netlink.Link, error) { return k.handle.LinkByIndex(r.LinkIndex) }); err == nil {
			name = l.Attrs().Name
		}
		names[r.LinkIndex] = name
	}
	source, _ := netip.AddrFromSlice(r.Src)
	gateway, _ := netip.AddrFromSlice(r.Gw)
	kind, table := r.Type, r.Table
	if kind == unix.RTN_UNICAST {
		kind = 0
	}
	if table == unix.RT_TABLE_MAIN {
		table = 0
	}
	destination := prefix(r.Dst)
	if r.Dst == nil && r.Family == netlink.FAMILY_V6 {
		destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	index := r.LinkIndex
	if kind != 0 && destination.Addr().Is6() {
		index, name = 0, "" // the kernel lists lo for one that rejects packets
	}
	if index == 0 && len(r.MultiPath) > 0 {
		index = r.MultiPath[0].LinkIndex
		for _, hop := range r.MultiPath {
			if hop.LinkIndex != index {
				index = 0
				break
			}
		}
	}
	return plan.Route{
		Table:       table,
		Destination: destination,
		Gateway:     gateway.Unmap(),
		Index:       index,
		Interface:   name,
		Source:      source.Unmap(),
		Metric:      r.Priority,
		Scope:       plan.Scope(r.Scope),
		TOS:         r.Tos,
		Type:        kind,
		Kept:        r.Protocol == protocol,
		Kernel:      listedRoute(r),
	}
}

// A listedRoute is a route as netlink lists it.
type listedRoute netlink.Route

// By returns the part of a route that leads by one interface.
func (l listedRoute) By(r plan.Route, index int) (plan.Route, bool) {
	other := func(hop *netlink.NexthopInfo) bool { return hop.LinkIndex != index }
	l.MultiPath = slices.DeleteFunc(slices.Clone(l.MultiPath), other)
	switch len(l.MultiPath) {
	case 0:
		return r, false
	case 1:
		hop := l.MultiPath[0]
		l.MultiPath, l.Gw, l.Via, l.LinkIndex, l.Flags = nil, hop.Gw, hop.Via, index, hop.Flags
		gateway, _ := netip.AddrFromSlice(hop.Gw)
		r.Gateway = gateway.Unmap()
	}
	r.Index, r.Kernel = index, l
	return r, true
}

// prefix converts a network; nil stands for all destinations of IPv4.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Do takes one step. Repeating a step is an error, except for setting a link up or
// down, writing a sysctl, replacing a route and deleting what was advertised.
func (k *Kernel) Do(s plan.Change) error {
	if err := k.do(s); err != nil {
		if s.Value == "1" && (s.Sysctl == plan.IPForward || s.Sysctl == plan.IPv6Forward || strings.HasSuffix(s.Sysctl, "/forwarding")) {
			return &ForwardingError{s.Sysctl, err}
		}
		return fmt.Errorf("%s: %w", s, err)
	}
	return nil
}

func (k *Kernel) do(s plan.Change) error {
	iface := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: s.Index, Name: s.Interface}}
	// A broadcast address of 0.0.0.0 keeps netlink from computing one: the
	// original set none.
	address := &netlink.Addr{Broadcast: net.IPv4zero}
	if s.Address.IsValid() {
		address.IPNet = ipNet(s.Address)
	}
	switch s.Op {
	case plan.AddAddress:
		if listed, ok := s.Kernel.(netlink.Addr); ok {
			return k.handle.AddrAdd(iface, &netlink.Addr{IPNet: listed.IPNet, Flags: unix.IFA_F_NOPREFIXROUTE, ValidLft: listed.ValidLft, PreferedLft: listed.PreferedLft})
		}
		if s.Shared {
			address.Flags |= unix.IFA_F_NODAD // ip-address(8), nodad: of IPv6
		}
		return k.handle.AddrAdd(iface, address)
	case plan.RemoveAddress:
		err := k.handle.AddrDel(iface, address)
		if s.Kernel != nil && errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil // the kernel deletes advertised ones too, a temporary one with its origin
		}
		return err
	case plan.SetUp:
		return k.handle.LinkSetUp(iface)
	case plan.SetDown:
		return k.handle.LinkSetDown(iface)
	case plan.ReplaceRoute:
		return k.handle.RouteReplace(kernelRoute(s.Route))
	case plan.AppendRoute:
		return k.handle.RouteAppend(kernelRoute(s.Route))
	case plan.DeleteRoute:
		route := kernelRoute(s.Route)
		err := k.handle.RouteDel(route)
		if errors.Is(err, unix.ESRCH) {
			// A route with a nexthop object is listed with the object's gateway and
			// interface, but does not match them on deletion.
			err = k.handle.RouteDel(&netlink.Route{
				Dst: route.Dst, Priority: route.Priority, Tos: route.Tos, Table: route.Table, Type: route.Type, Scope: netlink.SCOPE_NOWHERE,
			})
		}
		if errors.Is(err, unix.ESRCH) && s.Route.Destination.Addr().Is6() {
			return nil // an advertised one, whose time is over
		}
		return err
	case plan.AddRule:
		return k.handle.RuleAdd(kernelRule(s.Rule))
	case plan.DeleteRule:
		return k.handle.RuleDel(kernelRule(s.Rule))
	case plan.WriteSysctl:
		if s.Sysctl == plan.IPForward {
			return writeForward(s.Value)
		}
		return sysctl.Write(s.Sysctl, s.Value)
	}
	return fmt.Errorf("unknown step %d", s.Op)
}

// kernelRoute returns netlink's form of a route: the listed form, if any, with the
// destination, source, metric and table of r.
func kernelRoute(r plan.Route) *netlink.Route {
	route := netlink.Route{
		Gw:        r.Gateway.AsSlice(),
		LinkIndex: r.Index,
		Scope:     netlink.Scope(r.Scope),
		Type:      cmp.Or(r.Type, unix.RTN_UNICAST),
	}
	if listed, ok := r.Kernel.(listedRoute); ok {
		route = netlink.Route(listed)
	}
	route.Dst = ipNet(r.Destination)
	route.Src = r.Source.AsSlice()
	route.Priority = r.Metric
	route.Table = cmp.Or(r.Table, unix.RT_TABLE_MAIN)
	if r.Kept {
		route.Protocol = protocol
	}
	// The kernel reports other flags too, but rejects them in requests
	// (fib_create_info in net/ipv4/fib_semantics.c).
	const settable = unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE
	route.Flags &= settable
	route.MultiPath = slices.Clone(route.MultiPath)
	for i, hop := range route.MultiPath {
		h := *hop
		h.Flags &= settable
		route.MultiPath[i] = &h
	}
	return &route
}

// rule converts a listed routing rule and keeps the original.
func rule(r netlink.Rule) plan.Rule {
	found := plan.Rule{IPv6: r.Family == netlink.FAMILY_V6, Priority: r.Priority, Mark: r.Mark, Arrival: r.IifName, Table: r.Table, Kernel: r}
	if r.Mask != nil {
		found.Mask = *r.Mask
	}
	if r.Src != nil {
		found.Source = prefix(r.Src)
	}
	return found
}

func kernelRule(r plan.Rule) *netlink.Rule {
	if listed, ok := r.Kernel.(netlink.Rule); ok {
		return &listed
	}
	k := netlink.NewRule()
	if k.Family = netlink.FAMILY_V4; r.IPv6 {
		k.Family = netlink.FAMILY_V6
	}
	k.IifName = r.Arrival
	k.Priority, k.Table = r.Priority, r.Table
	if r.Mark != 0 {
		k.Mark, k.Mask = r.Mark, &r.Mask
	}
	if r.Source.IsValid() {
		k.Src = ipNet(r.Source)
	}
	return k
}
