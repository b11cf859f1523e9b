package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A nameServer is the one that the pod's resolv.conf names, behind the cluster
// network.
type nameServer struct {
	mu     sync.Mutex
	addrs  map[string][]string // by name; nil: no such name
	silent bool
	unsure uint16       // type of the questions that get no answer
	ttl    uint32       // of answers; zero: 1
	asked  []netip.Addr // sources of the questions
	missed int          // questions that were not answered
}

func (n *nameServer) set(name string, addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs[name] = addrs
}

func (n *nameServer) setSilent(silent bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.silent = silent
}

// setUnsure leaves the questions of a type without an answer.
func (n *nameServer) setUnsure(of uint16) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.unsure = of
}

func (n *nameServer) unanswered() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.missed
}

// wantAskedBy checks that only this address has asked.
func (n *nameServer) wantAskedBy(t *testing.T, want netip.Addr) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.asked) == 0 {
		t.Error("the name server received no query")
	}
	for _, a := range n.asked {
		if a != want {
			t.Errorf("a query from %s, want %s", a, want)
		}
	}
}

// ServeDNS answers with TTL 1 if there is no other one, so that a test need not wait long for a change.
func (n *nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, w.RemoteAddr().(*net.UDPAddr).AddrPort().Addr().Unmap())
	if n.silent || n.unsure == q.Question[0].Qtype {
		n.missed++
		return
	}
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	addrs := n.addrs[q.Question[0].Name]
	if len(addrs) == 0 {
		m.Rcode = dns.RcodeNameError
	}
	for _, a := range addrs {
		header := dns.RR_Header{Name: q.Question[0].Name, Rrtype: q.Question[0].Qtype, Class: dns.ClassINET, Ttl: max(1, n.ttl)}
		switch six := strings.Contains(a, ":"); {
		case header.Rrtype == dns.TypeA && !six:
			m.Answer = append(m.Answer, &dns.A{Hdr: header, A: net.ParseIP(a)})
		case header.Rrtype == dns.TypeAAAA && six:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: net.ParseIP(a)})
		}
	}
	_ = w.WriteMsg(m)
}

func serveNames(p *labtest.Pod) *nameServer {
	p.Helper()
	node := p.Handle(p.Lab.Node)
	_, addr, err := net.ParseCIDR("10.96.0.10/32")
	if err != nil {
		p.Fatal(err)
	}
	if err := node.AddrAdd(p.Link(node, "lo"), &netlink.Addr{IPNet: addr}); err != nil {
		p.Fatal(err)
	}
	var socket net.PacketConn
	if err := p.Lab.Node.Do(func() (err error) {
		socket, err = net.ListenPacket("udp4", "10.96.0.10:53")
		return err
	}); err != nil {
		p.Fatal(err)
	}
	n := &nameServer{addrs: map[string][]string{}}
	server := &dns.Server{PacketConn: socket, Handler: n}
	started := make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	go func() { _ = server.ActivateAndServe() }()
	<-started
	p.Cleanup(func() { _ = server.Shutdown() })
	return n
}

// A proxy is the DNS proxy, running in the router's namespace.
type proxy struct {
	*labtest.Pod
	cmd *exec.Cmd
	log *log
}

// A log is the output of a process so far.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// startDNSProxy configures the pod for the DNS proxy and starts that, with the variables
// given; with before, under another program.
func startDNSProxy(p *labtest.Pod, env map[string]string, before ...string) *proxy {
	p.Helper()
	p.Env = map[string]string{"EGRESS_ROUTER_MODE": "dns-proxy", "EGRESS_SOURCE": "192.168.12.99/24", "EGRESS_GATEWAY": "192.168.12.1"}
	p.OK()
	p.Env = env
	path, err := exec.LookPath("egress-dns-proxy")
	if err != nil {
		p.Fatal(err)
	}
	command := slices.Concat(before, []string{path})
	x := &proxy{p, p.Command(command[0], command[1:]...), new(log)}
	x.cmd.Stderr = x.log
	if err := p.Lab.Start(p.Lab.Router, x.cmd); err != nil {
		p.Fatal(err)
	}
	return x
}

