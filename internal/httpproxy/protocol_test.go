package httpproxy

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// The client's request, its form at the server, the server's response, and its form at
// the client are compared byte by byte. S is the server's host and port; END is the end
// of the connection.
func TestProtocol(t *testing.T) {
	const (
		get      = "GET http://S/ HTTP/1.1\r\nHost: S\r\n\r\n"
		got      = "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.1 egress-router\r\n\r\n"
		date     = "Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
		answer   = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + date + "\r\nhi"
		via      = "Via: 1.1 egress-router\r\n"
		received = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + date + via + "\r\nhi"
	)
	head := func(line, headers string) string { return line + " HTTP/1.1\r\nHost: S\r\n" + headers + "\r\n" }
	for name, test := range map[string]struct{ send, reaches, answer, want string }{
		"a request":              {get, got, answer, received},
		"a path as it is":        {head("GET http://S/a%2Fb/%7e;x=y/../?q=a;b&c=%zz|", ""), head("GET /a%2Fb/%7e;x=y/../?q=a;b&c=%zz|", via), answer, received},
		"a path of two slashes":  {head("GET http://S//a", ""), head("GET //a", via), answer, received},
		"no path":                {head("GET http://S", ""), head("GET /", via), answer, received},
		"a query without a path": {head("GET http://S?a=b", ""), head("GET /?a=b", via), answer, received},
		"an empty query":         {head("GET http://S/?", ""), head("GET /?", via), answer, received},
		"a Host of its own":      {"GET http://S/ HTTP/1.1\r\nHost: other.example\r\n\r\n", got, answer, received},
		"a whole server":         {head("OPTIONS http://S", ""), head("OPTIONS *", via), answer, received},
		"a method of its own":    {head("PROPFIND http://S/", ""), head("PROPFIND /", via), answer, received},
		"hop-by-hop headers": {
			head("GET http://S/", "Connection: close, X-One , X-Two\r\nX-One: 1\r\nx-two: 2\r\nX-Three: 3\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\n"+
				"Proxy-Authorization: Basic eA==\r\nTE: gzip\r\nUpgrade: x\r\n"),
			head("GET /", via+"X-Three: 3\r\n"),
			"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Four, close\r\nX-Four: 4\r\nX-Five: 5\r\nKeep-Alive: 5\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\n" + date + "\r\nhi",
			"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + date + via + "X-Five: 5\r\nConnection: close\r\n\r\nhiEND",
		},
		"headers that pass": {
			head("GET http://S/", "Accept-Encoding: br\r\nCookie: a=b\r\nForwarded: for=x\r\nUser-Agent: me\r\nVia: 1.0 first\r\nX-A: 1\r\nX-A: 2\r\nX-Forwarded-For: 10.1.1.1\r\n"),
			"GET / HTTP/1.1\r\nHost: S\r\nUser-Agent: me\r\nAccept-Encoding: br\r\nCookie: a=b\r\nForwarded: for=x\r\nVia: 1.0 first\r\nVia: 1.1 egress-router\r\nX-A: 1\r\nX-A: 2\r\nX-Forwarded-For: 10.1.1.1\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n" + date + "\r\nhi",
			"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n" + date + "Set-Cookie: a\r\nSet-Cookie: b\r\n" + via + "\r\nhi",
		},
		"a forwarding header that Connection names": {
			head("GET http://S/", "Connection: x-forwarded-for\r\nX-Forwarded-For: 10.1.1.1\r\n"), got, answer, received,
		},
		"a body with a length": {
			head("POST http://S/", "Content-Length: 5\r\n") + "hello",
			"POST / HTTP/1.1\r\nHost: S\r\nContent-Length: 5\r\nVia: 1.1 egress-router\r\n\r\nhello", answer, received,
		},
		"a body in chunks, with trailers": {
			head("POST http://S/", "Trailer: T-One\r\nTransfer-Encoding: chunked\r\n") + "5\r\nhello\r\n0\r\nT-One: 1\r\nT-Two: 2\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: S\r\nTransfer-Encoding: chunked\r\nTrailer: T-One\r\nVia: 1.1 egress-router\r\n\r\n5\r\nhello\r\n0\r\nT-One: 1\r\nT-Two: 2\r\n\r\n",
			answer, received,
		},
		"trailers that are not announced": {
			head("POST http://S/", "Transfer-Encoding: chunked\r\n") + "1\r\nx\r\n0\r\nT-Two: 2\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: S\r\nTransfer-Encoding: chunked\r\nVia: 1.1 egress-router\r\n\r\n1\r\nx\r\n0\r\nT-Two: 2\r\n\r\n",
			answer, received,
		},
		"an answer in chunks, with trailers": {
			head("GET http://S/", "TE: trailers\r\n"), head("GET /", "Te: trailers\r\n"+via),
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: T-One\r\n" + date + "\r\n2\r\nhi\r\n0\r\nT-One: 1\r\nT-Two: 2\r\n\r\n",
			"HTTP/1.1 200 OK\r\n" + date + "Trailer: T-One\r\n" + via + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nT-One: 1\r\nT-Two: 2\r\n\r\n",
		},
		"an answer until the end": {
			get, got, "HTTP/1.0 200 OK\r\n" + date + "\r\nhiEND",
			"HTTP/1.1 200 OK\r\n" + date + "Via: 1.0 egress-router\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
		},
		"an answer with both framings is chunks": {
			get, got, "HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n" + date + "\r\n2\r\nhi\r\n0\r\n\r\n",
			"HTTP/1.1 200 OK\r\n" + date + via + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
		},
		"a reason phrase of its own": {
			get + get, got, strings.Replace(answer, "200 OK", "200 All is w\xe9ll", 1), strings.Repeat(strings.Replace(received, "200 OK", "200 All is w\xe9ll", 1), 2),
		},
		"no reason phrase":    {get, got, strings.Replace(answer, "200 OK", "200", 1), strings.Replace(received, "200 OK", "200 ", 1)},
		"a status of its own": {get, got, strings.Replace(answer, "200 OK", "799 Mine", 1), strings.Replace(received, "200 OK", "799 Mine", 1)},
		"a reason phrase of HTTP/1.0": {
			"GET http://S/ HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.0 egress-router\r\n\r\n",
			strings.Replace(answer, "200 OK", "404 Gone Fishing", 1), "HTTP/1.0 404 Gone Fishing\r\nContent-Length: 2\r\n" + date + via + "\r\nhiEND",
		},
		"no body": {
			get, got, "HTTP/1.1 204 No Content\r\n" + date + "\r\n", "HTTP/1.1 204 No Content\r\n" + date + via + "\r\n",
		},
		"HEAD": {
			head("HEAD http://S/", ""), head("HEAD /", via),
			"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n" + date + "\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n" + date + via + "\r\n",
		},
		"a cached answer": {
			head("GET http://S/", "If-None-Match: \"x\"\r\n"), head("GET /", "If-None-Match: \"x\"\r\n"+via),
			"HTTP/1.1 304 Not Modified\r\nEtag: \"x\"\r\n" + date + "\r\n", "HTTP/1.1 304 Not Modified\r\n" + date + "Etag: \"x\"\r\n" + via + "\r\n",
		},
		"1xx": {
			get, got, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + received,
		},
		"1xx with headers of the connection": {
			get, got, "HTTP/1.1 103 Early Hints\r\nConnection: close, X-A\r\nKeep-Alive: 5\r\nLink: </a>\r\nX-A: 1\r\n\r\n" + answer,
			"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + received,
		},
		"headers of the connection after 1xx of HTTP/1.0": {
			get, got, "HTTP/1.0 103 Early Hints\r\n\r\n" + strings.Replace(answer, "\r\n", "\r\nConnection: X-A, close\r\nX-A: 1\r\n", 1), "HTTP/1.1 103 Early Hints\r\n\r\n" + received,
		},
		"HTTP/1.0": {
			"GET http://S/ HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.0 egress-router\r\n\r\n",
			answer, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n" + date + via + "\r\nhiEND",
		},
		"HTTP/1.0 and chunks": {
			"GET http://S/ HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.0 egress-router\r\n\r\n",
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n" + date + "\r\n2\r\nhi\r\n0\r\nT: 1\r\n\r\n",
			"HTTP/1.0 200 OK\r\n" + date + "Trailer: T\r\n" + via + "\r\nhiEND",
		},
		"HTTP/1.0 that is kept": {
			"GET http://S/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.0 egress-router\r\n\r\n",
			answer, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n" + date + via + "Connection: keep-alive\r\n\r\nhi",
		},
		"HTTP/1.0 gets no 1xx": {
			"GET http://S/ HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", "GET / HTTP/1.1\r\nHost: S\r\nVia: 1.0 egress-router\r\n\r\n",
			"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n" + date + via + "\r\nhiEND",
		},
		"two requests at once": {
			get + get, got, answer, received + received,
		},
		"a request and an invalid one at once": {
			get + head("POST http://S/", "Content-Length: 1\r\nContent-Length: 1\r\n"), got, answer,
			received + "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request: more than one Content-Length (RFC 9112 section 6.3)\nEND",
		},
		"an empty line before a request": {
			"\r\n" + get + "\r\n" + get, got, answer, received + received,
		},
		"a length of many digits": {
			head("POST http://S/", "Content-Length: "+strings.Repeat("0", 301)+"2\r\n") + "hi" + head("POST http://S/", "Content-Length: 2\r\n") + "hi",
			"POST / HTTP/1.1\r\nHost: S\r\nContent-Length: 2\r\nVia: 1.1 egress-router\r\n\r\nhi", answer, received + received,
		},
		"forbidden trailers of a request": {
			head("POST http://S/", "Trailer: Host, T-One\r\nTransfer-Encoding: chunked\r\n") + "2\r\nhi\r\n0\r\nContent-Length: 9\r\nHost: x\r\nIf-Match: x\r\nT-One: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: S\r\nTransfer-Encoding: chunked\r\nTrailer: T-One\r\nVia: 1.1 egress-router\r\n\r\n2\r\nhi\r\n0\r\nT-One: 1\r\n\r\n",
			answer, received,
		},
		"forbidden trailers of an answer": {
			get, got,
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Host\r\n" + date + "\r\n2\r\nhi\r\n0\r\nContent-Length: 9\r\nHost: x\r\nSet-Cookie: x\r\nT-One: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
			"HTTP/1.1 200 OK\r\n" + date + via + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nT-One: 1\r\n\r\n",
		},
		"trailers in old forms": {
			head("POST http://S/", "Transfer-Encoding: chunked\r\n") + "2\r\nhi\r\n0\r\nT-One: 1\n 2\r\n\t\r\nT-Two: 3\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: S\r\nTransfer-Encoding: chunked\r\nVia: 1.1 egress-router\r\n\r\n2\r\nhi\r\n0\r\nT-One: 1 2\r\nT-Two: 3\r\n\r\n",
			answer, received,
		},
		"an answer with folded headers": {
			get, got, "HTTP/1.1 200 OK\r\nA: b\r\n\t\r\nB:\r\n c\r\n d\r\nContent-Length: 2\r\n" + date + "\r\nhi",
			"HTTP/1.1 200 OK\r\nA: b\r\nB: c d\r\nContent-Length: 2\r\n" + date + via + "\r\nhi",
		},
		"an unknown expectation": {
			head("GET http://S/", "Expect: x\r\n"), "", "", "HTTP/1.1 417 Expectation Failed\r\nConnection: close\r\n",
		},
		"an unknown expectation in HTTP/1.0": {
			"GET http://S/ HTTP/1.0\r\nExpect: x\r\n\r\n", "", "", "HTTP/1.0 417 Expectation Failed\r\nConnection: close\r\n",
		},
		"a body up to its fault": {
			head("POST http://S/", "Transfer-Encoding: chunked\r\n") + "5\r\nhello0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: S\r\nTransfer-Encoding: chunked\r\nVia: 1.1 egress-router\r\n\r\n5\r\nhello\r\n", "", "HTTP/1.1 400 Bad Request\r\n",
		},
		"the preface of HTTP/2": {
			"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", "", "HTTP/1.1 400 Bad Request\r\nContent-Length: 74\r\n",
		},
		"forwards are counted": {
			head("TRACE http://S/", "Max-Forwards: 3\r\n"), head("TRACE /", "Max-Forwards: 2\r\n"+via), answer, received,
		},
		"an answer of this proxy": {
			head("OPTIONS http://S/", "Max-Forwards: 0\r\n"), "", "", "HTTP/1.1 200 OK\r\nContent-Length: 56\r\nContent-Type: text/plain; charset=utf-8\r\n",
		},
		"a tunnel": {
			"CONNECT S HTTP/1.1\r\nHost: S\r\n\r\n", "", answer, "HTTP/1.1 200 Connection established\r\n\r\n" + answer,
		},
		"a tunnel by HTTP/1.0": {
			"CONNECT S HTTP/1.0\r\n\r\n", "", answer, "HTTP/1.1 200 Connection established\r\n\r\n" + answer,
		},
		"data sent along with CONNECT": {
			"CONNECT S HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			answer, "HTTP/1.1 200 Connection established\r\n\r\n" + answer,
		},
		"an upgrade": {
			head("GET http://S/", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"),
			"GET / HTTP/1.1\r\nHost: S\r\nConnection: Upgrade\r\nSec-Websocket-Key: x\r\nUpgrade: websocket\r\nVia: 1.1 egress-router\r\n\r\n",
			"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhiEND",
			"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nVia: 1.1 egress-router\r\n\r\nhiEND",
		},
		"an upgrade that is declined": {
			head("GET http://S/", "Connection: Upgrade\r\nUpgrade: x/1\r\n"), "GET / HTTP/1.1\r\nHost: S\r\nConnection: Upgrade\r\nUpgrade: x/1\r\nVia: 1.1 egress-router\r\n\r\n",
			answer, received,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fill := func(server, s string) string {
				return strings.NewReplacer("http://S", "http://"+server, "Host: S\r", "Host: "+server+"\r", "CONNECT S ", "CONNECT "+server+" ").Replace(s)
			}
			server := serve(t, func(conn *net.TCPConn) {
				for {
					want := fill(conn.LocalAddr().String(), test.reaches)
					got := make([]byte, len(want))
					if n, err := io.ReadFull(conn, got); err == io.EOF && n == 0 && want != "" {
						return // the proxy has closed the idle connection
					}
					if string(got) != want {
						t.Errorf("the server got %q\nwant           %q", got, want)
						return
					}
					answer, ends := strings.CutSuffix(test.answer, "END")
					send(t, conn, answer)
					if ends {
						return
					}
					if want == "" {
						_, _ = io.Copy(io.Discard, conn)
						return
					}
				}
			})
			p := start(t, "203.0.113.1", nil, nil)
			conn := p.connect(t)
			send(t, conn, fill(server, test.send))
			if want, ends := strings.CutSuffix(fill(server, test.want), "END"); ends {
				wantEnd(t, conn, want)
			} else {
				wantRead(t, conn, want)
			}
		})
	}
}

