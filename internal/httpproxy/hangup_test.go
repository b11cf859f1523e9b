package httpproxy

import (
	"net"
	"testing"
)

// The watch of a connection ends with end, whose kernel entry goes too, and does not take the
// number from a later connection.
func TestHangupsEnd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := &Proxy{}
	if err := p.hangups.open(); err != nil {
		t.Fatal(err)
	}
	defer p.hangups.close()
	s := newShares(2, func() bool { return false })
	pair := func() (*clientConn, net.Conn) {
		far, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { far.Close() })
		near, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c, err := newClientConn(p, near.(*net.TCPConn), s)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := p.hangups.add(c); err != nil {
			t.Fatal(err)
		}
		return c, far
	}
	tunnel, client := pair()
	p.hangups.end(tunnel)
	if err := p.hangups.add(tunnel); err != nil {
		t.Errorf("the kernel still watches: %v", err) // EEXIST of epoll_ctl(2)
	}
	p.hangups.end(tunnel)
	client.Close()

	p.hangups.last = tunnel.number - 1 // the numbers begin again
	other, client := pair()
	if other.number != tunnel.number {
		t.Fatalf("number %d, want %d again", other.number, tunnel.number)
	}
	tunnel.Close()
	if p.hangups.conn(other.number) != other {
		t.Error("a connection has taken the number of another one")
	}
	go p.hangups.run()
	client.Close()
	if !await(func() bool { other.mu.Lock(); defer other.mu.Unlock(); return other.gone }) {
		t.Error("the end of the other one was not noticed")
	}
	if tunnel.mu.Lock(); tunnel.gone {
		t.Error("the end of the first one was noticed")
	}
	tunnel.mu.Unlock()
}
