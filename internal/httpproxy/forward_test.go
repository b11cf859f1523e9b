package httpproxy

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// reference starts a forward proxy of net/http and httputil.ReverseProxy, which do the same
// with most requests and responses, and returns its address.
func reference(t *testing.T) string {
	via := func(h http.Header, major, minor int) {
		h["Via"] = append(h["Via"], fmt.Sprintf("%d.%d egress-router", major, minor))
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.Host, r.Out.Trailer = r.In.Host, r.In.Trailer
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			r.Out.URL.Opaque = (&request{method: r.In.Method, uri: r.In.RequestURI}).pathAsWritten()
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if values, ok := r.In.Header[name]; ok && !hasToken(strings.Join(r.In.Header["Connection"], ","), name) {
					r.Out.Header[name] = values
				}
			}
			via(r.Out.Header, r.In.ProtoMajor, r.In.ProtoMinor)
		},
		ModifyResponse: func(r *http.Response) error {
			via(r.Header, r.ProtoMajor, r.ProtoMinor)
			return nil
		},
		Transport: &http.Transport{DisableCompression: true},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TransferEncoding) > 0 && r.Trailer == nil {
			r.Trailer = http.Header{}
		}
		w.Header()["Content-Type"] = nil // or net/http guesses one
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// Requests reach the server, and their responses the client, as a proxy of the standard
// library would forward them. Where this one differs on purpose, TestProtocol has the bytes.
func TestLikeStandardLibrary(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	other := reference(t)
	for name, test := range map[string]struct{ method, path, proto, header, body, answer string }{
		"a GET":                      {answer: ok},
		"a HEAD":                     {method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"},
		"a POST without a body":      {method: "POST", header: "Content-Length: 0\r\n", answer: ok},
		"a DELETE":                   {method: "DELETE", answer: ok},
		"OPTIONS of the server":      {method: "OPTIONS", path: "-", answer: ok},
		"OPTIONS of a path":          {method: "OPTIONS", path: "/a", answer: ok},
		"a path as it was written":   {path: "/a%2fb/%7e;c?d=%zz;e&f", answer: ok},
		"a path of two slashes":      {path: "//a", answer: ok},
		"HTTP/1.0":                   {proto: "HTTP/1.0", answer: ok},
		"headers of the connection":  {header: "Keep-Alive: 5\r\nProxy-Connection: a\r\nProxy-Authorization: b\r\nTrailer: c\r\nConnection: X-A, User-Agent, Forwarded\r\nX-A: 1\r\nX-B: 2\r\nUser-Agent: u\r\n", answer: ok},
		"trailers that are accepted": {header: "TE: gzip, Trailers\r\nConnection: TE\r\n", answer: ok},
		"trailers that are not":      {header: "TE: gzip\r\n", answer: ok},
		"another proxy's headers":    {header: "Forwarded: for=a\r\nX-Forwarded-For: b\r\nX-Forwarded-Host: c\r\nX-Forwarded-Proto: d\r\nVia: 1.0 e\r\n", answer: ok},
		"an expectation":             {header: "Expect: 100-continue\r\n", answer: ok},
		"two values":                 {header: "Cookie: a\r\nCookie: b\r\nUser-Agent: \r\n", answer: "HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nVia: 1.1 c\r\nContent-Length: 0\r\n\r\n"},
		"no content":                 {answer: "HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n"},
		"not modified":               {answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: \"a\"\r\n\r\n"},
		"headers of its connection":  {answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nKeep-Alive: 5\r\nProxy-Authenticate: a\r\nUpgrade: b\r\nContent-Length: 0\r\n\r\n"},
		"interim responses":          {answer: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\nhi"},
		"chunks":                     {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"},
		"trailers":                   {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-A, X-B\r\n\r\n2\r\nhi\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\n"},
		"unexpected trailers":        {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n2\r\nhi\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\n"},
		"up to the end":              {answer: "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nhi"},
		"a body":                     {method: "POST", header: "Content-Length: 5\r\n", body: "hello", answer: ok},
		"a body of a GET":            {header: "Content-Length: 5\r\n", body: "hello", answer: ok},
		"a body in chunks":           {method: "PUT", header: "Transfer-Encoding: chunked\r\n", body: "5;a=b\r\nhello\r\n0\r\n\r\n", answer: ok},
		"a body with trailers":       {method: "PATCH", header: "Trailer: X-A, X-B\r\nTransfer-Encoding: chunked\r\n", body: "5\r\nhello\r\n0\r\nX-A: 1\r\nx-b:2\r\n\r\n", answer: ok},
		"unexpected trailers of it":  {method: "POST", header: "Transfer-Encoding: chunked\r\n", body: "5\r\nhello\r\n0\r\nX-A: 1\r\n\r\n", answer: ok},
		"old control of caches":      {header: "Pragma: no-cache\r\n", answer: "HTTP/1.1 200 OK\r\nPragma: no-cache\r\nContent-Length: 0\r\n\r\n"},
		"a folded response":          {answer: "HTTP/1.1 200 OK\r\nX-A: a\r\n\t b\r\nX-B:\r\n c\r\nContent-Length: 0\r\n\r\n"},
		"equal lengths":              {answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi"},
		"an upgrade without a word":  {header: "Upgrade: x\r\n", answer: ok},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reached := make(chan string, 1)
			server := serve(t, func(conn *net.TCPConn) {
				var raw bytes.Buffer
				r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &raw)))
				if err != nil {
					reached <- err.Error()
					return
				}
				body, err := io.ReadAll(r.Body)
				head, _, _ := strings.Cut(raw.String(), "\r\n\r\n")
				reached <- fmt.Sprintf("%s\n%q %v trailers %v\n", head, body, err, r.Trailer)
				send(t, conn, test.answer)
			})
			p := start(t, "*", nil, nil)
			forward := func(proxy string) string {
				method, proto, path := cmp.Or(test.method, "GET"), cmp.Or(test.proto, "HTTP/1.1"), strings.TrimPrefix(test.path, "-")
				if test.path == "" {
					path = "/"
				}
				conn := dialAt(t, proxy)
				send(t, conn, fmt.Sprintf("%s http://%s%s %s\r\nHost: x\r\nConnection: close\r\n%s\r\n%s", method, server, path, proto, test.header, test.body))
				return <-reached + describe(conn, method)
			}
			if got, want := forward(p.addr), forward(other); got != want {
				t.Errorf("got\n%s\nby the standard library\n%s", got, want)
			}
		})
	}
}

// The client gets what has come of an incomplete response, and the end of the connection.
func TestPlainIncomplete(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n5\r\nh",
	} {
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, answer)
		})
		conn := start(t, "*", nil, nil).get(t, server)
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if !strings.HasPrefix(string(body), "hi") || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: body %q, %v; want hi and an unexpected end", answer, body, err)
		}
	}
}

