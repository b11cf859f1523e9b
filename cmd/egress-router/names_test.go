package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// An echo is an open connection through the pod.
type echo struct {
	conn   net.Conn
	r      *bufio.Reader
	server string
}

// open opens a connection to a port of the pod.
func open(p *labtest.Pod, port uint16) echo {
	p.Helper()
	conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
	r := bufio.NewReader(conn)
	a, err := lab.ReadAnswer(r)
	if err != nil || a.Peer.Addr() != lab.Source {
		p.Fatalf("port %d: %v, error %v; want to be seen as %s", port, a, err, lab.Source)
	}
	return echo{conn, r, a.Server.String()}
}

// wantEnd checks that a connection ends by a reset, as one whose line is gone.
func (e echo) wantEnd(p *labtest.Pod, what string) {
	p.Helper()
	_ = e.conn.SetDeadline(time.Now().Add(labtest.Patience))
	var err error
	for err == nil {
		_, err = e.conn.Write([]byte("?\n"))
		time.Sleep(time.Millisecond)
	}
	if !strings.Contains(err.Error(), "reset") && !strings.Contains(err.Error(), "broken pipe") {
		p.Errorf("%s: %v, want a reset", what, err)
	}
}

// wantOnly checks that new connections to a port reach this server alone.
func wantOnly(p *labtest.Pod, port uint16, server string) {
	p.Helper()
	for range 20 {
		p.WantAnswer("tcp", port, server)
	}
}

// awaitServer waits until a port reaches a server.
func awaitServer(p *labtest.Pod, port uint16, server string) {
	p.Helper()
	p.Until(fmt.Sprintf("port %d reaches %s", port, server), func() bool {
		a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
		return err == nil && a.Server.String() == server
	})
}

// The addresses of a name are followed, and connections to other destinations continue; so
// do those to an address that is gone, except with drain=no. Before the first answer a port
// refuses, and does not get the fallback. While there is no usable answer, the last
// addresses stay.
func TestNamesAreFollowed(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		n.set("db.example.com.", "203.0.113.25")
		n.set("ending.example.com.", "203.0.113.25")
		for _, s := range []string{"203.0.113.27:5433", "203.0.113.27:5432", "203.0.113.27:5435"} {
			p.Serve(p.Lab.Outside, "tcp", s)
		}
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_HEALTH_LISTEN"] = "extended", ":9465"
		p.Env["EGRESS_DESTINATION"] = "5432 tcp DB.example.com 80\n5433 tcp late.example.com 80\n5434 tcp ending.example.com 80 drain=no\n81 tcp 203.0.113.25 80\n203.0.113.27\n"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		awaitServer(p, 5432, "203.0.113.25:80")
		wantOnly(p, 5432, "203.0.113.25:80")
		p.WantRefused("tcp", 5433)
		p.WantAnswer("tcp", 5435, "203.0.113.27:5435")

		var others []echo
		for range 200 {
			others = append(others, open(p, 81))
		}
		stays, ends := open(p, 5432), open(p, 5434)
		n.set("ending.example.com.", "203.0.113.26")
		n.set("db.example.com.", "203.0.113.26")
		begin := time.Now()
		awaitServer(p, 5432, "203.0.113.26:80")
		t.Logf("%s: the new address after %v, with a TTL of 1 s", p.Backend.Name, time.Since(begin).Round(time.Millisecond))
		awaitServer(p, 5434, "203.0.113.26:80")
		wantOnly(p, 5432, "203.0.113.26:80")
		for _, e := range others {
			p.WantEcho("a connection to another destination", e.conn, e.r)
		}
		p.WantEcho("a connection to the former address", stays.conn, stays.r)
		ends.wantEnd(p, "a connection to the former address with drain=no")

		n.set("late.example.com.", "203.0.113.26")
		awaitServer(p, 5433, "203.0.113.26:80")
		wantOnly(p, 5433, "203.0.113.26:80")

		// Without a usable answer.
		n.set("db.example.com.")
		r.AwaitLog(1, `msg="name lookup failed" name=db.example.com error="no such name" addresses=203.0.113.26`)
		wantOnly(p, 5432, "203.0.113.26:80")
		missed := n.unanswered()
		n.setSilent(true)
		p.Until("the silent name server is asked", func() bool { return n.unanswered() > missed })
		wantOnly(p, 5433, "203.0.113.26:80")
		p.Until("health names the failure", func() bool {
			code, out := p.Health()
			return code == 0 && strings.Contains(out, "db.example.com: 203.0.113.26, lookup failed: ") && strings.Contains(out, "late.example.com: 203.0.113.26")
		})
		n.setSilent(false)
		n.set("db.example.com.", "127.0.0.1", "10.128.0.98", "0.0.0.0", "224.0.0.1", "192.168.12.99", "203.0.113.25")
		awaitServer(p, 5432, "203.0.113.25:80")
		wantOnly(p, 5432, "203.0.113.25:80")
		r.AwaitLog(1, `msg="addresses of a name ignored" name=db.example.com addresses="0.0.0.0 is the unspecified address, 10.128.0.98 is an address of the pod, 127.0.0.1 is a loopback address, 192.168.12.99 is the reserved address, 224.0.0.1 is a multicast address"`)
		p.WantEcho("a connection that has changed nothing", stays.conn, stays.r)

		const labels = `{destination="db.example.com:80",port="5432",protocol="tcp"}`
		p.Until("the metrics of the line", func() bool {
			m := p.Metrics()
			return strings.Contains(m, "egress_router_destination_addresses"+labels+" 1\n") && strings.Contains(m, "egress_router_open_connections"+labels+" 1\n") &&
				p.Metric("egress_router_connections_total"+labels) > 80 && p.Metric("egress_router_name_lookup_failures_total") > 0
		})
		if m := p.Metrics(); !strings.Contains(m, "egress_router_reloads_total 0\n") || strings.Contains(m, `repairs_total{kind="rules"} 1`) {
			t.Errorf("a change of addresses counts as another one:\n%s", m)
		}
		n.wantAskedBy(t, lab.RouterAddr)
	})
}

