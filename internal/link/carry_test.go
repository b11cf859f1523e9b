package link_test

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/plan"
)

func aTunnel(peers ...string) plan.Carry {
	c := plan.Carry{
		Interface: "tunnel0", Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")},
		Own: netip.MustParseAddr("10.128.0.101"), UDP: 9468, First: 1024, Last: 2000, Table: 4712, Known: true,
	}
	for i, p := range peers {
		c.Peers = append(c.Peers, plan.CarryPeer{Address: netip.MustParseAddr(p), First: uint16(3000 + 1000*i), Last: uint16(3999 + 1000*i)}) //nolint:gosec // small
	}
	if len(peers) > 0 {
		c.Toward = c.Peers[0].Address
	}
	return c
}

// inPod calls fn with the kernel of a namespace that has the two sides.
func inPod(t *testing.T, fn func(k *link.Kernel, h *netlink.Handle)) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		k, err := link.Open()
		if err != nil {
			return err
		}
		defer k.Close()
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		a := netlink.NewLinkAttrs()
		a.Name, a.MTU = "eth0", 1450
		v := netlink.NewVeth(a)
		v.PeerName = "macvlan0"
		if err := h.LinkAdd(v); err != nil {
			return err
		}
		for _, name := range []string{"lo", "eth0", "macvlan0"} {
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
		}
		fn(k, h)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// rulesOf returns the routing rules, in their order.
func rulesOf(t *testing.T, h *netlink.Handle) (all []string) {
	t.Helper()
	found, err := h.RuleList(netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range found {
		all = append(all, r.String())
	}
	return all
}

// A tunnel is set up, again without a change, and to other peers; what another program damages is
// found and repaired; nothing remains after its removal.
func TestCarry(t *testing.T) {
	inPod(t, func(k *link.Kernel, h *netlink.Handle) {
		before := rulesOf(t, h)
		differs := func(c plan.Carry, when string, want bool) {
			t.Helper()
			found, err := k.CarryDiffers(c)
			if err != nil || (len(found) > 0) != want {
				t.Errorf("%s: differences %q, %v", when, found, err)
			}
		}
		load := func(c plan.Carry) {
			t.Helper()
			if err := k.LoadCarry(c); err != nil {
				t.Fatal(err)
			}
			differs(c, "loaded", false)
		}
		none, one, two := aTunnel(), aTunnel("10.128.0.102"), aTunnel("10.128.0.102", "10.128.0.103")
		differs(none, "before", true)
		for _, c := range []plan.Carry{none, two, two, one, none, two} {
			load(c)
		}
		other := two
		other.Toward = two.Peers[1].Address
		differs(other, "of another holder", true)
		if err := k.Steer(other); err != nil {
			t.Fatal(err)
		}
		differs(other, "steered", false)
		if l, err := h.LinkByName("tunnel0"); err != nil || l.Attrs().MTU != 1400 {
			t.Errorf("link %+v, %v", l, err)
		}
		for name, damage := range map[string]func(l netlink.Link) error{
			"down":      h.LinkSetDown,
			"deleted":   h.LinkDel,
			"MTU":       func(l netlink.Link) error { return h.LinkSetMTU(l, 1300) },
			"no peer":   func(l netlink.Link) error { return h.NeighDel(neighbour(l, unix.AF_INET)) },
			"no remote": func(l netlink.Link) error { return h.NeighDel(neighbour(l, unix.AF_BRIDGE)) },
			"another address": func(l netlink.Link) error {
				return h.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(169, 254, 1, 1), Mask: net.CIDRMask(32, 32)}})
			},
			"local rule": func(netlink.Link) error { return h.RuleAdd(localFirst()) },
			"another remote": func(l netlink.Link) error {
				n := neighbour(l, unix.AF_BRIDGE)
				n.IP, n.HardwareAddr = net.IPv4(10, 9, 9, 9), net.HardwareAddr{2, 1, 1, 1, 1, 1}
				return h.NeighSet(n)
			},
		} {
			l, err := h.LinkByName("tunnel0")
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(l); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			differs(other, name, true)
			load(other)
		}
		for range 2 {
			if err := k.RemoveCarry("tunnel0", 4712); err != nil {
				t.Fatal(err)
			}
		}
		if after := rulesOf(t, h); !slices.Equal(before, after) {
			t.Errorf("rules after removal %v, want %v", after, before)
		}
		if there, err := k.HasCarry(other); err != nil || there {
			t.Errorf("tunnel after removal: %v, %v", there, err)
		}
	})
}

// A tunnel with other routing tables than those of an earlier run leads by its own alone, and nothing
// of either remains after its removal with a third one; a link of another kind stays.
func TestCarryOtherTables(t *testing.T) {
	inPod(t, func(k *link.Kernel, h *netlink.Handle) {
		before := rulesOf(t, h)
		routes := func() (n int) {
			t.Helper()
			found, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range found {
				if r.Table > unix.RT_TABLE_LOCAL {
					n++
				}
			}
			return n
		}
		left := func(want bool) {
			t.Helper()
			if found, err := k.CarryLeft("tunnel0"); err != nil || found != want {
				t.Errorf("left: %v, %v, want %v", found, err, want)
			}
		}
		left(false)
		former := aTunnel("10.128.0.102", "10.128.0.103")
		try(t, k.LoadCarry(former))
		now := former
		now.Table, now.Toward = 5000, now.Peers[1].Address
		if there, err := k.HasCarry(now); err != nil || there {
			t.Errorf("with the former tables: there %v, %v", there, err)
		}
		if found, err := k.CarryDiffers(now); err != nil || len(found) == 0 {
			t.Errorf("with the former tables: differences %q, %v", found, err)
		}
		try(t, k.LoadCarry(now))
		if there, err := k.HasCarry(now); err != nil || !there {
			t.Errorf("there %v, %v", there, err)
		}
		if found, err := k.CarryDiffers(now); err != nil || len(found) > 0 || routes() != 3 {
			t.Errorf("differences %q, %v, %d routes", found, err, routes())
		}
		l, err := h.LinkByName("tunnel0")
		try(t, err)
		try(t, h.LinkDel(l))
		a := netlink.NewLinkAttrs()
		a.Name = "tunnel0"
		try(t, h.LinkAdd(&netlink.Bridge{LinkAttrs: a}))
		left(true) // the routing rules
		try(t, k.RemoveCarry("tunnel0", 6000))
		left(false)
		if after := rulesOf(t, h); !slices.Equal(before, after) || routes() != 0 {
			t.Errorf("rules after removal %v, want %v; %d routes", after, before, routes())
		}
		if _, err := h.LinkByName("tunnel0"); err != nil {
			t.Errorf("link of another kind: %v", err)
		}
	})
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func neighbour(l netlink.Link, family int) *netlink.Neigh {
	peer := netip.MustParseAddr("10.128.0.102")
	mac := plan.HardwareAddress(peer)
	n := &netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: peer.AsSlice(), HardwareAddr: mac[:]}
	if family == unix.AF_BRIDGE {
		n.Flags = netlink.NTF_SELF
	}
	return n
}

// localFirst is the kernel's own rule for local addresses.
func localFirst() *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table = netlink.FAMILY_V4, 0, unix.RT_TABLE_LOCAL
	return r
}
