package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// limit is how long a test waits for an event, which a busy machine may delay.
const limit = 10 * time.Minute

// A server is a name server for tests, on an address of its own of the loopback
// link, port 53, by UDP and TCP.
type server struct {
	t    *testing.T
	addr string

	mu      sync.Mutex
	records []dns.RR
	broken  map[string]func(w dns.ResponseWriter, q *dns.Msg) // in place of records, by name
	unknown func(w dns.ResponseWriter, q *dns.Msg)            // in place of NXDOMAIN; may be nil
	first   func(w dns.ResponseWriter, q *dns.Msg) bool       // before all others, unless it returns false; may be nil
	asked   []string                                          // "name TYPE network"
}

// lastServer counts servers, to give each its own address.
var lastServer atomic.Uint32

func serve(t *testing.T) *server {
	t.Helper()
	n := lastServer.Add(1)
	s := &server{t: t, addr: fmt.Sprintf("127.0.%d.%d", 1+n/200, 1+n%200), broken: map[string]func(dns.ResponseWriter, *dns.Msg){}}
	socket, err := net.ListenPacket("udp", s.addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", s.addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []*dns.Server{{PacketConn: socket, Handler: s}, {Listener: listener, Handler: s}} {
		started := make(chan struct{})
		d.NotifyStartedFunc = func() { close(started) }
		go func() { _ = d.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = d.Shutdown() })
	}
	return s
}

// set replaces all records by the lines of a zone file.
func (s *server) set(lines ...string) {
	s.t.Helper()
	var records []dns.RR
	for _, line := range lines {
		rr, err := dns.NewRR(line)
		if err != nil {
			s.t.Fatal(err)
		}
		records = append(records, rr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = records
}

// answer sets the handler of a name, or "name TYPE", in place of its records; nil
// removes it.
func (s *server) answer(name string, how func(dns.ResponseWriter, *dns.Msg)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken[name] = how
}

// otherwise sets the handler of all names without records.
func (s *server) otherwise(how func(dns.ResponseWriter, *dns.Msg)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unknown = how
}

// before sets a handler of all queries, except those for which it returns false.
func (s *server) before(how func(dns.ResponseWriter, *dns.Msg) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.first = how
}

// Handlers without an answer.
func silence(dns.ResponseWriter, *dns.Msg) {}

func code(rcode int) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(q, rcode)
		_ = w.WriteMsg(m)
	}
}

func (s *server) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	name, qtype := q.Question[0].Name, q.Question[0].Qtype
	s.mu.Lock()
	s.asked = append(s.asked, fmt.Sprintf("%s %s %s", name, dns.TypeToString[qtype], w.RemoteAddr().Network()))
	how := s.broken[name]
	if how == nil {
		how = s.broken[fmt.Sprintf("%s %s", name, dns.TypeToString[qtype])]
	}
	records, first := s.records, s.first
	if how == nil && !slices.ContainsFunc(records, func(rr dns.RR) bool { return rr.Header().Name == name }) {
		how = s.unknown
	}
	s.mu.Unlock()
	if first != nil && first(w, q) {
		return
	}
	if how != nil {
		how(w, q)
		return
	}
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable, m.Compress = true, true
	known := false
	for range 20 {
		next := ""
		for _, rr := range records {
			if rr.Header().Name != name {
				continue
			}
			known = true
			alias, isAlias := rr.(*dns.CNAME)
			if isAlias {
				next = alias.Target
			}
			if isAlias || rr.Header().Rrtype == qtype {
				m.Answer = append(m.Answer, rr)
			}
		}
		if next == "" {
			break
		}
		name = next
	}
	if len(m.Answer) == 0 {
		soa, _ := dns.NewRR("example. 60 IN SOA ns.example. admin.example. 1 2 3 4 60")
		m.Ns = append(m.Ns, soa)
		if !known {
			m.Rcode = dns.RcodeNameError
		}
	}
	if w.RemoteAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
		}
		m.Truncate(size)
	}
	_ = w.WriteMsg(m)
}

// queries returns the queries since the last call, sorted.
func (s *server) queries() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	slices.Sort(asked)
	return asked
}

// files is the directory of a resolver's files.
type files struct {
	t   *testing.T
	dir string
}

// newResolver returns a resolver that queries the servers, and its files.
func newResolver(t *testing.T, options string, servers ...*server) (*Resolver, files) {
	t.Helper()
	f := files{t, t.TempDir()}
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s.addr)
	}
	f.write("resolv.conf", b.String()+options)
	f.write("hosts", "127.0.0.1 localhost\n")
	return New(Options{Hosts: filepath.Join(f.dir, "hosts"), ResolvConf: filepath.Join(f.dir, "resolv.conf")}), f
}

// write replaces a file atomically, as the kubelet does.
func (f files) write(name, text string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		f.t.Fatal(err)
	}
}

// A found is an answer and when it was looked up.
type found struct {
	Answer
	begin, end time.Time
}

// want looks a host up and checks the addresses, or the kind of error.
func want(t *testing.T, r *Resolver, host string, addrs ...any) found {
	t.Helper()
	return wantOf(t, r, netip.Addr{}, host, addrs...)
}

// wantOf is want for a client.
func wantOf(t *testing.T, r *Resolver, client netip.Addr, host string, addrs ...any) found {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	kind, _ := addrs[0].(error)
	var wanted []netip.Addr
	for _, a := range addrs {
		if a, ok := a.(string); ok {
			wanted = append(wanted, netip.MustParseAddr(a))
		}
	}
	for {
		begin := time.Now()
		answer, err := r.Lookup(ctx, client, host)
		a := found{answer, begin, time.Now()}
		if kind != nil && errors.Is(err, kind) || kind == nil && err == nil && slices.Equal(answer.Addrs, wanted) {
			return a
		}
		if a.end.Sub(begin) < patience || ctx.Err() != nil {
			t.Errorf("%s: %v, %v; want %v", host, answer.Addrs, err, addrs)
			return a
		}
		// The machine is so slow that the resolver has given up AAAA records, or a
		// server.
		r.addrs.expire()
	}
}

// wantExpires checks for how long an answer holds.
func wantExpires(t *testing.T, a found, ttl time.Duration) {
	t.Helper()
	if least, most := a.Expires.Sub(a.end), a.Expires.Sub(a.begin); least > ttl || most < ttl {
		t.Errorf("the answer is cached for %s to %s, want %s", least, most, ttl)
	}
}

// of returns the queries for a name, and for that name below other domains. A query of
// another look-up that nobody waited for may arrive at any time.
func of(name string, queries []string) []string {
	return slices.DeleteFunc(queries, func(q string) bool { return !strings.HasPrefix(q, name+".") })
}

// queriesOf returns the distinct queries of a look-up of a name to the server, sorted. It
// repeats a look-up that takes so long that the resolver may have given up a part of it.
func queriesOf(t *testing.T, s *server, r *Resolver, name string, lookUp func()) []string {
	t.Helper()
	for {
		r.addrs.expire()
		s.queries()
		begin := time.Now()
		lookUp()
		if asked := of(name, s.queries()); time.Since(begin) < patience || t.Failed() {
			return slices.Compact(asked)
		}
	}
}
