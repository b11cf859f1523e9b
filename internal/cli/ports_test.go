package cli

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A router that shares the ports of an IPv4 address has a range of them.
func TestFewPortsOfRange(t *testing.T) {
	var log bytes.Buffer
	c := config.Config{}
	if n := rangedPorts(c); n != 0 {
		t.Errorf("alone: %d", n)
	}
	c.Standby = &spec.Standby{Carry: &spec.Carry{First: 1024, Last: 2023}}
	w := portWatch{log: slog.New(slog.NewTextHandler(&log, nil)), ranged: rangedPorts(c)}
	of := func(a string, n int) conntrack.Ports {
		return conntrack.Ports{Protocol: rules.TCP, Server: netip.MustParseAddrPort("203.0.113.25:443"), Reserved: netip.MustParseAddr(a), InUse: n}
	}
	w.check([]conntrack.Ports{of("192.168.12.99", 799), of("2001:db8::99", 50000)})
	if log.Len() > 0 {
		t.Errorf("logged %s", &log)
	}
	w.check([]conntrack.Ports{of("192.168.12.99", 800)})
	var r health.Report
	if w.report(&r); len(r.Checks) != 1 || !strings.Contains(r.Checks[0].Detail, "uses 800 of 1000 ports") || !strings.Contains(log.String(), "limit=1000") {
		t.Errorf("checks %+v, logged %s", r.Checks, &log)
	}
}

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
