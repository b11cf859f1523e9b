package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A router that stays reports its health and metrics: to the exec probe without
// privilege, and by HTTP to the cluster side, not to the physical network. The
// fallback does not redirect that port.
func TestRouterHealthAndMetrics(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
		p.Env["EGRESS_HEALTH_INTERVAL"] = "300ms"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		for range 100 { // idle connections delay nobody
			p.Dial(p.Lab.Client, "tcp", labtest.HealthAddr)
		}
		wantGet(p, "/healthz", 200, "ok\n")
		wantGet(p, "/readyz", 200, "ok\n")
		wantClusterOnly(p, labtest.HealthAddr.Port())
		p.WantAnswer("tcp", 9000, "203.0.113.27:9000") // by the fallback
		r.AwaitLog(1, "gateway answers ARP")

		// The metrics count the connections.
		for range 5 {
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
		}
		keepDatagrams(p)
		flow := p.Flow(53)
		flow.WantAnswer("by the fallback", "203.0.113.27:53", "192.168.12.99")
		p.FlushSourceRule()
		r.AwaitLog(1, labtest.RepairLogged)
		wantMetrics(p,
			`egress_router_ready 1`, `egress_router_gateway_reachable 1`, `egress_router_address_conflicts_total 0`,
			`egress_router_repairs_total{kind="rules"} 1`, `egress_router_repairs_total{kind="link"} 0`,
			`egress_router_connections_total{destination="203.0.113.25:80",port="80",protocol="tcp"} 5`,
			`egress_router_connections_total{destination="203.0.113.26:80",port="8080",protocol="tcp"} 0`,
			`egress_router_connections_total{destination="203.0.113.27",port="fallback",protocol="any"} 2`,
			`egress_router_open_connections{destination="203.0.113.27",port="fallback",protocol="any"} 1`,
			`egress_router_snat_ports_in_use{destination="203.0.113.27:53",protocol="udp"} 1`,
			`egress_router_event_overruns_total 0`,
		)
		_, text := get(p, "/metrics")
		for _, re := range []string{
			`egress_router_info{backend="(iptables v[^"]*|nftables)",gateway="192.168.12.1",mode="legacy",source="192.168.12.99/24",version="[^"]+"} 1`,
			`egress_router_received_bytes_total{destination="203.0.113.25:80",port="80",protocol="tcp"} [1-9]\d\d\d+`,
			`egress_router_sent_packets_total{destination="203.0.113.25:80",port="80",protocol="tcp"} [1-9]\d+`,
			`egress_router_conntrack_entries [1-9]\d*`, `egress_router_conntrack_limit [1-9]\S*`, `egress_router_comparisons_total [1-9]\d*`,
			`egress_router_last_comparison_timestamp_seconds 1\.\d+e\+09`,
			`egress_router_dropped_packets_total{reason="physical-network"} [1-9]\d*`, `egress_router_dropped_packets_total{reason="other-interface"} 0`,
		} {
			if !regexp.MustCompile("(?m)^" + re + "$").MatchString(text) {
				p.Errorf("/metrics lacks %s:\n%s", re, text)
			}
		}

		// Without its interface the router runs on, not ready.
		h := p.Handle(p.Lab.Router)
		if err := h.LinkDel(p.Link(h, "macvlan0")); err != nil {
			p.Fatal(err)
		}
		p.Until("the router is not ready", func() bool { code, _ := p.Health(); return code == 1 })
		if _, out := p.Health(); !strings.Contains(out, `interface "macvlan0" not found`) || !strings.Contains(out, "router") {
			p.Errorf("health lacks the missing interface:\n%s", out)
		}
		if status, body := get(p, "/readyz"); status != 503 || !strings.Contains(body, `interface "macvlan0" not found`) {
			p.Errorf("/readyz: %d %s, want 503 and the missing interface", status, body)
		}
		wantGet(p, "/healthz", 200, "ok\n")
		wantMetrics(p, "egress_router_ready 0")
	})
}

// wantMetrics waits until /metrics has all of the lines.
func wantMetrics(p *labtest.Pod, lines ...string) {
	p.Helper()
	missing, text := lines, ""
	for begin := time.Now(); len(missing) > 0 && time.Since(begin) < labtest.Patience; {
		_, text = get(p, "/metrics")
		missing = nil
		for _, line := range lines {
			if !strings.Contains(text, "\n"+line+"\n") {
				missing = append(missing, line)
			}
		}
	}
	if len(missing) > 0 {
		p.Errorf("/metrics lacks\n%s\nof\n%s", strings.Join(missing, "\n"), text)
	}
}

// A health port in use is an error before anything changes.
func TestHealthPortTakenIsRefused(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Serve(p.Lab.Router, "tcp", labtest.HealthAddr.String())
	before := p.State()
	p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_HEALTH_LISTEN"] = "legacy", ":9465"
	p.WantRefusal("", "address already in use", "EGRESS_HEALTH_LISTEN")
	p.WantState(before)
}

