package cli

import (
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
)

// The plan of a fresh pod has the flowtable, if there shall be one.
func TestPlanHasFlowtable(t *testing.T) {
	for _, choice := range []string{"off", "auto", "require"} {
		c, err := config.Parse(config.Environment{
			Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Destination: "203.0.113.25", Flowtable: choice,
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if text := planText(c); strings.Contains(text, ". load the flowtable of eth0 and macvlan0: ") == (choice == "off") {
			t.Errorf("EGRESS_FLOWTABLE=%s:\n%s", choice, text)
		}
	}
}