// await sends requests to a port until one of the given servers answers.
func (x *proxy) await(port uint16, servers ...string) {
	x.Helper()
	x.Until(fmt.Sprintf("port %d answers as one of %v", port, servers), func() bool {
		a, err := x.Ask(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
		return err == nil && slices.Contains(servers, a.Server.String())
	})
}

// wantServers asks a port a few times and checks who answered, and that each
// server saw the reserved address.
func (x *proxy) wantServers(port uint16, servers ...string) {
	x.Helper()
	seen := map[string]bool{}
	for range 4 {
		a, err := x.Ask(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
		if err != nil || a.Peer.Addr() != lab.Source {
			x.Errorf("port %d: %v, %v; want to be seen as %s", port, a, err, lab.Source)
		}
		seen[a.Server.String()] = true
	}
	for _, s := range servers {
		if !seen[s] {
			x.Errorf("port %d: no answer from %s", port, s)
		}
		delete(seen, s)
	}
	if len(seen) > 0 {
		x.Errorf("port %d: answers from %v, want only %v", port, seen, servers)
	}
}

// stop stops the proxy and returns its log.
func (x *proxy) stop() string {
	x.Helper()
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		x.Error(err)
	}
	return x.wait()
}

func (x *proxy) wait() string {
	x.Helper()
	if err := x.cmd.Wait(); err != nil {
		x.Errorf("%v\n%s", err, labtest.Tail(x.log.String()))
	}
	return x.log.String()
}

// Clients of the DNS proxy reach servers by name. Servers see the reserved address,
// name servers the pod's own.
func TestDNSProxyByName(t *testing.T) {
	t.Parallel()
	for _, b := range []labtest.Backend{labtest.IptablesNFT, labtest.Nftables} {
		t.Run(b.Name, func(t *testing.T) {
			t.Parallel()
			testDNSProxy(labtest.New(t, lab.Options{}, b))
		})
	}
}

func testDNSProxy(p *labtest.Pod) {
	t := p.T
	n := serveNames(p)
	n.set("www.example.com.", "203.0.113.25", "203.0.113.26")
	x := startDNSProxy(p, map[string]string{
		"EGRESS_DNS_PROXY_DESTINATION": "80 203.0.113.25\n8080 www.example.com 80\n8443 late.example.com 443\n8081 dead.example.com 80\n",
		"EGRESS_DNS_PROXY_DEBUG":       "1",
		"EGRESS_SHUTDOWN_GRACE":        "1h", "EGRESS_DNS_PROXY_IDLE_TIMEOUT": "1h",
	})
	x.await(80, "203.0.113.25:80")
	x.await(8080, "203.0.113.25:80", "203.0.113.26:80")
	x.wantServers(80, "203.0.113.25:80")
	x.wantServers(8080, "203.0.113.25:80", "203.0.113.26:80")
	if a, err := x.Ask(x.Lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080)); err != nil || a.Peer.Addr() != lab.Source {
		t.Errorf("from another subnet: %v, %v", a, err)
	}

	// The addresses of a name change, and another name gets its first. An open
	// connection stays.
	conn := x.Dial(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	r := bufio.NewReader(conn)
	if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source {
		t.Errorf("%v, %v", a, err)
	}
	n.set("www.example.com.", "203.0.113.26")
	n.set("late.example.com.", "203.0.113.26")
	x.await(8443, "203.0.113.26:443")
	x.Until("only the new address of the name answers", func() bool {
		for range 4 {
			a, err := x.Ask(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
			if err != nil || a.Server.String() != "203.0.113.26:80" {
				return false
			}
		}
		return true
	})

	// The name server does not answer any more. No client waits for the timeout of a
	// question, which is 5 s (resolv.conf(5)).
	n.setSilent(true)
	x.Until("the silent name server is asked", func() bool {
		x.wantServers(8080, "203.0.113.26:80")
		return n.unanswered() > 0
	})
	slow := 0
	for range 4 {
		begin := time.Now()
		x.wantServers(8080, "203.0.113.26:80")
		if time.Since(begin)/4 >= 5*time.Second {
			slow++
		}
	}
	if slow > 1 { // a virtual machine that is suspended delays one
		t.Errorf("%d of 4 times connections to the known address took the timeout, want none", slow)
	}
	n.setSilent(false)

	// An address that refuses is skipped.
	n.set("dead.example.com.", "203.0.113.27", "203.0.113.25")
	x.await(8081, "203.0.113.25:80")
	x.wantServers(8081, "203.0.113.25:80")

	n.wantAskedBy(t, lab.RouterAddr)

	wantNoUseFromOutside(x.Pod, 8080)

	// The open connection continues after SIGTERM.
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.Until("connections are refused", func() bool {
		_, err := x.Ask(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		return err != nil
	})
	x.WantEcho("the open connection", conn, r)
	_ = conn.Close()
	log := x.wait()
	if !regexp.MustCompile(`(?m)msg=connection client=10\.128\.0\.71:\d+ port=8080 destination=www\.example\.com:80 address=203\.0\.113\.2[56]:80 .* outcome=done$`).MatchString(log) {
		t.Errorf("the log lacks a connection:\n%s", labtest.Tail(log))
	}
}

// The DNS proxy follows its file in a mounted ConfigMap, whose links the kubelet
// swaps.
func TestDNSProxyFollowsFile(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	dir := t.TempDir()
	version := 0
	mount := func(list string) {
		t.Helper()
		version++
		data := fmt.Sprintf("..%d", version)
		for _, err := range []error{
			os.Mkdir(filepath.Join(dir, data), 0o755),
			os.WriteFile(filepath.Join(dir, data, "destinations"), []byte(list), 0o600),
			os.Symlink(data, filepath.Join(dir, "..data_tmp")),
			os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if version > 1 {
			if err := os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..%d", version-1))); err != nil {
				t.Fatal(err)
			}
		}
	}
	mount("8080 203.0.113.25 80\n")
	file := filepath.Join(dir, "destinations")
	if err := os.Symlink("..data/destinations", file); err != nil {
		t.Fatal(err)
	}
	x := startDNSProxy(p, map[string]string{"EGRESS_DNS_PROXY_DESTINATION_FILE": file, "EGRESS_DNS_PROXY_IDLE_TIMEOUT": "1h"})
	x.await(8080, "203.0.113.25:80")
	conn := x.Dial(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	r := bufio.NewReader(conn)
	if a, err := lab.ReadAnswer(r); err != nil || a.Server.String() != "203.0.113.25:80" {
		t.Errorf("%v, %v", a, err)
	}

	mount("8080 203.0.113.26 80\n8443 203.0.113.26 443\n")
	x.await(8443, "203.0.113.26:443")
	x.wantServers(8080, "203.0.113.26:80")

	mount("8080 203.0.113.26 80\n8443 nonsense\n")
	x.Until("the invalid list is read", func() bool { return strings.Contains(x.log.String(), "Bad destination '8443 nonsense'") })
	x.wantServers(8443, "203.0.113.26:443")

	mount("8443 203.0.113.26 443\n")
	x.Until("the removed port is closed", func() bool {
		_, err := x.Ask(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
		return err != nil
	})
	x.WantEcho("the connection from the beginning", conn, r)
	_ = conn.Close()
	log := x.stop()
	if n := strings.Count(log, "Bad destination '8443 nonsense'"); n != 1 {
		t.Errorf("%d errors of the invalid list, want 1:\n%s", n, labtest.Tail(log))
	}
}

// Data does not pass through the memory of the DNS proxy (splice(2)).
func TestDNSProxySplices(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	trace := filepath.Join(t.TempDir(), "trace")
	// With -D the started process is the proxy, which gets the SIGTERM, not strace.
	x := startDNSProxy(p, map[string]string{"EGRESS_DNS_PROXY_DESTINATION": "8080 203.0.113.25 80"},
		"strace", "-D", "-f", "-qq", "-o", trace, "-e", "trace=splice,read,write,sendto,recvfrom,sendmsg,recvmsg")
	x.await(8080, "203.0.113.25:80")
	conn := x.Dial(x.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	const size, short = 2 << 20, 128 << 10
	go func() {
		_, _ = conn.Write(make([]byte, size))
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, conn); err != nil || n < size {
		t.Errorf("%d bytes received, %v", n, err)
	}
	x.stop()

	moved := map[string]int{}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		clear(moved)
		for _, m := range regexp.MustCompile(`(?m)^\d+ +(?:<\.\.\. )?(\w+)[( ].* = (\d+)$`).FindAllStringSubmatch(string(text), -1) {
			n, err := strconv.Atoi(m[2])
			if err != nil {
				t.Fatal(err)
			}
			moved[m[1]] += n
		}
		// Data goes to the server and back, each way into a pipe and out of it. The
		// first pieces, and later ones of their size, need not.
		if moved["splice"] >= 4*(size-short) {
			break
		}
		if time.Since(begin) > labtest.Patience {
			t.Fatalf("bytes by call: %v, want %d by splice", moved, 4*(size-short))
		}
	}
	delete(moved, "splice")
	for call, n := range moved {
		if n > 2*short {
			t.Errorf("%d bytes by %s, want at most %d", n, call, 2*short)
		}
	}
}