// A client whose datagrams were refused before the first answer for a name reaches its server
// afterwards from the same socket.
func TestRefusedDatagramsReachANameLater(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		p.Serve(p.Lab.Outside, "udp", "203.0.113.25:5300")
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "53 udp late.example.com 5300\n203.0.113.27\n"
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		conn := p.Dial(p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
		ask := func() (lab.Answer, error) {
			_ = conn.SetDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := conn.Write([]byte("?\n")); err != nil {
				return lab.Answer{}, err
			}
			return lab.ReadAnswer(bufio.NewReader(conn))
		}
		p.Until("a datagram is refused", func() bool {
			_, err := ask()
			return errors.Is(err, syscall.ECONNREFUSED)
		})
		n.set("late.example.com.", "203.0.113.25")
		p.Until("the server answers the same socket", func() bool {
			a, err := ask()
			return err == nil && a.Server.String() == "203.0.113.25:5300" && a.Peer.Addr() == lab.Source
		})
	})
}

// A run that does not stay looks names up once, and says so. A router in mode monitor then
// follows them. The next run changes nothing.
func TestNamesOfAnInitRun(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		n.set("db.example.com.", "203.0.113.25", "203.0.113.26")
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "5432 tcp db.example.com 80\n5433 udp none.example.com\n203.0.113.27\n"
		// A run waits 5 s for the answers, and a machine may stand still for longer.
		const inTime = `msg="destinations without address" number=1`
		p.Until("a run gets the answers in time", func() bool {
			r := p.OK()
			for _, want := range []string{`msg="names are not followed"`, `msg="name lookup failed" name=none.example.com error="no such name"`} {
				if strings.Contains(r.Stderr, inTime) && !strings.Contains(r.Stderr, want) {
					t.Errorf("no line %s:\n%s", want, r.Stderr)
				}
			}
			return strings.Contains(r.Stderr, inTime)
		})
		awaitServer(p, 5432, "203.0.113.25:80")
		awaitServer(p, 5432, "203.0.113.26:80")
		p.WantRefused("udp", 5433)
		state := p.State()
		p.Until("two more runs get them", func() bool {
			if !strings.Contains(p.OK().Stderr, inTime) {
				return false
			}
			again := p.OK()
			if !strings.Contains(again.Stderr, inTime) {
				return false
			}
			p.WantUnchanged(again)
			p.WantState(state)
			return true
		})
		p.Until("the plan for this kernel has the addresses", func() bool {
			out := p.Exec("egress-router", "plan", "--kernel").Stdout
			return strings.Contains(out, "to db.example.com (203.0.113.25, 203.0.113.26) port 80") && strings.Contains(out, "to none.example.com (no address) port 5433")
		})
		n.setSilent(true)
		if out := p.Exec("egress-router", "plan").Stdout; !strings.Contains(out, "to db.example.com port 80") || strings.Contains(out, "203.0.113.26") {
			t.Errorf("the plan looks names up:\n%s", out)
		}
		n.setSilent(false)

		p.Start("monitor")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		p.Until("the router has the addresses", func() bool { return p.State() == state })
		n.set("db.example.com.", "203.0.113.26")
		p.Until("new connections get one address", func() bool {
			for range 10 {
				a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 5432))
				if err != nil || a.Server.String() != "203.0.113.26:80" {
					return false
				}
			}
			return true
		})
	})
}

