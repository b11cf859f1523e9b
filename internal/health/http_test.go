package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

func TestHandler(t *testing.T) {
	ready, notReady := Report{Ready: true}, Report{Reasons: []string{"stopping", "two\nlines"}}
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") })
	stuck := func() error { return errors.New("no comparison for 1m0s") }
	for _, test := range []struct {
		name    string
		request string
		report  Report
		alive   func() error
		metrics http.Handler
		status  int
		body    string
	}{
		{"alive", "GET /healthz", notReady, func() error { return nil }, nil, 200, "ok\n"},
		{"alive without a check", "GET /healthz", notReady, nil, nil, 200, "ok\n"},
		{"stuck", "GET /healthz", ready, stuck, nil, 503, "no comparison for 1m0s\n"},
		{"ready", "GET /readyz", ready, stuck, nil, 200, "ok\n"},
		{"not ready", "GET /readyz", notReady, nil, nil, 503, "stopping\ntwo; lines\n"},
		{"not ready without a reason", "GET /readyz", Report{}, nil, nil, 503, "not ready\n"},
		{"metrics", "GET /metrics", ready, nil, metrics, 200, "up 1\n"},
		{"head", "HEAD /metrics", ready, nil, metrics, 200, "up 1\n"}, // the server leaves the body out
		{"no metrics", "GET /metrics", ready, nil, nil, 404, "not found: the paths are /healthz and /readyz\n"},
		{"query", "GET /readyz?verbose", ready, nil, nil, 200, "ok\n"},
		{"root", "GET /", ready, nil, nil, 404, "not found: the paths are /healthz and /readyz\n"},
		{"below", "GET /healthz/", ready, nil, metrics, 404, "not found: the paths are /healthz, /metrics and /readyz\n"},
		{"post", "POST /readyz", ready, nil, nil, 405, "method not allowed: use GET or HEAD\n"},
		{"delete", "DELETE /metrics", ready, nil, metrics, 405, "method not allowed: use GET or HEAD\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			method, path, _ := strings.Cut(test.request, " ")
			w := httptest.NewRecorder()
			others := map[string]http.Handler{}
			if test.metrics != nil {
				others["/metrics"] = test.metrics
			}
			Handler(func() Report { return test.report }, test.alive, others).ServeHTTP(w, httptest.NewRequest(method, path, nil))
			if w.Code != test.status || w.Body.String() != test.body {
				t.Errorf("%d %q, want %d %q", w.Code, w.Body, test.status, test.body)
			}
			if allow := w.Header().Get("Allow"); (allow == "GET, HEAD") != (w.Code == 405) {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
}

// freePort returns a port on which no process listens.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func listen(t *testing.T, at netip.AddrPort) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	wait, err := Listen(ctx, at, Handler(func() Report { return Report{Ready: true} }, nil, nil), new(book).logger())
	if err != nil {
		t.Fatal(err)
	}
	stop = func() { cancel(); wait() }
	t.Cleanup(stop)
	return stop
}

func get(t *testing.T, address string) (string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(conn, "GET /readyz HTTP/1.1\r\nHost: pod\r\n\r\n")
	answer, err := io.ReadAll(conn) // it ends, since a connection serves one request
	return string(answer), err
}

func TestListen(t *testing.T) {
	for _, test := range []struct {
		at       netip.Addr
		yes, not []string
	}{
		{netip.Addr{}, []string{"127.0.0.1", "[::1]"}, nil},
		{netip.MustParseAddr("127.0.0.2"), []string{"127.0.0.2"}, []string{"127.0.0.1", "[::1]"}},
		{netip.MustParseAddr("::1"), []string{"[::1]"}, []string{"127.0.0.1"}},
	} {
		port := freePort(t)
		stop := listen(t, netip.AddrPortFrom(test.at, port))
		for _, host := range test.yes {
			if answer, err := get(t, fmt.Sprintf("%s:%d", host, port)); err != nil || !strings.HasPrefix(answer, "HTTP/1.1 200 OK\r\n") || !strings.HasSuffix(answer, "\r\n\r\nok\n") {
				t.Errorf("listening on %v, request to %s: %v\n%s", test.at, host, err, answer)
			}
		}
		stop()
		for _, host := range append(test.yes, test.not...) {
			if _, err := get(t, fmt.Sprintf("%s:%d", host, port)); err == nil {
				t.Errorf("listening on %v, request to %s after the end: a response", test.at, host)
			}
		}
	}
}

func TestListenErrors(t *testing.T) {
	taken := freePort(t)
	listen(t, netip.AddrPortFrom(netip.Addr{}, taken))
	for at, want := range map[netip.AddrPort]struct {
		err  error
		text string
		hint string
	}{
		netip.AddrPortFrom(netip.Addr{}, taken):   {syscall.EADDRINUSE, fmt.Sprintf("listening on health address :%d: bind: address already in use", taken), "another container of the pod, or this program"},
		netip.MustParseAddrPort("192.0.2.1:9465"): {syscall.EADDRNOTAVAIL, "listening on health address 192.0.2.1:9465: bind: cannot assign requested address", "the pod does not have this address"},
	} {
		_, err := Listen(t.Context(), at, nil, new(book).logger())
		failed, ok := errors.AsType[*ListenError](err)
		if !ok || !errors.Is(err, want.err) || err.Error() != want.text || !strings.Contains(failed.Hint(nil), want.hint) || !strings.Contains(failed.Hint(nil), string(wording.HealthListen)) {
			t.Errorf("%s: %v", at, err)
		}
	}
	if hint := (&ListenError{":80", os.ErrPermission}).Hint(nil); !strings.Contains(hint, "NET_BIND_SERVICE") {
		t.Errorf("hint of a low port: %q", hint)
	}
}

// A pipeListener accepts the ends of pipes, whose deadlines are on synctest's clock.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	close(l.closed)
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// request returns a new connection on which a part of a request is sent.
func (l *pipeListener) request(text string) net.Conn {
	near, far := net.Pipe()
	go func() {
		l.conns <- far
		_, _ = io.WriteString(near, text)
	}()
	return near
}

// inBubble serves the clients of a pipeListener on synctest's clock.
func inBubble(t *testing.T, test func(t *testing.T, l *pipeListener, stop func())) {
	synctest.Test(t, func(t *testing.T) {
		l := &pipeListener{make(chan net.Conn), make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		wait := serveHTTP(ctx, l, Handler(func() Report { return Report{Ready: true} }, nil, nil), new(book).logger())
		stop := sync.OnceFunc(func() { cancel(); wait() })
		test(t, l, stop)
		stop()
	})
}

// A client that sends no complete header is disconnected after the header timeout.
func TestSlowClient(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipeListener, _ func()) {
		conn := l.request("GET /readyz HTTP/1.1\r\n")
		began := time.Now()
		_, _ = io.ReadAll(conn)
		if took := time.Since(began); took != headerTimeout {
			t.Errorf("disconnected after %s, want %s", took, headerTimeout)
		}
	})
}

// hold opens n connections to a server from the addresses after 127.0.1.0, each in turn,
// and sends text on each. They stay open until the test ends.
func hold(t *testing.T, to netip.AddrPort, n, addresses int, text string) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, 0, n)
	for i := range n {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%addresses))}}
		conn, err := d.DialContext(t.Context(), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = io.WriteString(conn, text) // it may be closed already
		conns = append(conns, conn)
	}
	return conns
}

