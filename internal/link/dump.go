package link

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// dumpTries is how often a listing is taken before its interruption is an
// error. Each takes well under a millisecond; only something that changes the
// same table without pause interrupts so many in a row.
const dumpTries = 20

// dump takes a listing from the kernel. The kernel marks one during which the
// table changed (NLM_F_DUMP_INTR, netlink(7)), and netlink v1.3.1 returns it
// with ErrDumpInterrupted, possibly incomplete: it has to be taken again. All
// listings and look-ups by name go through here.
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

func (k *Kernel) addresses(l netlink.Link) ([]netlink.Addr, error) {
	return dump(func() ([]netlink.Addr, error) { return k.handle.AddrList(l, netlink.FAMILY_V4) })
}

// routesOf lists the IPv4 routes of one table.
func (k *Kernel) routesOf(table int) ([]netlink.Route, error) {
	return dump(func() ([]netlink.Route, error) {
		return k.handle.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
}

// rules lists the IPv4 routing rules.
func (k *Kernel) rules() ([]netlink.Rule, error) {
	return dump(func() ([]netlink.Rule, error) { return k.handle.RuleList(netlink.FAMILY_V4) })
}
