//go:build kernels

package router_test

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/nft"
)

// A shortcut has the connections in the kernel's flowtable, as the program shows them.
type shortcut struct {
	*labtest.Pod
	names int
}

// offloads reports whether the connection of a client's address is in the flowtable, and how many
// bytes the kernel counts of each direction.
func (s *shortcut) offloads(client net.Addr) (is bool, sent, received uint64) {
	s.Helper()
	if err := s.Lab.Router.Do(func() error {
		return conntrack.Each([]netip.Addr{lab.Source, lab.Source6}, func(c conntrack.Connection) {
			if c.Client.String() == client.String() {
				is, sent, received = c.Offloaded, c.BytesOut, c.BytesIn
			}
		})
	}); err != nil {
		s.Fatal(err)
	}
	return is, sent, received
}

// count adds a rule that counts the packets to and from the client's port that the forward hook sees, and
// returns a function that reads it.
func (s *shortcut) count(proto string, client net.Addr) func() string {
	s.Helper()
	_, port, err := net.SplitHostPort(client.String())
	if err != nil {
		s.Fatal(err)
	}
	s.names++
	table := fmt.Sprintf("seen%d", s.names)
	s.NFT("add table inet " + table)
	s.NFT("add chain inet " + table + " seen { type filter hook forward priority -300 ; }")
	s.NFT("add rule inet " + table + " seen " + proto + " sport " + port + " counter")
	s.NFT("add rule inet " + table + " seen " + proto + " dport " + port + " counter")
	return func() string { return s.NFT("list table inet " + table) }
}

// await sends messages by a connection of UDP or TCP until its packets take the shortcut.
func (s *shortcut) await(what string, conn net.Conn, r *bufio.Reader) {
	s.Helper()
	s.Until("the flowtable has "+what, func() bool {
		s.WantEcho(what, conn, r)
		is, _, _ := s.offloads(conn.LocalAddr())
		return is
	})
}

func shortcuts(t *testing.T, o lab.Options, test func(*shortcut)) {
	t.Helper()
	labtest.EachBackend(t, o, func(p *labtest.Pod) {
		p.Env["EGRESS_FLOWTABLE"] = "require"
		if has, known := labtest.HasNetdevEgress(p.T); known && !has {
			p.WantRefusal("", "EGRESS_FLOWTABLE=require: the kernel has no netdev egress hook (Linux 5.16)", "")
			return
		}
		test(&shortcut{Pod: p})
	})
}

// Packets of established connections of both families, of clients in the pod's subnet and beyond
// its gateway, bypass the rules: the forward hook sees no more of them. The server sees the
// reserved address, both sides get all bytes, and the kernel counts them. The end of the
// connection takes the usual way.
func TestFlowtable(t *testing.T) {
	shortcuts(t, lab.Options{IPv6: true}, func(s *shortcut) {
		dualStack(s.Pod, "2001:db8:12::99/64, 192.168.12.99/24", "192.168.12.1, fe80::1")
		s.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n80 tcp 2001:db8::25\n"
		s.OK()
		if err := s.Lab.SetSysctl(s.Lab.Router, "net/netfilter/nf_conntrack_acct", "1"); err != nil {
			s.Fatal(err)
		}
		for _, c := range []struct {
			what   string
			from   *netns.Namespace
			to     netip.Addr
			source netip.Addr
		}{
			{"IPv4", s.Lab.Client, lab.RouterAddr, lab.Source}, {"IPv4 from far", s.Lab.Far, lab.RouterAddr, lab.Source},
			{"IPv6", s.Lab.Client, lab.RouterAddr6, lab.Source6}, {"IPv6 from far", s.Lab.Far, lab.RouterAddr6, lab.Source6},
		} {
			conn := s.Dial(c.from, "tcp", netip.AddrPortFrom(c.to, 80))
			r := bufio.NewReader(conn)
			if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != c.source {
				s.Fatalf("%s: %v, %v", c.what, a, err)
			}
			s.await(c.what, conn, r)
			seen := s.count("tcp", conn.LocalAddr())
			before := seen()
			bytes := s.transfer(c.what, conn, r)
			if after := seen(); after != before {
				s.Errorf("%s: the forward hook saw packets:\n%s", c.what, after)
			}
			if is, sent, received := s.offloads(conn.LocalAddr()); !is || sent < bytes || received < bytes {
				s.Errorf("%s: in the flowtable %v, %d bytes counted and %d, want more than %d", c.what, is, sent, received, bytes)
			}
			if err := conn.Close(); err != nil {
				s.Error(err)
			}
			s.Until("the connection ends in conntrack, too", func() bool {
				is, _, _ := s.offloads(conn.LocalAddr())
				return !is
			})
		}
		s.WantUnchanged(s.OK())
	})
}