// Without an answer of the name server, the router starts all the same, and gets the address
// later. After a restart connections to any address of the name continue.
func TestNamesWithoutNameServer(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	n := serveNames(p)
	n.setSilent(true)
	p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "5432 tcp db.example.com 80\n81 tcp 203.0.113.25 80\n203.0.113.27\n"
	r := p.OK()
	if !strings.Contains(r.Stderr, `msg="destinations without address" number=1`) {
		t.Errorf("no warning:\n%s", r.Stderr)
	}
	p.WantRefused("tcp", 5432)
	p.WantAnswer("tcp", 81, "203.0.113.25:80")
	running := p.Start("legacy")
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
	p.WantRefused("tcp", 5432)
	n.set("db.example.com.", "203.0.113.25")
	n.setSilent(false)
	awaitServer(p, 5432, "203.0.113.25:80")
	conn := open(p, 5432)
	running.Terminate()
	n.set("db.example.com.", "203.0.113.26")
	p.Start("legacy")
	awaitServer(p, 5432, "203.0.113.26:80")
	p.WantEcho("a connection to the former address, after a restart", conn.conn, conn.r)
}

// After a restart, or in mode monitor after init, names keep the addresses of the run before
// until the first answer, if no name server answers: existing and new connections continue.
// A port with another name than before refuses.
func TestNamesSurviveARestartWithoutNameServer(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		n.set("db.example.com.", "203.0.113.25", "203.0.113.26")
		long := strings.Repeat(strings.Repeat("n", 63)+".", 3) + strings.Repeat("n", 55) + ".com" // the longest that the kernel keeps
		n.set(long+".", "203.0.113.25")
		p.Env["EGRESS_GRAMMAR"] = "extended"
		lines := "5432 tcp db.example.com 80\n30000-30100 tcp " + long + " 80\n203.0.113.27\n"
		p.Env["EGRESS_DESTINATION"] = "5434 tcp " + long + " 80\n" + lines
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		awaitServer(p, 5432, "203.0.113.25:80")
		awaitServer(p, 30050, "203.0.113.25:80")
		var conns []echo
		for range 200 {
			conns = append(conns, open(p, 5432))
		}
		missed := n.unanswered()
		n.setSilent(true)
		p.Until("the silent name server is asked", func() bool { return n.unanswered() > missed })
		state := p.State()
		wantServed := func(when string) {
			p.Helper()
			seen := make(map[string]int)
			for range 40 {
				seen[open(p, 5432).server]++
			}
			if len(seen) != 2 || seen["203.0.113.25:80"]+seen["203.0.113.26:80"] != 40 {
				t.Errorf("%s new connections get %v", when, seen)
			}
			wantOnly(p, 30050, "203.0.113.25:80")
			for _, e := range conns {
				p.WantEcho(when+" a connection from before", e.conn, e.r)
			}
		}
		r.Terminate()
		p.Until("the router has ended", func() bool { return strings.Contains(r.Logged(), "stopping, configuration stays") })

		r = p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		r.AwaitLog(1, `msg="name keeps addresses of an earlier run" name=db.example.com addresses=203.0.113.25,203.0.113.26`)
		wantServed("after a restart")
		p.WantState(state)
		r.Terminate()
		p.Until("the router has ended again", func() bool { return strings.Contains(r.Logged(), "stopping, configuration stays") })

		p.Env["EGRESS_ROUTER_MODE"] = "init"
		p.WantUnchanged(p.OK())
		wantServed("after another run of init")
		if out := p.Exec("egress-router", "plan", "--kernel").Stdout; !strings.Contains(out, "nothing is missing") {
			t.Errorf("plan --kernel:\n%s", out)
		}

		// Another name on a port, and the name of that port on another one.
		p.Env["EGRESS_DESTINATION"] = "5434 tcp other.example.com 80\n5435 tcp " + long + " 80\n" + lines
		r = p.Start("monitor")
		awaitServer(p, 5435, "203.0.113.25:80")
		p.WantRefused("tcp", 5434)
		wantServed("in mode monitor")
		n.set("db.example.com.", "203.0.113.26")
		n.setSilent(false)
		p.Until("the answer applies", func() bool {
			for range 10 {
				a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 5432))
				if err != nil || a.Server.String() != "203.0.113.26:80" {
					return false
				}
			}
			return true
		})
		for _, e := range conns {
			p.WantEcho("after the answer a connection from before", e.conn, e.r)
		}
	})
}

