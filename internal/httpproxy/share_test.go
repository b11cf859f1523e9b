package httpproxy

import (
	"net"
	"testing"

	"github.com/egress-router/egress-router/internal/limit"
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
	c := &clientConn{TCPConn: near.(*net.TCPConn), from: client(near.(*net.TCPConn)), shares: s}
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
	if _, err := c.TCPConn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if !s.evictAny() || s.count() != 0 {
		t.Error("a connection without a request stays")
	}
}

// Addresses of one IPv6 network are one client.
func TestClientOfIPv6(t *testing.T) {
	for _, test := range []struct {
		a, b string
		same bool
	}{
		{"2001:db8::1", "2001:db8::2:0:0:1", true},
		{"fe80::1", "fe80::2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"::ffff:192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
	} {
		if same := limit.Client(ip(test.a)) == limit.Client(ip(test.b)); same != test.same {
			t.Errorf("%s and %s are one client: %v, want %v", test.a, test.b, same, test.same)
		}
	}
}
