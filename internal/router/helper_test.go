package router_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// listen starts a listener in a namespace, until the test ends.
func listen(p *labtest.Pod, ns *netns.Namespace, addr string) *net.TCPListener {
	p.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", addr)
		return err
	}); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

// commas returns an address as PORT and PASV write it (RFC 959, section 5.3.2).
func commas(a netip.AddrPort) string {
	return fmt.Sprintf("%s,%d,%d", strings.ReplaceAll(a.Addr().String(), ".", ","), a.Port()>>8, a.Port()&0xff)
}

// fromCommas is the reverse of commas.
func fromCommas(s string) (a netip.AddrPort, err error) {
	var b [4]byte
	var high, low uint16
	if _, err := fmt.Sscanf(s, "%d,%d,%d,%d,%d,%d", &b[0], &b[1], &b[2], &b[3], &high, &low); err != nil {
		return a, fmt.Errorf("address %q: %w", s, err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(b), high<<8|low), nil
}

// serveFTP starts a server that knows PORT, PASV, EPSV and RETR, which sends the
// data and then returns what it receives.
func serveFTP(p *labtest.Pod, addr string) {
	p.Helper()
	var serving sync.WaitGroup
	p.Cleanup(serving.Wait) // before the namespace is closed
	l := listen(p, p.Lab.Outside, addr)
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(p.Context(), func() { _ = conn.Close() })()
				if err := ftpSession(p, conn); err != nil {
					fmt.Fprintf(conn, "451 %v\r\n", err)
				}
			})
		}
	})
}

func ftpSession(p *labtest.Pod, conn net.Conn) error {
	local := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr()
	fmt.Fprint(conn, "220 ready\r\n")
	var passive net.Listener
	var active netip.AddrPort
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil //nolint:nilerr // the client has closed
		}
		command, argument, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch command {
		case "USER":
			fmt.Fprint(conn, "230 welcome\r\n")
		case "PORT":
			if active, err = fromCommas(argument); err != nil {
				return err
			}
			fmt.Fprint(conn, "200 PORT\r\n")
		case "PASV", "EPSV":
			if err := p.Lab.Outside.Do(func() (err error) {
				passive, err = net.Listen("tcp4", local.String()+":0")
				return err
			}); err != nil {
				return err
			}
			defer passive.Close()
			_ = passive.(*net.TCPListener).SetDeadline(time.Now().Add(labtest.Patience))
			at := netip.MustParseAddrPort(passive.Addr().String())
			if command == "PASV" {
				fmt.Fprintf(conn, "227 Entering Passive Mode (%s).\r\n", commas(at))
			} else {
				fmt.Fprintf(conn, "229 Entering Extended Passive Mode (|||%d|)\r\n", at.Port()) // RFC 2428
			}
		case "RETR":
			var data net.Conn
			if passive != nil {
				data, err = passive.Accept()
			} else {
				// From the address of the control connection; the port below its own
				// (RFC 959, section 3.2) is not required.
				err = p.Lab.Outside.Do(func() (err error) {
					d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0)), Timeout: labtest.Patience}
					data, err = d.DialContext(p.Context(), "tcp4", active.String())
					return err
				})
			}
			if err != nil {
				return err
			}
			fmt.Fprint(data, "data\n")
			_, err = io.Copy(data, data)
			_ = data.Close()
			if err != nil {
				return err
			}
			fmt.Fprint(conn, "226 done\r\n")
			passive = nil
		default:
			return fmt.Errorf("command %q", line)
		}
	}
}

// An ftpClient is a client with its control connection.
type ftpClient struct {
	p    *labtest.Pod
	ns   *netns.Namespace
	conn net.Conn
	r    *bufio.Reader
}

func ftp(p *labtest.Pod, ns *netns.Namespace, port uint16) *ftpClient {
	p.Helper()
	conn := p.Dial(ns, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
	_ = conn.SetDeadline(time.Now().Add(labtest.Patience))
	c := &ftpClient{p, ns, conn, bufio.NewReader(conn)}
	c.want("220")
	c.do("USER anonymous", "230") // a helper needs a complete line before PORT
	return c
}

// do sends a command and returns the answer, which has the given code.
func (c *ftpClient) do(command, code string) string {
	c.p.Helper()
	if _, err := fmt.Fprint(c.conn, command+"\r\n"); err != nil {
		c.p.Fatal(err)
	}
	return c.want(code)
}

func (c *ftpClient) want(code string) string {
	c.p.Helper()
	line, err := c.r.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, code) {
		c.p.Fatalf("answer %q, error %v; want %s", line, err, code)
	}
	return strings.TrimSpace(line)
}