// A reload that replaces a name ends the connections to the addresses of the former one.
func TestNamesAreReloaded(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		n.set("one.example.com.", "203.0.113.25")
		n.set("two.example.com.", "203.0.113.26")
		p.Env["EGRESS_GRAMMAR"] = "extended"
		file := p.TempDir() + "/destinations"
		write := func(list string) {
			p.Helper()
			if err := os.WriteFile(file+".new", []byte(list), 0o600); err != nil {
				p.Fatal(err)
			}
			if err := os.Rename(file+".new", file); err != nil {
				p.Fatal(err)
			}
		}
		const other = "5434 tcp two.example.com 80\n" // its name may have had other addresses before the start
		write("5432 tcp one.example.com 80\n5433 tcp one.example.com 80\n" + other)
		delete(p.Env, "EGRESS_DESTINATION")
		p.Env["EGRESS_DESTINATION_FILE"] = file
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		awaitServer(p, 5432, "203.0.113.25:80")
		first, second := open(p, 5432), open(p, 5433)
		write("5432 tcp two.example.com 80\n5433 tcp one.example.com 80\n" + other)
		r.AwaitLog(1, "destinations changed")
		awaitServer(p, 5432, "203.0.113.26:80")
		first.wantEnd(p, "a connection to the former name")
		p.WantEcho("a connection to a name that stays", second.conn, second.r)
		n.set("one.example.com.", "203.0.113.27")
		n.set("two.example.com.", "203.0.113.25")
		third := open(p, 5432)
		awaitServer(p, 5432, "203.0.113.25:80")
		if third.server == "203.0.113.26:80" {
			p.WantEcho("a connection to the former address of a name from a reload", third.conn, third.r)
		}
	})
}

