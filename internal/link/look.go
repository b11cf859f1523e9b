package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/plan"
)

// A Look is what the kernel shows of an interface.
type Look struct {
	Index          int
	Kind           string // such as macvlan or veth
	Mode           string // of a macvlan; empty: another kind
	Parent         string // interface below in this namespace; empty: it is in another one, or there is none
	MAC            net.HardwareAddr
	MTU            int // bytes
	Up, Carrier    bool
	Sent, Received uint64 // frames since its creation
}

// Look returns what the kernel shows of an interface. A missing one is a *MissingError. It
// needs no privilege.
func (k *Kernel) Look(name string) (Look, error) {
	l, err := k.find(name)
	if err != nil {
		return Look{}, err
	}
	a := l.Attrs()
	look := Look{
		Index: a.Index, Kind: l.Type(), MAC: a.HardwareAddr, MTU: a.MTU,
		Up: a.Flags&net.FlagUp != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0,
	}
	if m, is := l.(*netlink.Macvlan); is {
		look.Mode = modeName(m.Mode)
		// An index of another namespace may be that of another interface here.
		if a.NetNsID < 0 && a.ParentIndex != 0 {
			if parent, err := dump(func() (netlink.Link, error) { return k.handle.LinkByIndex(a.ParentIndex) }); err == nil {
				look.Parent = fmt.Sprintf("%s (%s)", parent.Attrs().Name, parent.Type())
			}
		}
	}
	if a.Statistics != nil {
		look.Sent, look.Received = a.Statistics.TxPackets, a.Statistics.RxPackets
	}
	return look, nil
}

// ParentIn returns the name and the kind of the NIC below a macvlan, if it is in the host's
// namespace, whose descriptor is hostFd; otherwise it is empty.
func (k *Kernel) ParentIn(host *Kernel, hostFd int, name string) (string, error) {
	l, err := k.find(name)
	if err != nil {
		return "", err
	}
	id, err := k.handle.GetNetNsIdByFd(hostFd)
	a := l.Attrs()
	if err != nil || id < 0 || a.NetNsID != id || a.ParentIndex == 0 {
		return "", err
	}
	parent, err := dump(func() (netlink.Link, error) { return host.handle.LinkByIndex(a.ParentIndex) })
	if err != nil {
		return "", fmt.Errorf("get interface %d of the host: %w", a.ParentIndex, err)
	}
	return fmt.Sprintf("%s (%s)", parent.Attrs().Name, parent.Type()), nil
}

// userHertz is the unit of the times in a neighbour entry (USER_HZ, time(7)), in 1/s.
const userHertz = 100

// Neighbour returns the hardware address that the kernel's table of neighbours has for an
// address on an interface, and the time since it was last confirmed. Without one, mac is
// nil. It needs no privilege.
func (k *Kernel) Neighbour(index int, of netip.Addr) (mac net.HardwareAddr, confirmed time.Duration, err error) {
	list, err := k.neighbours(index, of.Is6())
	if err != nil {
		return nil, 0, fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range list {
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == of && len(n.HardwareAddr) > 0 {
			return n.HardwareAddr, time.Duration(n.Confirmed) * time.Second / userHertz, nil
		}
	}
	return nil, 0, nil
}

// RouteTo returns the route of packets from an address of the namespace to another host,
// and false if there is none. It needs no privilege.
func (k *Kernel) RouteTo(source, to netip.Addr) (plan.Route, bool, error) {
	found, err := k.handle.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: source.AsSlice()})
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) {
		return plan.Route{}, false, nil
	}
	if err != nil || len(found) == 0 {
		return plan.Route{}, false, fmt.Errorf("get route to %s: %w", to, err)
	}
	r := k.route(found[0], make(map[int]string))
	r.Source = source
	return r, true, nil
}