// transfer sends a text and reads its echo.
func (s *shortcut) transfer(what string, conn net.Conn, r *bufio.Reader) (bytes uint64) {
	s.Helper()
	text := strings.Repeat("x", 100<<10) + "\n"
	go func() { _, _ = conn.Write([]byte(text)) }()
	if got, err := r.ReadString('\n'); got != text {
		s.Fatalf("%s: %d bytes came back of %d: %v", what, len(got), len(text), err)
	}
	return uint64(len(text))
}

// A gate that shuts holds back the packets in the flowtable, too, and a connection goes on when it
// is gone.
func TestFlowtablePassesNoGate(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		s.OK()
		conn, r := s.Open(s.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		s.await("the connection", conn, r)
		gate := nft.Gate{
			Interface: "macvlan0", Sources: []netip.Addr{lab.Source}, Witnesses: []netip.Addr{lab.GatewayAddr}, Mark: 1,
			Ticket: time.Second, Permit: time.Second,
		}
		in := func(do func() error) {
			s.Helper()
			if err := s.Lab.Router.Do(do); err != nil {
				s.Fatal(err)
			}
		}
		in(gate.Load)
		watch := s.Watch(s.Lab.Router, "macvlan0")
		if _, err := conn.Write([]byte("held back\n")); err != nil {
			s.Fatal(err)
		}
		s.Until("the gate drops packets", func() bool {
			var dropped uint64
			in(func() (err error) {
				dropped, err = gate.Dropped()
				return err
			})
			return dropped > 2 // of the shortcut: the kernel sends again
		})
		watch.WantNothing("macvlan0", labtest.ToServers)
		if is, _, _ := s.offloads(conn.LocalAddr()); !is {
			s.Error("the connection has left the flowtable")
		}
		in(func() error {
			_, err := nft.RemoveGate()
			return err
		})
		s.WantEcho("without the gate", conn, r)
	})
}

// A smaller MTU, an idle time and a reset have the effect that they have without a flowtable.
func TestFlowtableKeepsTimes(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		if err := s.Lab.SetSysctl(s.Lab.Router, "net/netfilter/nf_flowtable_tcp_timeout", "1"); err != nil {
			s.Fatal(err)
		}
		s.OK()
		conn, r := s.Open(s.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		s.await("the connection", conn, r)
		h := s.Handle(s.Lab.Router)
		if err := h.LinkSetMTU(s.Link(h, "macvlan0"), 1300); err != nil {
			s.Fatal(err)
		}
		s.transfer("with a smaller MTU", conn, r)
		s.Until("conntrack has the idle connection", func() bool {
			is, _, _ := s.offloads(conn.LocalAddr())
			return !is
		})
		s.await("the connection, again", conn, r)
		if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
			s.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			s.Fatal(err)
		}
		s.Until("the reset ends the connection in conntrack", func() bool {
			var state string
			if err := s.Lab.Router.Do(func() error {
				return conntrack.Each([]netip.Addr{lab.Source}, func(c conntrack.Connection) { state += c.State })
			}); err != nil {
				s.Fatal(err)
			}
			return !strings.Contains(state, "ESTABLISHED") && strings.HasPrefix(state, "CLOSE")
		})
	})
}

