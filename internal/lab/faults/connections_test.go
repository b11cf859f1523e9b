package faults_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// Connections wait for a router that has no rules yet: its kernel refuses them.
func TestHoldWaitsForRules(t *testing.T) {
	t.Parallel()
	site, err := lab.NewSite(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(site.Close)
	const port = 5000
	err = site.Client.Do(func() error {
		conn, err := net.DialTimeout("tcp4", netip.AddrPortFrom(site.Nodes[0].Addr, port).String(), lab.Patience)
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("a pod without rules: %v, want a refusal", err)
	}
	held := make(chan error, 1)
	go func() {
		c, err := faults.Hold(site, 0, 3, port, faults.Pace)
		if err == nil {
			c.Close()
		}
		held <- err
	}()
	if err := site.AddSource(0); err != nil {
		t.Error(err)
	}
	if err := site.RouteUnfenced(0); err != nil {
		t.Error(err)
	}
	if err := <-held; err != nil {
		t.Error(err)
	}
}
