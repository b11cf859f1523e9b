package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// get asks a program by HTTP, as a kubelet does: from the cluster side.
func get(p *labtest.Pod, path string) (status int, body string) {
	p.Helper()
	p.Until("GET "+path+" is answered", func() bool { // as labtest.Pod.Metrics
		conn := p.Dial(p.Lab.Client, "tcp", labtest.HealthAddr)
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: pod\r\n\r\n", path)
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return false
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		status, body = r.StatusCode, string(text)
		return err == nil
	})
	return status, body
}

// keepDatagrams has the kernel keep the entries of datagrams for longer than any test takes, and
// not for 30 s.
func keepDatagrams(p *labtest.Pod) {
	p.Helper()
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_udp_timeout", "3600"); err != nil {
		p.Fatal(err)
	}
}

func wantGet(p *labtest.Pod, path string, status int, body string) {
	p.Helper()
	if s, b := get(p, path); s != status || b != body {
		p.Errorf("%s: %d %q, want %d %q", path, s, b, status, body)
	}
}

// A proxy is ready from the time it listens to SIGTERM, and reports that it shuts
// down while connections continue. The physical network cannot reach its health port.
func TestProxyHealthUntilShutdown(t *testing.T) {
	t.Parallel()
	for program, test := range map[string]struct {
		env     map[string]string
		begin   string // first line of a client
		metrics []string
	}{
		"http-proxy": {
			map[string]string{"EGRESS_HTTP_PROXY_DESTINATION": "*"},
			"CONNECT 203.0.113.26:80 HTTP/1.1\r\nHost: 203.0.113.26:80\r\n\r\n",
			[]string{"egress_http_proxy_open_requests 1", "egress_http_proxy_open_connections 1", `egress_http_proxy_requests_total{code="2xx",kind="tunnel"} 0`},
		},
		"dns-proxy": {
			map[string]string{"EGRESS_DNS_PROXY_DESTINATION": "8080 203.0.113.26 80"},
			"",
			[]string{`egress_dns_proxy_open_connections{destination="203.0.113.26:80",port="8080"} 1`, `egress_dns_proxy_connections_total{destination="203.0.113.26:80",port="8080"} 1`},
		},
	} {
		t.Run(program, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.Nftables)
			p.Env = map[string]string{"EGRESS_ROUTER_MODE": program, "EGRESS_SOURCE": "192.168.12.99/24", "EGRESS_GATEWAY": "192.168.12.1"}
			p.OK()
			if code, out := p.Health(); code != 1 || out != "" {
				t.Errorf("before the proxy: exit code %d, want 1 and nothing; stdout:\n%s", code, out)
			}
			p.Env = test.env
			p.Env["EGRESS_HEALTH_LISTEN"], p.Env["EGRESS_SHUTDOWN_GRACE"] = ":9465", "1h"
			cmd := p.Command("without-privilege", program)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
				t.Fatal(err)
			}
			p.Until("the proxy is ready", func() bool { code, _ := p.Health(); return code == 0 })
			wantGet(p, "/healthz", 200, "ok\n")
			wantGet(p, "/readyz", 200, "ok\n")
			wantNoUseFromOutside(p, labtest.HealthAddr.Port())

			conn := p.Dial(p.Lab.Client, "tcp", proxyAddr)
			fmt.Fprint(conn, test.begin)
			var text string
			p.Until("the metrics have the connection", func() bool {
				_, text = get(p, "/metrics")
				return strings.Contains(text, test.metrics[0]+"\n")
			})
			for _, m := range append(test.metrics, "egress_"+strings.ReplaceAll(program, "-", "_")+"_ready 1") {
				if !strings.Contains(text, m+"\n") {
					t.Errorf("the metrics lack %s:\n%s", m, text)
				}
			}

			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			p.Until("the proxy is not ready", func() bool { status, _ := get(p, "/readyz"); return status != 200 })
			wantGet(p, "/readyz", 503, "shutting down\n")
			wantGet(p, "/healthz", 200, "ok\n")
			if code, out := p.Health(); code != 1 || !strings.Contains(out, "\n  not ready: shutting down\n") {
				t.Errorf("after SIGTERM: exit code %d, want 1; stdout:\n%s", code, out)
			}
			_ = conn.Close()
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, &stderr)
			}
			if code, out := p.Health(); code != 1 || out != "" {
				t.Errorf("after the proxy: exit code %d, want 1 and nothing; stdout:\n%s", code, out)
			}
		})
	}
}