// A second router of the namespace leaves the health socket of the first one alone, logs
// that, and has it after the end of the first one.
func TestSecondRouterLeavesHealthSocket(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	healthOf := func(mode string) bool {
		code, out := p.Health()
		return code == 0 && strings.Contains(out, "("+mode+"): ready")
	}
	first := p.Start("legacy")
	p.Until("the first router is ready", func() bool { return healthOf("legacy") })
	second := p.Start("monitor")
	second.AwaitLog(1, `level=WARN msg="health socket in use" program=router`)
	if !healthOf("legacy") {
		t.Error("health is not that of the first router")
	}
	first.Terminate()
	p.Until("health is that of the second router", func() bool { return healthOf("monitor") })
}

// The audit log has a line for the start and one for the end of each redirected
// connection, at any log level.
func TestAuditLogHasConnections(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_AUDIT_LOG"], p.Env["EGRESS_LOG_FORMAT"], p.Env["EGRESS_LOG_LEVEL"] = "true", "json", "error"
	r := p.Start("legacy")
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
	conn := p.Dial(p.Lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	a, err := lab.ReadAnswer(bufio.NewReader(conn))
	if err != nil {
		t.Fatal(err)
	}
	client := conn.LocalAddr().String()
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	// The kernel keeps the entry of an ended connection for a while: delete it.
	r.AwaitLog(1, "connection begins")
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
		t.Fatal(err)
	}
	if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
		t.Fatal(err)
	}
	r.AwaitLog(1, "connection ends")
	for line := range strings.Lines(r.Logged()) {
		var got map[string]any
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		want := map[string]any{
			"level": "INFO", "client": client, "protocol": "tcp", "port": 8080.0, "destination": "203.0.113.26:80", "reserved": a.Peer.String(),
		}
		for key, value := range want {
			if got[key] != value {
				t.Errorf("%s: %s is %v, want %v", line, key, got[key], value)
			}
		}
		if got["msg"] == "connection ends" && (got["packets_sent"].(float64) < 3 || got["bytes_received"].(float64) < 100 || got["seconds"].(float64) <= 0 || got["outcome"] != "closed") {
			t.Errorf("counters of the connection: %s", line)
		}
	}
}

// The end of a refused connection is logged at once, with its outcome.
func TestAuditLogHasOutcome(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_AUDIT_LOG"], p.Env["EGRESS_LOG_FORMAT"] = "true", "json"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		const closed = 9999 // of the fallback's server
		if a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, closed)); err == nil {
			p.Fatalf("%v answers", a)
		}
		r.AwaitLog(1, "connection ends")
		for line := range strings.Lines(r.Logged()) {
			var got struct {
				Msg, Local, Outcome string
				Seconds             *float64
				PacketsSent         int `json:"packets_sent"`
			}
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				p.Fatalf("%s: %v", line, err)
			}
			if got.Msg == "connection ends" && (got.Outcome != "refused" || got.Local != "10.128.0.98:9999" || got.PacketsSent != 1 || got.Seconds == nil || *got.Seconds > labtest.Patience.Seconds()) {
				p.Errorf("%s, want it refused", line)
			}
		}
	})
}

// A mount is a directory in which a file comes as the kubelet has it come: as a
// link into a directory that another takes the place of at once.
type mount struct {
	*labtest.Pod
	dir      string
	versions int
}

func newMount(p *labtest.Pod) *mount { return &mount{Pod: p, dir: p.TempDir()} }

// set makes content that of the file, at once.
func (m *mount) set(content string) {
	m.Helper()
	m.versions++
	version := fmt.Sprintf("..version_%d", m.versions)
	for _, err := range []error{
		os.Mkdir(filepath.Join(m.dir, version), 0o755),
		os.WriteFile(filepath.Join(m.dir, version, "destinations"), []byte(content), 0o644),
		os.Symlink(version, filepath.Join(m.dir, "..data_tmp")),
		os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")),
	} {
		if err != nil {
			m.Fatal(err)
		}
	}
	if m.versions == 1 {
		if err := os.Symlink("..data/destinations", m.file()); err != nil {
			m.Fatal(err)
		}
	}
}

func (m *mount) file() string { return filepath.Join(m.dir, "destinations") }

