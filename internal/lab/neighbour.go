package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/netns"
)

// Neighbour returns the hardware address of the neighbour entry of ns for an address on a
// link, in any state. Without an entry the error is an os.ErrNotExist.
func (l *Lab) Neighbour(ns *netns.Namespace, link string, addr netip.Addr) (net.HardwareAddr, error) {
	h, err := l.Netlink(ns)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	found, err := h.LinkByName(link)
	if err != nil {
		return nil, fmt.Errorf("finding link %q: %w", link, err)
	}
	list, err := neighbours(h, found.Attrs().Index, addr)
	if err != nil {
		return nil, fmt.Errorf("listing neighbours of %q: %w", link, err)
	}
	for _, n := range list {
		// An unresolved entry has no hardware address.
		if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == addr && len(n.HardwareAddr) > 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, fmt.Errorf("finding neighbour %q on %q: %w", addr, link, os.ErrNotExist)
}

// neighbours lists a link's entries of one family, and again if the table changed during
// the list call: the kernel marks such a list as incomplete.
func neighbours(h *netlink.Handle, index int, addr netip.Addr) (list []netlink.Neigh, err error) {
	family := netlink.FAMILY_V6
	if addr.Is4() {
		family = netlink.FAMILY_V4
	}
	for range 10 {
		list, err = h.NeighList(index, family)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}

// SetStaleNeighbour adds an entry of the state STALE to ns: the kernel uses it at once and
// replaces it when it receives another hardware address. A gateway has such an entry when
// a reserved address moves to another pod.
func (l *Lab) SetStaleNeighbour(ns *netns.Namespace, link string, addr netip.Addr, mac net.HardwareAddr) error {
	h, err := l.Netlink(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	found, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", link, err)
	}
	err = h.NeighSet(&netlink.Neigh{
		LinkIndex:    found.Attrs().Index,
		IP:           addr.AsSlice(),
		HardwareAddr: mac,
		State:        netlink.NUD_STALE,
	})
	if err != nil {
		return fmt.Errorf("setting neighbour %q on %q: %w", addr, link, err)
	}
	return nil
}
