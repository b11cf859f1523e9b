package httpproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/wording"
)

// header reads a request's header.
func header(conn net.Conn) string {
	var b strings.Builder
	one := make([]byte, 1)
	for !strings.HasSuffix(b.String(), "\r\n\r\n") {
		if _, err := conn.Read(one); err != nil {
			return b.String()
		}
		b.Write(one)
	}
	return b.String()
}

// get starts a GET and returns the connection.
func (p *testProxy) get(t *testing.T, server string) *net.TCPConn {
	t.Helper()
	conn := p.connect(t)
	send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: "+server+"\r\n\r\n")
	return conn
}

// tunnel makes a tunnel.
func (p *testProxy) tunnel(t *testing.T, server string) *net.TCPConn {
	t.Helper()
	conn := p.connect(t)
	send(t, conn, "CONNECT "+server+" HTTP/1.1\r\n\r\n")
	wantRead(t, conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	return conn
}

// answer reads the response to a request without a body.
func answer(t *testing.T, conn net.Conn) (status int, body string) {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("reading the body behind %q: %v", text, err)
	}
	return response.StatusCode, string(text)
}

func TestStreams(t *testing.T) {
	t.Run("each chunk of an answer passes at once", func(t *testing.T) {
		for name, headers := range map[string]string{
			"chunks":    "Transfer-Encoding: chunked\r\n",
			"events":    "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n",
			"other SSE": "Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n",
		} {
			t.Run(name, func(t *testing.T) {
				received := make(chan struct{})
				server := serve(t, func(conn *net.TCPConn) {
					header(conn)
					send(t, conn, "HTTP/1.1 200 OK\r\nDate: x\r\n"+headers+"\r\n")
					for range 3 {
						send(t, conn, "6\r\nevent\n\r\n")
						<-received
					}
				})
				conn := start(t, "203.0.113.1", nil, nil).get(t, server)
				if got := header(conn); !strings.HasPrefix(got, "HTTP/1.1 200 OK") {
					t.Fatalf("got %q", got)
				}
				for range 3 {
					wantRead(t, conn, "6\r\nevent\n\r\n")
					received <- struct{}{}
				}
				wantEnd(t, conn, "") // the connection ends without the last chunk
			})
		}
	})
	t.Run("each part of an answer with a length passes at once", func(t *testing.T) {
		received := make(chan struct{})
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n")
			for range 3 {
				<-received
				send(t, conn, "event")
			}
			<-received
		})
		conn := start(t, "203.0.113.1", nil, nil).get(t, server)
		if got := header(conn); !strings.HasPrefix(got, "HTTP/1.1 200 OK") {
			t.Fatalf("got %q", got)
		}
		for range 3 {
			received <- struct{}{}
			wantRead(t, conn, "event")
		}
		received <- struct{}{}
	})
	t.Run("each chunk of a request passes at once", func(t *testing.T) {
		got := make(chan string)
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			for range 3 {
				buf := make([]byte, 9)
				n, _ := io.ReadFull(conn, buf)
				got <- string(buf[:n])
			}
			wantRead(t, conn, "0\r\n\r\n")
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		})
		conn := start(t, "203.0.113.1", nil, nil).connect(t)
		send(t, conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
		for range 3 {
			send(t, conn, "4\r\ndata\r\n")
			if s := <-got; s != "4\r\ndata\r\n" {
				t.Errorf("the server got %q", s)
			}
		}
		send(t, conn, "0\r\n\r\n")
		if status, _ := answer(t, conn); status != 200 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("an answer before the end of the request", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		})
		conn := start(t, "203.0.113.1", nil, nil).connect(t)
		send(t, conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nxx")
		if status, _ := answer(t, conn); status != 413 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("a request with Expect: 100-continue", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			if got := header(conn); !strings.Contains(got, "Expect: 100-continue\r\n") {
				t.Errorf("the server got %q", got)
			}
			send(t, conn, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n") // the client gets one
			wantRead(t, conn, "hello")
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		})
		conn := start(t, "203.0.113.1", nil, nil).connect(t)
		send(t, conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		wantRead(t, conn, "HTTP/1.1 100 Continue\r\n\r\n")
		send(t, conn, "hello")
		wantRead(t, conn, "HTTP/1.1 200 OK\r\n")
	})
	t.Run("a server that refuses the expectation", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 417 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		})
		conn := start(t, "203.0.113.1", nil, nil).connect(t)
		send(t, conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		if status, _ := answer(t, conn); status != 417 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("an answer that breaks off", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
		})
		conn := start(t, "203.0.113.1", nil, nil).get(t, server)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil { // the header may have been sent
			_, err = io.Copy(io.Discard, response.Body)
		}
		if err != io.ErrUnexpectedEOF {
			t.Errorf("%v, want %v", err, io.ErrUnexpectedEOF)
		}
	})
}

// Responses that come while bodies are still sent, whole ones and others, reach their
// clients, and buffers are never those of two connections.
func TestEarlyAnswers(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		request := header(conn)
		length := "2"
		if strings.Contains(request, "X-Short") {
			length = "9"
		}
		send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: "+length+"\r\n\r\nhi")
	})
	p := start(t, "*", nil, func(p *Proxy) { p.config.HeaderTimeout = time.Second })
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for j := range 20 {
				framing := []string{"Content-Length: 100000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"}[j%2]
				short := []string{"", "X-Short: 1\r\n"}[(i+j/2)%2]
				conn := p.connect(t)
				go func() {
					_, _ = io.WriteString(conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\n"+short+framing)
					for range 20 {
						_, _ = io.WriteString(conn, "2\r\nhi\r\n")
					}
					_ = conn.CloseWrite()
				}()
				text, _ := io.ReadAll(conn) // the end may be a reset
				if s := string(text); s != "" && !strings.HasPrefix(s, "HTTP/1.1 200 OK\r\n") && !strings.HasPrefix(s, "HTTP/1.1 400 ") && !strings.HasPrefix(s, "HTTP/1.1 502 ") {
					t.Errorf("got %q", s)
				}
				conn.Close()
			}
		})
	}
	clients.Wait()
	if log := p.log.String(); strings.Contains(log, "panic") {
		t.Errorf("logged:\n%s", log)
	}
}