// A response of which parts come is flushed by nothing else at the same time, which the
// race detector finds.
func TestOneFlush(t *testing.T) {
	for _, framing := range []string{"Transfer-Encoding: chunked\r\n\r\n", "Content-Type: text/event-stream\r\nContent-Length: 7\r\n\r\n"} {
		server := serve(t, func(conn *net.TCPConn) {
			for header(conn) != "" {
				send(t, conn, "HTTP/1.1 200 OK\r\n"+framing)
				send(t, conn, "2\r\nhi\r\n")
				if strings.HasPrefix(framing, "T") {
					send(t, conn, "0\r\n\r\n")
				}
			}
		})
		conn := start(t, "*", nil, nil).connect(t)
		buffered := bufio.NewReader(conn)
		for range 20 {
			send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\n\r\n")
			r, err := http.ReadResponse(buffered, nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(r.Body); err != nil || !strings.Contains(string(body), "hi") {
				t.Fatalf("body %q, %v", body, err)
			}
		}
	}
}

// describe returns all responses on a connection, without the date that net/http adds.
func describe(conn io.Reader, method string) string {
	var text strings.Builder
	buffered := bufio.NewReader(conn)
	for {
		r, err := http.ReadResponse(buffered, &http.Request{Method: method})
		if err != nil {
			fmt.Fprintf(&text, "%v\n", err)
			return text.String()
		}
		r.Header.Del("Date")
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(&text, "%s %s %v %v %d %q %v trailers %v\n", r.Proto, r.Status, r.Header, r.TransferEncoding, r.ContentLength, body, err, r.Trailer)
		if r.StatusCode >= 200 {
			rest, err := io.ReadAll(buffered)
			fmt.Fprintf(&text, "rest %q %v\n", rest, err)
			return text.String()
		}
	}
}

// asker returns a function that has a proxy forward one GET on a kept connection. The test's
// client and server take no memory for it.
func asker(tb testing.TB, p *testProxy, server string) func() {
	tb.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	request := []byte("GET http://" + server + "/index.html HTTP/1.1\r\nHost: x\r\nUser-Agent: a\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n\r\n")
	buf := make([]byte, 4096)
	return func() {
		if _, err := conn.Write(request); err != nil {
			tb.Fatal(err)
		}
		for n := 0; !bytes.HasSuffix(buf[:n], []byte("\r\n\r\nhi")); {
			part, err := conn.Read(buf[n:])
			if err != nil {
				tb.Fatal(err)
			}
			n += part
		}
	}
}

// answering starts a server that answers every GET, and takes no memory for it.
func answering(tb testing.TB) string {
	const answer = "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nhi"
	return serve(tb, func(conn *net.TCPConn) {
		buf, reply := make([]byte, 4096), []byte(answer)
		for n := 0; ; {
			part, err := conn.Read(buf[n:])
			if err != nil {
				return
			}
			if n += part; bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
				n = 0
				_, _ = conn.Write(reply)
			}
		}
	})
}