// open opens a data connection by a command.
func (c *ftpClient) open(command string) net.Conn {
	c.p.Helper()
	local := netip.MustParseAddrPort(c.conn.LocalAddr().String()).Addr()
	var data net.Conn
	var err error
	switch command {
	case "PORT":
		l := listen(c.p, c.ns, local.String()+":0")
		c.do("PORT "+commas(netip.MustParseAddrPort(l.Addr().String())), "200")
		_, _ = fmt.Fprint(c.conn, "RETR file\r\n")
		_ = l.SetDeadline(time.Now().Add(labtest.Patience))
		if data, err = l.Accept(); err != nil {
			c.p.Fatalf("PORT: %v", err)
		}
		if from := netip.MustParseAddrPort(data.RemoteAddr().String()); from.Addr() != lab.RouterAddr {
			c.p.Errorf("data connection from %s, want the address that the client knows", from)
		}
	case "PASV", "EPSV":
		var at netip.AddrPort
		if answer := c.do(command, "22"); command == "PASV" {
			_, inside, _ := strings.Cut(answer, "(")
			if at, err = fromCommas(inside); err != nil || at.Addr() != lab.RouterAddr {
				c.p.Fatalf("%s: address %s, error %v; want one of the pod", answer, at, err)
			}
		} else {
			var port uint16
			if _, err := fmt.Sscanf(answer, "229 Entering Extended Passive Mode (|||%d|)", &port); err != nil {
				c.p.Fatal(answer, err)
			}
			at = netip.AddrPortFrom(lab.RouterAddr, port)
		}
		_, _ = fmt.Fprint(c.conn, "RETR file\r\n")
		data = c.p.Dial(c.ns, "tcp", at)
	}
	_ = data.SetDeadline(time.Now().Add(labtest.Patience))
	c.p.Cleanup(func() { _ = data.Close() })
	return data
}

// finish reads the data, checks that the other direction works, and ends the transfer.
func (c *ftpClient) finish(data net.Conn) {
	c.p.Helper()
	if _, err := fmt.Fprint(data, "and back\n"); err != nil {
		c.p.Error(err)
	}
	if err := data.(*net.TCPConn).CloseWrite(); err != nil {
		c.p.Error(err)
	}
	if all, err := io.ReadAll(data); err != nil || string(all) != "data\nand back\n" {
		c.p.Errorf("data %q, error %v", all, err)
	}
	c.want("226")
}

// serveTFTP starts a server that answers each read request from a port of its own
// (RFC 1350, section 4).
func serveTFTP(p *labtest.Pod, addr string) {
	p.Helper()
	packet := func(addr string) (c net.PacketConn, err error) {
		err = p.Lab.Outside.Do(func() (err error) {
			c, err = net.ListenPacket("udp4", addr)
			return err
		})
		return c, err
	}
	l, err := packet(addr)
	if err != nil {
		p.Fatal(err)
	}
	var serving sync.WaitGroup
	p.Cleanup(func() { _ = l.Close(); serving.Wait() }) // before the namespace is closed
	host, _, _ := net.SplitHostPort(addr)
	serving.Go(func() {
		for b := make([]byte, 600); ; {
			n, client, err := l.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 2 || b[1] != 1 {
				continue
			}
			serving.Go(func() {
				c, err := packet(host + ":0")
				if err != nil {
					return // the client gets no answer
				}
				defer c.Close()
				defer context.AfterFunc(p.Context(), func() { _ = c.Close() })()
				_, _ = c.WriteTo([]byte("\x00\x03\x00\x01data"), client)
				_ = c.SetReadDeadline(time.Now().Add(labtest.Patience))
				answer := make([]byte, 600)
				if n, from, err := c.ReadFrom(answer); err == nil && n == 4 && answer[1] == 4 {
					_, _ = c.WriteTo([]byte("\x00\x03\x00\x02acknowledged"), from)
				}
			})
		}
	})
}

// tftp reads a file of two blocks, from the given port of the pod, and reports the
// error of the first.
func tftp(p *labtest.Pod, ns *netns.Namespace, port uint16, patience time.Duration) error {
	p.Helper()
	var c net.PacketConn
	if err := ns.Do(func() (err error) {
		c, err = net.ListenPacket("udp4", ":0")
		return err
	}); err != nil {
		p.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteTo([]byte("\x00\x01file\x00octet\x00"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.RouterAddr, port))); err != nil {
		p.Fatal(err)
	}
	b := make([]byte, 600)
	for block := uint16(1); block <= 2; block++ {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return err
		}
		if n < 4 || b[1] != 3 || binary.BigEndian.Uint16(b[2:]) != block {
			return fmt.Errorf("block %d: %q from %s", block, b[:n], from)
		}
		if _, err := c.WriteTo([]byte{0, 4, 0, byte(block)}, from); err != nil {
			return err
		}
	}
	return nil
}

