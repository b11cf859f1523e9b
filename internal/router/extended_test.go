package router_test

import (
	"bufio"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// extended is a list of the extended grammar.
const extended = `5300      tcp,udp 203.0.113.25           # both
6000-6010   udp      203.0.113.26             # the same ports
7000-7100   tcp      203.0.113.26 17000-17100
30000-30100 udp      203.0.113.26 9000-9100
40000-41000 tcp      203.0.113.25 1443        # one port
3868        sctp     203.0.113.27 3869
5000-5010   sctp     203.0.113.27 5100-5110
`

// Every form of the extended grammar redirects real traffic, in a short list and in one
// that is a tree of chains. The next run changes nothing.
func TestExtendedRedirects(t *testing.T) {
	t.Parallel()
	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, "%d tcp 203.0.113.26 443\n", 20001+i)
	}
	for name, list := range map[string]string{"short": extended, "long": many.String() + extended} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", list
				for _, s := range []string{
					"tcp 203.0.113.25:5300", "udp 203.0.113.25:5300", "udp 203.0.113.26:6000", "udp 203.0.113.26:6010", "tcp 203.0.113.26:17000",
					"tcp 203.0.113.26:17042", "tcp 203.0.113.26:17100", "udp 203.0.113.26:9042", "tcp 203.0.113.25:1443",
				} {
					proto, addr, _ := strings.Cut(s, " ")
					p.Serve(p.Lab.Outside, proto, addr)
				}
				p.OK()
				p.WantAnswer("tcp", 5300, "203.0.113.25:5300")
				p.WantAnswer("udp", 5300, "203.0.113.25:5300")
				p.WantAnswer("udp", 6000, "203.0.113.26:6000")
				p.WantAnswer("udp", 6010, "203.0.113.26:6010")
				p.WantAnswer("tcp", 7000, "203.0.113.26:17000")
				p.WantAnswer("tcp", 7042, "203.0.113.26:17042")
				p.WantAnswer("tcp", 7100, "203.0.113.26:17100")
				p.WantAnswer("udp", 30042, "203.0.113.26:9042")
				p.WantAnswer("tcp", 40000, "203.0.113.25:1443")
				p.WantAnswer("tcp", 40500, "203.0.113.25:1443")
				p.WantAnswer("tcp", 41000, "203.0.113.25:1443")
				for _, port := range []uint16{5999, 6011, 30101} {
					p.WantRefused("udp", port)
				}
				for _, port := range []uint16{6000, 6999, 7101, 39999, 41001} {
					p.WantRefused("tcp", port)
				}
				p.WantSCTP(3868, 3869)
				p.WantSCTP(5007, 5107)

				state := p.State()
				p.WantUnchanged(p.OK())
				p.WantState(state)
			})
		})
	}
}

// A range of 30,000 ports is one rule or element. One to shifted ports may be a few elements
// in nftables, here two: the kernel shifts by the remainder of a division.
func TestRangeCostsOneElement(t *testing.T) {
	t.Parallel()
	for name, to := range map[string]string{"to the same ports": "", "to one port": " 443", "to shifted ports": " 10000-39999"} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "80 tcp 203.0.113.25\n20000-49999 tcp 203.0.113.26"+to+"\n"
				for _, s := range []string{"203.0.113.26:20000", "203.0.113.26:49999", "203.0.113.26:10000", "203.0.113.26:39999"} {
					p.Serve(p.Lab.Outside, "tcp", s)
				}
				p.OK()
				want := 1
				if p.Backend == labtest.Nftables && name == "to shifted ports" {
					want = 2
				}
				if n := strings.Count(p.Rules(), "203.0.113.26"); n != want {
					p.Errorf("%d rules or elements, want %d:\n%s", n, want, p.Rules())
				}
				for _, port := range []uint16{20000, 49999} {
					server := map[string]uint16{"": port, " 443": 443, " 10000-39999": port - 10000}[to]
					p.WantAnswer("tcp", port, fmt.Sprint("203.0.113.26:", server))
				}
				p.WantRefused("tcp", 19999)
				p.WantRefused("tcp", 50000)
			})
		})
	}
}

// The counters have a line for each range, and the router that stays applies another
// range without a break of other connections.
func TestExtendedReload(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Serve(p.Lab.Outside, "udp", "203.0.113.26:9042")
		p.Serve(p.Lab.Outside, "udp", "203.0.113.26:9142")
		r, replace := startWithFile(p, "80 tcp 203.0.113.25\n30000-30100 udp 203.0.113.26 9000-9100 # first\n")
		conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		answers := bufio.NewReader(conn)
		p.WantEcho("before the change", conn, answers)
		p.WantAnswer("udp", 30042, "203.0.113.26:9042")
		counted := func(n int, labels string) {
			p.Helper()
			line := fmt.Sprintf("egress_router_connections_total{%s} %d\n", labels, n)
			p.Until(line, func() bool { return strings.Contains(p.Metrics(), line) })
		}
		counted(1, `destination="203.0.113.26:9000-9100",port="30000-30100",protocol="udp"`)

		replace("80 tcp 203.0.113.25\n30000-30100 udp 203.0.113.26 9100-9200\n")
		r.AwaitLog(2, "rules loaded")
		p.WantAnswer("udp", 30042, "203.0.113.26:9142")
		counted(1, `destination="203.0.113.26:9100-9200",port="30000-30100",protocol="udp"`)
		p.WantEcho("after the change", conn, answers)
	})
}

// A redirect that the legacy grammar refuses, and the extended one would accept, says so.
func TestExtendedHint(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_DESTINATION"] = "3868 sctp 203.0.113.27"
	p.WantRefusal("", "EGRESS_DESTINATION value '3868 sctp 203.0.113.27' is invalid", "EGRESS_GRAMMAR=extended accepts this line")
}
