package tcpproxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// names is a Resolver for tests.
type names struct {
	mu    sync.Mutex
	addrs map[string][]netip.Addr
}

func (n *names) set(host string, addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.addrs == nil {
		n.addrs = map[string][]netip.Addr{}
	}
	n.addrs[host] = nil
	for _, a := range addrs {
		n.addrs[host] = append(n.addrs[host], netip.MustParseAddr(a))
	}
}

func (n *names) Lookup(_ context.Context, host string) ([]netip.Addr, time.Time, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.addrs[host]) == 0 {
		return nil, time.Time{}, notFoundError{errors.New("no such name")}
	}
	return n.addrs[host], time.Now().Add(time.Second), nil
}

// serve answers each connection to an address with that address and the first line,
// then echoes.
func serve(t *testing.T, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // without a descriptor, see limit
				time.Sleep(time.Millisecond)
				continue
			}
			go func() {
				defer conn.Close()
				line, err := bufio.NewReader(conn).ReadString('\n')
				if err != nil {
					return
				}
				fmt.Fprintf(conn, "%s %q\n", addr, line)
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
}

// A client is one connection to the proxy.
type client struct {
	*net.TCPConn
	r *bufio.Reader
}

func connect(t *testing.T, port int) *client {
	t.Helper()
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &client{conn.(*net.TCPConn), bufio.NewReader(conn)}
}

// wantRefusal checks that a connection is reset before any data.
func wantRefusal(t *testing.T, port int) {
	t.Helper()
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("port %d: %v, want a reset", port, err)
	}
}

func (c *client) ask(t *testing.T, want string) {
	t.Helper()
	if _, err := c.Write([]byte("hi\n")); err != nil {
		t.Error(err)
	}
	if line, err := c.r.ReadString('\n'); err != nil || line != want+" \"hi\\n\"\n" {
		t.Errorf("answer %q, %v; want from %s", line, err, want)
	}
}

func (c *client) wantEcho(t *testing.T) {
	t.Helper()
	if _, err := c.Write([]byte("echo\n")); err != nil {
		t.Error(err)
	}
	if line, err := c.r.ReadString('\n'); err != nil || line != "echo\n" {
		t.Errorf("echo %q, %v", line, err)
	}
}

// A logBook is a log for tests.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newProxy(t *testing.T, change func(*Options)) (*Proxy, *names, *logBook) {
	t.Helper()
	n, book := new(names), new(logBook)
	o := Options{Resolver: n, Idle: time.Minute, Log: slog.New(slog.NewTextHandler(book, nil))}
	if change != nil {
		change(&o)
	}
	p := New(o)
	p.local = func(netip.Addr) bool { return false } // the servers of tests are on loopback addresses
	t.Cleanup(func() { p.Shutdown(0) })
	return p, n, book
}

func apply(t *testing.T, p *Proxy, list string) {
	t.Helper()
	destinations, err := Parse(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(destinations); err != nil {
		t.Fatal(err)
	}
}

// Connections reach destinations by address and by name. The clients of a name that
// does not resolve are refused until it does; others are unaffected.
func TestProxy(t *testing.T) {
	serve(t, "127.0.1.1:80")
	serve(t, "127.0.1.2:80")
	p, n, _ := newProxy(t, nil)
	n.set("a.example", "127.0.1.2")
	n.set("dead.example", "127.0.1.7", "127.0.1.8", "127.0.1.9")
	apply(t, p, "7001 127.0.1.1 80\n7002 a.example 80\n7003 late.example 80\n7004 dead.example 1")
	connect(t, 7001).ask(t, "127.0.1.1:80")
	connect(t, 7002).ask(t, "127.0.1.2:80")

	wantRefusal(t, 7003) // a name that does not exist
	wantRefusal(t, 7004) // servers that do not exist
	n.set("late.example", "127.0.1.2")
	await(t, func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:7003")
		if err != nil {
			return err
		}
		defer conn.Close()
		_, _ = conn.Write([]byte("hi\n"))
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err == nil && !strings.HasPrefix(line, "127.0.1.2:80") {
			err = fmt.Errorf("answer %q", line)
		}
		return err
	})
}