// Probes are answered while other clients hold 1,000 connections, whatever they do.
func TestProbesAmongIdleClients(t *testing.T) {
	const many = 1000
	large := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		line := []byte(strings.Repeat("x", 1<<20))
		for range 16 { // more than the buffers of a connection hold
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	})
	for name, text := range map[string]string{
		"silent": "", "half requests": "GET /readyz HTTP/1.1\r\nHost: pod\r\n", "without their bodies": "GET /readyz HTTP/1.1\r\nHost: pod\r\nContent-Length: 9\r\n\r\n",
		"answers not read": "GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n", "trickling": "G",
	} {
		for _, addresses := range []int{1, 100} {
			t.Run(fmt.Sprintf("%s, %d addresses", name, addresses), func(t *testing.T) {
				at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
				ctx, cancel := context.WithCancel(t.Context())
				wait, err := Listen(ctx, at, Handler(func() Report { return Report{Ready: true} }, nil, map[string]http.Handler{"/metrics": large}), new(book).logger())
				if err != nil {
					t.Fatal(err)
				}
				var trickling sync.WaitGroup
				defer func() { cancel(); wait(); trickling.Wait() }()
				conns := hold(t, at, many, addresses, text)
				if name == "trickling" {
					trickling.Go(func() {
						for i := 0; ctx.Err() == nil; i++ {
							_, _ = io.WriteString(conns[i%many], "E")
						}
					})
				}
				for range 5 {
					if answer, err := get(t, at.String()); err != nil || !strings.HasPrefix(answer, "HTTP/1.1 200 OK\r\n") {
						t.Errorf("probe: %v\n%s", err, answer)
					}
					hold(t, at, maxConnections, addresses, text)
				}
			})
		}
	}
}

// A client that reads a long answer gets all of it while others connect.
func TestReaderAmongIdleClients(t *testing.T) {
	const size = 1 << 20
	synctest.Test(t, func(t *testing.T) {
		l := &pipeListener{make(chan net.Conn), make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, size)) })
		wait := serveHTTP(ctx, l, Handler(func() Report { return Report{} }, nil, map[string]http.Handler{"/metrics": metrics}), new(book).logger())
		defer func() { cancel(); wait() }()
		reader := l.request("GET /metrics HTTP/1.0\r\n\r\n")
		var got int
		b := make([]byte, 1000)
		for i := 0; ; i++ {
			if i < 500 {
				defer l.request("GET /").Close()
				synctest.Wait()
			}
			n, err := reader.Read(b)
			if got += n; err != nil {
				break
			}
		}
		if got < size {
			t.Errorf("read %d bytes, want at least %d", got, size)
		}
	})
}

// A header above the limit is refused.
func TestLargeHeader(t *testing.T) {
	at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	listen(t, at)
	conn, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		fmt.Fprint(conn, "GET /readyz HTTP/1.1\r\n")
		for {
			if _, err := fmt.Fprintf(conn, "X-More: %s\r\n", strings.Repeat("x", 1000)); err != nil {
				return
			}
		}
	}()
	if status, err := bufio.NewReader(conn).ReadString('\n'); err == nil && !strings.HasPrefix(status, "HTTP/1.1 431 ") {
		t.Errorf("answer %q", status)
	}
}

// The end does not wait for clients that are connected.
func TestListenEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipeListener, stop func()) {
		defer l.request("").Close()
		defer l.request("GET /readyz HTTP/1.1\r\n").Close()
		synctest.Wait()
		began := time.Now()
		stop()
		if took := time.Since(began); took > 0 {
			t.Errorf("the end took %s", took)
		}
	})
}
