package router_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// severalAddresses is a list with several addresses on each line. Numbers of addresses
// differ.
const severalAddresses = `443         tcp     203.0.113.25,203.0.113.26,203.0.113.27 8443
5300        tcp,udp 203.0.113.26,203.0.113.27
6000-6010   udp     203.0.113.25,203.0.113.26,203.0.113.27
7000-7100   tcp     203.0.113.25,203.0.113.26 17000-17100
40000-41000 tcp     203.0.113.26,203.0.113.27 1443
3868        sctp    203.0.113.26,203.0.113.27 3869
`

// New connections are spread over the addresses of a line, evenly, with every form of a
// line and in lists of both structures, short and long. The next run changes nothing.
func TestSeveralAddresses(t *testing.T) {
	t.Parallel()
	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, "%d tcp 203.0.113.26 443\n", 20001+i)
	}
	for name, list := range map[string]string{"short": severalAddresses, "long": many.String() + severalAddresses} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", list
				for _, s := range []string{
					"tcp 203.0.113.25:8443", "tcp 203.0.113.26:8443", "tcp 203.0.113.27:8443", "tcp 203.0.113.26:5300", "tcp 203.0.113.27:5300", "udp 203.0.113.26:5300",
					"udp 203.0.113.27:5300", "udp 203.0.113.25:6007", "udp 203.0.113.26:6007", "udp 203.0.113.27:6007", "tcp 203.0.113.25:17042", "tcp 203.0.113.26:17042",
					"tcp 203.0.113.26:1443", "tcp 203.0.113.27:1443",
				} {
					proto, addr, _ := strings.Cut(s, " ")
					p.Serve(p.Lab.Outside, proto, addr)
				}
				p.OK()
				wantSpread(p, "tcp", 443, "203.0.113.25:8443", "203.0.113.26:8443", "203.0.113.27:8443")
				wantAll(p, "tcp", 5300, "203.0.113.26:5300", "203.0.113.27:5300")
				wantAll(p, "udp", 5300, "203.0.113.26:5300", "203.0.113.27:5300")
				wantAll(p, "udp", 6007, "203.0.113.25:6007", "203.0.113.26:6007", "203.0.113.27:6007")
				wantAll(p, "tcp", 7042, "203.0.113.25:17042", "203.0.113.26:17042")
				wantAll(p, "tcp", 40500, "203.0.113.26:1443", "203.0.113.27:1443")
				wantAllSCTP(p, 3868, 3869, "203.0.113.26", "203.0.113.27")
				p.WantRefused("tcp", 444)
				p.WantRefused("udp", 443)

				state := p.State()
				p.WantUnchanged(p.OK())
				p.WantState(state)
			})
		})
	}
}

// countAnswer opens a connection to a port, and counts it for the server that it gets.
func countAnswer(p *labtest.Pod, proto string, port uint16, count map[string]int) {
	p.Helper()
	a, err := p.Ask(p.Lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil || a.Peer.Addr() != lab.Source {
		p.Fatalf("%s port %d: %v saw %v, error %v; want %s", proto, port, a.Server, a.Peer, err, lab.Source)
	}
	count[a.Server.String()]++
}

// wantSpread checks that each of the servers gets its share of new connections. That one
// gets less than half of it by chance has a probability below 1e-9.
func wantSpread(p *labtest.Pod, proto string, port uint16, servers ...string) {
	p.Helper()
	const share = 120
	count := make(map[string]int)
	for range share * len(servers) {
		countAnswer(p, proto, port, count)
	}
	for _, s := range servers {
		if count[s] < share/2 {
			p.Errorf("%s port %d: %d of %d connections to %s", proto, port, count[s], share*len(servers), s)
		}
	}
	if len(count) != len(servers) {
		p.Errorf("%s port %d: answers of %v, want those of %v", proto, port, count, servers)
	}
}

// wantAll checks that new connections get each of the servers, and no other.
func wantAll(p *labtest.Pod, proto string, port uint16, servers ...string) {
	p.Helper()
	count := make(map[string]int)
	p.Until(fmt.Sprintf("%s port %d reaches %v", proto, port, servers), func() bool {
		countAnswer(p, proto, port, count)
		for _, s := range servers {
			if count[s] == 0 {
				return false
			}
		}
		return true
	})
	if len(count) != len(servers) {
		p.Errorf("%s port %d: answers of %v, want those of %v", proto, port, count, servers)
	}
}

// wantAllSCTP sends the first packets of associations until each server has got one, at the
// remote port.
func wantAllSCTP(p *labtest.Pod, local, remote uint16, servers ...string) {
	p.Helper()
	listen := func(at string) *net.IPConn {
		p.Helper()
		var c *net.IPConn
		ns := p.Lab.Outside
		if at == "0.0.0.0" {
			ns = p.Lab.Client
		}
		if err := ns.Do(func() (err error) {
			c, err = net.ListenIP("ip4:132", &net.IPAddr{IP: net.ParseIP(at)})
			return err
		}); err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { _ = c.Close() })
		return c
	}
	client, got := listen("0.0.0.0"), make([]*net.IPConn, len(servers))
	for i, s := range servers {
		got[i] = listen(s)
	}
	from, buffer := uint16(20000), make([]byte, 1500)
	for i, c := range got {
		p.Until("an association with "+servers[i], func() bool {
			if _, err := client.WriteToIP(labtest.SCTPInit(from, local), &net.IPAddr{IP: lab.RouterAddr.AsSlice()}); err != nil {
				p.Fatal(err)
			}
			from++
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			n, sender, err := c.ReadFromIP(buffer)
			if err != nil || n <= 12 || buffer[12] != labtest.SCTPInitChunk {
				return false
			}
			if port := binary.BigEndian.Uint16(buffer[2:]); port != remote || sender.IP.String() != lab.Source.String() {
				p.Errorf("INIT at port %d from %s, want %d and %s", port, sender, remote, lab.Source)
			}
			return true
		})
	}
}

