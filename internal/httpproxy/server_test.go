package httpproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The first end of an expectation counts: its time, or the server's response.
func TestExpectation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		e := newExpectation()
		if <-e.met; e.err != nil || time.Since(begun) != expectPatience {
			t.Errorf("%v after %v", e.err, time.Since(begun))
		}
		if e.end(errFinalAnswer); e.err != nil {
			t.Errorf("a second end counts: %v", e.err)
		}
		e = newExpectation()
		e.end(errFinalAnswer)
		if <-e.met; !errors.Is(e.err, errFinalAnswer) {
			t.Errorf("%v", e.err)
		}
		time.Sleep(2 * expectPatience)
		(*expectation)(nil).end(nil)
	})
	// The timer may end it before newExpectation has set the timer.
	e := &expectation{met: make(chan struct{})}
	if e.meet(nil); e.err != nil {
		t.Error(e.err)
	}
	<-e.met
}

// A panic in any goroutine that handles data of a client or a server ends its connection,
// and nothing else.
func TestPanic(t *testing.T) {
	server := serve(t, func(conn *net.TCPConn) {
		if strings.HasPrefix(header(conn), "GET ") {
			send(t, conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
		}
		_, _ = io.Copy(io.Discard, conn)
	})
	tunnel := serve(t, func(conn *net.TCPConn) {
		send(t, conn, "hello")
		_, _ = io.Copy(io.Discard, conn)
	})
	post := "POST http://" + server + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: "
	for name, test := range map[string]struct{ send, where string }{
		"a response's body":     {"GET http://" + server + "/ HTTP/1.1\r\nHost: x\r\n\r\n", ".copyBody("},
		"a request's body":      {post + "5\r\n\r\nhello", ".write("},
		"the rest of a body":    {strings.Replace(post, server, "127.0.0.1:0", 1) + "5\r\n\r\n", ".dropRest("},
		"a request's head":      {"GET\r\n\r\n", ".reject("},
		"from a tunnel's end":   {"CONNECT " + tunnel + " HTTP/1.1\r\n\r\n", ".pass("},
		"from a tunnel's start": {"CONNECT " + server + " HTTP/1.1\r\n\r\nx", ".pass("},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, "*", nil, func(p *Proxy) { p.buffers.pool.New = func() any { panic("no buffer") } })
			conn := p.connect(t)
			send(t, conn, test.send)
			if test.where == ".pass(" {
				_, _ = conn.Read(make([]byte, 1)) // the tunnel is open
				_, _ = io.WriteString(conn, "more")
			}
			_, _ = io.Copy(io.Discard, conn) // the end may be a reset
			p.await(t, "panic while serving a client")
			if log := p.log.String(); !strings.Contains(log, test.where) {
				t.Errorf("another panic than in %s:\n%s", test.where, log)
			}
			if status, _ := answer(t, p.get(t, "unknown.example")); status != 502 {
				t.Errorf("the next client: %d", status)
			}
			if !await(func() bool { return p.running.count() == 0 }) {
				t.Errorf("%d requests are active", p.running.count())
			}
		})
	}
}

// A server may end its response while the client still sends a body: the buffer in which
// that arrives is no other client's before its last read.
func TestEndsDuringBody(t *testing.T) {
	hasty := serve(t, func(conn *net.TCPConn) {
		header(conn)
		_, _ = conn.Read(make([]byte, 100))
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
	})
	good := serve(t, func(conn *net.TCPConn) {
		for {
			line, _, _ := strings.Cut(header(conn), " HTTP")
			if line == "" {
				return
			}
			if _, err := fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(line), line); err != nil {
				return
			}
		}
	})
	p := start(t, "*", nil, nil)
	var clients sync.WaitGroup
	for client := range 3 {
		clients.Go(func() {
			for range 100 {
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.SetDeadline(time.Now().Add(patience))
				_, _ = io.WriteString(conn, "POST http://"+hasty+"/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
				var read sync.WaitGroup
				read.Go(func() { _, _ = io.Copy(io.Discard, conn) })
				for range 60 {
					if _, err := io.WriteString(conn, "6\r\nothers\r\n"); err != nil {
						break
					}
				}
				_ = conn.Close()
				read.Wait()
			}
		})
		clients.Go(func() {
			for n := range 100 {
				path := fmt.Sprintf("/%d-%d", client, n)
				conn, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Error(err)
					return
				}
				_ = conn.SetDeadline(time.Now().Add(patience))
				_, _ = io.WriteString(conn, "GET http://"+good+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
				if got, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(got), "\r\n\r\nGET "+path) {
					t.Errorf("%s: %q, %v", path, got, err)
				}
				_ = conn.Close()
			}
		})
	}
	clients.Wait()
	if log := p.log.String(); strings.Contains(log, "panic") {
		t.Error(log)
	}
}
