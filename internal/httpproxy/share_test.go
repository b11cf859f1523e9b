package httpproxy

import (
	"net"
	"strings"
	"testing"
)

// A connection whose request has come and was not read yet keeps its place.
func TestEvictKeepsUnreadRequest(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s := newShares(1, func() bool { return false })
	c, err := newClientConn(&Proxy{config: Config{HeaderTimeout: patience, MaxHeaderBytes: 64 << 10}}, near.(*net.TCPConn), s)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !s.add(c) {
		t.Fatal("no place")
	}
	if _, err := far.Write([]byte("G")); err != nil {
		t.Fatal(err)
	}
	if !await(c.unread) {
		t.Fatal("no data")
	}
	if s.evictAny() {
		t.Error("closed with a request")
	}
	// The data have been read, and may be a request.
	if err := c.wait(); err != nil {
		t.Fatal(err)
	}
	if s.evictAny() {
		t.Error("closed with data that were read")
	}
	if _, err := far.Write([]byte("ET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if err := c.readRequest(new(request)); err != nil {
		t.Fatal(err)
	}
	if c.unread() || s.evictAny() || !c.begin() || s.evictAny() {
		t.Error("closed with a request that was read")
	}
	c.state.Store(reading)
	// A part of a request is none.
	if _, err := far.Write([]byte("GET http://x/ HTTP/1.1\r\nHost: x")); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.wait(); err != nil {
			t.Error(err)
		}
		if err := c.readRequest(new(request)); err == nil {
			t.Error("a part of a request is read")
		}
	}()
	if !await(s.evictAny) || s.count() != 0 {
		t.Error("a connection without a request stays")
	}
	<-done
}

// A connection that was closed for another client before it is served is no fault.
func TestClosedBeforeServed(t *testing.T) {
	p := start(t, "*", nil, nil)
	if !await(func() bool { return p.listener.Load() != nil }) {
		t.Fatal("the proxy does not listen")
	}
	l := p.listener.Load()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer other.Close()
	dialAt(t, other.Addr().String())
	conn, err := other.Accept()
	check(t, err)
	c, err := newClientConn(p.Proxy, conn.(*net.TCPConn), l.shares)
	check(t, err)
	_ = conn.Close()
	l.ready <- c
	if status, _ := answer(t, p.get(t, "unknown.example")); status != 502 { // the next connection, for an unknown name
		t.Errorf("status %d", status)
	}
	if log := p.log.String(); strings.Contains(log, "WARN") {
		t.Error(log)
	}
}
