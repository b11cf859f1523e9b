package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/logqueue"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/tcpproxy"
)

// newDNSProxy returns a proxy with the given destinations.
func newDNSProxy(t *testing.T, list string) *dnsProxy {
	t.Helper()
	d := &dnsProxy{log: slog.New(slog.DiscardHandler)}
	d.proxy = tcpproxy.New(tcpproxy.Options{Resolver: names{resolver.New(resolver.Options{})}, Log: d.log})
	if err := d.parse(list); err != nil {
		t.Fatal(err)
	}
	if err := d.proxy.Apply(d.list); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.proxy.Shutdown(0) })
	return d
}

// Each proxy emits exactly the metrics of its table.
func TestMetrics(t *testing.T) {
	d := newDNSProxy(t, "18091 203.0.113.25 80\n18092 203.0.113.26")
	list, err := httpproxy.Parse("*")
	if err != nil {
		t.Fatal(err)
	}
	h := httpproxy.New(httpproxy.Config{Rules: list}, d.log, resolver.New(resolver.Options{}))
	logs := logqueue.New(io.Discard)
	for _, test := range []reporter{
		{program: health.DNSProxy, logs: logs, table: metrics.DNSProxy, collect: d.collect},
		{program: health.HTTPProxy, logs: logs, table: metrics.HTTPProxy, collect: func(e metrics.Emit, r health.Report) { collectHTTPProxy(e, r, h.Status()) }},
	} {
		var log bytes.Buffer
		page, err := metrics.Handler(test.table, func(e metrics.Emit) { test.emit(e, health.Report{}) }, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		page.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if log.Len() > 0 {
			t.Errorf("log: %s", &log)
		}
		for _, m := range test.table {
			if !strings.Contains(w.Body.String(), "# TYPE "+m.Name+" "+string(m.Type)+"\n") {
				t.Errorf("metric %s missing", m.Name)
			}
		}
	}
}

func TestReportDNSProxy(t *testing.T) {
	d := newDNSProxy(t, "18093 203.0.113.25 80")
	check := func(want ...health.Check) {
		t.Helper()
		var r health.Report
		d.report(&r)
		for i := range r.Checks {
			r.Checks[i].Since = time.Time{}
		}
		if diff := cmp.Diff(want, r.Checks); diff != "" {
			t.Errorf("checks (- want, + got):\n%s", diff)
		}
		if ready := len(r.Reasons) == 0; ready != d.listening.Load() {
			t.Errorf("not ready: %q", r.Reasons)
		}
	}
	connections := health.Check{Name: "connections", Detail: "0 open"}
	port := health.Check{Name: "port 18093", Detail: "203.0.113.25:80: 1 address"}
	check(connections, port)
	d.listening.Store(true)
	d.setListOK()
	right := health.Check{Name: "destinations", Detail: "1 from EGRESS_DNS_PROXY_DESTINATION"}
	check(right, connections, port)

	// An invalid list is a warning, counted once.
	r := reloader{log: d.log, result: d.result}
	for range 2 {
		r.complain(errors.New("Bad destination '80'"))
	}
	check(health.Check{Name: "destinations", State: health.Warning, Detail: "Bad destination '80'"}, connections, port)
	if n := d.refused.Load(); n != 1 {
		t.Errorf("counted %d times", n)
	}
	d.env.DestinationFile = "/etc/egress/destinations"
	d.setListOK()
	right.Detail = "1 from /etc/egress/destinations"
	check(right, connections, port)
}

// A new list with the port of the health endpoint is refused, and the previous one stays.
func TestReloadWithHealthPort(t *testing.T) {
	d := newDNSProxy(t, "18094 203.0.113.25 80")
	d.conf.Health = netip.MustParseAddrPort("127.0.0.1:18095")
	d.env.DestinationFile = filepath.Join(t.TempDir(), "destinations")
	write := func(list string) {
		t.Helper()
		if err := os.WriteFile(d.env.DestinationFile, []byte(list), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("18095 203.0.113.25 80")
	err := d.reload()
	if err == nil || err.Error() != "hint: set another port in EGRESS_HEALTH_LISTEN, such as :9465\nEGRESS_HEALTH_LISTEN has port 18095, as has a line of EGRESS_DNS_PROXY_DESTINATION" {
		t.Error(err)
	}
	if status := d.proxy.Status(); len(d.list) != 1 || d.list[0].Port != 18094 || len(status) != 1 || status[0].Destination.Port != 18094 || status[0].Err != nil {
		t.Errorf("list %v, status %+v", d.list, status)
	}
	write("18096 203.0.113.25 80")
	if err := d.reload(); err != nil || d.proxy.Status()[0].Destination.Port != 18096 {
		t.Error(err, d.proxy.Status())
	}
}

func TestPortCheck(t *testing.T) {
	destination := tcpproxy.Destination{Port: 8443, Host: "www.example.com", ToPort: 443}
	failed := errors.New("no such name")
	for want, s := range map[string]tcpproxy.Status{
		"ok www.example.com:443: 1 address":                                     {Addresses: 1, Looked: true},
		"ok www.example.com:443: 2 addresses":                                   {Addresses: 2, Looked: true},
		"warning www.example.com:443: 2 addresses, 1 unreachable":               {Condition: tcpproxy.Impaired, Addresses: 2, Aside: 1, Looked: true},
		"warning www.example.com:443: 2 addresses, lookup failed: no such name": {Condition: tcpproxy.Impaired, Addresses: 2, LookupErr: failed, Looked: true},
		"warning www.example.com:443: not looked up yet":                        {Condition: tcpproxy.Unusable},
		"warning www.example.com:443: no address":                               {Condition: tcpproxy.Unusable, Looked: true},
		"warning www.example.com:443: no address: no such name":                 {Condition: tcpproxy.Unusable, LookupErr: failed},
		"warning www.example.com:443: 1 address, 1 unreachable":                 {Condition: tcpproxy.Unusable, Addresses: 1, Aside: 1},
		"failed www.example.com:443: not listening: no such name":               {Condition: tcpproxy.Unusable, Err: failed},
	} {
		s.Destination = destination
		c := portCheck(s)
		if got := c.State.String() + " " + c.Detail; got != want || c.Name != "port 8443" {
			t.Errorf("%s: %q, want %q", c.Name, got, want)
		}
	}
}

func TestReportHTTPProxy(t *testing.T) {
	at := time.Now()
	good := httpproxy.Status{Listen: "[::]:8080", ListenSince: at, Rules: 4, RulesSince: at, Connections: 3, MaxConnections: 10, Running: 2}
	var r health.Report
	reportHTTPProxy(&r, good, "")
	want := []health.Check{
		{Name: "listener", Detail: "[::]:8080", Since: at},
		{Name: "rules", Detail: "4 from EGRESS_HTTP_PROXY_DESTINATION", Since: at},
		{Name: "connections", Detail: "3 of at most 10, 2 active requests and tunnels"},
	}
	if diff := cmp.Diff(want, r.Checks); diff != "" || len(r.Reasons) > 0 {
		t.Errorf("reasons %q, checks (- want, + got):\n%s", r.Reasons, diff)
	}

	bad := httpproxy.Status{Rules: 4, RulesSince: at, Connections: 10, MaxConnections: 10,
		RulesErr: errors.New("/etc/egress/rules:3; Bad destination '1.2.3.256'"), LookupErr: errors.New("timeout"), LookupSince: at}
	r = health.Report{}
	reportHTTPProxy(&r, bad, "/etc/egress/rules")
	want = []health.Check{
		{Name: "listener", State: health.Failed, Detail: "not listening"},
		{Name: "rules", State: health.Warning, Since: at, Detail: "invalid file, keeping previous rules: /etc/egress/rules:3; Bad destination '1.2.3.256'"},
		{Name: "connections", State: health.Warning, Detail: "10 of at most 10, 0 active requests and tunnels"},
		{Name: "lookups", State: health.Warning, Detail: "name servers do not answer: timeout", Since: at},
	}
	if diff := cmp.Diff(want, r.Checks); diff != "" || len(r.Reasons) != 1 {
		t.Errorf("reasons %q, checks (- want, + got):\n%s", r.Reasons, diff)
	}
}

// Each check has its addresses, and the time since which it is in its state.
func TestReportRouter(t *testing.T) {
	c := config.Config{
		Router: spec.Router{Egress: "macvlan0", Sources: spec.Sources{{Prefix: netip.MustParsePrefix("192.168.12.99/24"), Gateway: netip.MustParseAddr("192.168.12.1")}}},
		Health: config.Health{Probe: true},
	}
	mac, other := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 9}
	check := func(name string, state health.State, detail string, since time.Time) health.Check {
		return health.Check{Name: name, State: state, Detail: detail, Since: since}
	}
	fault := func(f diagnose.Fault, c health.Check) health.Check {
		c.Fault = string(f)
		return c
	}
	begin := time.Now()
	at := begin.Add(-10 * time.Second)
	web := netip.MustParseAddrPort("203.0.113.25:80")
	for _, test := range []struct {
		status router.Status
		want   []health.Check
	}{
		{
			router.Status{Failure: "not reconciled yet", Since: begin, Destinations: 2, ReloadSince: begin, Surroundings: []router.Surroundings{{}}},
			[]health.Check{
				check("kernel", health.Failed, "not reconciled yet", begin), check("interface", health.OK, "macvlan0, not read yet", begin),
				check("gateway", health.OK, "192.168.12.1, no answer yet", begin), check("address", health.OK, "192.168.12.99/24, no conflict", begin),
				check("destinations", health.OK, "2 destinations", begin), check("servers", health.OK, "not probed yet", begin),
			},
		},
		{
			router.Status{
				InSync: true, Since: at, Backend: "nftables", Link: router.LinkStatus{Found: true, MAC: mac, Carrier: true, Since: at},
				Surroundings: []router.Surroundings{{State: arp.State{Gateway: arp.GatewayState{Known: true, Reachable: true, Since: at, MAC: other, Answered: at}}}},
				Destinations: 1, ReloadSince: at, Probes: []router.Probe{{To: web}}, ProbesSince: at,
			},
			[]health.Check{
				check("kernel", health.OK, "no drift, backend nftables, 0 repairs", at), check("interface", health.OK, "macvlan0 at 02:00:00:00:00:01", at),
				check("gateway", health.OK, "192.168.12.1 answers ARP, last answer 10s ago by 02:00:00:00:00:09", at),
				check("address", health.OK, "192.168.12.99/24, no conflict", begin), check("destinations", health.OK, "1 destination", at),
				check("servers", health.OK, "1 reachable", at),
			},
		},
		{
			router.Status{
				InSync: true, Since: begin, Contested: "set macvlan0 up", ContestedSince: at, Link: router.LinkStatus{Found: true, MAC: mac, Since: at},
				Surroundings: []router.Surroundings{{State: arp.State{
					Gateway:   arp.GatewayState{Known: true, Since: at, MAC: other, Answered: at},
					Conflicts: 3, ConflictMAC: other, ConflictAt: at,
				}}},
				Destinations: 2, ReloadError: "line 1", ReloadSince: at,
				Probes: []router.Probe{{To: web, Err: "reset", Outcome: diagnose.Refused}, {}}, ProbesSince: at,
			},
			[]health.Check{
				check("kernel", health.Warning, "repair contested by another program: set macvlan0 up", at),
				fault(diagnose.NoCarrier, check("interface", health.Failed, "macvlan0 at 02:00:00:00:00:01, without carrier", at)),
				fault(diagnose.GatewaySilent, check("gateway", health.Failed, "192.168.12.1 does not answer ARP, last answer 10s ago by 02:00:00:00:00:09", at)),
				fault(diagnose.WrongMAC, check("address", health.Warning, "192.168.12.99/24, claimed by 02:00:00:00:00:09, 3 conflicts", at)),
				check("destinations", health.Warning, "2 destinations, reload failed: line 1", at),
				fault(diagnose.ServerRefuses, check("servers", health.Warning, "1 of 2 unreachable: 203.0.113.25:80: refused: reset", at)),
			},
		},
		{
			router.Status{Failure: "not found", Since: at, Link: router.LinkStatus{Since: at}, Surroundings: []router.Surroundings{{Unwatched: "denied", UnwatchedSince: at}}, ReloadSince: at, ProbesSince: at},
			[]health.Check{
				check("kernel", health.Failed, "not found", at), fault(diagnose.InterfaceMissing, check("interface", health.Failed, "macvlan0 not found", at)),
				check("gateway", health.Warning, "192.168.12.1, ARP watch not running: denied", at),
				check("address", health.OK, "192.168.12.99/24, no conflict", begin), check("destinations", health.OK, "0 destinations", at), check("servers", health.OK, "0 reachable", at),
			},
		},
		{
			router.Status{
				InSync: true, Since: at, Backend: "nftables", Link: router.LinkStatus{Found: true, MAC: mac, Carrier: true, Since: at},
				Surroundings: []router.Surroundings{{}, {State: arp.State{Gateway: arp.GatewayState{Known: true, Since: at}}}},
				Closed:       "another host has 2001:db8:12::99", ClosedSince: at, ReloadSince: at, ProbesSince: at,
			},
			[]health.Check{
				check("kernel", health.OK, "no drift, backend nftables, 0 repairs", at), check("interface", health.OK, "macvlan0 at 02:00:00:00:00:01", at),
				check("gateway", health.OK, "192.168.12.1, no answer yet", begin), check("address", health.OK, "192.168.12.99/24, no conflict", begin),
				fault(diagnose.GatewaySilent, check("gateway-ipv6", health.Failed, "fe80::1 does not answer NDP, no answer yet", at)),
				check("address-ipv6", health.Failed, "2001:db8:12::99/64, another host has 2001:db8:12::99", at),
				check("destinations", health.OK, "0 destinations", at), check("servers", health.OK, "0 reachable", at),
			},
		},
	} {
		r := health.Report{Started: begin}
		if len(test.status.Surroundings) == 2 {
			c.Sources = append(c.Sources, spec.Source{Prefix: netip.MustParsePrefix("2001:db8:12::99/64"), Gateway: netip.MustParseAddr("fe80::1")})
		}
		reportRouter(&r, test.status, c, begin)
		if diff := cmp.Diff(test.want, r.Checks); diff != "" {
			t.Errorf("checks (- want, + got):\n%s", diff)
		}
	}
}

// The table of connections is reported if it has little room, with a fault if it has none.
func TestReportTable(t *testing.T) {
	at := time.Now()
	for table, want := range map[diagnose.Table][]health.Check{
		{Entries: 90, Limit: 100}:           nil,
		{Entries: 90}:                       nil,
		{Entries: 91, Limit: 100}:           {{Name: "conntrack", State: health.Warning, Detail: "91 of 100 entries", Since: at}},
		{Entries: 100, Limit: 100}:          {{Name: "conntrack", State: health.Warning, Detail: "100 of 100 entries: the kernel drops new connections", Since: at, Fault: "conntrack-full"}},
		{Unknown: "permission", Entries: 0}: nil,
	} {
		var r health.Report
		reportTable(&r, table, at)
		if diff := cmp.Diff(want, r.Checks); diff != "" {
			t.Errorf("%+v (- want, + got):\n%s", table, diff)
		}
	}
}

// A tracker that is missing is a warning; one that is not needed is nothing.
func TestReportUntracked(t *testing.T) {
	why := "get conntrack statistics: invalid argument"
	for text, want := range map[*string][]health.Check{
		nil:  nil,
		&why: {{Name: "tracking", State: health.Warning, Detail: "connections are neither counted nor logged: " + why}},
	} {
		var r health.Report
		reportUntracked(&r, text)
		if diff := cmp.Diff(want, r.Checks); diff != "" {
			t.Errorf("(- want, + got):\n%s", diff)
		}
	}
}

// Up to 1,000 destinations have counters of failures from the start, of more those that failed.
func TestProbeFailureCounters(t *testing.T) {
	for destinations, want := range map[int]int{1: 5, mostZeros: 5 * mostZeros, mostZeros + 1: 5} {
		s := router.Status{Probes: make([]router.Probe, destinations)}
		for i := range s.Probes {
			s.Probes[i].To = netip.AddrPortFrom(netip.MustParseAddr("203.0.113.25"), uint16(i+1))
		}
		s.Probes[0].Failures = map[diagnose.Outcome]uint64{diagnose.Refused: 3}
		n, failed := 0, 0.0
		collectProbes(func(name string, value float64, _ ...string) {
			if name == "egress_router_probe_failures_total" {
				n++
				failed += value
			}
		}, s)
		if n != want || failed != 3 {
			t.Errorf("%d destinations have %d counters with a sum of %g, want %d and 3", destinations, n, failed, want)
		}
	}
}

// A program is not ready after it was stopped, and reports until its end.
func TestReporterStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := reporter{
		program: health.Router, mode: "legacy", logs: logqueue.New(io.Discard),
		report: func(r *health.Report) { r.Checks = []health.Check{{Name: "rules"}} },
	}
	stop, err := r.start(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for _, want := range []bool{true, false} {
		reports, err := health.Ask(t.Context())
		if err != nil || len(reports) != 1 || reports[0].Ready != want || reports[0].Mode != "legacy" {
			t.Errorf("%+v, %v; want ready %v", reports, err, want)
		}
		cancel()
	}
}