// Responses that no client must get are errors of the server. None of them ends the
// proxy's work on the connection, or is a line of another form in the log.
func TestBadResponses(t *testing.T) {
	for name, response := range map[string]string{
		"status 000":        "HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n",
		"status 099":        "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
		"status +20":        "HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n",
		"a reason phrase":   "HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
		"a switch unasked":  "HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"a header too long": "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 80<<10) + "\r\n\r\n",
		"endless 1xx":       strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", 2000),
		// net/http takes these lines for interim responses, too.
		"endless 1xx of HTTP/1.0":             strings.Repeat("HTTP/1.0 103 Early Hints\r\nLink: </a>\r\n\r\n", 2000),
		"a header too long after such a line": "HTTP/1.1  103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 80<<10) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			server := serve(t, func(conn *net.TCPConn) {
				for header(conn) != "" {
					if _, err := io.WriteString(conn, response); err != nil {
						return
					}
				}
			})
			p := start(t, "*", nil, nil)
			s := p.session(t)
			for range 2 {
				_, err := io.WriteString(s, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\n\r\n")
				check(t, err)
				status := http.StatusEarlyHints
				for status == http.StatusEarlyHints {
					got, err := http.ReadResponse(s.r, nil)
					check(t, err)
					_, err = io.Copy(io.Discard, got.Body)
					check(t, err)
					status = got.StatusCode
				}
				if status != 502 {
					t.Errorf("status %d", status)
				}
			}
			if log := p.log.String(); strings.Contains(log, "panic") {
				t.Errorf("logged:\n%s", log)
			}
		})
	}
}

// Data that a server sends without a request reach no client, and no log.
func TestUnsolicitedResponse(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
	for name, after := range map[string]func(*net.TCPConn){
		"at once": func(*net.TCPConn) {},
		"later": func(conn *net.TCPConn) {
			_ = await(func() bool { quiet, err := quietFor(conn); return err != nil || quiet > 5*time.Millisecond })
			_, _ = io.WriteString(conn, answer+"no")
		},
	} {
		t.Run(name, func(t *testing.T) {
			sent := make(chan struct{}, 100)
			server := serve(t, func(conn *net.TCPConn) {
				if header(conn) == "" {
					return
				}
				text := answer + "hi"
				if name == "at once" {
					text += answer + "no"
				}
				_, _ = io.WriteString(conn, text)
				after(conn)
				sent <- struct{}{}
				_, _ = io.Copy(io.Discard, conn)
			})
			var std output
			log.SetOutput(&std)
			defer log.SetOutput(os.Stderr)
			p := start(t, "*", nil, nil)
			s := p.session(t)
			for range 5 {
				s.want(t, "GET", server, "", 200, "hi")
				<-sent
			}
			if text := std.String(); text != "" {
				t.Errorf("logged %q", text)
			}
		})
	}
}

// One connection serves many requests, to the client and to the server.
func TestKeepAlive(t *testing.T) {
	var connections atomic.Int32
	server := serve(t, func(conn *net.TCPConn) {
		connections.Add(1)
		for header(conn) != "" {
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		}
	})
	p := start(t, "203.0.113.1", nil, nil)
	conn := p.connect(t)
	r := bufio.NewReader(conn)
	for range 5 {
		send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\n\r\n")
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != 200 {
			t.Fatalf("status %d, %v", response.StatusCode, err)
		}
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("the server had %d connections, want 1", n)
	}
}

// An idle connection is reused only if the current rules allow its address.
func TestKeptConnectionsAndRules(t *testing.T) {
	hello := func(s string) func(*net.TCPConn) {
		return func(conn *net.TCPConn) {
			for header(conn) != "" {
				send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"+s)
			}
		}
	}
	serveAt(t, "203.0.113.11:8011", hello("1"))
	serveAt(t, "203.0.113.12:8011", hello("2"))
	p := start(t, "*", zone{"a.example": {"203.0.113.11", "203.0.113.12"}}, nil)
	for _, step := range []struct{ rules, want string }{
		{"*", "1"}, {"203.0.113.12", "2"}, {"!203.0.113.11\n*", ""}, {"203.0.113.11", "1"}, {"!a.example\n*", ""}, {"a.example", "1"},
	} {
		list, err := Parse(step.rules)
		if err != nil {
			t.Fatal(err)
		}
		p.rules.Store(newRuleSet(list, nil))
		status, body := answer(t, p.get(t, "a.example:8011"))
		if step.want == "" && status == 403 {
			continue
		}
		if status != 200 || body != step.want {
			t.Errorf("%q: %d, %q; want %q", step.rules, status, body, step.want)
		}
	}
}

func TestTunnelHalves(t *testing.T) {
	t.Run("the client ends first", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			wantEnd(t, conn, "question")
			send(t, conn, "answer")
		})
		conn := start(t, "203.0.113.1", nil, nil).tunnel(t, server)
		send(t, conn, "question")
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, conn, "answer")
	})
	t.Run("the client ends with the CONNECT", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			wantEnd(t, conn, "question")
			send(t, conn, "answer")
		})
		_, port, _ := net.SplitHostPort(server)
		p := start(t, "203.0.113.0/24\n198.51.100.0/24", zone{"slow.example": {"198.51.100.7", "203.0.113.1"}}, nil)
		conn := p.connect(t)
		send(t, conn, "CONNECT slow.example:"+port+" HTTP/1.1\r\n\r\nquestion")
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, conn, "HTTP/1.1 200 Connection established\r\n\r\nanswer")
	})
	t.Run("the server ends first", func(t *testing.T) {
		done := make(chan struct{})
		server := serve(t, func(conn *net.TCPConn) {
			defer close(done)
			send(t, conn, "greeting")
			if err := conn.CloseWrite(); err != nil {
				t.Error(err)
			}
			wantEnd(t, conn, "late")
		})
		conn := start(t, "203.0.113.1", nil, nil).tunnel(t, server)
		wantEnd(t, conn, "greeting")
		send(t, conn, "late")
		conn.Close()
		<-done
	})
	t.Run("bulk data in both directions", func(t *testing.T) {
		const size = 8 << 20
		server := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn); _ = conn.CloseWrite() })
		conn := start(t, "203.0.113.1", nil, nil).tunnel(t, server)
		go func() {
			_, _ = io.CopyN(conn, zeros{}, size)
			_ = conn.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
			t.Errorf("%d bytes received, %v", n, err)
		}
	})
	t.Run("the server resets", func(t *testing.T) {
		server := serve(t, func(conn *net.TCPConn) {
			wantRead(t, conn, "x")
			_ = conn.SetLinger(0)
		})
		conn := start(t, "203.0.113.1", nil, nil).tunnel(t, server)
		send(t, conn, "x")
		_, _ = io.Copy(io.Discard, conn) // it ends
	})
}

