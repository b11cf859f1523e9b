package cli

import (
	"net/netip"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/plan"
)

// A reconcile that began before the last change of the holder neither finds a difference nor leads
// the packets for the holder back, whatever the order of the two.
func TestTunnelLeadsToLatest(t *testing.T) {
	peer := func(n byte) plan.CarryPeer {
		return plan.CarryPeer{Address: netip.AddrFrom4([4]byte{10, 128, 0, n}), First: 1000 * uint16(n), Last: 1000*uint16(n) + 999}
	}
	first := plan.Carry{
		Interface: "tunnel0", Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")},
		Own: netip.MustParseAddr("10.128.0.101"), UDP: 9468, First: 1024, Last: 1999, Table: 4712, Known: true,
		Peers: []plan.CarryPeer{peer(2), peer(3)}, Toward: peer(2).Address,
	}
	second := first
	second.Toward = peer(3).Address
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	do := func(fn func() error) {
		if err := ns.Do(fn); err != nil {
			t.Error(err)
		}
	}
	do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		a := netlink.NewLinkAttrs()
		a.Name = "eth0"
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
		return nil
	})
	k := new(tunnel)
	want := func(c plan.Carry) {
		t.Helper()
		do(func() error {
			kernel, err := link.Open()
			if err != nil {
				return err
			}
			defer kernel.Close()
			if found, err := kernel.CarryDiffers(c); err != nil || len(found) > 0 {
				t.Errorf("differences from the latest: %q, %v", found, err)
			}
			return nil
		})
	}
	do(func() error { return k.Connect(first) })
	want(first)
	do(func() error { return k.steer(second) })
	want(second)
	do(func() error {
		if found, err := k.Differs(&first); err != nil || len(found) > 0 {
			t.Errorf("an older reconcile finds %q, %v", found, err)
		}
		return k.Connect(first)
	})
	want(second)
	for i := range 20 {
		before, now := first, second
		if i%2 == 0 {
			before, now = second, first
		}
		var both sync.WaitGroup
		both.Go(func() { do(func() error { return k.Connect(before) }) })
		both.Go(func() { do(func() error { return k.steer(now) }) })
		both.Wait()
		want(now)
	}
}
