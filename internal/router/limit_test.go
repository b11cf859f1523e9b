package router_test

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// A client is a client of ports with limits.
type client struct{ *labtest.Pod }

// dial opens a TCP connection, nil if the pod refuses it.
func (c client) dial(port uint16) net.Conn {
	c.Helper()
	conn, err := c.Lab.Dial(c.Context(), c.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() { _ = conn.Close() })
	return conn
}

// wantOpen opens n connections that the server answers.
func (c client) wantOpen(port uint16, n int) (open []net.Conn) {
	c.Helper()
	for i := range n {
		conn := c.dial(port)
		if conn == nil {
			c.Fatalf("port %d: connection %d is refused", port, i+1)
		}
		c.WantEcho(fmt.Sprintf("connection %d to port %d", i+1, port), conn, bufio.NewReader(conn))
		open = append(open, conn)
	}
	return open
}

// wantNone checks that port refuses a TCP connection.
func (c client) wantNone(when string, port uint16) {
	c.Helper()
	if c.dial(port) != nil {
		c.Errorf("%s: a connection to port %d passes", when, port)
	}
}

// wantEntries checks the number of entries in conntrack of TCP connections to port.
func (c client) wantEntries(port uint16, want int) {
	c.Helper()
	found := 0
	if err := c.Lab.Router.Do(func() error {
		entries, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, e := range entries {
			if e.Forward.Protocol == unix.IPPROTO_TCP && e.Forward.DstPort == port {
				found++
			}
		}
		return err
	}); err != nil {
		c.Fatal(err)
	}
	if found != want {
		c.Errorf("%d entries of connections to port %d, want %d", found, port, want)
	}
}

// The connections at a time are limited, each redirect by itself, until one ends. A refused
// one does not get to the fallback and leaves no entry in conntrack; those that are open
// stay, and count on after a reload of another line, and after another run.
func TestLimitOfConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		c := client{p}
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.25:443")
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.25:8010")
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.27:443")
		const list = "443 tcp 203.0.113.25 max=2\n8000-8010 tcp,udp 203.0.113.25 8010 max=1\n"
		r, replace := startWithFile(p, list+"203.0.113.27\n")
		open := c.wantOpen(443, 2)
		c.wantNone("beyond the limit", 443)
		c.wantEntries(443, 2)
		c.wantOpen(8001, 1)
		c.wantNone("another port of the range", 8002)

		replace(list + "90 tcp 203.0.113.25\n91 tcp 203.0.113.25 max=5\n203.0.113.27\n")
		r.AwaitLog(2, "rules loaded")
		c.wantNone("after a reload", 443)
		c.wantNone("after a reload", 8003)

		_ = open[0].Close()
		p.Until("a connection passes after another has ended", func() bool {
			conn := c.dial(443)
			if conn != nil {
				open[0] = conn
			}
			return conn != nil
		})
		c.wantNone("beyond the limit again", 443)
		for _, conn := range open {
			p.WantEcho("an open connection", conn, bufio.NewReader(conn))
		}
		p.Until("every open connection counts for its destination, and no other", func() bool {
			return strings.Contains(p.Metrics(), `egress_router_connections_total{destination="203.0.113.25:443",port="443",protocol="tcp"} 3`)
		})
		p.Until("the refused connections are counted", func() bool {
			return p.Metric(`egress_router_dropped_packets_total{reason="limit"}`) >= 5
		})
		r.Terminate()

		p.Env["EGRESS_ROUTER_MODE"] = "init"
		state := p.State()
		p.WantUnchanged(p.OK())
		p.WantState(state)
		c.wantNone("after another run", 443)
	})
}

