package cni

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/object"
	"github.com/egress-router/egress-router/internal/spec"
)

// ADD fails if the other pod stays, and so does a call that finds the address reserved by another
// one for as long as it may last. The runtime repeats both.
func TestHolderStays(t *testing.T) {
	t.Parallel()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetAlias(lo, "egress-router net c1")
		}
		if err == nil {
			err = netlink.AddrAdd(lo, labtest.Addr("192.168.12.99/24"))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(labtest.File(ns), filepath.Join(dir, "cni-1")); err != nil {
		t.Fatal(err)
	}
	made := object.Description{}
	made.Sources = spec.Sources{{Prefix: netip.MustParsePrefix("192.168.12.99/24")}}
	synctest.Test(t, func(t *testing.T) {
		c := &call{process: Process{Namespaces: dir}, netns: "/proc/self/ns/net", log: nodeLog{stderr: slog.New(slog.DiscardHandler)}}
		begin := time.Now()
		_, err := c.takeTurn(t.Context(), made)
		if e := failure(err); e.Code != types.ErrTryAgainLater || !strings.Contains(e.Msg, "take reserved address 192.168.12.99: another pod of the node has it: lo of "+dir+"/cni-1, container c1") {
			t.Errorf("error %d, %v", e.Code, e)
		}
		if waited := time.Since(begin); waited < maxTurnWait || waited > maxTurnWait+time.Second {
			t.Errorf("waited %s, want %s", waited, maxTurnWait)
		}
		c.netns = labtest.File(ns) // the pod itself
		end, err := c.takeTurn(t.Context(), made)
		if err != nil {
			t.Fatal(err)
		}
		defer end()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = c.takeTurn(ctx, made)
		if e := failure(err); e.Code != types.ErrTryAgainLater || !strings.Contains(e.Msg, "another call that takes it has not ended") {
			t.Errorf("error %d, %v", e.Code, e)
		}
	})
}
