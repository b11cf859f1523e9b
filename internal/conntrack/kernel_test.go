package conntrack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/sysctl"
	"github.com/egress-router/egress-router/rules"
)

// redirects are rules that act on the loopback link as a router does on two:
// connections to 127.0.0.98 are marked, redirected and get another source.
const redirects = `
flush ruleset
table ip t {
	chain marks { type filter hook output priority mangle; ip daddr 127.0.0.98 ct mark set 0x1000; }
	chain to {
		type nat hook output priority -100;
		ip daddr 127.0.0.98 tcp dport 80 dnat to 127.0.0.25:8080
		ip daddr 127.0.0.98 udp dport 53 dnat to 127.0.0.25:5353
		ip daddr 127.0.0.98 dnat to 127.0.0.27
	}
	chain from { type nat hook postrouting priority 100; ct mark 0x1000 snat to 127.0.0.99; }
}`

var (
	server   = netip.MustParseAddr("127.0.0.25")
	fallback = netip.MustParseAddr("127.0.0.27")
	set      = rules.Set{
		Redirects: []rules.Redirect{
			{Protocol: rules.TCP, Port: 80, To: server, ToPort: 8080},
			{Protocol: rules.UDP, Port: 53, To: server, ToPort: 5353},
			{Protocol: rules.TCP, Port: 81, To: server},
		},
		Fallback: fallback,
	}
	options = Options{Sources: []netip.Addr{netip.MustParseAddr("127.0.0.99")}, Mark: 0x1000, Set: set, Count: true, Log: slog.New(slog.DiscardHandler)}
)

func run(t *testing.T, stdin, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// redirect loads the rules, with an empty connection table.
func redirect(t *testing.T) {
	t.Helper()
	run(t, redirects, "nft", "-f", "-")
	// No entry of a datagram expires during a test, however long that takes.
	setSysctl(t, "net.netfilter.nf_conntrack_udp_timeout", "3600")
	forget(t)
}

// forget deletes all entries of the connection table.
func forget(t *testing.T) {
	t.Helper()
	s, err := openSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.ask(messageDelete, unix.NLM_F_ACK, nil, func(message) {}); err != nil {
		t.Fatal(err)
	}
}

func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	before, err := sysctl.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := sysctl.Write(name, value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sysctl.Write(name, before); err != nil {
			t.Error(err)
		}
	})
}

// start opens a tracker and runs it until the test ends.
func start(t *testing.T, o Options) *Tracker {
	t.Helper()
	tracker, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- tracker.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		tracker.Close()
	})
	return tracker
}

// serve echoes TCP connections and datagrams.
func serve(t *testing.T, tcp, udp string) {
	t.Helper()
	l, err := net.Listen("tcp4", tcp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	c, err := net.ListenPacket("udp4", udp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = c.WriteTo(b[:n], from)
			}
		}
	}()
}

// exchange sends n bytes to the echo server, reads them back and returns the connection.
func exchange(t *testing.T, conn net.Conn, n int) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func dial(t *testing.T, network, to string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// dialFrom connects to the UDP server from a port of its own: a port that the kernel
// chooses twice would continue the earlier connection.
func dialFrom(port int) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
	return dialer.Dial("udp4", "127.0.0.98:53")
}

