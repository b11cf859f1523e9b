package main

import (
	"bufio"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// row returns a pattern of a row of a table on the page, with these cells among others.
func row(cells ...string) *regexp.Regexp {
	for i, c := range cells {
		cells[i] = `<td role="cell"[^>]*>` + regexp.QuoteMeta(c) + `</td>`
	}
	return regexp.MustCompile(`<tr role="row" class="[a-z]+">[^\n]*` + strings.Join(cells, `[^\n]*`))
}

// wantPage waits until the page has texts and rows.
func wantPage(p *labtest.Pod, parts ...any) string {
	p.Helper()
	var text string
	for _, part := range parts {
		p.Until(fmt.Sprintf("the page has %v", part), func() bool {
			var status int
			if status, text = get(p, "/"); status != 200 {
				p.Fatalf("/: %d %s", status, text)
			}
			if re, is := part.(*regexp.Regexp); is {
				return re.MatchString(text)
			}
			return strings.Contains(text, part.(string))
		})
	}
	return text
}

// The page of a router has the state, destinations with their counters, connections, ports
// and repairs. It changes nothing, and needs nothing else.
func TestPage(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		keepDatagrams(p)
		for range 2 {
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
		}
		p.Flow(53).WantAnswer("by the fallback", "203.0.113.27:53", "192.168.12.99")
		p.FlushSourceRule()
		r.AwaitLog(1, labtest.RepairLogged)
		wantPage(p,
			`>Ready</span>`, "10.128.0.98", "192.168.12.99/24, no conflict", "192.168.12.1 answers ARP",
			row("tcp 80", "203.0.113.25:80", "", "0", "2"), row("others", "203.0.113.27", "", "1", "1"), row("tcp 8443", "203.0.113.26:443", "", "0", "0"),
			row("udp", "replied", "53", "203.0.113.27:53"), row("192.168.12.99", "tcp", "203.0.113.25:80", "2"),
			"<strong>repaired</strong>", "<strong>ready</strong>",
		)
		wantGet(p, "/other", 404, "not found: the paths are /, /healthz, /metrics and /readyz\n")
		if status, text := get(p, "/?q=tcp+8443"); status != 200 || !row("tcp 8443").MatchString(text) || row("tcp 80").MatchString(text) {
			p.Errorf("the search for a port: %d\n%s", status, text)
		}
		for request, want := range map[string]string{"POST /": "405", "HEAD /": "200"} {
			conn := p.Dial(p.Lab.Client, "tcp", labtest.HealthAddr)
			fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: pod\r\nContent-Length: 0\r\n\r\n", request)
			if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 "+want) {
				p.Errorf("%s: %q, %v; want %s", request, line, err, want)
			}
			_ = conn.Close()
		}

		h := p.Handle(p.Lab.Router)
		if err := h.LinkDel(p.Link(h, "macvlan0")); err != nil {
			p.Fatal(err)
		}
		wantPage(p, `>Not ready</span>`, `<li>interface &#34;macvlan0&#34; not found`, "Check what creates it")
	})
}

// A connection without an answer is a failure of its destination; one that was refused is
// counted.
func TestPageNamesUnanswered(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
		p.Env["EGRESS_DESTINATION"] = "81 tcp 203.0.113.25 81\n82 tcp 203.0.113.25 82\n80 tcp 203.0.113.25\n"
		p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		if err := p.Lab.Run(p.Lab.Outside, p.Command("nft", "add table ip fault; add chain ip fault input { type filter hook input priority 0; }; add rule ip fault input tcp dport 81 drop")); err != nil {
			p.Fatal(err)
		}
		if conn, err := p.Lab.Dial(p.Context(), p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 82)); err == nil {
			_ = conn.Close()
			p.Error("a port that nothing listens on accepts a connection")
		}
		given := make(chan struct{})
		p.Cleanup(func() { <-given })
		go func() {
			defer close(given)
			if conn, err := p.Lab.Dial(p.Context(), p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 81)); err == nil {
				_ = conn.Close()
			}
		}()
		text := wantPage(p, row("tcp 81", "203.0.113.25:81", "1 of 1 open connections without an answer"), row("tcp", "SYN_SENT unreplied", "81"))
		wantPage(p, row("tcp 82", "203.0.113.25:82", "so far 1 refused")) // once the kernel forgets it
		if strings.Index(text, "tcp 81<") > strings.Index(text, "tcp 80<") {
			p.Errorf("the destination with a failure is not the first one:\n%s", text)
		}
	})
}