// A connection stays at its server: when lines are added, when the addresses of its line
// change, and also a UDP flow. Connections to an address that its line no longer has end.
func TestSeveralAddressesReload(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", fmt.Sprint(":", labtest.HealthAddr.Port())
		for _, s := range []string{"203.0.113.25:5300", "203.0.113.26:5300", "203.0.113.27:5300"} {
			p.Serve(p.Lab.Outside, "udp", s)
		}
		p.Serve(p.Lab.Outside, "tcp", "203.0.113.27:80")
		r, replace := startWithFile(p, "80 tcp 203.0.113.25,203.0.113.26\n5300 udp 203.0.113.25,203.0.113.26\n")
		// conns has a connection to each server, by its address.
		type echo struct {
			conn   net.Conn
			reader *bufio.Reader
		}
		conns := make(map[string]echo)
		p.Until("connections to both servers", func() bool {
			c := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			reader := bufio.NewReader(c)
			a, err := lab.ReadAnswer(reader)
			if err != nil {
				p.Fatal(err)
			}
			conns[a.Server.Addr().String()] = echo{c, reader}
			return len(conns) == 2
		})
		flows := make(map[string]*labtest.Flow)
		p.Until("flows to both servers", func() bool {
			f := p.Flow(5300)
			flows[f.Ask().Server.String()] = f
			return len(flows) == 2
		})
		unchanged := func(what string, servers ...string) {
			p.Helper()
			for _, s := range servers {
				p.WantEcho(what, conns[s].conn, conns[s].reader)
				for range 10 {
					if a := flows[s+":5300"].Ask(); a.Server.String() != s+":5300" {
						p.Errorf("%s: the flow to %s is at %s", what, s, a.Server)
					}
				}
			}
		}
		unchanged("at first", "203.0.113.25", "203.0.113.26")
		replace("80 tcp 203.0.113.27,203.0.113.26,203.0.113.25\n5300 udp 203.0.113.26,203.0.113.25\n81 tcp 203.0.113.25\n")
		r.AwaitLog(2, "rules loaded")
		unchanged("with another address", "203.0.113.25", "203.0.113.26")
		wantAll(p, "tcp", 80, "203.0.113.25:80", "203.0.113.26:80", "203.0.113.27:80")
		replace("80 tcp 203.0.113.26,203.0.113.27\n5300 udp 203.0.113.26,203.0.113.27\n81 tcp 203.0.113.25\n")
		r.AwaitLog(1, "stale connections deleted")
		unchanged("without the other's server", "203.0.113.26")
		wantAll(p, "tcp", 80, "203.0.113.26:80", "203.0.113.27:80")
		p.Until("the flow has another server", func() bool {
			a, err := flows["203.0.113.25:5300"].Try()
			return err == nil && a.Server.Addr().String() != "203.0.113.25"
		})
		_ = conns["203.0.113.25"].conn.SetDeadline(time.Now().Add(labtest.Patience))
		var err error
		for err == nil {
			_, err = conns["203.0.113.25"].conn.Write([]byte("?\n"))
			time.Sleep(time.Millisecond)
		}
		if !strings.Contains(err.Error(), "reset") && !strings.Contains(err.Error(), "broken pipe") {
			p.Errorf("the connection to the address that is gone: %v, want a reset", err)
		}
		p.Until("the counters", func() bool {
			m := p.Metrics()
			return strings.Contains(m, `egress_router_connections_total{destination="203.0.113.26,203.0.113.27:80",port="80",protocol="tcp"}`) && !strings.Contains(m, "203.0.113.25,")
		})
	})
}

