package link_test

import (
	"slices"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/link"
)

// The counters of dropped frames are those of the kernel, and a driver's are read by name.
func TestTroubles(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	nic := p.Link(p.Handle(p.Lab.Node), lab.NIC).Attrs()
	dropped := func() (n uint64) {
		if err := p.Lab.Node.Do(func() error {
			k, err := link.Open()
			if err != nil {
				return err
			}
			defer k.Close()
			all, err := k.Troubles(lab.NIC)
			for _, c := range all {
				if c.Value == 0 {
					t.Errorf("%s is 0", c.Name)
				}
				if c.Name == "rx_dropped" {
					n = c.Value
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := dropped()
	p.SendUnknown(nic.HardwareAddr)
	p.Until("the frame is counted", func() bool { return dropped() > before })

	if err := p.Lab.Node.Do(func() error {
		all, err := link.DriverCounters(lab.NIC)
		if !slices.Contains(all, link.Counter{Name: "peer_ifindex", Value: uint64(nic.ParentIndex)}) {
			t.Errorf("counters of veth: %v, want peer_ifindex %d", all, nic.ParentIndex)
		}
		if none, err := link.DriverCounters("lo"); err != nil || len(none) != 0 {
			t.Errorf("counters of lo: %v, %v", none, err)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