// The page of the HTTP proxy has the hits of each rule, and nothing that a client wrote.
func TestPageOfHTTPProxy(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	r := startProxy(p, "http-proxy", map[string]string{"EGRESS_HTTP_PROXY_DESTINATION": "!203.0.113.26\n203.0.113.0/24", "EGRESS_ACCESS_LOG": "true"})
	for _, host := range []string{"203.0.113.25", "203.0.113.25", "203.0.113.26", "192.0.2.1"} {
		response := request(p, p.Lab.Client, proxyAddr, "GET http://"+host+"/?token=secret HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n")
		if _, err := response.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	r.AwaitLog(4, "msg=access")
	text := wantPage(p, row("1", "!203.0.113.26", "denied", "1"), row("2", "203.0.113.0/24", "allowed", "2"), row("no rule matches", "denied", "1"), "<strong>ready</strong>", "2 requests denied")
	for _, leaked := range []string{"secret", "token", "access", "10.128.0.71"} {
		if strings.Contains(text, leaked) {
			t.Errorf("the page has %q:\n%s", leaked, text)
		}
	}
}

// The page of the DNS proxy has its destinations.
func TestPageOfDNSProxy(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	startProxy(p, "dns-proxy", map[string]string{"EGRESS_DNS_PROXY_DESTINATION": "8080 203.0.113.26 80\n8081 203.0.113.26 81"})
	conn := p.Dial(p.Lab.Client, "tcp", proxyAddr)
	defer conn.Close()
	wantPage(p, row("8080", "203.0.113.26:80: 1 address", "1", "1", "0"), row("8081", "203.0.113.26:81: 1 address", "0", "0"))
}

// With 10,000 destinations and 1,000 connections, the page costs less than the metrics, to
// which any number of readers adds little.
func TestPageOfManyDestinations(t *testing.T) {
	t.Parallel()
	var list strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&list, "%d tcp 203.0.113.%d 80\n", 10000+i, 25+i%2)
	}
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	file := filepath.Join(t.TempDir(), "destinations")
	if err := os.WriteFile(file, []byte(list.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	p.Env["EGRESS_DESTINATION"], p.Env["EGRESS_DESTINATION_FILE"], p.Env["EGRESS_HEALTH_LISTEN"] = "", file, ":9465"
	r := p.Start("legacy")
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
	for i := range 1000 {
		defer p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, uint16(10000+i%500))).Close()
	}
	before := residentMemory(t, r.Cmd.Process.Pid)
	for range 3 {
		get(p, "/")
	}
	after := residentMemory(t, r.Cmd.Process.Pid)
	const rounds = 8
	var times [2]time.Duration // the shortest: a process may stand still in any other
	for round := range rounds {
		for i, path := range []string{"/", "/metrics"} {
			begin := time.Now()
			if status, _ := get(p, path); status != 200 {
				t.Fatalf("%s: status %d", path, status)
			}
			if took := time.Since(begin); round == 0 || took < times[i] {
				times[i] = took
			}
		}
	}
	t.Logf("the page takes %s, the metrics %s; resident memory %d, then %d bytes", times[0], times[1], before, after)
	if times[0] > times[1] {
		t.Errorf("the page takes %s, the metrics %s", times[0], times[1])
	}
	if _, text := get(p, "/?page=200"); !strings.Contains(text, "9,951 to 10,000 of 10,000") {
		t.Errorf("the last page has\n%s", text)
	}
	// Readers at the same time share a look at the kernel.
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			if status, _ := get(p, "/"); status != http.StatusOK {
				t.Errorf("status %d", status)
			}
		})
	}
	all.Wait()
	wantGet(p, "/readyz", 200, "ok\n")
}

// startProxy configures the network for a proxy and starts it, until the test ends.
func startProxy(p *labtest.Pod, program string, variables map[string]string) *labtest.Running {
	p.Helper()
	p.Env["EGRESS_ROUTER_MODE"] = program
	p.OK()
	p.Env = variables
	p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
	r := p.StartCommand("egress-" + program)
	p.Until("the proxy is ready", func() bool { code, _ := p.Health(); return code == 0 })
	return r
}