// Among 10,000 destinations, a change of ten names loads ten elements or chains, and breaks
// no connection to another destination.
func TestNamesAmongManyDestinations(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		n := serveNames(p)
		var list strings.Builder
		var named []uint16
		for i := range 10_000 {
			to, port := "203.0.113.25", uint16(10_001+i)
			if i%1000 == 500 {
				to = fmt.Sprintf("n%d.example.com", port)
				n.set(to+".", "203.0.113.25")
				named = append(named, port)
			}
			fmt.Fprintf(&list, "%d tcp %s 80\n", port, to)
		}
		file := p.TempDir() + "/destinations"
		if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
			p.Fatal(err)
		}
		delete(p.Env, "EGRESS_DESTINATION")
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION_FILE"] = "extended", file
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		for _, port := range named {
			awaitServer(p, port, "203.0.113.25:80")
		}
		var others []echo
		for i := range uint16(200) {
			others = append(others, open(p, 10_001+49*i))
		}
		before := len(r.Logged())
		for _, port := range named {
			n.set(fmt.Sprintf("n%d.example.com.", port), "203.0.113.26")
		}
		begin := time.Now()
		for _, port := range named {
			awaitServer(p, port, "203.0.113.26:80")
		}
		t.Logf("%s: the last of the new addresses after %v, with a TTL of 1 s", p.Backend.Name, time.Since(begin).Round(time.Millisecond))
		for _, e := range others {
			p.WantEcho("a connection to another destination", e.conn, e.r)
		}
		changed := 0
		p.Until("the log has all changes", func() bool {
			changed = 0
			for _, found := range regexp.MustCompile(`(\d+) (?:elements differ|chains EGRESS-TCP)`).FindAllStringSubmatch(r.Logged()[before:], -1) {
				n, _ := strconv.Atoi(found[1])
				changed += n
			}
			return changed >= len(named)
		})
		if changed != len(named) {
			t.Errorf("%d elements or chains have changed, want %d:\n%s", changed, len(named), labtest.Tail(r.Logged()[before:]))
		}
	})
}

// With sources of both families, a client gets an address of its own family. While a name has
// none of a family, its port refuses there, also with a fallback, and existing connections
// continue.
func TestNamesOfBothFamilies(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		n := serveNames(p)
		n.set("db.example.com.", "203.0.113.25", "2001:db8::25", "fe80::1", "::1")
		for _, s := range []string{"[2001:db8::25]:80", "[2001:db8::26]:80", "[2001:db8::27]:5432"} {
			p.Serve(p.Lab.Outside, "tcp", s)
		}
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "extended", "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1"
		p.Env["EGRESS_DESTINATION"] = "5432 tcp db.example.com 80\n203.0.113.27\n2001:db8::27\n"
		r := p.Start("legacy")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		pod6 := netip.MustParseAddrPort("[fd00:10:128::98]:5432")
		await6 := func(server string) {
			p.Helper()
			p.Until("IPv6 reaches "+server, func() bool {
				a, err := p.Ask(p.Lab.Client, "tcp", pod6)
				if err == nil && a.Server.String() == "[2001:db8::27]:5432" {
					p.Fatal("the fallback has answered")
				}
				return err == nil && a.Server.String() == server && a.Peer.Addr() == lab.Source6
			})
		}
		await6("[2001:db8::25]:80")
		awaitServer(p, 5432, "203.0.113.25:80")
		r.AwaitLog(1, `addresses="::1 is a loopback address, fe80::1 is a link-local address"`)
		conn := p.Dial(p.Lab.Client, "tcp", pod6)
		reader := bufio.NewReader(conn)
		n.set("db.example.com.", "203.0.113.25", "203.0.113.26")
		awaitServer(p, 5432, "203.0.113.26:80")
		p.Until("IPv6 is refused", func() bool {
			a, err := p.Ask(p.Lab.Client, "tcp", pod6)
			if err == nil && a.Server.String() == "[2001:db8::27]:5432" {
				p.Fatal("the fallback has answered")
			}
			return errors.Is(err, syscall.ECONNREFUSED)
		})
		p.WantEcho("a connection to the former IPv6 address", conn, reader)
		n.set("db.example.com.", "2001:db8::26", "203.0.113.25")
		await6("[2001:db8::26]:80")
		p.Until("IPv4 has no former address", func() bool { return !strings.Contains(p.Rules(), "203.0.113.26") })
		p.WantEcho("a connection to the former IPv6 address", conn, reader)

		n.setSilent(true)
		r.Terminate()
		r.AwaitLog(1, "stopping, configuration stays")
		r = p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		await6("[2001:db8::26]:80")
		wantOnly(p, 5432, "203.0.113.25:80")
		p.WantEcho("a connection to the former IPv6 address, after a restart", conn, reader)
	})
}

