package probe_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// startConnection sends a SYN from the client to a port of the pod, and waits for nothing.
func startConnection(p *labtest.Pod, port uint16) {
	p.Helper()
	err := p.Lab.Client.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(port), Addr: lab.RouterAddr.As4()}); !errors.Is(err, unix.EINPROGRESS) {
			return os.NewSyscallError("connect", err)
		}
		return nil
	})
	if err != nil {
		p.Fatal(err)
	}
}

// The metrics and the health of a router that stays have the reason of each failure, of the
// connections of clients and of its own probes, in the words of a diagnosis.
func TestRunningRouterNamesReasons(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 81\n8443 tcp 203.0.113.26 443\n53 udp 203.0.113.27\n"
		p.Env["EGRESS_HEALTH_LISTEN"], p.Env["EGRESS_PROBE"], p.Env["EGRESS_PROBE_INTERVAL"] = ":9465", "tcp", "1s"
		filter(p, p.Lab.Outside, atServer("ip daddr 203.0.113.26 tcp dport 443 drop"))
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.Until("connections are counted", func() bool { return strings.Contains(p.Metrics(), "egress_router_connections_total{") })
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		if _, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
			p.Errorf("port 8080: %v, want a refusal", err)
		}
		// Only now: the other entries need their time on a busy machine.
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_tcp_timeout_syn_sent", "1"); err != nil {
			p.Fatal(err)
		}
		startConnection(p, 8443)

		const connections, probes = "egress_router_connection_failures_total", "egress_router_probe_failures_total"
		text := ""
		for _, line := range []string{
			connections + `{destination="203.0.113.26:81",port="8080",protocol="tcp",reason="refused"} 1`,
			connections + `{destination="203.0.113.26:81",port="8080",protocol="tcp",reason="silent"} 0`,
			connections + `{destination="203.0.113.26:443",port="8443",protocol="tcp",reason="silent"} 1`,
			connections + `{destination="203.0.113.26:443",port="8443",protocol="tcp",reason="refused"} 0`,
			connections + `{destination="203.0.113.25:80",port="80",protocol="tcp",reason="silent"} 0`,
			`egress_router_fault{fault="refused-by-server"} 1`, // of the first one
			`egress_router_fault{fault="gateway-silent"} 0`,
			probes + `{destination="203.0.113.25:80",protocol="tcp",reason="silent"} 0`,
		} {
			p.Until("/metrics has "+line, func() bool { text = p.Metrics(); return strings.Contains(text, line+"\n") })
		}
		if strings.Contains(text, connections+`{destination="203.0.113.27`) {
			p.Errorf("datagrams have failures:\n%s", text)
		}
		p.Until("the probes count", func() bool {
			return p.Metric(probes+`{destination="203.0.113.26:81",protocol="tcp",reason="refused"}`) >= 1 &&
				p.Metric(probes+`{destination="203.0.113.26:443",protocol="tcp",reason="silent"}`) >= 1 &&
				p.Metric("egress_router_probe_connect_seconds_count") >= 2 && p.Metric(`egress_router_probe_connect_seconds_bucket{le="5"}`) >= 2
		})
		p.Until("health names the reasons", func() bool {
			code, out := p.Health()
			return code == 0 && strings.Contains(out, "2 of 3 unreachable: 203.0.113.26:81: refused: ") &&
				strings.Contains(out, "; 1 refused, 1 silent\n    fault: refused-by-server\n")
		})
		r.AwaitLog(1, `msg="destination unreachable" destination=203.0.113.26:443 outcome=silent`)
	})
}

// The status page has a refused connection, of which the kernel keeps no entry, and counts
// only open connections among those that wait for an answer.
func TestPageHasFailedConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"], p.Env["EGRESS_HEALTH_LISTEN"] = "80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 81\n", ":9465"
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.Until("connections are counted", func() bool { return strings.Contains(p.Metrics(), "egress_router_connections_total{") })
		p.Until("the page has the refusal", func() bool { // again after a minute on a machine that stood still
			if _, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
				p.Errorf("port 8080: %v, want a refusal", err)
			}
			text := p.Page("/")
			return strings.Contains(text, ">a connection refused ") && strings.Contains(text, "destinations with a failure: 1<")
		})

		p.WantAnswer("tcp", 80, "203.0.113.25:80") // the kernel keeps its entry for two minutes
		filter(p, p.Lab.Outside, atServer("tcp dport 80 drop"))
		var before string
		p.Until("the page has the silence", func() bool {
			startConnection(p, 80)
			var found bool
			before, _, found = strings.Cut(p.Page("/"), " open connections without an answer")
			return found
		})
		var silent, open int
		if _, err := fmt.Sscanf(before[strings.LastIndexAny(before, ">;")+1:], "%d of %d", &silent, &open); err != nil || silent != open {
			p.Errorf("%v: %d of %d open connections without an answer", err, silent, open)
		}
	})
}