// openPipes returns the number of open ends of pipes.
func openPipes(t *testing.T) (n int) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/fd/*")
	check(t, err)
	for _, f := range files {
		if to, err := os.Readlink(f); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// The kernel copies long pieces of a tunnel by pipes (splice(2)), which a tunnel holds
// only while they contain data.
func TestTunnelPipes(t *testing.T) {
	// io.Copy of other tests leaves pipes, until the garbage collector closes them.
	before := openPipes(t)
	for range 20 {
		runtime.GC()
		time.Sleep(time.Millisecond)
		before = openPipes(t)
	}
	echo := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}) })
	bulk := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(struct{ io.Writer }{conn}, zeros{}) })
	p := start(t, "203.0.113.1", nil, func(p *Proxy) { p.pipes.most = 12 })
	const tunnels = 16
	for range tunnels {
		conn := p.tunnel(t, echo)
		for range 3 {
			send(t, conn, "echo")
			wantRead(t, conn, "echo")
		}
	}
	if n := openPipes(t); n > before {
		t.Errorf("%d tunnels without data hold %d ends of pipes", tunnels, n-before)
	}
	var conns []net.Conn
	for range tunnels {
		conn := p.tunnel(t, bulk)
		_, err := io.CopyN(io.Discard, conn, 8<<20)
		check(t, err)
		conns = append(conns, conn)
	}
	inUse := func() int {
		p.pipes.mu.Lock()
		defer p.pipes.mu.Unlock()
		return p.pipes.used
	}
	if !await(func() bool { return inUse() == 12 }) {
		t.Errorf("%d tunnels whose clients do not read hold %d pipes, want 12, the limit", tunnels, inUse())
	}
	for _, conn := range conns {
		conn.Close()
	}
	if !await(func() bool { return openPipes(t) <= before }) {
		t.Errorf("%d ends of pipes stay open", openPipes(t)-before)
	}
}

// Tunnels take two files each. If all are in use, more clients wait, and nobody gets an
// error; idle clients take one file.
func TestTunnelFiles(t *testing.T) {
	if n := connectionFiles(1024) + 2*(1024/pipeShare); n > 1024*15/16 {
		t.Errorf("connections and pipes take %d of 1,024 files", n)
	}
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return len(entries)
	}
	echo := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}) })
	const tunnels = 32
	p := start(t, "203.0.113.1", nil, func(p *Proxy) {
		p.config.MaxConnections, p.connections = 2*tunnels, 2*tunnels
	})
	if !await(func() bool { return p.listener.Load() != nil }) { // it has opened its own files
		t.Fatal("the proxy does not serve")
	}
	before := count()
	var conns []*net.TCPConn
	for range tunnels {
		conn := p.tunnel(t, echo)
		go func() { _, _ = io.CopyN(conn, zeros{}, 1<<20) }()
		_, err := io.CopyN(io.Discard, conn, 1<<20)
		check(t, err)
		conns = append(conns, conn)
	}
	// The test itself has the other ends of both connections.
	if !await(func() bool { return count() <= before+4*tunnels }) {
		t.Errorf("%d tunnels take %d files, want 2 each and the test's own 2", tunnels, count()-before)
	}
	late := p.get(t, "192.0.2.1")
	if !await(func() bool { return p.listener.Load().waits.Load() }) {
		t.Fatal("the next client does not wait")
	}
	conns[0].Close()
	if status, _ := answer(t, late); status != 403 {
		t.Errorf("status %d", status)
	}
	late.Close()
	for _, conn := range conns[1:] {
		conn.Close()
	}
	// Clients without requests need no second file, and one with a tunnel gets it.
	if !await(func() bool { return p.used() == 0 }) {
		t.Fatalf("%d connections", p.used())
	}
	for range 2*tunnels - 1 {
		p.connect(t)
	}
	if !await(func() bool { return p.Status().Connections == 2*tunnels-1 }) {
		t.Fatalf("%d idle clients", p.Status().Connections)
	}
}

// Idle connections to servers make room for new ones.
func TestOpenServerConnections(t *testing.T) {
	hello := func(conn *net.TCPConn) {
		for header(conn) != "" {
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		}
	}
	var all []string
	for range 10 {
		all = append(all, serve(t, hello))
	}
	p := start(t, "203.0.113.1", nil, func(p *Proxy) { p.connections = 4 })
	s := p.session(t)
	for _, server := range all {
		s.want(t, "GET", server, "", 200, "hi")
		if n := p.servers.open.Load(); n > 3 {
			t.Errorf("%d connections to servers, want 3", n)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// After a switch to any protocol both directions work, including data that were sent
// before the switch.
func TestUpgrade(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		if got := header(conn); !strings.Contains(got, "Upgrade: my/1\r\n") {
			t.Errorf("the server got %q", got)
		}
		send(t, conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: my/1\r\n\r\n")
		wantEnd(t, conn, "early, late")
		send(t, conn, "end")
	})
	p := start(t, "203.0.113.1", nil, func(p *Proxy) { p.config.AccessLog = true })
	conn := p.connect(t)
	send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: my/1\r\n\r\nearly")
	if got := header(conn); !strings.HasPrefix(got, "HTTP/1.1 101 ") {
		t.Fatalf("got %q", got)
	}
	send(t, conn, ", late")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, conn, "end")
	p.await(t, "status=101 received=11 sent=3")
}

// await waits until the log contains a text.
func (p *testProxy) await(t *testing.T, text string) {
	t.Helper()
	if !await(func() bool { return strings.Contains(p.log.String(), text) }) {
		t.Fatalf("the log lacks %q", text)
	}
}

// connectTimeout shortens the timeout for a server that does not answer.
func connectTimeout(server string) func(*Proxy) {
	return func(p *Proxy) {
		if strings.Contains(server, "void.example") {
			p.config.ConnectTimeout = 500 * time.Millisecond
		}
	}
}

func TestErrors(t *testing.T) {
	garbage := serve(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 4096))
		send(t, conn, "SSH-2.0-x\r\n")
	})
	mute := serve(t, func(conn *net.TCPConn) { header(conn) })
	names := zone{
		"here.example": {"203.0.113.1"}, "mixed.example": {"10.0.0.1", "127.0.0.1"}, "late.example": {"timeout"}, "none.example": {},
		"void.example": {"198.51.100.7", "198.51.100.8"}, "local.example": {"169.254.169.254", "::1"},
		"both.example": {"203.0.113.1", "2001:db8::1"},
	}
	for name, test := range map[string]struct {
		rules, url string
		status     int
		text       string
	}{
		"denied by a name":           {"!*.example\n*", "http://here.example/", 403, "here.example is denied by rule 1: !*.example"},
		"denied by a network":        {"#\n!10.0.0.0/8\n*", "http://mixed.example/", 403, "mixed.example (10.0.0.1) is denied by rule 1: !10.0.0.0/8"},
		"no rule":                    {"1.2.3.4", "http://here.example/", 403, "no rule allows here.example (203.0.113.1)"},
		"no rule for a name":         {"x.example", "http://here.example/", 403, "no rule allows here.example"},
		"no rule for an address":     {"x.example", "http://203.0.113.1/", 403, "no rule allows 203.0.113.1"},
		"local":                      {"*", "http://local.example/", 403, "local.example (169.254.169.254) is a local address of the proxy: only a rule for this address allows it"},
		"a name that does not exist": {"*", "http://none.example/", 502, "looking up none.example: no such host"},
		"and is denied":              {"!10.0.0.0/8\n1.2.3.4", "http://none.example/", 403, "no rule allows none.example"},
		"name servers are mute":      {"*", "http://late.example/", 504, "looking up late.example: no answer from the name servers"},
		"connection refused":         {"*", "http://here.example:9/", 502, "connecting to here.example:9: 203.0.113.1: connection refused"},
		"IPv4 refuses, beside IPv6":  {"*", "http://both.example:9/", 502, "connecting to both.example:9: 203.0.113.1: connection refused\n"},
		"only IPv6 is allowed": {"!0.0.0.0/0\n*", "http://both.example/", 403, "both.example (203.0.113.1) is denied by rule 1: !0.0.0.0/0; " +
			"its address 2001:db8::1 is allowed, but IPv6 is used only if the name has no IPv4 address\n"},
		"no rule for either":               {"1.2.3.4", "http://both.example/", 403, "no rule allows both.example (203.0.113.1)\n"},
		"a silent network":                 {"*", "http://void.example/", 504, "connecting to void.example:80: 198.51.100.7: no answer"},
		"no route":                         {"*", "http://192.0.2.1/", 502, "connecting to 192.0.2.1:80: 192.0.2.1: network is unreachable"},
		"no HTTP":                          {"*", "http://" + garbage + "/", 502, "malformed HTTP"},
		"no answer":                        {"*", "http://" + mute + "/", 502, "the server closed the connection without a response"},
		"no TLS":                           {"*", "https://" + garbage + "/", 502, "TLS"},
		"one of two addresses is denied":   {"!10.0.0.0/8\n127.0.0.1", "http://mixed.example:9/", 403, "mixed.example (10.0.0.1) is denied by rule 1: !10.0.0.0/8\n"},
		"the second of two is denied":      {"!127.0.0.1\n*", "http://mixed.example:9/", 403, "mixed.example (127.0.0.1) is denied by rule 1: !127.0.0.1\n"},
		"one is denied behind a name":      {"mixed.example\n127.0.0.1\n!10.0.0.0/8", "http://mixed.example:9/", 502, "connecting to mixed.example:9: "},
		"one of two addresses is allowed":  {"127.0.0.1", "http://mixed.example:9/", 502, "connecting to mixed.example:9: 127.0.0.1: connection refused\n"},
		"one is allowed before a denial":   {"127.0.0.1\n!10.0.0.0/8\n*", "http://mixed.example:9/", 502, "connecting to mixed.example:9: 127.0.0.1: connection refused\n"},
		"the IPv6 address is denied":       {"!2001:db8::/32\n*", "http://both.example:9/", 403, "both.example (2001:db8::1) is denied by rule 1: !2001:db8::/32\n"},
		"IPv6 is denied to a name of both": {"!::/0\n*", "http://both.example:9/", 502, "203.0.113.1: connection refused\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, test.rules, names, connectTimeout(test.url))
			conn := p.connect(t)
			u, err := url.Parse(test.url)
			if err != nil {
				t.Fatal(err)
			}
			send(t, conn, "GET "+test.url+" HTTP/1.1\r\nHost: "+u.Host+"\r\n\r\n")
			status, text := answer(t, conn)
			if status != test.status || !strings.HasPrefix(text, "egress-router: ") || !strings.Contains(text, test.text) || strings.Count(text, "\n") != 1 {
				t.Errorf("%d %q, want %d with %q", status, text, test.status, test.text)
			}
			if u.Scheme == "https" || strings.Contains(name, "HTTP") || strings.Contains(name, "answer") {
				return
			}
			conn = p.connect(t)
			authority := u.Host
			if u.Port() == "" {
				authority += ":80"
			}
			send(t, conn, "CONNECT "+authority+" HTTP/1.1\r\n\r\n\x16\x03\x01\r\n\r\n")
			if s, again := answer(t, conn); s != status || !strings.Contains(again, test.text) {
				t.Errorf("CONNECT: %d %q, want %d %q", s, again, status, test.text)
			}
			wantEnd(t, conn, "")
		})
	}
}

// If a name has addresses of both families, IPv6 is not dialled, even if IPv4 refuses,
// does not answer or is denied, in any order of the addresses. A name without an IPv4
// address, and an IPv6 address itself, are dialled.
func TestFamilies(t *testing.T) {
	var connections atomic.Int32
	server := serveAt(t, "[2001:db8::1]:0", func(conn *net.TCPConn) {
		connections.Add(1)
		header(conn)
		send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	_, port, err := net.SplitHostPort(server)
	check(t, err)
	names := zone{
		"refuses.example": {"203.0.113.1", "2001:db8::1"}, "later.example": {"2001:db8::1", "203.0.113.1"},
		"void.example": {"198.51.100.9", "2001:db8::1"}, "six.example": {"2001:db8::1"},
	}
	for _, test := range []struct {
		rules, host string
		status      int
	}{
		{"*", "refuses.example", 502}, {"*", "later.example", 502}, {"*", "void.example", 504}, {"!0.0.0.0/0\n*", "refuses.example", 403},
		{"2001:db8::/32", "refuses.example", 403}, {"!2001:db8::/32\n*", "refuses.example", 403}, {"!::/0\n*", "refuses.example", 502}, {"!::/0\n*", "six.example", 403}, {"!2001:db8::/32\n*", "six.example", 403},
		{"*", "six.example", 200}, {"2001:db8::/32", "six.example", 200}, {"*", "[2001:db8::1]", 200},
	} {
		p := start(t, test.rules, names, connectTimeout(test.host))
		before := connections.Load()
		status, text := answer(t, p.get(t, net.JoinHostPort(strings.Trim(test.host, "[]"), port)))
		if status != test.status {
			t.Errorf("%q, %s: %d %q, want %d", test.rules, test.host, status, text, test.status)
		}
		if dialled := connections.Load() > before; dialled != (test.status == 200) {
			t.Errorf("%q, %s: dialled by IPv6: %v", test.rules, test.host, dialled)
		}
	}
}

// An invalid body is an error of the client.
func TestBadBody(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	conn := start(t, "*", nil, nil).connect(t)
	send(t, conn, "POST http://"+server+"/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
	if status, text := answer(t, conn); status != 400 || !strings.Contains(text, "reading the request") {
		t.Errorf("%d %q", status, text)
	}
}

// The pod's own addresses are local like its loopback.
func TestOwnAddresses(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		header(conn)
		send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	own := func(p *Proxy) { p.own = new(netns.Addresses).Has }
	own254 := strings.Replace(server, "203.0.113.1:", "203.0.113.254:", 1)
	for _, test := range []struct {
		rules, to string
		status    int
	}{
		{"*", own254, 403}, {"203.0.113.0/24\n*", own254, 403}, {"203.0.113.254", own254, 502}, {"*", server, 200},
		{"*", "a.example:80", 403}, {"*", "[2001:db8::1]:80", 403}, {"*", "[::ffff:203.0.113.254]:80", 403}, {"*", "[64:ff9b::203.0.113.254]:80", 403},
		{"*", "[64:ff9b::127.0.0.1]:80", 403}, {"*", "[2002:7f00:1::1]:80", 403}, {"*", "[::169.254.169.254]:80", 403}, {"*", "[64:ff9b::203.0.113.1]:80", 502}, {"*", "0.0.0.0:80", 403},
	} {
		p := start(t, test.rules, zone{"a.example": {"203.0.113.254"}}, own)
		if status, text := answer(t, p.get(t, test.to)); status != test.status {
			t.Errorf("%q, %s: %d %q, want %d", test.rules, test.to, status, text, test.status)
		}
	}
}

// A reverse name of an address counts only if it resolves to the address.
func TestReverseNames(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		header(conn)
		send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	for name, test := range map[string]struct {
		names  zone
		status int
	}{
		"its own":                 {zone{"203.0.113.1": {"www.good.example."}, "www.good.example": {"203.0.113.1"}}, 200},
		"one of several":          {zone{"203.0.113.1": {"x.", "www.good.example."}, "www.good.example": {"203.0.113.9", "203.0.113.1"}}, 200},
		"another address's":       {zone{"203.0.113.1": {"www.good.example."}, "www.good.example": {"203.0.113.9"}}, 403},
		"one that does not exist": {zone{"203.0.113.1": {"www.good.example."}}, 403},
		"one that times out":      {zone{"203.0.113.1": {"www.good.example."}, "www.good.example": {"timeout"}}, 403},
		"none":                    {nil, 403},
		"another":                 {zone{"203.0.113.1": {"bad.example."}, "bad.example": {"203.0.113.1"}}, 403},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, "*.good.example", test.names, nil)
			if status, text := answer(t, p.get(t, server)); status != test.status {
				t.Errorf("%d %q, want %d", status, text, test.status)
			}
		})
	}
}

func TestIdle(t *testing.T) {
	const limit = 200 * time.Millisecond
	quick := func(p *Proxy) { p.config.IdleTimeout = limit }
	quickHeader := func(p *Proxy) { p.config.HeaderTimeout, p.config.MaxConnections = limit, 1 }
	silent := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	noBody := "POST http://" + silent + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12"
	t.Run("no answer", func(t *testing.T) {
		t.Parallel()
		if status, text := answer(t, start(t, "*", nil, quick).get(t, silent)); status != 504 || !strings.Contains(text, "idle timeout, no data for 200ms") {
			t.Errorf("%d %q", status, text)
		}
	})
	t.Run("no body", func(t *testing.T) {
		t.Parallel()
		conn := early(t, start(t, "*", nil, func(p *Proxy) { quick(p); quickHeader(p) }), noBody)
		if status, _ := answer(t, conn); status != 504 {
			t.Errorf("status %d", status)
		}
		wantEnd(t, conn, "")
	})
	t.Run("no body of a request that is denied", func(t *testing.T) {
		t.Parallel()
		conn := early(t, start(t, "#", nil, quickHeader), noBody)
		if status, _ := answer(t, conn); status != 403 {
			t.Errorf("status %d", status)
		}
		wantEnd(t, conn, "")
	})
	t.Run("no body of a request that is answered", func(t *testing.T) {
		t.Parallel()
		// The proxy waits for the body when the response comes.
		quickServer := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			_, _ = io.Copy(io.Discard, conn)
		})
		for _, framing := range []string{"Content-Length: 5\r\n\r\n12", "Transfer-Encoding: chunked\r\n\r\n2\r\n12\r\n"} {
			conn := early(t, start(t, "*", nil, quickHeader), "POST http://"+quickServer+"/ HTTP/1.1\r\nHost: x\r\n"+framing)
			if status, text := answer(t, conn); status != 200 || text != "ok" {
				t.Errorf("%s: %d %q", framing, status, text)
			}
			wantEnd(t, conn, "")
		}
	})
	t.Run("a tunnel", func(t *testing.T) {
		t.Parallel()
		p := start(t, "*", nil, quick)
		begin := time.Now()
		_, err := io.Copy(io.Discard, p.tunnel(t, silent))
		// The kernel's times have the precision of a tick, 10 ms at most.
		if took := time.Since(begin); took < limit-10*time.Millisecond || isTimeout(err) {
			t.Errorf("the tunnel ended after %s (%v), want %s", took, err, limit)
		}
	})
	t.Run("a tunnel with data in one direction", func(t *testing.T) {
		t.Parallel()
		talk(t, limit, "", func(t *testing.T, server string) string {
			conn := start(t, "*", nil, quick).connect(t)
			send(t, conn, "CONNECT "+server+" HTTP/1.1\r\n\r\n")
			text, _ := io.ReadAll(conn)
			return strings.TrimPrefix(string(text), "HTTP/1.1 200 Connection established\r\n\r\n")
		})
	})
	t.Run("slow response", func(t *testing.T) {
		t.Parallel()
		talk(t, limit, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", func(t *testing.T, server string) string {
			response, err := http.ReadResponse(bufio.NewReader(start(t, "*", nil, quick).get(t, server)), nil)
			if err != nil {
				return err.Error()
			}
			text, _ := io.ReadAll(response.Body)
			return string(text)
		})
	})
	t.Run("a client that does not read", func(t *testing.T) {
		t.Parallel()
		ended := make(chan struct{})
		endless := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 200 OK\r\n\r\n")
			_, _ = io.Copy(conn, zeros{})
			close(ended)
		})
		start(t, "*", nil, quick).get(t, endless)
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("the server is still writing")
		}
	})
	t.Run("an upgraded connection", func(t *testing.T) {
		t.Parallel()
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			send(t, conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
			_, _ = io.Copy(io.Discard, conn)
		})
		conn := start(t, "*", nil, quick).connect(t)
		send(t, conn, "GET http://"+server+"/ HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
		header(conn)
		wantEnd(t, conn, "")
	})
	t.Run("slow header", func(t *testing.T) {
		t.Parallel()
		conn := early(t, start(t, "*", nil, quickHeader), "GET http://x/ HTTP/1.1\r\nHost:")
		wantEnd(t, conn, "")
	})
	t.Run("no next request", func(t *testing.T) {
		t.Parallel()
		conn := start(t, "#", nil, func(p *Proxy) { p.config.KeepAliveTimeout = limit }).get(t, silent)
		if status, _ := answer(t, conn); status != 403 {
			t.Errorf("status %d", status)
		}
		wantEnd(t, conn, "")
	})
}

// early returns a connection whose data the kernel has before the proxy accepts it,
// so that a short header timeout cannot end it before. The proxy takes one
// connection at a time.
func early(t *testing.T, p *testProxy, data string) *net.TCPConn {
	t.Helper()
	first := p.connect(t)
	if !await(func() bool { return p.Status().Connections == 1 }) {
		t.Fatal("the first connection is not accepted")
	}
	conn := p.connect(t)
	send(t, conn, data)
	first.Close()
	return conn
}

// talk has a server send a byte now and then for longer than the idle timeout, and
// checks that the client reads them all. If a busy machine stops the server for about
// the timeout, the connection may end, and the test is repeated.
func talk(t *testing.T, idle time.Duration, begin string, read func(t *testing.T, server string) string) {
	t.Helper()
	const bytes = 30
	for range 100 {
		gaps := make(chan time.Duration, 1)
		server := serve(t, func(conn *net.TCPConn) {
			if begin != "" {
				header(conn)
				_, _ = io.WriteString(conn, begin)
			}
			var gap time.Duration
			last := time.Now()
			for range bytes {
				time.Sleep(idle / 20)
				_, _ = io.WriteString(conn, "x")
				gap = max(gap, time.Since(last))
				last = time.Now()
			}
			gaps <- gap
		})
		text := read(t, server)
		if text == strings.Repeat("x", bytes) {
			return
		}
		select {
		case gap := <-gaps:
			// The way to the client may take a while too.
			if gap < idle/2 {
				t.Errorf("got %q; longest pause of the server %s, idle timeout %s", text, gap, idle)
				return
			}
		case <-time.After(10 * idle): // the timeout was over before the proxy was connected
		}
	}
	t.Error("the idle timeout ended every connection")
}

// More clients than the limit wait until a connection ends.
func TestMaxConnections(t *testing.T) {
	silent := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	p := start(t, "203.0.113.1", nil, func(p *Proxy) { p.config.MaxConnections = 2 })
	first, second := p.tunnel(t, silent), p.connect(t)
	third := p.get(t, "192.0.2.1")
	if err := third.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := third.Read(make([]byte, 1)); n > 0 || !os.IsTimeout(err) {
		t.Fatalf("third connection served: %v", err)
	}
	if err := third.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	first.Close()
	if status, _ := answer(t, third); status != 403 {
		t.Errorf("status %d", status)
	}
	third.Close()
	send(t, second, "GET http://192.0.2.1/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if status, _ := answer(t, second); status != 403 {
		t.Errorf("status %d", status)
	}
}

// One client with more connections than the limit does not keep another one out: that
// one takes the place of a connection without a request, or the next free place.
func TestClientShares(t *testing.T) {
	const most = 32
	from := func(t *testing.T, p *testProxy, addr string) *net.TCPConn {
		t.Helper()
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip(addr), 0)), Timeout: patience}
		conn, err := dialer.Dial("tcp", p.addr)
		check(t, err)
		t.Cleanup(func() { conn.Close() })
		check(t, conn.SetDeadline(time.Now().Add(patience)))
		return conn.(*net.TCPConn)
	}
	const get = "GET http://192.0.2.1/ HTTP/1.1\r\nHost: x\r\n\r\n"
	limit := func(p *Proxy) { p.config.MaxConnections = most }
	full := func(t *testing.T, p *testProxy) {
		t.Helper()
		if !await(func() bool { return p.Status().Connections == most }) {
			t.Fatalf("%d connections, want %d", p.Status().Connections, most)
		}
	}
	t.Run("silent connections", func(t *testing.T) {
		silent := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
		p := start(t, "203.0.113.1", nil, limit)
		tunnel := p.tunnel(t, silent)
		for range 2 * most {
			p.connect(t)
		}
		full(t, p)
		for range 5 {
			conn := from(t, p, "127.0.0.2")
			send(t, conn, get)
			if status, _ := answer(t, conn); status != 403 {
				t.Errorf("status %d", status)
			}
		}
		send(t, tunnel, "still here")
		wantRead(t, tunnel, "still here")
	})
	t.Run("tunnels", func(t *testing.T) {
		silent := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
		p := start(t, "203.0.113.1", nil, limit)
		var tunnels []*net.TCPConn
		for range most {
			tunnels = append(tunnels, p.tunnel(t, silent))
		}
		for range 2 * most {
			p.connect(t)
		}
		conn := from(t, p, "127.0.0.2")
		send(t, conn, get)
		l := p.listener.Load()
		if !await(func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return slices.ContainsFunc(l.waiting, func(c *clientConn) bool { return c.from == ip("127.0.0.2") })
		}) {
			t.Fatal("the other client does not wait")
		}
		tunnels[0].Close()
		if status, _ := answer(t, conn); status != 403 {
			t.Errorf("status %d", status)
		}
	})
}

// After the end of its context a proxy accepts no clients, and ends active requests.
func TestStop(t *testing.T) {
	t.Run("active requests finish", func(t *testing.T) {
		t.Parallel()
		asked, stopped := make(chan struct{}, 2), make(chan struct{})
		server := serve(t, func(conn *net.TCPConn) {
			header(conn)
			asked <- struct{}{}
			<-stopped
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		})
		p := start(t, "*", nil, func(p *Proxy) { p.config.ShutdownGrace = patience })
		idle := p.connect(t)
		send(t, idle, "GET http://none.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
		if status, _ := answer(t, idle); status != 502 {
			t.Fatalf("status %d", status)
		}
		conn, tunnel := p.get(t, server), p.tunnel(t, server)
		send(t, tunnel, "\r\n\r\n")
		<-asked
		<-asked
		p.stop()
		for { // until the proxy does not listen any more
			late, err := net.Dial("tcp", p.addr)
			if err != nil {
				break
			}
			late.Close()
		}
		wantEnd(t, idle, "")
		close(stopped)
		if status, text := answer(t, conn); status != 200 || text != "hi" {
			t.Errorf("%d %q", status, text)
		}
		wantEnd(t, tunnel, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		tunnel.Close()
		if err := <-p.done; err != nil {
			t.Error(err)
		}
		p.done <- nil
	})
	t.Run("shutdown timeout closes active requests", func(t *testing.T) {
		t.Parallel()
		const grace = 100 * time.Millisecond
		silent := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
		p := start(t, "*", nil, func(p *Proxy) { p.config.ShutdownGrace = grace })
		conn, tunnel := p.get(t, silent), p.tunnel(t, silent)
		begin := time.Now()
		p.stop()
		for name, conn := range map[string]net.Conn{"request": conn, "tunnel": tunnel} {
			if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
				t.Errorf("the %s has not ended", name)
			}
		}
		if err := <-p.done; err != nil || time.Since(begin) < grace {
			t.Errorf("%v after %s", err, time.Since(begin))
		}
		p.done <- nil
		if !strings.Contains(p.log.String(), "shutdown timeout, closing active requests") {
			t.Errorf("the log lacks the shutdown timeout:\n%s", p.log)
		}
	})
}

func TestAccessLog(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		// Before the response: a client's body that nobody has read by then is not counted.
		if h := header(conn); strings.Contains(h, "Content-Length: 5") {
			wantRead(t, conn, "hello")
		}
		send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
	})
	_, port, _ := net.SplitHostPort(server)
	p := start(t, "!denied.example\n*.example\n", zone{"a.example": {"203.0.113.1"}}, func(p *Proxy) { p.config.AccessLog = true })
	conn := p.connect(t)
	send(t, conn, "POST http://a.example:"+port+"/secret?x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
	if status, _ := answer(t, conn); status != 200 {
		t.Fatalf("status %d", status)
	}
	client := conn.LocalAddr().String()
	conn.Close()
	p.await(t, fmt.Sprintf("msg=access client=%s method=POST destination=a.example:%s address=%s rule=*.example status=200 received=5 sent=2 duration=", client, port, server))

	conn = p.get(t, "denied.example")
	if status, _ := answer(t, conn); status != 403 {
		t.Fatalf("status %d", status)
	}
	p.await(t, "method=GET destination=denied.example:80 rule=!denied.example status=403 received=0 sent=")

	// A failure has its cause.
	conn = p.connect(t)
	send(t, conn, "GET http://user:secret@a.example:9/where?secret HTTP/1.1\r\nHost: x\r\n\r\n")
	if status, _ := answer(t, conn); status != 502 {
		t.Fatalf("status %d", status)
	}
	p.await(t, `url=http://a.example:9/where error="connecting to a.example:9: 203.0.113.1: connection refused"`)
	conn = p.connect(t)
	send(t, conn, "CONNECT none.example:9 HTTP/1.1\r\nHost: x\r\n\r\n")
	if status, _ := answer(t, conn); status != 502 {
		t.Fatalf("status %d", status)
	}
	p.await(t, `url=none.example:9 error="looking up none.example: no such host"`)

	tunnel := p.tunnel(t, "a.example:"+port)
	send(t, tunnel, "\r\n\r\n")
	wantEnd(t, tunnel, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
	tunnel.Close()
	p.await(t, "method=CONNECT destination=a.example:"+port+" address="+server+" rule=*.example status=200 received=4 sent=40 duration=")
	if strings.Contains(p.log.String(), "secret") {
		t.Error("a path is logged")
	}
}

// New rules apply to the next requests, and tunnels continue. The same rules are no
// change.
func TestSetRules(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	p := start(t, "*", nil, nil)
	tunnel, kept := p.tunnel(t, server), p.connect(t)
	set := func(text, logged string) {
		t.Helper()
		p.log.take()
		list, err := Parse(text)
		check(t, err)
		p.SetRules(list)
		if text := p.log.take(); (text == "") != (logged == "") || !strings.Contains(text, logged) {
			t.Errorf("logged %q, want %q", text, logged)
		}
	}
	set("# the same\n*", "")
	set("192.0.2.1", "rules=1")
	p.Rejected(errors.New("invalid"))
	if s := p.Status(); s.RulesErr == nil || s.Reloads != 1 || s.ReloadFailures != 1 {
		t.Errorf("after a valid and an invalid list: %+v", s)
	}
	send(t, kept, "CONNECT "+server+" HTTP/1.1\r\n\r\n")
	if status, _ := answer(t, kept); status != 403 {
		t.Errorf("status %d by the new rules", status)
	}
	send(t, tunnel, "still here")
	wantRead(t, tunnel, "still here")
}

// Run returns an error with a hint if the port is in use, and nil after its context ends.
func TestRun(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	p := New(Config{Listen: netip.MustParseAddrPort(l.Addr().String())}, newLogger(&output{}), zone{})
	err = p.Run(t.Context())
	if hint, ok := err.(interface{ Hint(wording.Names) string }); !ok || !strings.Contains(err.Error(), "address already in use") || hint.Hint(nil) == "" {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p = New(Config{Listen: netip.AddrPortFrom(netip.Addr{}, 8080), ShutdownGrace: time.Second}, newLogger(&output{}), zone{})
	if err := p.Run(ctx); err != nil {
		t.Errorf("after the end of the context: %v", err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A client that closes its half before the response ends the request to the server.
func TestClientGone(t *testing.T) {
	asked, ended := make(chan struct{}), make(chan struct{})
	server := serve(t, func(conn *net.TCPConn) {
		header(conn)
		close(asked)
		_, _ = io.Copy(io.Discard, conn)
		close(ended)
	})
	p := start(t, "*", nil, func(p *Proxy) { p.config.AccessLog = true })
	conn := p.get(t, server)
	<-asked
	check(t, conn.CloseWrite())
	if status, text := answer(t, conn); status != 502 || !strings.Contains(text, "the client closed the connection") {
		t.Errorf("%d %q", status, text)
	}
	p.await(t, "status=499")
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the server's connection is still open")
	}
}

// A client that ends its connection, or its half, in the middle of a body is gone; the
// body is not a bad one.
func TestClientGoneInBody(t *testing.T) {
	for name, body := range map[string]string{
		"a length": "Content-Length: 9\r\n\r\nabc", "chunks": "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "a chunk": "Transfer-Encoding: chunked\r\n\r\n9\r\nabc",
		"no byte": "Content-Length: 9\r\n\r\n", "trailers": "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: ",
	} {
		for how, end := range map[string]func(*net.TCPConn){
			"half": func(conn *net.TCPConn) { _ = conn.CloseWrite() },
			"all":  func(conn *net.TCPConn) { _ = conn.Close() },
			"a reset": func(conn *net.TCPConn) {
				_ = conn.SetLinger(0)
				_ = conn.Close()
			},
		} {
			t.Run(name+", "+how, func(t *testing.T) {
				asked, ended := make(chan struct{}), make(chan struct{})
				server := serve(t, func(conn *net.TCPConn) {
					header(conn)
					close(asked)
					_, _ = io.Copy(io.Discard, conn)
					close(ended)
				})
				p := start(t, "*", nil, func(p *Proxy) { p.config.AccessLog = true })
				conn := p.connect(t)
				send(t, conn, "POST http://"+server+"/p HTTP/1.1\r\nHost: x\r\n"+body)
				<-asked
				end(conn)
				if how == "half" {
					if status, text := answer(t, conn); status != 502 || !strings.Contains(text, "the client closed the connection before the response") {
						t.Errorf("%d %q", status, text)
					}
				}
				p.await(t, "status=499")
				p.await(t, "url=http://"+server+`/p error="the client closed the connection before the response"`)
				select {
				case <-ended:
				case <-time.After(patience):
					t.Error("the server's connection is still open")
				}
			})
		}
	}
}

// An attempt to connect may still run when its exchange has ended, and another request of
// the same or another client takes the place of that one.
func TestAttemptsAfterTheirExchange(t *testing.T) {
	handle := func(conn *net.TCPConn) {
		for {
			line, _, _ := strings.Cut(header(conn), "\r\n")
			if line == "" {
				return
			}
			path := strings.Fields(line)[1]
			if _, err := fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(path), path); err != nil {
				return
			}
		}
	}
	server := serve(t, handle)
	_, port, _ := net.SplitHostPort(server)
	serveAt(t, "203.0.113.2:"+port, handle)
	p := start(t, "*", zone{"several.example": {"203.0.113.1", "203.0.113.2", "203.0.113.3"}, "one.example": {"203.0.113.2"}}, nil)
	var clients sync.WaitGroup
	for client := range 4 {
		clients.Go(func() {
			for n := range 100 {
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.SetDeadline(time.Now().Add(patience))
				_, _ = fmt.Fprintf(conn, "GET http://several.example:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close() // while the proxy connects, or not
				conn, err = net.Dial("tcp", p.addr)
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.SetDeadline(time.Now().Add(patience))
				path := fmt.Sprintf("/%d-%d", client, n)
				_, _ = fmt.Fprintf(conn, "GET http://one.example:%s%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", port, path)
				got, err := io.ReadAll(conn)
				if err != nil || !strings.HasSuffix(string(got), "\r\n\r\n"+path) {
					t.Errorf("%s: %q, %v", path, got, err)
				}
				_ = conn.Close()
			}
		})
	}
	clients.Wait()
}
