package httpproxy

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

// Only requests with the same name and the same allowed addresses share connections.
func TestPoolKey(t *testing.T) {
	key := func(host string, addrs ...string) serverKey {
		h, _ := parseHost(host)
		r := route{target: target{host: h}}
		for _, a := range addrs {
			r.addrs = append(r.addrs, netip.MustParseAddr(a))
		}
		return r.serverKey("http")
	}
	if a, b := key("a", "192.0.2.1", "192.0.2.2"), key("a", "192.0.2.2", "192.0.2.1"); a != b {
		t.Errorf("the order counts: %v, %v", a, b)
	}
	seen := map[serverKey]bool{}
	for _, k := range []serverKey{
		key("a", "192.0.2.1"), key("a", "192.0.2.1", "192.0.2.2"), key("b", "192.0.2.1"),
		key("a", "2001:db8::1"), key("192.0.2.1", "192.0.2.1"), key("[2001:db8::1]", "2001:db8::1"),
	} {
		if seen[k] {
			t.Errorf("two destinations have the key %v", k)
		}
		seen[k] = true
	}
}

// The proxy does not connect to itself, whatever the rules.
func TestNoConnectionToItself(t *testing.T) {
	p := start(t, "127.0.0.0/8\n0.0.0.0\n*", zone{"self.example": {"127.0.0.1"}}, nil)
	_, port, err := net.SplitHostPort(p.addr)
	check(t, err)
	for _, host := range []string{"127.0.0.1", "127.1.2.3", "0.0.0.0", "self.example"} {
		target := net.JoinHostPort(host, port)
		for _, request := range []string{"CONNECT " + target, "GET http://" + target + "/"} {
			conn := p.connect(t)
			send(t, conn, request+" HTTP/1.0\r\nHost: "+target+"\r\n\r\n")
			answer, err := io.ReadAll(conn)
			if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.0 403 ")) || !bytes.Contains(answer, []byte(target+" is this proxy itself")) {
				t.Errorf("%s: %q, %v", request, answer, err)
			}
		}
	}
}

// Look-ups of a request are those of its client, and of a name with a final dot without
// the search list. Of the names of an address, only those are looked up that matter.
func TestLookUpOfClient(t *testing.T) {
	asked := &askedZone{zone: zone{"search": {"corp.test"}, "203.0.113.1": {"one.example", "one.test"}, "a.corp.test": {"203.0.113.1"}}}
	p := start(t, "*.example\n*", nil, func(p *Proxy) { p.resolver = asked })
	server := serve(t, func(*net.TCPConn) {})
	_, port, err := net.SplitHostPort(server)
	check(t, err)
	for _, host := range []string{"a", "a.", "203.0.113.1"} {
		conn := p.connect(t)
		send(t, conn, "CONNECT "+host+":"+port+" HTTP/1.1\r\nHost: x\r\n\r\n")
		_, err := io.ReadAll(conn)
		check(t, err)
	}
	asked.mu.Lock()
	defer asked.mu.Unlock()
	if got, want := strings.Join(asked.list, " "), "a a. 203.0.113.1 one.example."; got != want || asked.client != ip("127.0.0.1") {
		t.Errorf("look-ups %q by %s, want %q by 127.0.0.1", got, asked.client, want)
	}
}

// A look-up that ended in favour of others of its client does not make an address count
// as one without a name for all clients.
func TestOverloadIsNoSilence(t *testing.T) {
	a := ip("203.0.113.9")
	p := start(t, "*.example", nil, func(p *Proxy) { p.resolver = overloadedZone{} })
	conn := p.connect(t)
	send(t, conn, "CONNECT "+a.String()+":80 HTTP/1.1\r\nHost: x\r\n\r\n")
	if answer, err := io.ReadAll(conn); !bytes.HasPrefix(answer, []byte("HTTP/1.1 403 ")) || err != nil {
		t.Errorf("%q, %v", answer, err)
	}
	if p.unnamed.has(a) {
		t.Error("the address counts as one without a name")
	}
}

type overloadedZone struct{ zone }

func (overloadedZone) LookupNames(context.Context, netip.Addr, netip.Addr) ([]string, error) {
	return nil, overloadError{}
}

type overloadError struct{}

func (overloadError) Error() string    { return "too many look-ups" }
func (overloadError) Timeout() bool    { return true }
func (overloadError) Temporary() bool  { return true }
func (overloadError) Overloaded() bool { return true }

// An askedZone records its look-ups.
type askedZone struct {
	zone
	mu     sync.Mutex
	list   []string
	client netip.Addr
}

func (z *askedZone) LookupAddr(ctx context.Context, client netip.Addr, host string) ([]netip.Addr, string, error) {
	z.ask(client, host)
	return z.zone.LookupAddr(ctx, client, host)
}

func (z *askedZone) LookupNames(ctx context.Context, client, a netip.Addr) ([]string, error) {
	z.ask(client, a.String())
	return z.zone.LookupNames(ctx, client, a)
}

func (z *askedZone) ask(client netip.Addr, what string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.list, z.client = append(z.list, what), client
}
