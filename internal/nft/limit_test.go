package nft

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/rules"
)

// After a change from any limits to any others the kernel lists what was loaded, undo
// restores what was there, and the rules of a line that both have stay, with their counts. In
// the short variant, thousands of limits change from and to a few others only.
func TestApplyLimits(t *testing.T) {
	limited := func(list string) rules.Plan {
		t.Helper()
		set, err := rules.ParseExtended(list, nil)
		if err != nil {
			t.Fatal(err)
		}
		return rules.NewPlan(set, sides)
	}
	const kept = "443 tcp 203.0.113.25 limit=100/s burst=7 max=500\n"
	var many strings.Builder
	for i := range 2500 {
		fmt.Fprintf(&many, "%d udp 203.0.113.25 limit=%d/m\n", 1000+i, 1+i)
	}
	plans := map[string]rules.Plan{
		"none":       limited("443 tcp 203.0.113.25"),
		"one":        limited(kept),
		"another":    limited("80 tcp 203.0.113.25 max=7\n" + kept),
		"a range":    limited("80-90 tcp 203.0.113.25 max=7\n500-600 sctp 203.0.113.25 limit=7/s\n" + kept),
		"other":      limited("80-91 tcp 203.0.113.25 limit=9/m\n" + kept),
		"many":       limited(many.String() + kept),
		"logged":     limited(kept).WithDropLog(),
		"closed":     limited(kept).WithoutRedirects(),
		"of nothing": {},
	}
	for from, before := range plans {
		t.Run(from, func(t *testing.T) {
			for to, after := range plans {
				if !nstest.Long() && !few(from, to, []string{"many"}, "one", "closed") {
					continue
				}
				inNamespace(t, func() {
					begin := func() *Tx {
						t.Helper()
						tx, err := BeginGuard(t.Context(), rules.IPv4, rules.IPv6)
						if err != nil {
							t.Fatal(err)
						}
						return tx
					}
					if _, err := begin().Apply(t.Context(), before); err != nil {
						t.Fatal(err)
					}
					tx := begin()
					if found := tx.Differs(before); len(found) > 0 {
						t.Fatalf("drift after load: %v", found)
					}
					handles := lineHandles(t)
					undo, err := tx.Apply(t.Context(), after)
					if err != nil {
						t.Fatalf("%s: %v", to, err)
					}
					if found := begin().Differs(after); len(found) > 0 {
						t.Errorf("%s: drift after load: %v", to, found)
					}
					if now := lineHandles(t); len(handles) > 0 && len(now) > 0 {
						if diff := cmp.Diff(handles, now); diff != "" {
							t.Errorf("%s: the rules of an unchanged line were replaced:\n%s", to, diff)
						}
					}
					if err := undo(); err != nil {
						t.Fatal(err)
					}
					if found := begin().Differs(before); len(found) > 0 {
						t.Errorf("%s: drift after undo: %v", to, found)
					}
				})
			}
		})
	}
}

// lineHandles returns the handles of the rules of port 443.
func lineHandles(t *testing.T) (handles []uint64) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	found, err := conn.GetRules(&nftables.Table{Name: limitsName, Family: nftables.TableFamilyIPv4}, &nftables.Chain{Name: "tcp-443"})
	if err != nil {
		return nil // there is none
	}
	for _, r := range found {
		handles = append(handles, r.Handle)
	}
	return handles
}