// A new list changes the destinations and ends no connection.
func TestApply(t *testing.T) {
	for _, addr := range []string{"127.0.1.1:80", "127.0.1.2:80"} {
		serve(t, addr)
	}
	p, _, _ := newProxy(t, nil)
	apply(t, p, "7001 127.0.1.1 80\n7002 127.0.1.1 80\n7003 127.0.1.1 80")
	var old []*client
	for port := 7001; port <= 7003; port++ {
		c := connect(t, port)
		c.ask(t, "127.0.1.1:80")
		old = append(old, c)
	}
	apply(t, p, "7004 127.0.1.2 80\n7001 127.0.1.1 80\n7002 127.0.1.2 80")
	connect(t, 7001).ask(t, "127.0.1.1:80")
	connect(t, 7002).ask(t, "127.0.1.2:80")
	connect(t, 7004).ask(t, "127.0.1.2:80")
	if _, err := net.Dial("tcp", "127.0.0.1:7003"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port that was removed: %v", err)
	}
	for _, c := range old {
		c.wantEcho(t)
	}
	apply(t, p, "# none")
	if _, err := net.Dial("tcp", "127.0.0.1:7001"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("an empty list: %v", err)
	}
	old[0].wantEcho(t)
}

// A port in use is an error, does not affect the others, and is retried.
func TestPortInUse(t *testing.T) {
	serve(t, "127.0.1.1:80")
	other, err := net.Listen("tcp", ":7002")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p, _, _ := newProxy(t, nil)
	list, err := Parse("7002 127.0.1.1 80\n7003 127.0.1.1 80")
	if err != nil {
		t.Fatal(err)
	}
	err = p.Apply(list)
	failed, ok := errors.AsType[*ListenError](err)
	if !ok || failed.Port != 7002 || err.Error() != "listening on port 7002: bind: address already in use" || failed.Hint(nil) == "" {
		t.Errorf("error %v", err)
	}
	connect(t, 7003).ask(t, "127.0.1.1:80")
	_ = other.Close()
	if err := p.Apply(list); err != nil {
		t.Error(err)
	}
	connect(t, 7002).ask(t, "127.0.1.1:80")
}

// Shutdown refuses new connections and waits for existing ones up to the grace.
func TestShutdown(t *testing.T) {
	serve(t, "127.0.1.1:80")
	for name, patient := range map[string]bool{"connections that end": true, "connections that do not": false} {
		t.Run(name, func(t *testing.T) {
			p, _, book := newProxy(t, func(o *Options) { o.AccessLog = true })
			apply(t, p, "7001 127.0.1.1 80")
			c := connect(t, 7001)
			c.ask(t, "127.0.1.1:80")
			grace := 50 * time.Millisecond
			if patient {
				grace = patience
			}
			done := make(chan struct{})
			go func() {
				p.Shutdown(grace)
				close(done)
			}()
			for refused := false; !refused; time.Sleep(time.Millisecond) {
				conn, err := net.Dial("tcp", "127.0.0.1:7001")
				if refused = errors.Is(err, syscall.ECONNREFUSED); !refused && err == nil {
					_ = conn.Close()
				}
			}
			if patient {
				c.wantEcho(t)
				_ = c.Close()
			} else if _, err := c.r.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("after the shutdown timeout: %v", err)
			}
			<-done
			if want := map[bool]string{true: "outcome=done", false: "outcome=stopped"}[patient]; !strings.Contains(book.String(), want) {
				t.Errorf("the log lacks %s:\n%s", want, book)
			}
		})
	}
}

// Each connection has one line with its addresses, bytes, duration and outcome.
func TestAccessLog(t *testing.T) {
	serve(t, "127.0.1.1:80")
	p, n, book := newProxy(t, func(o *Options) { o.AccessLog = true })
	n.set("a.example", "127.0.1.1")
	apply(t, p, "7001 a.example 80\n7002 nowhere.example 80")
	c := connect(t, 7001)
	c.ask(t, "127.0.1.1:80")
	_ = c.Close()
	wantDone(t, p)
	idle := connect(t, 7001)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.ReadAll(idle)
	}()
	for over := false; !over; {
		for _, l := range p.loops {
			l.pass()
		}
		select {
		case <-ended:
			over = true
		default:
		}
	}
	wantRefusal(t, 7002)
	p.Shutdown(patience)
	for _, want := range []string{
		`level=INFO msg=connection client=127.0.0.1:\d+ port=7001 destination=a.example:80 address=127.0.1.1:80 to_server=3 to_client=20 duration=[0-9.]+m?s outcome=done`,
		`level=INFO msg=connection client=127.0.0.1:\d+ port=7001 destination=a.example:80 address=127.0.1.1:80 to_server=0 to_client=0 duration=[0-9.]+m?s outcome=idle`,
		`level=INFO msg=connection client=127.0.0.1:\d+ port=7002 destination=nowhere.example:80 address="" to_server=0 to_client=0 duration=[0-9.]+m?s outcome="not connected" error="no such name"`,
	} {
		if n := len(regexp.MustCompile(want).FindAllString(book.String(), -1)); n != 1 {
			t.Errorf("%d lines like\n%s\nin\n%s", n, want, book)
		}
	}
	if n := strings.Count(book.String(), "msg=connection"); n != 3 {
		t.Errorf("%d lines for 3 connections", n)
	}
}