// The connection log has the bytes that took the shortcut, and how the connection ended.
func TestFlowtableIsAudited(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		s.Env["EGRESS_AUDIT_LOG"] = "true"
		running := s.Start("legacy")
		running.AwaitLog(1, "msg=ready")
		if err := s.Lab.SetSysctl(s.Lab.Router, "net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1"); err != nil {
			s.Fatal(err)
		}
		s.Until("connections are counted", func() bool { return s.Tool("cat", "/proc/sys/net/netfilter/nf_conntrack_acct") == "1\n" })
		conn, r := s.Open(s.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		s.await("the connection", conn, r)
		bytes := s.transfer("the text", conn, r)
		if err := conn.Close(); err != nil {
			s.Fatal(err)
		}
		s.Until("the end is logged", func() bool {
			s.offloads(conn.LocalAddr()) // the kernel deletes an entry that is over as it lists it, or later
			return strings.Contains(running.Logged(), `msg="connection ends"`)
		})
		_, line, _ := strings.Cut(running.Logged(), `msg="connection ends"`)
		line, _, _ = strings.Cut(line, "\n")
		if !strings.Contains(line, " outcome=closed") {
			s.Errorf("%s: expected the outcome closed", line)
		}
		for _, name := range []string{"bytes_sent", "bytes_received"} {
			_, number, _ := strings.Cut(line, " "+name+"=")
			number, _, _ = strings.Cut(number, " ")
			if n, err := strconv.ParseUint(number, 10, 64); err != nil || n < bytes {
				s.Errorf("%s: expected %s of at least %d", line, name, bytes)
			}
		}
	})
}

// A UDP connection takes the shortcut when it has lasted for two seconds.
func TestFlowtableOfDatagrams(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		s.OK()
		client := s.Dial(s.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
		r := bufio.NewReader(client)
		ask := func() {
			s.Helper()
			if _, err := client.Write([]byte("?\n")); err != nil {
				s.Fatal(err)
			}
			if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source {
				s.Fatalf("%v, %v", a, err)
			}
		}
		s.Until("the flowtable has the connection", func() bool {
			ask()
			is, _, _ := s.offloads(client.LocalAddr())
			return is
		})
		for _, text := range []string{s.Exec("egress-router", "connections").Stdout, s.Exec("egress-router", "connections", "-o", "json").Stdout} {
			if !strings.Contains(text, "offloaded") {
				s.Errorf("no connection is shown as offloaded:\n%s", text)
			}
		}
		seen := s.count("udp", client.LocalAddr())
		before := seen()
		for range 10 {
			ask()
		}
		if after := seen(); after != before {
			s.Errorf("the forward hook saw packets:\n%s", after)
		}
		// In fragments, which have no ports, it takes the usual way.
		if _, err := client.Write(make([]byte, 3000)); err != nil {
			s.Fatal(err)
		}
		if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source {
			s.Errorf("in fragments: %v, %v", a, err)
		}
	})
}

// The connections of a destination that is removed end, whose packets took the shortcut before, and
// those of another one go on.
func TestFlowtableForgetsRemovedDestination(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		file := s.TempDir() + "/destinations"
		write := func(lines string) {
			if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
				s.Fatal(err)
			}
		}
		write("80 tcp 203.0.113.25\n81 tcp 203.0.113.26 80\n")
		delete(s.Env, "EGRESS_DESTINATION")
		s.Env["EGRESS_DESTINATION_FILE"] = file
		running := s.Start("legacy")
		running.AwaitLog(1, "msg=ready")
		removed, r := s.Open(s.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		kept, k := s.Open(s.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 81))
		s.await("the one", removed, r)
		s.await("the other", kept, k)
		write("81 tcp 203.0.113.26 80\n")
		running.AwaitLog(1, "stale connections deleted")
		wantReset(s.Pod, "the one", removed)
		s.await("the other, again", kept, k)
	})
}

// A router that stays repairs the flowtable.
func TestFlowtableIsRepaired(t *testing.T) {
	shortcuts(t, lab.Options{}, func(s *shortcut) {
		running := s.Start("legacy")
		running.AwaitLog(1, "msg=ready")
		whole := s.NFT("list table inet egress-router-flowtable")
		s.NFT("delete table inet egress-router-flowtable")
		running.AwaitLog(1, labtest.RepairLogged)
		s.Until("the table is repaired", func() bool { return s.NFT("list table inet egress-router-flowtable") == whole })
	})
}