// Invalid requests are refused without a connection to a server.
func TestRefusedRequests(t *testing.T) {
	reached := make(chan struct{}, 1)
	server := serve(t, func(*net.TCPConn) { reached <- struct{}{} })
	p := start(t, "*", nil, nil)
	post := "POST http://" + server + "/ HTTP/1.1\r\nHost: " + server + "\r\n"
	for name, test := range map[string]struct{ send, status, text string }{
		"two framings":                   {post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "both Content-Length and Transfer-Encoding"},
		"two lengths":                    {post + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "400", "more than one Content-Length"},
		"two lengths that are equal":     {post + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "400", "more than one Content-Length"},
		"two lengths in one":             {post + "Content-Length: 5, 5\r\n\r\nhello", "400", ""},
		"a length that is none":          {post + "Content-Length: +5\r\n\r\nhello", "400", ""},
		"an unknown coding":              {post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "501", ""},
		"chunked twice":                  {post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "501", ""},
		"chunks in HTTP/1.0":             {strings.Replace(post, "HTTP/1.1", "HTTP/1.0", 1) + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "HTTP/1.0"},
		"chunks in HTTP/1.0, a long URL": {"POST http://" + server + "/" + strings.Repeat("x", 300) + " HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "HTTP/1.0"},
		"a length of too many digits":    {post + "Content-Length: " + strings.Repeat("1", 302) + "\r\n\r\n", "400", ""},
		"a folded header":                {post + "X: y\r\n z\r\n\r\n", "400", "several lines"},
		"a blank before the colon":       {post + "Content-Length : 5\r\n\r\nhello", "400", ""},
		"two hosts":                      {post + "Host: other\r\n\r\n", "400", ""},
		"a header without end":           {post + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 80) + "\r\n", "431", ""},
		"a path alone":                   {"GET / HTTP/1.1\r\nHost: " + server + "\r\n\r\n", "400", "expected an absolute URL"},
		"the server itself":              {"OPTIONS * HTTP/1.1\r\nHost: " + server + "\r\n\r\n", "400", "expected an absolute URL"},
		"another scheme":                 {"GET ftp://" + server + "/ HTTP/1.1\r\nHost: " + server + "\r\n\r\n", "400", "must be http or https"},
		"a bad port":                     {"GET http://203.0.113.1:99999/ HTTP/1.1\r\nHost: x\r\n\r\n", "400", "port"},
		"an address in disguise":         {"GET http://127.1/ HTTP/1.1\r\nHost: x\r\n\r\n", "400", "not a host name or an IP address"},
		"CONNECT without a port":         {"CONNECT 203.0.113.1 HTTP/1.1\r\nHost: x\r\n\r\n", "400", "port"},
		"CONNECT to a path":              {"CONNECT " + server + "/x HTTP/1.1\r\nHost: x\r\n\r\n", "400", "port"},
		"CONNECT to a URL":               {"CONNECT http://" + server + " HTTP/1.1\r\nHost: x\r\n\r\n", "400", ""},
		"CONNECT with a body":            {"CONNECT " + server + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "400", "must not have a body"},
		"CONNECT with chunks":            {"CONNECT " + server + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "must not have a body"},
		"a bad version":                  {"GET http://" + server + "/ HTTP/2.0\r\nHost: x\r\n\r\n", "505", ""},
		"nothing like it":                {"\x16\x03\x01\x02\x00\x01\r\n\r\n", "400", ""},
	} {
		t.Run(name, func(t *testing.T) {
			conn := p.connect(t)
			_, _ = io.WriteString(conn, test.send) // the proxy may close the connection before the end
			var got []byte
			buf := make([]byte, 4096)
			for !strings.Contains(string(got), "\r\n\r\n") {
				n, err := conn.Read(buf)
				got = append(got, buf[:n]...)
				if err != nil {
					break
				}
			}
			if len(test.text) > 0 && !strings.Contains(string(got), test.text) {
				n, _ := conn.Read(buf)
				got = append(got, buf[:n]...)
			}
			if !strings.HasPrefix(string(got), "HTTP/1.1 "+test.status+" ") || !strings.Contains(string(got), test.text) {
				t.Errorf("got %q, want %s with %q", got, test.status, test.text)
			}
		})
	}
	select {
	case <-reached:
		t.Error("a server was reached")
	case <-time.After(20 * time.Millisecond):
	}
}