func BenchmarkGet(b *testing.B) {
	server := answering(b)
	ask := asker(b, start(b, "*", nil, nil), server)
	ask()
	b.ReportAllocs()
	for b.Loop() {
		ask()
	}
}

// A GET leaves little garbage: each collection delays all active requests, so that the
// slowest answers depend on the number of collections.
func TestGarbage(t *testing.T) {
	const mostAllocations, mostBytes = 12, 512
	server := answering(t)
	ask := asker(t, start(t, "*", nil, nil), server)
	ask()
	// The race detector makes sync.Pool drop some objects at random: the least counts.
	allocations, size := uint64(math.MaxUint64), uint64(math.MaxUint64)
	for range 500 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		ask()
		runtime.ReadMemStats(&after)
		allocations, size = min(allocations, after.Mallocs-before.Mallocs), min(size, after.TotalAlloc-before.TotalAlloc)
	}
	t.Logf("%d allocations, %d bytes a request", allocations, size)
	if allocations > mostAllocations || size > mostBytes {
		t.Errorf("%d allocations, %d bytes a request; want %d and %d at most", allocations, size, mostAllocations, mostBytes)
	}
}

// A client that waits for its next request has no buffer, unlike one that has sent a part
// of it.
func TestIdleClientMemory(t *testing.T) {
	const clients = 1000
	server := answering(t)
	p := start(t, "*", nil, func(p *Proxy) { p.config.MaxConnections, p.connections = 4*clients, 4*clients })
	to := netip.MustParseAddrPort(p.addr)
	request := []byte("GET http://" + server + "/ HTTP/1.1\r\nHost: x\r\nUser-Agent: a\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 4096)
	// It returns the end of a client after one request, a file that takes no memory.
	client := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		check(t, unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}))
		_, err = unix.Write(fd, request)
		check(t, err)
		for n := 0; !bytes.HasSuffix(buf[:n], []byte("\r\n\r\nhi")); {
			part, err := unix.Read(fd, buf[n:])
			if err != nil || part == 0 {
				t.Fatal(part, err)
			}
			n += part
		}
		return fd
	}
	memory := func() int {
		runtime.GC()
		runtime.GC() // for what sync.Pool holds
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc + m.StackInuse)
	}
	fds := []int{client()}
	before := memory()
	for range clients {
		fds = append(fds, client())
	}
	between := memory()
	for _, fd := range fds {
		_, err := unix.Write(fd, []byte("GET"))
		check(t, err)
	}
	partial := 0
	if !await(func() bool {
		partial = 0
		p.listener.Load().each(func(c *clientConn) {
			if c.partial.Load() && c.state.Load() == resting {
				partial++
			}
		})
		return partial == len(fds)
	}) {
		t.Fatalf("%d clients have sent a part of a request, want %d", partial, len(fds))
	}
	idle, buffered := (between-before)/clients, (memory()-between)/clients
	t.Logf("%d bytes an idle client, %d more with a part of a request", idle, buffered)
	if buffered < 4<<10 || idle > 3*buffered {
		t.Errorf("an idle client takes %d bytes, and %d more with a part of a request; want the buffer of 4,096 in the second alone", idle, buffered)
	}
	for _, fd := range fds {
		check(t, unix.Close(fd))
	}
}
