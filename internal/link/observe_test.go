package link_test

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
)

// An interface that disappears while its state is read is missing, and no error of a
// call in between.
func TestObserveInterfaceThatComesAndGoes(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	h := p.Handle(p.Lab.Router)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "egress9"}, PeerName: "peer9"}
			if err := h.LinkAdd(pair); err != nil {
				stopped <- err
				return
			}
			if err := h.LinkDel(pair); err != nil {
				stopped <- err
				return
			}
		}
	}()
	var seen, missing int
	if err := p.Lab.Router.Do(func() error {
		k, err := link.Open()
		if err != nil {
			return err
		}
		defer k.Close()
		want := plan.Network{Interface: "egress9", Cluster: plan.ClusterSide{Interface: "eth0"}}
		for n := 0; n < 100000 && (n < 1000 || seen == 0 || missing == 0); n++ {
			_, err := k.Observe(want)
			if _, isMissing := errors.AsType[*link.MissingError](err); isMissing {
				missing++
			} else if err != nil {
				return err
			} else {
				seen++
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if seen == 0 || missing == 0 {
		t.Errorf("seen %d times, missing %d times", seen, missing)
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