func counts(t *testing.T, tracker *Tracker) Report {
	t.Helper()
	r, err := tracker.Counts()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantUDP checks the counters of datagrams, whose sizes are exact: an IP header has
// 20 bytes, a UDP header 8 (RFC 791 and 768).
func wantUDP(t *testing.T, got Line, connections uint64, open, datagrams, payload int) {
	t.Helper()
	packets, size := uint64(datagrams), uint64(datagrams*28+payload)
	want := Counts{Connections: connections, Traffic: Traffic{packets, size, packets, size}, Open: open}
	if got.Counts != want {
		t.Errorf("%v: got %+v, want %+v", got.Redirect, got.Counts, want)
	}
}

func TestCounts(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	serve(t, "127.0.0.27:7000", "127.0.0.27:7000")
	// Older than the tracker: only later traffic counts.
	setSysctl(t, accountingSysctl, "1")
	old := dial(t, "udp4", "127.0.0.98:53")
	exchange(t, old, 5)
	tracker := start(t, options)
	r := counts(t, tracker)
	if len(r.Lines) != 4 || !r.Accounted || r.Lines[3].Redirect != (rules.Redirect{To: fallback}) || r.Lines[2].ToPort != 81 {
		t.Fatalf("got %+v", r)
	}
	wantUDP(t, r.Lines[1], 0, 1, 0, 0)
	exchange(t, old, 7)
	wantUDP(t, counts(t, tracker).Lines[1], 0, 1, 1, 7)

	conn := dial(t, "udp4", "127.0.0.98:53")
	exchange(t, conn, 100)
	wantUDP(t, counts(t, tracker).Lines[1], 1, 2, 2, 107)
	exchange(t, conn, 11)
	exchange(t, dial(t, "udp4", "127.0.0.98:7000"), 1000) // never seen while open
	forget(t)
	r = counts(t, tracker)
	wantUDP(t, r.Lines[1], 1, 0, 3, 118)
	wantUDP(t, r.Lines[3], 1, 0, 1, 1000)
	if len(r.Ports) != 0 {
		t.Errorf("ports are in use: %+v", r.Ports)
	}
	// Not redirected.
	exchange(t, dial(t, "udp4", "127.0.0.25:5353"), 10)
	if again := counts(t, tracker); again.Lines[1] != r.Lines[1] {
		t.Errorf("another's connection is counted: %+v", again)
	}

	tcp := dial(t, "tcp4", "127.0.0.98:80")
	exchange(t, tcp, 1000)
	r = counts(t, tracker)
	if l := r.Lines[0]; l.Connections != 1 || l.Open != 1 || l.BytesOut < 1000+l.PacketsOut*40 || l.BytesOut > 1000+l.PacketsOut*60 {
		t.Errorf("got %+v", l)
	}
	if want := (Ports{rules.TCP, netip.MustParseAddrPort("127.0.0.25:8080"), netip.MustParseAddr("127.0.0.99"), 1}); len(r.Ports) != 1 || r.Ports[0] != want {
		t.Errorf("ports in use: got %+v, want %+v", r.Ports, want)
	}
	if err := tcp.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := tcp.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	_ = tcp.Close()
	for deadline := time.Now().Add(10 * time.Minute); r.Lines[0].Open != 0 && time.Now().Before(deadline); {
		r = counts(t, tracker) // the last acknowledgement may be pending
	}
	if l := r.Lines[0]; l.Connections != 1 || l.Open != 0 || len(r.Ports) != 1 {
		t.Errorf("a connection that is over: got %+v, ports %+v", l, r.Ports)
	}
	forget(t)
	if l := counts(t, tracker).Lines[0]; l.Connections != 1 || l.PacketsOut < 4 {
		t.Errorf("got %+v", l)
	}
}

// Counters are exact for concurrent short connections, read in their midst. TCP
// entries disappear when their connection closes, even during a dump.
func TestCountsExactly(t *testing.T) {
	redirect(t)
	setSysctl(t, "net.netfilter.nf_conntrack_tcp_timeout_time_wait", "0")
	setSysctl(t, "net.netfilter.nf_conntrack_tcp_loose", "0") // a late segment begins no connection
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	tracker := start(t, options)
	const clients, each = 8, 250
	var working sync.WaitGroup
	var left atomic.Int64
	left.Store(clients)
	for client := range clients {
		working.Go(func() {
			defer left.Add(-1)
			for i := range each {
				var conn net.Conn
				var err error
				if i%2 == 1 {
					conn, err = dialFrom(20000 + client*each + i)
				} else {
					conn, err = net.Dial("tcp4", "127.0.0.98:80")
				}
				if err != nil {
					t.Error(err)
					return
				}
				_, err = conn.Write(make([]byte, 10))
				if err == nil {
					_, err = conn.Read(make([]byte, 10))
				}
				if err != nil {
					t.Error(err)
				}
				_ = conn.Close()
			}
		})
	}
	var before Report
	for left.Load() > 0 {
		r := counts(t, tracker)
		for i := range before.Lines {
			if r.Lines[i].Connections < before.Lines[i].Connections || r.Lines[i].less(before.Lines[i].Traffic) {
				t.Fatalf("counters went back, from %+v to %+v", before.Lines[i], r.Lines[i])
			}
		}
		before = r
	}
	working.Wait()
	for range 2 {
		r := counts(t, tracker)
		if n := r.Lines[0].Connections; n != clients*each/2 {
			t.Errorf("%d TCP connections, want %d", n, clients*each/2)
		}
		if l := r.Lines[1]; l.Connections != clients*each/2 || l.PacketsOut != l.Connections || l.BytesIn != l.PacketsIn*38 || l.PacketsIn != l.PacketsOut {
			t.Errorf("UDP: %+v, want %d", l, clients*each/2)
		}
		if r.Overruns != 0 {
			t.Errorf("%d overruns", r.Overruns)
		}
		forget(t)
	}
	if n := len(tracker.book.open); n != 0 {
		t.Errorf("%d connections are still kept", n)
	}
}

func TestAudit(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	events := make(chan Event, 100)
	o := options
	o.Count, o.Audit = false, func(e Event) { events <- e }
	start(t, o)
	begin := time.Now()
	conn := dial(t, "udp4", "127.0.0.98:53")
	exchange(t, conn, 12)
	began := <-events
	want := Event{
		Began: true, Protocol: rules.UDP, Client: conn.LocalAddr().(*net.UDPAddr).AddrPort(), Port: 53, Local: netip.MustParseAddrPort("127.0.0.98:53"),
		Server:   netip.MustParseAddrPort("127.0.0.25:5353"),
		Reserved: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.99"), began.Reserved.Port()),
	}
	if began != want || began.Reserved.Port() == 0 {
		t.Errorf("began:\n got %+v\nwant %+v", began, want)
	}
	forget(t)
	ended := <-events
	want.Began, want.Accounted, want.Traffic, want.Timed, want.Outcome = false, true, Traffic{1, 40, 1, 40}, true, Removed
	if want.Duration = ended.Duration; ended != want || ended.Duration < 0 || ended.Duration > time.Since(begin) {
		t.Errorf("ended:\n got %+v\nwant %+v", ended, want)
	}
	// A connection whose line was removed, and one without a redirect.
	exchange(t, dial(t, "udp4", "127.0.0.25:5353"), 12)
	run(t, "insert rule ip t to ip daddr 127.0.0.98 udp dport 54 dnat to 127.0.0.25:5353\n", "nft", "-f", "-")
	exchange(t, dial(t, "udp4", "127.0.0.98:54"), 12)
	if e := <-events; !e.Began || e.Port != 54 {
		t.Errorf("got %+v", e)
	}
}

// A buffer that is too small loses events, which is logged once and counted, and
// the tracker continues.
func TestOverrun(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	var log bytes.Buffer
	var began, ended int
	o := options
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	o.Audit = func(e Event) {
		if e.Began {
			began++
		} else {
			ended++
		}
	}
	tracker, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	if err := unix.SetsockoptInt(tracker.events.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		exchange(t, dial(t, "udp4", "127.0.0.98:53"), 1)
	}
	// The dump completes the lost events.
	if r := counts(t, tracker); r.Overruns == 0 || r.Lines[1].Connections != 50 || r.Lines[1].Open != 50 || began == 50 {
		t.Errorf("got %+v; %d began", r, began)
	}
	forget(t)
	counts(t, tracker)
	r := counts(t, tracker)
	if r.Lines[1].Connections != 50 || r.Lines[1].Open != 0 || len(tracker.book.open) != 0 {
		t.Errorf("got %+v", r)
	}
	if began == 0 || ended < began {
		t.Errorf("%d connections began and %d ended", began, ended)
	}
	if n := strings.Count(log.String(), "conntrack event overrun"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, &log)
	}
	// It continues.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- tracker.Run(ctx) }()
	exchange(t, dial(t, "udp4", "127.0.0.98:53"), 1)
	forget(t)
	if r := counts(t, tracker); r.Lines[1].Connections != 51 {
		t.Errorf("got %+v", r)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Connections that began before a subscription end without an event
// (nf_conntrack_events=2).
func TestBegunBeforeSubscription(t *testing.T) {
	redirect(t)
	setSysctl(t, accountingSysctl, "1")
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	old := dial(t, "udp4", "127.0.0.98:53")
	exchange(t, old, 5)
	tracker := start(t, options)
	exchange(t, old, 6)
	wantUDP(t, counts(t, tracker).Lines[1], 0, 1, 1, 6)
	forget(t)
	for range 3 {
		wantUDP(t, counts(t, tracker).Lines[1], 0, 0, 1, 6)
	}
	if n := len(tracker.book.open); n != 0 {
		t.Errorf("%d connections are still kept", n)
	}
}

func TestSysctls(t *testing.T) {
	redirect(t)
	setSysctl(t, accountingSysctl, "0")
	setSysctl(t, eventsSysctl, "0")
	var log bytes.Buffer
	o := options
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	tracker := start(t, o)
	if value, err := sysctl.Read(accountingSysctl); value != "1" || err != nil {
		t.Errorf("%s is %q, %v", accountingSysctl, value, err)
	}
	if s := log.String(); !strings.Contains(s, "level=WARN") || !strings.Contains(s, "net.netfilter.nf_conntrack_events=1") || strings.Contains(s, "nf_conntrack_acct") {
		t.Errorf("log:\n%s", s)
	}
	// Open connections are counted all the same.
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	exchange(t, dial(t, "udp4", "127.0.0.98:53"), 6)
	wantUDP(t, counts(t, tracker).Lines[1], 1, 1, 1, 6)
}

// With a read-only /proc/sys, as in a container without privilege, packets and bytes
// are not counted; connections are.
func TestReadOnlySysctls(t *testing.T) {
	redirect(t)
	setSysctl(t, accountingSysctl, "0")
	setSysctl(t, timestampSysctl, "0")
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	o := options
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	var ended []Event
	o.Audit = func(e Event) {
		if !e.Began {
			ended = append(ended, e)
		}
	}
	tracker, err := Open(o)
	if err := unix.Unmount("/proc/sys", 0); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	if s := log.String(); !strings.Contains(s, "level=WARN") || !strings.Contains(s, "net.netfilter.nf_conntrack_acct=1") || !strings.Contains(s, "net.netfilter.nf_conntrack_timestamp=1") {
		t.Errorf("log:\n%s", s)
	}
	exchange(t, dial(t, "udp4", "127.0.0.98:53"), 6)
	forget(t)
	if r := counts(t, tracker); r.Accounted || r.Lines[1].Counts != (Counts{Connections: 1}) {
		t.Errorf("got %+v", r)
	}
	if len(ended) != 1 || ended[0].Outcome != Removed || ended[0].Accounted || !ended[0].Timed {
		t.Errorf("ended: %+v", ended)
	}
}

func TestFill(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	o := options
	o.Count = false
	tracker := start(t, o)
	if tracker.events != nil {
		t.Error("it subscribed to events without need")
	}
	for range 5 {
		exchange(t, dial(t, "udp4", "127.0.0.98:53"), 1)
	}
	entries, limit, err := tracker.Fill()
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]int{"net.netfilter.nf_conntrack_count": entries, "net.netfilter.nf_conntrack_max": limit} {
		if want, err := sysctl.Read(name); err != nil || fmt.Sprint(got) != want {
			t.Errorf("got %d, %s is %s (%v)", got, name, want, err)
		}
	}
	r := counts(t, tracker)
	if len(r.Ports) != 1 || r.Ports[0].InUse != 5 || r.Lines[1].Connections != 0 {
		t.Errorf("got %+v", r)
	}
}

// A tracker without traffic keeps no state.
func TestManyAtOnce(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	tracker := start(t, options)
	for i := range 1500 {
		conn, err := dialFrom(20000 + i)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, conn, 1)
		_ = conn.Close()
	}
	r := counts(t, tracker)
	if r.Lines[1].Open != 1500 || r.Ports[0].InUse != 1500 {
		t.Errorf("got %+v", r)
	}
	forget(t)
	r = counts(t, tracker)
	if len(tracker.book.open) != 0 || tracker.book.most > 1024 {
		t.Errorf("it keeps %d connections, room for %d", len(tracker.book.open), tracker.book.most)
	}
	wantUDP(t, r.Lines[1], 1500, 0, 1500, 1500)
}

func TestErrors(t *testing.T) {
	tracker, err := Open(options)
	if err != nil {
		t.Fatal(err)
	}
	tracker.Close()
	if err := tracker.Run(t.Context()); err == nil {
		t.Error("Run of a closed tracker has no error")
	}
	if _, err := tracker.Counts(); err == nil {
		t.Error("Counts of a closed tracker has no error")
	}
	for err, want := range map[error]string{unix.EPERM: "NET_ADMIN", unix.EINVAL: "modprobe"} {
		e := &KernelError{"list conntrack entries", err}
		if !strings.Contains(e.Hint(nil), want) || !errors.Is(e, err) || !strings.HasPrefix(e.Error(), "list conntrack entries: ") {
			t.Errorf("%v: %s", e, e.Hint(nil))
		}
	}
}
