package ci

import (
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/rules"
)

// The image has the extension of iptables for every match and target that a plan may
// have: without one of them iptables loads no rule.
func TestImageHasExtensions(t *testing.T) {
	script, err := os.ReadFile("image-system")
	if err != nil {
		t.Fatal(err)
	}
	var there []string
	for _, list := range regexp.MustCompile(`(?s)\n(?:extensions|aliases)="(.*?)"`).FindAllSubmatch(script, -1) {
		for name := range strings.FieldsSeq(string(list[1])) {
			name, _, _ = strings.Cut(name, "=")
			there = append(there, name)
		}
	}
	set, err := rules.Parse("80 tcp 203.0.113.25\n53 udp 203.0.113.26 5353\n203.0.113.27", nil)
	if err != nil {
		t.Fatal(err)
	}
	sides := rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")}, Mark: 0x1000, Health: 9465}
	for _, group := range rules.HelperGroups {
		sides.Helpers = append(sides.Helpers, group.Helpers...)
	}
	open := sides
	open.Crossing = rules.CrossAll
	// libxt_standard has the targets RETURN and DROP, and jumps.
	found := map[string]bool{"standard": true}
	for _, plan := range []rules.Plan{rules.NewPlan(set, sides), rules.NewPlan(set, open), rules.NewProxyPlan(sides)} {
		for _, chain := range plan.WithDropLog().IPTables() {
			for _, name := range regexp.MustCompile(` -[mj] (\S+)`).FindAllSubmatch(chain.Saved, -1) {
				found[string(name[1])] = true
			}
		}
	}
	for name := range found {
		if slices.Contains([]string{"RETURN", "DROP"}, name) || strings.HasPrefix(name, rules.ChainPrefix) {
			continue
		}
		if !slices.ContainsFunc([]string{"libxt_", "libipt_", "libip6t_"}, func(prefix string) bool { return slices.Contains(there, prefix+name) }) {
			t.Errorf(".ci/image-system lacks the extension %q", name)
		}
	}
	if len(found) < 10 {
		t.Errorf("found only %v", found)
	}
}
