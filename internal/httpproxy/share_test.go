package httpproxy

import (
	"net"
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
	c := &clientConn{TCPConn: near.(*net.TCPConn), from: remoteIP(near.(*net.TCPConn)), shares: s}
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
	read := func() {
		t.Helper()
		if _, err := c.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	read()
	if _, err := far.Write([]byte("ET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	read()
	// net/http has read the request, and not called the handler.
	if c.unread() || s.evictAny() || !c.begin() {
		t.Error("closed with a request that was read")
	}
	c.ended.Add(1)
	c.state.Store(resting)
	// A part of a request is none.
	if _, err := far.Write([]byte("GET http://x/ HTTP/1.1\r\nHost: x")); err != nil {
		t.Fatal(err)
	}
	read()
	if !s.evictAny() || s.count() != 0 {
		t.Error("a connection without a request stays")
	}
}