// The header with the client's addresses is the first data to the server; that of a
// probe is the local one.
func TestProxyHeader(t *testing.T) {
	for name, test := range map[string]struct {
		client, local string
		want          string
	}{
		"IPv4": {"10.128.0.71:4660", "10.128.0.98:80", "\x21\x11\x00\x0c\x0a\x80\x00\x47\x0a\x80\x00\x62\x12\x34\x00\x50"},
		"IPv6": {"[2001:db8::1]:1", "[2001:db8::2]:256", "\x21\x21\x00\x24\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01\x01\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			got := proxyHeader(netip.MustParseAddrPort(test.client), netip.MustParseAddrPort(test.local))
			if diff := cmp.Diff("\r\n\r\n\x00\r\nQUIT\n"+test.want, string(got)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}

	l, err := net.Listen("tcp", "127.0.1.1:81")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, _, _ := newProxy(t, func(o *Options) { o.SendProxy = true })
	apply(t, p, "7001 127.0.1.1 81")
	c := connect(t, 7001)
	_, _ = c.Write([]byte("hi"))
	_ = c.CloseWrite()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(server)
	want := string(proxyHeader(c.LocalAddr().(*net.TCPAddr).AddrPort(), netip.MustParseAddrPort("127.0.0.1:7001"))) + "hi"
	if err != nil || string(got) != want {
		t.Errorf("the server read %q, %v; want %q", got, err, want)
	}
	_ = server.Close()

	if err := p.probe(t.Context(), netip.MustParseAddrPort("127.0.1.1:81")); err != nil {
		t.Error(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	got, _ = io.ReadAll(server) // ends by a reset
	if want := "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"; len(got) > 0 && string(got) != want {
		t.Errorf("a probe sends %q, want %q", got, want)
	}
}

// An unreachable server is tried once, set aside, and used again after a probe.
func TestServerComesBack(t *testing.T) {
	t.Parallel()
	serve(t, "127.0.1.1:86")
	p, n, book := newProxy(t, nil)
	n.set("a.example", "127.0.1.1", "127.0.1.9")
	apply(t, p, "7031 a.example 86")
	for range 4 {
		connect(t, 7031).ask(t, "127.0.1.1:86")
	}
	if n := strings.Count(book.String(), "address unreachable"); n != 1 {
		t.Errorf("set aside %d times, want once:\n%s", n, book)
	}
	serve(t, "127.0.1.9:86")
	await(t, func() error {
		if !strings.Contains(book.String(), "reachable again") {
			return fmt.Errorf("no probe succeeded:\n%s", book)
		}
		return nil
	})
	// Both share the connections again.
	seen := map[byte]int{}
	for range 4 {
		c := connect(t, 7031)
		_, _ = c.Write([]byte("hi\n"))
		line, err := c.r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		seen[line[len("127.0.1.")]]++
	}
	if seen['1'] != 2 || seen['9'] != 2 {
		t.Errorf("shared %v", seen)
	}
}

// Connections that the server closes first, aborted ones and probes leave no local port
// of the proxy in TIME_WAIT, of which there are some 28,000 for each server.
func TestNoPortIsKept(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.1.1:82")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("bye\n"))
			_ = conn.Close()
		}
	}()
	p, _, _ := newProxy(t, nil)
	apply(t, p, "7001 127.0.1.1 82")
	for i := range 50 {
		c := connect(t, 7001)
		if line, err := c.r.ReadString('\n'); line != "bye\n" {
			t.Error(line, err)
		}
		if i%2 == 0 {
			_, _ = io.ReadAll(c.r)
			_ = c.Close()
		} else {
			reset(c.TCPConn)
		}
		if err := p.probe(t.Context(), netip.MustParseAddrPort("127.0.1.1:82")); err != nil {
			t.Error(err)
		}
	}
	p.Shutdown(patience)
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	// proc_net_tcp.rst of the kernel: local address, remote address, state.
	if !regexp.MustCompile(`(?m)^ *\d+: 0101007F:0052 \w+:\w+ 06 `).Match(table) {
		t.Errorf("server connections in TIME_WAIT missing:\n%s", table)
	}
	waiting := regexp.MustCompile(`(?m)^ *\d+: \w+:\w+ 0101007F:0052 06 `).FindAllString(string(table), -1)
	if len(waiting) > 0 {
		t.Errorf("%d ports are in TIME_WAIT, such as %s", len(waiting), waiting[0])
	}
}
