package httpproxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// servers is a network all of whose addresses belong to this machine (RFC 5737). Tests
// have servers on them, which the tests' proxies do not treat as local.
const servers = "203.0.113.254/24"

// TestMain runs the tests in a network namespace with these addresses, and a network
// without any answer.
func TestMain(m *testing.M) { os.Exit(nstest.M{Tests: prepared{m}}.Run()) }

// prepared adds the addresses before the tests run.
type prepared struct{ tests *testing.M }

func (p prepared) Run() int {
	if err := addresses(); err != nil {
		fmt.Fprintf(os.Stderr, "preparing the network: %v\n", err)
		return 1
	}
	return p.tests.Run()
}

// patience is how long a test waits for an event, which a busy machine may delay.
const patience = 10 * time.Minute

// await polls a condition until it holds, and reports whether it does.
func await(condition func() bool) bool {
	for end := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// zone is a resolver with a few names. The key "search" has its search list.
type zone map[string][]string

// LookupAddr returns the addresses of a name.
func (z zone) LookupAddr(_ context.Context, _ netip.Addr, host string) ([]netip.Addr, string, error) {
	var addrs []netip.Addr
	for _, full := range z.FullNames(host) {
		for _, s := range z[full] {
			if s == "timeout" {
				return nil, "", &net.DNSError{Err: "i/o timeout", Name: host, IsTimeout: true}
			}
			addrs = append(addrs, ip(s))
		}
		if addrs != nil {
			return addrs, full, nil
		}
	}
	return nil, "", &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// FullNames returns the names to try for a host: itself first if it has a dot.
func (z zone) FullNames(host string) []string {
	bare, absolute := strings.CutSuffix(host, ".")
	if absolute {
		return []string{bare}
	}
	var list []string
	for _, domain := range z["search"] {
		list = append(list, bare+"."+domain)
	}
	if strings.Contains(bare, ".") {
		return slices.Insert(list, 0, bare)
	}
	return append(list, bare)
}

// LookupNames returns the names of an address.
func (z zone) LookupNames(_ context.Context, _, a netip.Addr) ([]string, error) {
	if names := z[a.String()]; names != nil {
		return names, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: a.String(), IsNotFound: true}
}

// output is a log for concurrent writers and readers.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// take returns the log since the last call.
func (o *output) take() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer o.b.Reset()
	return o.b.String()
}

func newLogger(o *output) *slog.Logger { return slog.New(slog.NewTextHandler(o, nil)) }

// A testProxy is a running proxy.
type testProxy struct {
	*Proxy
	addr string
	log  *output
	stop context.CancelFunc
	done chan error // the result of Serve
}

// start runs a proxy until the test ends.
func start(t testing.TB, rules string, names zone, change func(*Proxy)) *testProxy {
	t.Helper()
	list, err := Parse(rules)
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{log: &output{}, done: make(chan error, 1)}
	p.Proxy = New(Config{
		Rules: list, ConnectTimeout: patience, HeaderTimeout: patience, KeepAliveTimeout: patience,
		IdleTimeout: patience, ShutdownGrace: 50 * time.Millisecond, MaxHeaderBytes: 64 << 10,
	}, newLogger(p.log), names)
	p.own = func(netip.Addr) (bool, error) { return false, nil }
	if change != nil {
		change(p.Proxy)
	}
	l, err := listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	var ctx context.Context
	ctx, p.stop = context.WithCancel(context.Background())
	go func() { p.done <- p.Serve(ctx, l) }()
	t.Cleanup(func() {
		p.stop()
		select {
		case err := <-p.done:
			if err != nil {
				t.Errorf("the proxy ended with %v", err)
			}
		case <-time.After(patience):
			t.Errorf("the proxy does not end")
		}
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", p.log)
		}
	})
	return p
}

// connect connects to the proxy.
func (p *testProxy) connect(t *testing.T) *net.TCPConn { return dialAt(t, p.addr) }

func dialAt(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// send writes to a connection.
func send(t *testing.T, conn io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(conn, s); err != nil {
		t.Errorf("writing %q: %v", s, err)
	}
}

// wantRead reads as many bytes as expected and compares them.
func wantRead(t *testing.T, conn io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(conn, got)
	if string(got[:n]) != want {
		t.Errorf("got  %q (%v)\nwant %q", got[:n], err, want)
	}
}

// wantEnd reads to the end of the stream and compares the data.
func wantEnd(t *testing.T, conn io.Reader, want string) {
	t.Helper()
	got, err := io.ReadAll(conn)
	if string(got) != want || err != nil {
		t.Errorf("got  %q (%v)\nwant %q and the end", got, err, want)
	}
}

// serve runs a server that handles each connection, and returns its address.
func serve(t testing.TB, handle func(conn *net.TCPConn)) string {
	t.Helper()
	return serveAt(t, "203.0.113.1:0", handle)
}

func serveAt(t testing.TB, addr string, handle func(conn *net.TCPConn)) string {
	t.Helper()
	plain, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	l := plain.(*net.TCPListener)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(patience))
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	return l.Addr().String()
}

// addresses configures the network of TestMain.
func addresses() error {
	if _, err := netlink.LinkByName("void0"); err == nil {
		return nil // this process fuzzes, in the namespaces of the one that started it
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, network := range []string{servers, "2001:db8::1/128"} {
		addr, err := netlink.ParseAddr(network)
		if err != nil {
			return err
		}
		addr.Flags = 0x02 // IFA_F_NODAD
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return fmt.Errorf("adding %s: %w", network, err)
		}
	}
	// A network without any answer.
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "void0"}, PeerName: "void1"}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	for _, name := range []string{"void0", "void1"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	void, err := netlink.LinkByName("void0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("198.51.100.1/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(void, addr); err != nil {
		return err
	}
	// With ARP the kernel would report after three seconds that there is no host.
	for _, host := range []string{"198.51.100.7", "198.51.100.8", "198.51.100.9"} {
		neighbour := &netlink.Neigh{
			LinkIndex: void.Attrs().Index, State: netlink.NUD_PERMANENT,
			IP: net.ParseIP(host), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		}
		if err := netlink.NeighSet(neighbour); err != nil {
			return fmt.Errorf("adding the neighbour %s: %w", host, err)
		}
	}
	return nil
}
