package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Kernel observes and changes the network namespace that it was opened in.
// Its sysctls are those of the calling thread's namespace.
type Kernel struct {
	handle *netlink.Handle
}

// Open returns the Kernel of the calling thread's network namespace.
func Open() (*Kernel, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return &Kernel{handle}, nil
}

// Close gives the socket back.
func (k *Kernel) Close() { k.handle.Close() }

// A MissingError says that an interface is not there.
type MissingError struct {
	Interface string
	Present   []string // the interfaces that are there, without lo, sorted
}

func (e *MissingError) Error() string {
	present := "none but lo"
	if len(e.Present) > 0 {
		present = strings.Join(e.Present, ", ")
	}
	return fmt.Sprintf("interface %q not found; there are: %s", e.Interface, present)
}

// Exists returns nil where the interface is there, else a *MissingError.
func (k *Kernel) Exists(name string) error {
	_, err := k.find(name)
	return err
}

func (k *Kernel) find(name string) (netlink.Link, error) {
	l, err := k.linkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		e := &MissingError{Interface: name}
		links, err := k.links()
		if err != nil {
			return nil, fmt.Errorf("listing interfaces: %w", err)
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
		return nil, fmt.Errorf("looking up interface %q: %w", name, err)
	}
	return l, nil
}

// Observe returns the state of the interface called name, of the main routing
// table and of the sysctls. An interface that is not there is a *MissingError.
func (k *Kernel) Observe(name string) (State, error) {
	l, err := k.find(name)
	if err != nil {
		return State{}, err
	}
	attrs := l.Attrs()
	s := State{
		Index:   attrs.Index,
		Up:      attrs.Flags&net.FlagUp != 0,
		Carrier: attrs.RawFlags&unix.IFF_LOWER_UP != 0,
		NoARP:   attrs.RawFlags&unix.IFF_NOARP != 0,
		MAC:     attrs.HardwareAddr,
	}
	addresses, err := k.addresses(l)
	if err != nil {
		return State{}, fmt.Errorf("listing the addresses of %q: %w", name, err)
	}
	for _, a := range addresses {
		s.Addresses = append(s.Addresses, prefix(a.IPNet))
	}
	routes, err := k.mainRoutes()
	if err != nil {
		return State{}, fmt.Errorf("listing the routes of the main table: %w", err)
	}
	names := map[int]string{attrs.Index: name}
	for _, r := range routes {
		s.Routes = append(s.Routes, k.route(r, names))
	}
	forwards, err := readSysctl(ipForward)
	if err != nil {
		return State{}, err
	}
	s.Forwards = forwards != "0"
	promotes, err := readSysctl(promoteSecondaries(name))
	if err != nil {
		return State{}, err
	}
	s.Promotes = promotes != "0"
	return s, nil
}

// route converts a listed route and keeps the original to put it back whole.
// names holds the interface names that are known already.
func (k *Kernel) route(r netlink.Route, names map[int]string) Route {
	name, known := names[r.LinkIndex]
	if !known && r.LinkIndex != 0 {
		// A name for a person: where there is none, the route has none.
		if l, err := dump(func() (netlink.Link, error) { return k.handle.LinkByIndex(r.LinkIndex) }); err == nil {
			name = l.Attrs().Name
		}
		names[r.LinkIndex] = name
	}
	source, _ := netip.AddrFromSlice(r.Src)
	gateway, _ := netip.AddrFromSlice(r.Gw)
	return Route{
		Destination: prefix(r.Dst),
		Gateway:     gateway.Unmap(),
		Index:       r.LinkIndex,
		Interface:   name,
		Source:      source.Unmap(),
		Metric:      r.Priority,
		Scope:       Scope(r.Scope),
		TOS:         r.Tos,
		Special:     r.Type != unix.RTN_UNICAST,
		kernel:      r,
	}
}

// prefix converts an IPv4 network; nil is every destination.
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

// Do takes one step. Taking a step that is taken already is an error, except
// for setting a link up or down and for writing a sysctl.
func (k *Kernel) Do(s Step) error {
	if err := k.do(s); err != nil {
		if s.Sysctl == ipForward {
			return &ForwardingError{err}
		}
		return fmt.Errorf("trying to %s: %w", s, err)
	}
	return nil
}

func (k *Kernel) do(s Step) error {
	iface := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: s.Index, Name: s.Interface}}
	// A broadcast address of 0.0.0.0 keeps netlink from making one up: the
	// original set none.
	address := &netlink.Addr{Broadcast: net.IPv4zero}
	if s.Address.IsValid() {
		address.IPNet = ipNet(s.Address)
	}
	switch s.Op {
	case AddAddress:
		return k.handle.AddrAdd(iface, address)
	case RemoveAddress:
		return k.handle.AddrDel(iface, address)
	case SetUp:
		return k.handle.LinkSetUp(iface)
	case SetDown:
		return k.handle.LinkSetDown(iface)
	case ReplaceRoute:
		return k.handle.RouteReplace(kernelRoute(s.Route))
	case AppendRoute:
		return k.handle.RouteAppend(kernelRoute(s.Route))
	case DeleteRoute:
		return k.handle.RouteDel(kernelRoute(s.Route))
	case WriteSysctl:
		return writeSysctl(s.Sysctl, s.Value)
	}
	return fmt.Errorf("no such kind of step: %d", s.Op)
}

// kernelRoute returns the form of a route that netlink takes: of one that was
// listed, what was listed, with the source that r has now.
func kernelRoute(r Route) *netlink.Route {
	if listed, ok := r.kernel.(netlink.Route); ok {
		// The kernel reports these flags and refuses to be told them
		// (fib_create_info in net/ipv4/fib_semantics.c).
		listed.Flags &= unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE
		listed.MultiPath = slices.Clone(listed.MultiPath)
		for i, hop := range listed.MultiPath {
			h := *hop
			h.Flags &= unix.RTNH_F_ONLINK | unix.RTNH_F_PERVASIVE
			listed.MultiPath[i] = &h
		}
		listed.Src = r.Source.AsSlice()
		return &listed
	}
	return &netlink.Route{
		Dst:       ipNet(r.Destination),
		Gw:        r.Gateway.AsSlice(),
		LinkIndex: r.Index,
		Src:       r.Source.AsSlice(),
		Priority:  r.Metric,
		Scope:     netlink.Scope(r.Scope),
		Table:     unix.RT_TABLE_MAIN,
		Type:      unix.RTN_UNICAST,
	}
}