// With EGRESS_HELPERS, active and passive FTP and TFTP work, with every form of a
// destination, for clients of each subnet, and with the reserved address. Without, no
// connection that a server opens crosses.
func TestHelpers(t *testing.T) {
	t.Parallel()
	labtest.LoadModules(t, "nf_nat_ftp", "nf_nat_tftp")
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		serveFTP(p, "203.0.113.25:21")
		serveFTP(p, "203.0.113.27:21")
		serveTFTP(p, "203.0.113.27:69")
		p.Env["EGRESS_DESTINATION"] = "2121 tcp 203.0.113.25 21\n203.0.113.27\n"
		p.OK()
		if err := tftp(p, p.Lab.Client, 69, labtest.Silence); err == nil {
			p.Error("TFTP without a helper works, want silence")
		}
		p.Env["EGRESS_HELPERS"] = "ftp, tftp"
		p.OK()
		w := p.Watch(p.Lab.Router, "macvlan0", "eth0")
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			for _, port := range []uint16{21, 2121} {
				c := ftp(p, client, port)
				for _, command := range []string{"PORT", "PASV", "EPSV"} {
					c.finish(c.open(command))
				}
			}
			if err := tftp(p, client, 69, labtest.Patience); err != nil {
				p.Errorf("TFTP: %v", err)
			}
		}
		w.WantSource()
		w.WantNothing("eth0", labtest.ToServers)
		p.WantUnchanged(p.OK())

		delete(p.Env, "EGRESS_HELPERS")
		p.OK()
		if err := tftp(p, p.Lab.Client, 69, labtest.Silence); err == nil {
			p.Error("TFTP after the helper was removed works, want silence")
		}
		p.WantUnchanged(p.OK())
		if rules := p.Rules(); strings.Contains(rules, "helper") {
			p.Errorf("helpers remain:\n%s", rules)
		}
	})
}

// Helpers follow a list that changes while the router runs, and open data connections
// last as long as the line of their server. Deleted helper rules are repaired.
func TestHelpersFollowDestinations(t *testing.T) {
	t.Parallel()
	labtest.LoadModules(t, "nf_nat_ftp")
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		serveFTP(p, "203.0.113.25:21")
		file := filepath.Join(p.TempDir(), "destinations")
		write := func(list string) {
			if err := os.WriteFile(file, []byte(list), 0o600); err != nil {
				p.Fatal(err)
			}
		}
		write("80 tcp 203.0.113.25\n")
		delete(p.Env, "EGRESS_DESTINATION")
		p.Env["EGRESS_DESTINATION_FILE"], p.Env["EGRESS_HELPERS"] = file, "ftp"
		p.Env["EGRESS_HEALTH_INTERVAL"] = "50ms" // for legacy iptables
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		write("80 tcp 203.0.113.25\n2121 tcp 203.0.113.25 21\n")
		p.Until("the line is loaded", func() bool { return strings.Contains(p.Rules(), "2121") })
		settled := p.State()
		c := ftp(p, p.Lab.Client, 2121)
		c.finish(c.open("PORT"))

		// A reload leaves open data connections alone.
		passive, active := ftp(p, p.Lab.Client, 2121), ftp(p, p.Lab.Client, 2121)
		byClient, byServer := passive.open("PASV"), active.open("PORT")
		write("81 tcp 203.0.113.25 80\n2121 tcp 203.0.113.25 21\n")
		p.Until("the line is loaded", func() bool {
			return strings.Contains(p.Rules(), "81") && !strings.Contains(p.Rules(), "dport 80 ") && p.State() != settled
		})
		p.WantAnswer("tcp", 81, "203.0.113.25:80")
		passive.finish(byClient)
		active.finish(byServer)

		// The removal of the line ends them.
		passive, active = ftp(p, p.Lab.Client, 2121), ftp(p, p.Lab.Client, 2121)
		byClient, byServer = passive.open("PASV"), active.open("PORT")
		write("81 tcp 203.0.113.25 80\n")
		r.AwaitLog(1, `msg="stale connections deleted"`)
		for what, data := range map[string]net.Conn{"passive": byClient, "active": byServer} {
			if _, err := io.ReadFull(data, make([]byte, len("data\n"))); err != nil {
				p.Error(err)
			}
			wantReset(p, what, data)
		}
		write("81 tcp 203.0.113.25 80\n2121 tcp 203.0.113.25 21\n")
		p.Until("the line is loaded", func() bool { return strings.Contains(p.Rules(), "2121") })

		settled = p.State()
		if p.Backend == labtest.Nftables {
			p.NFT("flush chain ip egress-router raw-prerouting")
		} else {
			p.Iptables("-t", "raw", "-F", "EGRESS-PREROUTING")
		}
		r.Settle(settled)
		c = ftp(p, p.Lab.Client, 2121)
		c.finish(c.open("PORT"))
	})
}