// The resource as a file describes the same router as the variables. Its destinations are
// followed, and an object that no router can have, or with other addresses, leaves the
// previous one in force.
func TestConfigFile(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		m := newMount(p)
		object := func(ip, rules string) {
			m.set(fmt.Sprintf(`{kind: EgressRouter, spec: {addresses: [{ip: %s, gateway: 192.168.12.1}, {ip: "2001:db8:12::99/64", gateway: "2001:db8:12::1"}], redirect: {redirectRules: [%s], fallbackIP: 203.0.113.27}}}`, ip, rules))
		}
		p.Serve(p.Lab.Outside, "tcp", "[2001:db8::25]:80")
		const web, mail, six = "{port: 80, protocol: TCP, destinationIP: 203.0.113.25}", "{port: 8443, targetPort: 443, protocol: TCP, destinationIP: 203.0.113.26}", `{port: 81, targetPort: 80, protocol: TCP, destinationIP: "2001:db8::25"}`
		object("192.168.12.99/24", web+", "+mail)
		for _, name := range []string{"EGRESS_SOURCE", "EGRESS_GATEWAY", "EGRESS_DESTINATION"} {
			delete(p.Env, name)
		}
		p.Env["EGRESS_GRAMMAR"] = "" // the resource has none
		p.Env["EGRESS_CONFIG"], p.Env["EGRESS_HEALTH_INTERVAL"], p.Env["EGRESS_HEALTH_LISTEN"] = m.file(), "1h", ":9465"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		kept := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		p.WantAnswer("tcp", 8443, "203.0.113.26:443")
		p.WantAnswer("tcp", 9000, "203.0.113.27:9000")

		object("192.168.12.99/24", web+", "+six)
		r.AwaitLog(1, "destinations changed")
		to6 := netip.AddrPortFrom(lab.RouterAddr6, 81)
		p.Until("the new rule redirects", func() bool {
			_, err := p.Ask(p.Lab.Client, "tcp", to6)
			return err == nil
		})
		if a, err := p.Ask(p.Lab.Client, "tcp", to6); err != nil || a.Peer.Addr() != lab.Source6 {
			p.Errorf("answer %v, error %v; want the source %s", a, err, lab.Source6)
		}
		p.WantEcho("an open connection", kept, bufio.NewReader(kept))

		before := p.State()
		object("192.168.12.99/24", "{port: 80, protocol: TCP, destinationIP: nowhere}")
		r.AwaitLog(1, `spec.redirect.redirectRules[0].destinationIP is \"nowhere\": expected an IPv4 or IPv6 address`)
		object("192.168.12.98/24", web)
		r.AwaitLog(1, "spec.addresses is another one than at the start")
		p.WantState(before)
		wantMetrics(p, `egress_router_reload_failures_total 2`, `egress_router_ready 1`)
	})
}

// A changed list in a mount takes effect when the kernel notifies of it, and
// connections of unchanged lines continue. An invalid list leaves the previous one in
// force.
func TestReloadKeepsConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		m := newMount(p)
		m.set("80 tcp 203.0.113.25\n8443 tcp 203.0.113.26 443\n")
		delete(p.Env, "EGRESS_DESTINATION")
		p.Env["EGRESS_DESTINATION_FILE"], p.Env["EGRESS_HEALTH_LISTEN"] = m.file(), ":9465"
		// The kernel notifies the router of changes. It does not look by itself so soon.
		p.Env["EGRESS_HEALTH_INTERVAL"] = "1h"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })

		const open = 200
		var conns []net.Conn
		for range open {
			conns = append(conns, p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)))
		}
		p.WantAnswer("tcp", 8443, "203.0.113.26:443")

		m.set("80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n")
		r.AwaitLog(1, "destinations changed")
		r.Until("the new line redirects", func() bool {
			_, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
			return err == nil
		})
		p.WantAnswer("tcp", 8080, "203.0.113.26:80")
		p.WantRefused("tcp", 8443)
		for i, conn := range conns {
			p.WantEcho(fmt.Sprintf("open connection %d", i), conn, bufio.NewReader(conn))
		}
		wantMetrics(p,
			`egress_router_reloads_total 1`, `egress_router_reload_failures_total 0`, `egress_router_repairs_total{kind="rules"} 0`,
			fmt.Sprintf(`egress_router_connections_total{destination="203.0.113.25:80",port="80",protocol="tcp"} %d`, open),
			`egress_router_connections_total{destination="203.0.113.26:80",port="8080",protocol="tcp"} 2`,
		)

		// An invalid list is logged, and changes neither the rules nor readiness.
		before := p.State()
		m.set("80 tcp 203.0.113.25\n8080 tcp nowhere\n")
		r.AwaitLog(1, "invalid destination file")
		if plain := `hint="` + m.file() + `:2: \"8080 tcp nowhere\": `; !strings.Contains(r.Logged(), plain) {
			p.Errorf("the log lacks %s:\n%s", plain, r.Logged())
		}
		p.WantState(before)
		code, out := p.Health()
		if code != 0 || !strings.Contains(out, "EGRESS_DESTINATION value '8080 tcp nowhere' is invalid") {
			p.Errorf("health: exit code %d, want 0 and the invalid line:\n%s", code, out)
		}
		wantMetrics(p, `egress_router_reload_failures_total 1`, `egress_router_ready 1`)

		// After SIGHUP the router reads the file, and logs the fault, again.
		if err := r.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
			p.Fatal(err)
		}
		r.AwaitLog(2, "invalid destination file")
		m.set("8443 tcp 203.0.113.26 443\n")
		r.AwaitLog(2, "destinations changed")
		p.Until("the new line redirects", func() bool {
			a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8443))
			return err == nil && a.Server.String() == "203.0.113.26:443"
		})
	})
}
