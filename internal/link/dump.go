package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries is the number of tries of a dump before its interruption is an error.
// A dump takes well under a millisecond; only a program that changes the same
// table continuously interrupts so many in a row.
const dumpTries = 20

// dump calls list, again after an interruption. The kernel flags a dump during
// which the table changed (NLM_F_DUMP_INTR, netlink(7)), and netlink v1.3.1
// returns it, possibly incomplete, with ErrDumpInterrupted. All dumps and look-ups
// by name use this function.
func dump[T any](list func() (T, error)) (T, error) {
	for try := 1; ; try++ {
		found, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return found, err
		}
	}
}

func (k *Kernel) linkByName(name string) (netlink.Link, error) {
	return dump(func() (netlink.Link, error) { return k.handle.LinkByName(name) })
}

func (k *Kernel) links() ([]netlink.Link, error) { return dump(k.handle.LinkList) }

func (k *Kernel) addresses(family int, l netlink.Link) ([]netlink.Addr, error) {
	return dump(func() ([]netlink.Addr, error) { return k.handle.AddrList(l, family) })
}

func (k *Kernel) addressesIPv6(l netlink.Link) ([]netlink.Addr, error) {
	return k.addresses(netlink.FAMILY_V6, l)
}

// neighbours lists the neighbours of one family on an interface.
func (k *Kernel) neighbours(index int, ipv6 bool) ([]netlink.Neigh, error) {
	family := netlink.FAMILY_V4
	if ipv6 {
		family = netlink.FAMILY_V6
	}
	return dump(func() ([]netlink.Neigh, error) { return k.handle.NeighList(index, family) })
}

// forwardings lists the forwarding database of a link (bridge(8), fdb).
func (k *Kernel) forwardings(index int) ([]netlink.Neigh, error) {
	return dump(func() ([]netlink.Neigh, error) { return k.handle.NeighList(index, unix.AF_BRIDGE) })
}

// routesIPv6 lists the IPv6 routes of the main table.
func (k *Kernel) routesIPv6() ([]netlink.Route, error) {
	return dump(func() ([]netlink.Route, error) { return k.handle.RouteList(nil, netlink.FAMILY_V6) })
}

// routesOf lists the routes of one family in one table.
func (k *Kernel) routesOf(family, table int) ([]netlink.Route, error) {
	return dump(func() ([]netlink.Route, error) {
		return k.handle.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
}

// A Connection is an entry of the kernel's connection table, with its original
// addresses (From, To) and those of its replies. Ports are zero if its protocol
// (IANA number) has none.
type Connection struct {
	Protocol    uint8
	From        netip.Addr
	To          netip.AddrPort
	RepliesFrom netip.AddrPort
	RepliesTo   netip.Addr
}

// Forget deletes the conntrack entries of stale connections, so that their
// next packet starts a new connection, and returns their number.
func (k *Kernel) Forget(ipv6 bool, stale func(Connection) bool) (int, error) {
	families := []netlink.InetFamily{netlink.FAMILY_V4}
	if ipv6 {
		families = append(families, netlink.FAMILY_V6)
	}
	// A dump walks the table of all namespaces, which takes 10 ms and more
	// (ctnetlink_dump_table in net/netfilter/nf_conntrack_netlink.c).
	if tracked, err := isOn(conntrackCount); err == nil && !tracked {
		return 0, nil
	}
	handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer handle.Close()
	var n uint
	for _, family := range families {
		_, err = dump(func() (uint, error) {
			deleted, err := handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, picker(stale))
			n += deleted
			return n, err
		})
		if err != nil {
			return int(n), fmt.Errorf("delete conntrack entries: %w", err) //nolint:gosec // the kernel holds fewer
		}
	}
	return int(n), nil //nolint:gosec // the kernel holds fewer
}

// A picker adapts a function to netlink's filter interface.
type picker func(Connection) bool

// MatchConntrackFlow reports whether the function selects the flow.
func (p picker) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	addr := func(ip net.IP) netip.Addr {
		a, _ := netip.AddrFromSlice(ip)
		return a.Unmap()
	}
	return p(Connection{
		Protocol:    f.Forward.Protocol,
		From:        addr(f.Forward.SrcIP),
		To:          netip.AddrPortFrom(addr(f.Forward.DstIP), f.Forward.DstPort),
		RepliesFrom: netip.AddrPortFrom(addr(f.Reverse.SrcIP), f.Reverse.SrcPort),
		RepliesTo:   addr(f.Reverse.DstIP),
	})
}

// rules lists the routing rules of one family.
func (k *Kernel) rules(family int) ([]netlink.Rule, error) {
	return dump(func() ([]netlink.Rule, error) { return k.handle.RuleList(family) })
}
