package httpproxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// notPlain makes ReverseProxy forward a request, and is dropped by it: without a word in
// the header Connection, Upgrade has no effect (RFC 9110 section 7.8).
const notPlain = "Upgrade: x\r\n"

// Requests without a body reach the server, and their responses the client, as if
// ReverseProxy had forwarded them.
func TestPlainIsLikeReverseProxy(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
	for name, test := range map[string]struct{ method, path, proto, header, answer string }{
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
		"another reason":             {answer: "HTTP/1.1 299 Fine\r\nContent-Length: 0\r\n\r\n"},
		"headers of its connection":  {answer: "HTTP/1.1 200 OK\r\nConnection: close, X-A\r\nX-A: 1\r\nKeep-Alive: 5\r\nProxy-Authenticate: a\r\nUpgrade: b\r\nContent-Length: 0\r\n\r\n"},
		"interim responses":          {answer: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + ok},
		"chunks":                     {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"},
		"trailers":                   {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-A, X-B\r\n\r\n2\r\nhi\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\n"},
		"unexpected trailers":        {answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n2\r\nhi\r\n0\r\nX-A: 1\r\nX-B: 2\r\nContent-Length: 3\r\n\r\n"},
		"up to the end":              {answer: "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nhi"},
		"an invalid response":        {answer: "HTTP/1.1 2\r\n\r\n"},
		"a protocol of its choice":   {answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: y\r\n\r\n"},
		"no response":                {answer: ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reached := make(chan string, 1)
			server := serve(t, func(conn *net.TCPConn) {
				text, _ := readHeader(bufio.NewReader(conn))
				reached <- text
				send(t, conn, test.answer)
			})
			p := start(t, "*", nil, nil)
			forward := func(extra string) string {
				method, proto, path := test.method, test.proto, strings.TrimPrefix(test.path, "-")
				if method == "" {
					method = "GET"
				}
				if proto == "" {
					proto = "HTTP/1.1"
				}
				if test.path == "" {
					path = "/"
				}
				conn := p.connect(t)
				send(t, conn, fmt.Sprintf("%s http://%s%s %s\r\nHost: x\r\nConnection: close\r\n%s%s\r\n", method, server, path, proto, test.header, extra))
				return <-reached + describe(conn, method)
			}
			if plain, other := forward(""), forward(notPlain); plain != other {
				t.Errorf("plain\n%s\nby ReverseProxy\n%s", plain, other)
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

// A response that ReverseProxy flushes is flushed by nothing else at the same time, which
// the race detector finds.
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
			send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\n"+notPlain+"\r\n")
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

// readHeader returns a header as it was sent.
func readHeader(r *bufio.Reader) (string, error) {
	var text strings.Builder
	for {
		line, err := r.ReadString('\n')
		text.WriteString(line)
		if line == "\r\n" || err != nil {
			return text.String(), err
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

// A plain request takes four fifths of the allocations of one that ReverseProxy
// forwards, or less.
func TestPlainMakesLessGarbage(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nhi"
	server := serve(t, func(conn *net.TCPConn) {
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
	p := start(t, "*", nil, nil)
	// It returns the allocations of requests. Those of the client and the server are few.
	count := func(header string) uint64 {
		conn := p.connect(t)
		request := []byte("GET http://" + server + "/ HTTP/1.1\r\nHost: x\r\nUser-Agent: a\r\nAccept: */*\r\n" + header + "\r\n")
		buf := make([]byte, 4096)
		ask := func() {
			if _, err := conn.Write(request); err != nil {
				t.Fatal(err)
			}
			for n := 0; !bytes.HasSuffix(buf[:n], []byte("\r\n\r\nhi")); {
				part, err := conn.Read(buf[n:])
				if err != nil {
					t.Fatal(err)
				}
				n += part
			}
		}
		ask()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 200 {
			ask()
		}
		runtime.ReadMemStats(&after)
		return (after.Mallocs - before.Mallocs) / 200
	}
	plain, other := count(""), count(notPlain)
	t.Logf("%d allocations for a plain request, %d by ReverseProxy", plain, other)
	if plain > other*4/5 {
		t.Errorf("%d allocations for a plain request, %d by ReverseProxy; want four fifths at most", plain, other)
	}
}
