package httpproxy

import (
	"io"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wantCounts waits for counters, since requests are counted when they end.
func (p *testProxy) wantCounts(t *testing.T, want Counts) {
	t.Helper()
	var diff string
	if !await(func() bool {
		diff = cmp.Diff(want, p.Status().Counts)
		return diff == ""
	}) {
		t.Errorf("counts (- want, + got):\n%s", diff)
	}
}

// wantRunning waits for a number of active requests and tunnels.
func (p *testProxy) wantRunning(t *testing.T, want int) {
	t.Helper()
	if !await(func() bool { return p.Status().Running == want }) {
		t.Errorf("%d requests and tunnels are active, want %d", p.Status().Running, want)
	}
}

func TestStatus(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		if strings.HasPrefix(header(conn), "POST ") { // or the proxy may drop the body
			_, _ = io.ReadFull(conn, make([]byte, 5))
		}
		send(t, conn, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
	})
	_, port, _ := net.SplitHostPort(server)
	p := start(t, "!denied.example\n*.example\n", zone{"a.example": {"203.0.113.1"}, "b.example": {"203.0.113.250"}}, func(p *Proxy) { p.config.MaxConnections = 7 })
	s := p.Status()
	if s.Rules != 2 || s.RulesErr != nil || s.RulesSince.IsZero() || s.MaxConnections != 7 {
		t.Errorf("status %+v", s)
	}
	var want Counts
	p.wantCounts(t, want)

	conn := p.connect(t)
	send(t, conn, "POST http://a.example:"+port+"/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
	if status, _ := answer(t, conn); status != 204 {
		t.Fatalf("status %d", status)
	}
	want.Requests[Request][2], want.Sent[Request], want.Lookups = 1, 5, 1
	p.wantCounts(t, want)
	p.wantRunning(t, 0)
	if s := p.Status(); s.Listen != p.addr || s.ListenSince.IsZero() || s.Connections != 1 {
		t.Errorf("status %+v", s)
	}

	// A denied name, and one that does not exist.
	for _, test := range []struct {
		host   string
		status int
		count  *int64
	}{{"denied.example", 403, &want.Denied}, {"gone.example", 502, &want.LookupFailures}} {
		status, body := answer(t, p.get(t, test.host))
		if status != test.status {
			t.Fatalf("%s: status %d", test.host, status)
		}
		*test.count++
		want.Requests[Request][status/100]++
		want.Received[Request] += int64(len(body))
	}
	want.Lookups++
	p.wantCounts(t, want)

	// A server that does not exist.
	status, body := answer(t, p.get(t, "a.example:1"))
	if status != 502 {
		t.Fatalf("status %d", status)
	}
	want.Requests[Request][5]++
	want.Lookups++
	want.ConnectFailures++
	want.Received[Request] += int64(len(body))
	p.wantCounts(t, want)

	tunnel := p.tunnel(t, "a.example:"+port)
	p.wantRunning(t, 1)
	send(t, tunnel, "\r\n\r\n")
	wantEnd(t, tunnel, "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
	tunnel.Close()
	want.Requests[Tunnel][2], want.Sent[Tunnel], want.Received[Tunnel] = 1, 4, 46
	want.Lookups++
	p.wantCounts(t, want)

	p.stop()
	if err := <-p.done; err != nil {
		t.Error(err)
	}
	p.done <- nil // for the end of the test
	if s := p.Status(); s.Listen != "" {
		t.Errorf("the proxy listens on %s after its end", s.Listen)
	}
}