// The addresses of one family do not wait for those of the other: its port refuses there, also
// with a fallback, until they come. They are asked for again long before the first answer
// expires, and break no connection.
func TestNamesGetTheOtherFamilyLater(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		servers := map[bool]string{false: "203.0.113.25:80", true: "[2001:db8::25]:80"}
		for _, s := range []string{servers[true], "[2001:db8::27]:5432", "[2001:db8::27]:5433"} {
			p.Serve(p.Lab.Outside, "tcp", s)
		}
		n := serveNames(p)
		n.set("db.example.com.", "203.0.113.25", "2001:db8::25")
		n.ttl = 300
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "extended", "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1"
		p.Env["EGRESS_DESTINATION"] = "5432 tcp db.example.com 80\n203.0.113.27\n2001:db8::27\n"
		pods := map[bool]netip.AddrPort{false: netip.AddrPortFrom(lab.RouterAddr, 5432), true: netip.MustParseAddrPort("[fd00:10:128::98]:5432")}
		for _, late := range []struct {
			six      bool
			question uint16
			family   string
		}{{true, dns.TypeAAAA, "IPv6"}, {false, dns.TypeA, "IPv4"}} {
			await := func(six bool) {
				p.Helper()
				p.Until("the port reaches "+servers[six], func() bool {
					a, err := p.Ask(p.Lab.Client, "tcp", pods[six])
					return err == nil && a.Server.String() == servers[six]
				})
			}
			n.setUnsure(late.question)
			r := p.Start("legacy")
			await(!late.six)
			r.AwaitLog(1, `msg="name lookup incomplete" name=db.example.com missing=`+late.family)
			if a, err := p.Ask(p.Lab.Client, "tcp", pods[late.six]); !errors.Is(err, syscall.ECONNREFUSED) {
				p.Errorf("%s before its answer: %v, error %v; want a refusal", late.family, a, err)
			}
			conn := p.Dial(p.Lab.Client, "tcp", pods[!late.six])
			reader := bufio.NewReader(conn)
			n.setUnsure(dns.TypeNone)
			await(late.six)
			await(!late.six)
			p.WantEcho("a connection of the first family", conn, reader)
			r.Terminate()
			r.AwaitLog(1, "stopping, configuration stays")

			// After a restart the other family's addresses stay until their answer.
			n.setUnsure(late.question)
			r = p.Start("legacy")
			r.AwaitLog(1, "msg=ready")
			for six, server := range servers {
				if a, err := p.Ask(p.Lab.Client, "tcp", pods[six]); err != nil || a.Server.String() != server {
					p.Errorf("after a restart without an answer for %s: %v, error %v; want %s", late.family, a, err, server)
				}
			}
			n.setUnsure(dns.TypeNone)
			r.Terminate()
			r.AwaitLog(1, "stopping, configuration stays")
			if r := p.Exec("egress-router", "remove"); r.Code != 0 {
				p.Errorf("remove:\n%s", r.Stderr)
			}
		}
	})
}

// A name server that answers with other addresses each time does not make the router probe
// the other destinations each time.
func TestNamesDoNotSetTheIntervalOfProbes(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	var listener net.Listener
	if err := p.Lab.Outside.Do(func() (err error) {
		listener, err = net.Listen("tcp4", "203.0.113.27:8443")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	var probes atomic.Int64
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			probes.Add(1)
			_ = conn.Close()
		}
	}()
	n := serveNames(p)
	p.Env["EGRESS_GRAMMAR"] = "extended"
	p.Env["EGRESS_PROBE"], p.Env["EGRESS_PROBE_INTERVAL"] = "tcp", "12h"
	p.Env["EGRESS_DESTINATION"] = "5432 tcp db.example.com 80\n443 tcp 203.0.113.27 8443\n"
	p.Start("legacy")
	for i := range 5 {
		address := fmt.Sprint("203.0.113.", 25+i%2)
		n.set("db.example.com.", address)
		awaitServer(p, 5432, address+":80")
		p.Until("a probe of "+address, func() bool {
			_, out := p.Health()
			return strings.Contains(out, "2 reachable")
		})
	}
	if n := probes.Load(); n != 1 {
		t.Errorf("%d probes of a server that has not changed, want that of the start", n)
	}
}