// An address that does not answer probes gets no new connections while another one of its
// destination answers; its existing connections continue. It gets them again when it
// answers, and if no other one does.
func TestSilentAddressIsLeftOut(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", fmt.Sprint(":", labtest.HealthAddr.Port())
		p.Env["EGRESS_PROBE"], p.Env["EGRESS_PROBE_INTERVAL"] = "tcp", "100ms"
		p.Env["EGRESS_DESTINATION"] = "443 tcp 203.0.113.25,203.0.113.26 8443\n80 tcp 203.0.113.25\n"
		first, second := "203.0.113.25:8443", "203.0.113.26:8443"
		p.Serve(p.Lab.Outside, "tcp", first)
		p.Serve(p.Lab.Outside, "tcp", second)
		outside := func(lines string) {
			p.Helper()
			if out, err := runIn(p, p.Lab.Outside, "nft", lines); err != nil {
				p.Fatalf("%v\n%s", err, out)
			}
		}
		refuse := func(address string) {
			p.Helper()
			outside("add rule ip refusing in ip daddr " + address + " tcp dport 8443 tcp flags & (syn | ack) == syn reject with tcp reset")
		}
		outside("add table ip refusing; add chain ip refusing in { type filter hook input priority 0 ; }")
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		var conn net.Conn
		var reader *bufio.Reader
		p.Until("a connection to the first address", func() bool {
			conn = p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 443))
			reader = bufio.NewReader(conn)
			a, err := lab.ReadAnswer(reader)
			return err == nil && a.Server.String() == first
		})
		metric := func(line string) {
			p.Helper()
			p.Until(line, func() bool { return strings.Contains(p.Metrics(), line+"\n") })
		}
		const labels = `{destination="203.0.113.25,203.0.113.26:8443",port="443",protocol="tcp"}`
		metric("egress_router_destination_addresses" + labels + " 2")

		refuse("203.0.113.25")
		r.AwaitLog(1, `msg="address left out" destination=`+first+" probes=3")
		p.Until("new connections get the other address alone", func() bool {
			for range 40 {
				a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 443))
				if err != nil || a.Server.String() != second { // not loaded yet
					return false
				}
			}
			return true
		})
		p.WantEcho("while the address is left out", conn, reader)
		metric("egress_router_destination_addresses" + labels + " 1")
		metric("egress_router_destination_up" + labels + " 1")
		p.Until("health names the address", func() bool {
			code, out := p.Health()
			return code == 0 && strings.Contains(out, "1 of 3 unreachable: "+first) && strings.Contains(out, "1 left out: "+first)
		})

		refuse("203.0.113.26")
		r.AwaitLog(1, `msg="address used again" destination=`+first+` because="no other address answers"`)
		metric("egress_router_destination_up" + labels + " 0")
		metric("egress_router_destination_addresses" + labels + " 2")
		p.WantEcho("while no address answers", conn, reader)

		outside("flush chain ip refusing in")
		metric("egress_router_destination_up" + labels + " 1")
		wantAll(p, "tcp", 443, first, second)
		p.WantEcho("at the end", conn, reader)
		if n := strings.Count(r.Logged(), "address left out"); n < 1 || n > 2 { // the one that answers first may be faster by two probes
			p.Errorf("%d addresses were left out:\n%s", n, labtest.Tail(r.Logged()))
		}
		if n := p.Metric("egress_router_reloads_total"); n != 0 {
			p.Errorf("%d reloads", n)
		}
		if r.Repaired() != 0 {
			p.Errorf("a repair:\n%s", labtest.Tail(r.Logged()))
		}
	})
}

// runIn runs a program in a namespace of the lab.
func runIn(p *labtest.Pod, ns *netns.Namespace, name string, args ...string) (string, error) {
	p.Helper()
	var out strings.Builder
	cmd := p.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := p.Lab.Run(ns, cmd)
	return out.String(), err
}

// A line may have addresses of both families: a client gets those of its own. In both, each
// new connection gets one of them.
func TestSeveralAddressesOfBothFamilies(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		const list = "443 tcp 203.0.113.25,2001:db8::25,203.0.113.26,2001:db8::26 80\n7000-7010 udp 2001:db8::25,2001:db8::27,203.0.113.25 9000-9010\n"
		connectDual(p, list, lab.Source, lab.Source6)
		for _, s := range []string{"[2001:db8::25]:9005", "[2001:db8::27]:9005", "203.0.113.25:9005"} {
			p.Serve(p.Lab.Outside, "udp", s)
		}
		reached := func(proto, at string, source netip.Addr, servers ...string) {
			p.Helper()
			seen := make(map[string]bool)
			p.Until(fmt.Sprintf("%s %s reaches %v", proto, at, servers), func() bool {
				a, err := p.Ask(p.Lab.Client, proto, netip.MustParseAddrPort(at))
				if err != nil || a.Peer.Addr() != source || !slices.Contains(servers, a.Server.String()) {
					p.Fatalf("%s %s: %v, error %v; want one of %v, which sees %s", proto, at, a, err, servers, source)
				}
				seen[a.Server.String()] = true
				return len(seen) == len(servers)
			})
		}
		reached("tcp", "[fd00:10:128::98]:443", lab.Source6, "[2001:db8::25]:80", "[2001:db8::26]:80")
		reached("tcp", netip.AddrPortFrom(lab.RouterAddr, 443).String(), lab.Source, "203.0.113.25:80", "203.0.113.26:80")
		reached("udp", "[fd00:10:128::98]:7005", lab.Source6, "[2001:db8::25]:9005", "[2001:db8::27]:9005")
		reached("udp", netip.AddrPortFrom(lab.RouterAddr, 7005).String(), lab.Source, "203.0.113.25:9005")
	})
}
