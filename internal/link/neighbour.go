package link

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Reach sets the hardware address of a neighbour that has just answered. The kernel uses it
// without asking, confirms it later, and keeps what it has for a permanent entry
// (ip-neighbour(8), nud reachable).
func (k *Kernel) Reach(name string, a netip.Addr, mac net.HardwareAddr) error {
	l, err := k.find(name)
	if err != nil {
		return err
	}
	index, family := l.Attrs().Index, unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	entries, err := k.neighbours(index, a.Is6())
	if err != nil {
		return fmt.Errorf("list neighbours of %q: %w", name, err)
	}
	for _, e := range entries {
		if e.IP.Equal(a.AsSlice()) && e.State&netlink.NUD_PERMANENT != 0 {
			return nil
		}
	}
	err = k.handle.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_REACHABLE, IP: a.AsSlice(), HardwareAddr: mac})
	if err != nil {
		return fmt.Errorf("set neighbour %s of %q: %w", a, name, err)
	}
	return nil
}
