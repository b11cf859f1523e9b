package cli

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/rules"
)

// Each address and server is on its own, and is logged once while it has few ports left.
func TestFewPorts(t *testing.T) {
	var log bytes.Buffer
	w := portWatch{log: slog.New(slog.NewTextHandler(&log, nil))}
	web := netip.MustParseAddrPort("203.0.113.25:443")
	first, second := netip.MustParseAddr("192.168.12.99"), netip.MustParseAddr("192.168.12.100")
	ports := func(a netip.Addr, n int) conntrack.Ports {
		return conntrack.Ports{Protocol: rules.TCP, Server: web, Reserved: a, InUse: n}
	}
	const few = 51610 // 80 % of 64,512, rounded up
	for i, step := range []struct {
		ports  []conntrack.Ports
		logged int
		check  string
	}{
		{nil, 0, ""},
		{[]conntrack.Ports{ports(first, few-1), ports(second, few-1)}, 0, ""},
		{[]conntrack.Ports{ports(first, few), ports(second, 10)}, 1, "192.168.12.99 uses 51610 of 64512 ports to tcp 203.0.113.25:443"},
		{[]conntrack.Ports{ports(first, few+1)}, 1, "192.168.12.99 uses 51611 of 64512 ports to tcp 203.0.113.25:443"},
		{[]conntrack.Ports{ports(first, few), ports(second, few)}, 2, ", and 1 more"},
		{[]conntrack.Ports{ports(second, 1)}, 2, ""},
		{[]conntrack.Ports{ports(first, few)}, 3, "192.168.12.99 uses"},
	} {
		w.check(step.ports)
		if n := strings.Count(log.String(), `msg="source ports nearly used up"`); n != step.logged {
			t.Errorf("step %d: logged %d times, want %d:\n%s", i, n, step.logged, &log)
		}
		var r health.Report
		if w.report(&r); (len(r.Checks) == 0) != (step.check == "") || len(r.Checks) > 0 && !strings.Contains(r.Checks[0].Detail, step.check) {
			t.Errorf("step %d: checks %+v, want %q", i, r.Checks, step.check)
		}
	}
}
