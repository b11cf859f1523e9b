package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A logPipe is the log of a program, and its reader.
type logPipe struct {
	*os.File
	cmd *exec.Cmd
}

// logged starts a program whose log is a full pipe: it can write when the test reads.
func logged(p *labtest.Pod, cmd *exec.Cmd) *logPipe {
	p.Helper()
	from, to, err := os.Pipe()
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = from.Close() })
	const size = 4096 // the smallest (F_SETPIPE_SZ in fcntl(2))
	if _, err := unix.FcntlInt(to.Fd(), unix.F_SETPIPE_SZ, size); err != nil {
		p.Fatal(err)
	}
	if _, err := to.Write(bytes.Repeat([]byte{'\n'}, size)); err != nil {
		p.Fatal(err)
	}
	cmd.Stderr = to
	if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
		p.Fatal(err)
	}
	_ = to.Close()
	return &logPipe{from, cmd}
}

// wantEnd stops the program and checks that it ends with exit code 0.
func (l *logPipe) wantEnd(p *labtest.Pod) {
	p.Helper()
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.Fatal(err)
	}
	late := time.AfterFunc(labtest.Patience, func() { _ = l.cmd.Process.Kill() })
	defer late.Stop()
	if err := l.cmd.Wait(); err != nil {
		p.Errorf("after SIGTERM: %v", err)
	}
}

// awaitReady waits until the program of a pod is ready.
func awaitReady(p *labtest.Pod) {
	p.Helper()
	p.Until("the program is ready", func() bool { code, _ := p.Health(); return code == 0 })
}

// A router whose log nobody reads repairs drift and ends when it is stopped.
func TestRouterRepairsWithUnreadLog(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_HEALTH_INTERVAL"] = "legacy", "300ms"
		p.Env["EGRESS_AUDIT_LOG"] = "true"
		l := logged(p, p.Command("egress-router"))
		r := &labtest.Running{Pod: p, Cmd: l.cmd}
		awaitReady(p)
		before := p.State()
		for range 3 {
			p.FlushSourceRule()
			r.Settle(before)
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
		}
		l.wantEnd(p)
	})
}

// A program whose log has lost its reader continues, and counts the lines. A router
// that is being set up completes.
func TestRouterSurvivesEndOfLogReader(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_LOG_LEVEL"] = "init", "debug"
		l := logged(p, p.Command("egress-router"))
		_ = l.Close()
		if err := l.cmd.Wait(); err != nil {
			p.Errorf("init: %v", err)
		}
		p.WantExample()

		p.Env["EGRESS_ROUTER_MODE"], p.Env["EGRESS_HEALTH_INTERVAL"], p.Env["EGRESS_HEALTH_LISTEN"] = "legacy", "300ms", ":9465"
		l = logged(p, p.Command("egress-router"))
		_ = l.Close()
		r := &labtest.Running{Pod: p, Cmd: l.cmd}
		awaitReady(p)
		before := p.State()
		p.FlushSourceRule()
		r.Settle(before)
		p.Until("health has the dropped lines", func() bool {
			code, out := p.Health()
			return code == 0 && strings.Contains(out, "lines dropped, the reader of the log does not read")
		})
		if _, text := get(p, "/metrics"); strings.Contains(text, "egress_router_log_lines_dropped_total 0\n") || !strings.Contains(text, "\negress_router_log_lines_dropped_total ") {
			p.Errorf("/metrics lacks the dropped lines:\n%s", text)
		}
		l.wantEnd(p)
	})
}

// The HTTP proxy serves clients while nobody reads its access log, and the reader gets
// the lines when it is back, the last one at the end of the program.
func TestHTTPProxyServesWithUnreadLog(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_ROUTER_MODE"] = "http-proxy"
	p.OK()
	for _, read := range []bool{false, true} {
		cmd := p.Command("without-privilege", "http-proxy")
		cmd.Env = append(cmd.Env, "EGRESS_HTTP_PROXY_DESTINATION=203.0.113.25", "EGRESS_ACCESS_LOG=true")
		l := logged(p, cmd)
		awaitReady(p)
		conn := p.Dial(p.Lab.Client, "tcp", proxyAddr)
		if err := conn.SetDeadline(time.Now().Add(labtest.Patience)); err != nil {
			t.Fatal(err)
		}
		answers := bufio.NewReader(conn)
		const requests = 400
		for i := range requests {
			fmt.Fprintf(conn, "GET http://203.0.113.26/%d HTTP/1.1\r\nHost: x\r\n\r\n", i)
			r, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatalf("request %d: %v", i, err)
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil || r.StatusCode != http.StatusForbidden {
				t.Fatalf("request %d: %d, %v", i, r.StatusCode, err)
			}
		}
		_ = conn.Close()
		text, most := make(chan string, 1), make(chan struct{})
		if read {
			go func() {
				var b strings.Builder
				lines := bufio.NewReader(l)
				for n := 0; ; {
					line, err := lines.ReadString('\n')
					b.WriteString(line)
					if strings.Contains(line, "msg=access") {
						if n++; n == requests {
							close(most)
						}
					}
					if err != nil {
						break
					}
				}
				text <- b.String()
			}()
			select { // a program that ends waits for a reader that stands still, but not for long
			case <-most:
			case <-time.After(labtest.Patience):
				t.Fatalf("fewer lines than %d requests", requests)
			}
		}
		l.wantEnd(p)
		if !read {
			continue
		}
		if got := <-text; strings.Count(got, "msg=access") != requests || strings.Contains(got, "dropped") {
			t.Errorf("log of %d requests:\n%s", requests, labtest.Tail(got))
		}
	}
}

// The DNS proxy relays connections while nobody reads its log.
func TestDNSProxyRelaysWithUnreadLog(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_ROUTER_MODE"] = "dns-proxy"
	p.OK()
	cmd := p.Command("without-privilege", "dns-proxy")
	cmd.Env = append(cmd.Env, "EGRESS_DNS_PROXY_DESTINATION=8080 203.0.113.25 80", "EGRESS_ACCESS_LOG=true", "EGRESS_HEALTH_LISTEN=:9465")
	l := logged(p, cmd)
	awaitReady(p)
	const connections = 100
	for range connections {
		p.WantAnswer("tcp", 8080, "203.0.113.25:80")
	}
	wantMetrics(p,
		fmt.Sprintf(`egress_dns_proxy_connections_total{destination="203.0.113.25:80",port="8080"} %d`, connections),
		`egress_dns_proxy_open_connections{destination="203.0.113.25:80",port="8080"} 0`,
		`egress_dns_proxy_log_lines_dropped_total 0`)
	l.wantEnd(p)
}