// New connections are limited beyond a burst, and pass again later. Those of a UDP flow
// count once, and are refused by ICMP.
func TestLimitOfRate(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		c := client{p}
		p.Env["EGRESS_GRAMMAR"] = "extended"
		p.Env["EGRESS_DESTINATION"] = "443 tcp 203.0.113.25 limit=1/m burst=3\n444 tcp 203.0.113.25 443 limit=1/s\n53 udp 203.0.113.25 limit=1/m burst=2\n80 tcp 203.0.113.25 443\n"
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.25:443")
		p.OK()
		open := c.wantOpen(443, 3)
		c.wantNone("beyond the burst", 443)
		for _, conn := range open {
			p.WantEcho("an open connection", conn, bufio.NewReader(conn))
		}
		p.Until("a connection is refused", func() bool { return c.dial(444) == nil })
		p.Until("a connection passes again", func() bool { return c.dial(444) != nil })
		c.wantOpen(80, 1)

		flows := []*labtest.Flow{p.Flow(53), p.Flow(53)}
		for range 3 { // one datagram of each flow counts
			for _, f := range flows {
				f.WantAnswer("a flow within the limit", "203.0.113.25:53", lab.Source.String())
			}
		}
		p.WantRefused("udp", 53)
	})
}

// Damages of a limit are repaired, and what it has counted is no damage.
func TestLimitDrift(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "443 tcp 203.0.113.25 limit=100/s burst=7 max=3\n500-600 udp 203.0.113.26 limit=7/m\n"
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.25:443")
		p.OK()
		client{p}.wantOpen(443, 2)
		want := p.State()
		for _, damage := range []string{
			"flush chain ip egress-router-limits tcp-443",
			"add rule ip egress-router-limits tcp-443 accept",
			"flush map ip egress-router-limits limits",
			"add element ip egress-router-limits limits { tcp . 80 : goto tcp-443 }",
			"flush chain ip egress-router-limits limits-prerouting",
			"flush chain ip egress-router-limits limits",
			"add chain ip egress-router-limits other",
			"add chain ip egress-router-limits tcp-81",
			"delete table ip egress-router-limits",
		} {
			p.WantState(want)
			p.NFT(damage)
			if r := p.OK(); !strings.Contains(r.Stderr, "rules loaded") {
				p.Errorf("%s: no repair:\n%s", damage, r.Stderr)
			}
		}
		p.WantState(want)
		p.WantUnchanged(p.OK())
		p.Env["EGRESS_DESTINATION"] = "443 tcp 203.0.113.25\n"
		p.OK()
		if rules := p.Rules(); strings.Contains(rules, "egress-router-limits") {
			p.Errorf("limits remain:\n%s", rules)
		}
	})
}

// Each family has limits of its own, and a refusal reaches clients of any subnet.
func TestLimitsOfBothFamilies(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		const list = "80 tcp 203.0.113.25 limit=1/m\n80 tcp 2001:db8::25 limit=1/m\n53 udp 2001:db8::25 limit=1/m\n53 udp 203.0.113.25 limit=1/m\n" + fallback6
		connectDual(p, list, lab.Source, lab.Source6)
		out := captureOn(p, p.Lab.Router, "macvlan0")
		for _, s := range []struct {
			proto, addr, server string
			source              netip.Addr
		}{
			{"tcp", "10.128.0.98:80", "203.0.113.25:80", lab.Source}, {"tcp", "[fd00:10:128::98]:80", "[2001:db8::25]:80", lab.Source6},
			{"udp", "10.128.0.98:53", "203.0.113.25:53", lab.Source}, {"udp", "[fd00:10:128::98]:53", "[2001:db8::25]:53", lab.Source6},
		} {
			wantDual(p, p.Lab.Client, s.proto, s.addr, s.server, s.source)
			for _, client := range []*netns.Namespace{p.Lab.Far, p.Lab.Client} {
				if a, err := p.Ask(client, s.proto, netip.MustParseAddrPort(s.addr)); !errors.Is(err, syscall.ECONNREFUSED) {
					p.Errorf("%s %s beyond the limit: answer %v, error %v; want a refusal", s.proto, s.addr, a, err)
				}
			}
		}
		if !p.Load(list, lab.Source, lab.Source6) {
			p.Error("a second load changes something")
		}
		wantSources6(p, out, lab.Source6)
	})
}
