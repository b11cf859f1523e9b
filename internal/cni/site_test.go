package cni

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// Rules without the parts that the kernel refuses are right. Other rules are not, nor are
// those without parts that it takes.
func TestRulesWithoutRefusedParts(t *testing.T) {
	want := (&call{ifname: "net1"}).want(spec.Router{
		Forward: true, Sources: spec.Sources{{Prefix: netip.MustParsePrefix("192.168.12.99/24"), Gateway: netip.MustParseAddr("192.168.12.1")}},
		Set: rules.Set{Fallback: netip.MustParseAddr("203.0.113.27")},
	}, nil, "eth0").Rules
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error {
		ctx := context.Background()
		tx, err := nft.BeginAll(ctx, families()...)
		if err == nil {
			_, err = tx.Apply(ctx, want.WithoutParts(want.Parts()))
		}
		if err != nil {
			return err
		}
		refuses := func(rules.Plan) bool { return false }
		if differs := (tables{tx, slog.Default(), refuses}).Differs(want); differs != nil {
			t.Errorf("without what the kernel refuses: %v", differs)
		}
		if differs := (tables{tx, slog.Default(), canLoad}).Differs(want); len(differs) == 0 {
			t.Error("without what the kernel takes: no difference")
		}
		if _, err = tx.Apply(ctx, want.WithoutParts(want.Parts()).WithoutRedirects()); err != nil {
			return err
		}
		if differs := (tables{tx, slog.Default(), refuses}).Differs(want); len(differs) == 0 {
			t.Error("without redirects: no difference")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
