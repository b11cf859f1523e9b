package resolver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// Answers are valid for their TTL, within bounds, and the smallest TTL of a chain counts.
func TestAnswers(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set(
		"plain.example. 60 IN A 192.0.2.1",
		"plain.example. 60 IN A 192.0.2.2",
		"both.example. 60 IN AAAA 2001:db8::1",
		"both.example. 30 IN A 192.0.2.3",
		"six.example. 60 IN AAAA 2001:db8::2",
		"zero.example. 0 IN A 192.0.2.4",
		"long.example. 86400 IN A 192.0.2.5",
		"alias.example. 60 IN CNAME middle.example.",
		"middle.example. 20 IN CNAME plain.example.",
		"dangling.example. 60 IN CNAME nowhere.example.",
		"loop.example. 60 IN CNAME pool.example.",
		"pool.example. 60 IN CNAME loop.example.",
		"text.example. 60 IN TXT hello",
		"UPPER.example. 60 IN A 192.0.2.6",
	)
	s.answer("upper.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		q.Question[0].Name = "UPPER.example."
		s.ServeDNS(w, q)
	})
	r, _ := newResolver(t, "", s)

	wantExpires(t, want(t, r, "plain.example", "192.0.2.1", "192.0.2.2"), time.Minute)
	wantExpires(t, want(t, r, "both.example", "192.0.2.3", "2001:db8::1"), 30*time.Second)
	want(t, r, "six.example", "2001:db8::2")
	wantExpires(t, want(t, r, "zero.example", "192.0.2.4"), MinTTL)
	wantExpires(t, want(t, r, "long.example", "192.0.2.5"), MaxTTL)
	wantExpires(t, want(t, r, "alias.example", "192.0.2.1", "192.0.2.2"), 20*time.Second)
	want(t, r, "dangling.example", ErrNoName)
	want(t, r, "loop.example", ErrNoAnswer)
	want(t, r, "text.example", ErrNoAddress)
	want(t, r, "missing.example", ErrNoName)
	want(t, r, "Upper.Example.", "192.0.2.6")
	for _, host := range []string{"", ".", "a b", "a..b", "ü.example", `a\.b`, strings.Repeat("a.", 150)} {
		want(t, r, host, ErrNoName)
	}
	want(t, r, "198.51.100.7", "198.51.100.7")
	want(t, r, "::ffff:198.51.100.7", "198.51.100.7")

	begin := time.Now()
	r.addrs.expire()
	want(t, r, "plain.example", "192.0.2.1", "192.0.2.2")
	want(t, r, "missing.example", ErrNoName)
	s.queries()
	want(t, r, "PLAIN.example", "192.0.2.1", "192.0.2.2")
	want(t, r, "missing.example", ErrNoName)
	// The first AAAA query for the missing name may be late.
	late := func(q string) bool { return q == "missing.example. AAAA udp" }
	if q := slices.DeleteFunc(s.queries(), late); len(q) > 0 && time.Since(begin) < MaxNegativeTTL {
		t.Errorf("queries within the TTL: %v", q)
	}
	if _, _, err := r.LookupAddr(t.Context(), netip.Addr{}, "missing.example"); err.Error() != `looking up "missing.example": no such name` {
		t.Error(err)
	}
}

// An answer follows each change: other addresses, fewer, none, no name.
func TestChanges(t *testing.T) {
	t.Parallel()
	s := serve(t)
	r, _ := newResolver(t, "", s)
	s.set("a.example. 0 IN A 192.0.2.1", "a.example. 0 IN A 192.0.2.2")
	want(t, r, "a.example", "192.0.2.1", "192.0.2.2")
	for _, step := range []struct {
		records []string
		want    []any
	}{
		{[]string{"a.example. 60 IN A 192.0.2.2"}, []any{"192.0.2.2"}},
		{[]string{"a.example. 60 IN A 192.0.2.8", "a.example. 60 IN A 192.0.2.9"}, []any{"192.0.2.8", "192.0.2.9"}},
		{[]string{"a.example. 60 IN TXT gone"}, []any{ErrNoAddress}},
		{nil, []any{ErrNoName}},
		{[]string{"a.example. 60 IN A 192.0.2.1"}, []any{"192.0.2.1"}},
	} {
		s.set(step.records...)
		r.addrs.expire()
		if a := want(t, r, "a.example", step.want...); len(step.records) == 0 && len(a.Addrs) > 0 {
			t.Errorf("removed name has the addresses %v", a.Addrs)
		}
	}
	// Also after the TTL.
	s.set("a.example. 0 IN A 192.0.2.1")
	r.addrs.expire()
	want(t, r, "a.example", "192.0.2.1")
	s.set("a.example. 0 IN A 192.0.2.2")
	time.Sleep(MinTTL + 50*time.Millisecond)
	want(t, r, "a.example", "192.0.2.2")
}

// If the name servers do not answer, Lookup returns the old answer beside the error.
func TestStale(t *testing.T) {
	t.Parallel()
	s := serve(t)
	r, _ := newResolver(t, "options timeout:1 attempts:1\n", s)
	s.set("a.example. 60 IN A 192.0.2.1")
	want(t, r, "a.example", "192.0.2.1")
	want(t, r, "b.example", ErrNoName)
	for name, how := range map[string]func(dns.ResponseWriter, *dns.Msg){
		"silent": silence, "failing": code(dns.RcodeServerFailure), "refusing": code(dns.RcodeRefused),
	} {
		s.answer("a.example.", how)
		s.answer("b.example.", how)
		r.addrs.expire()
		var both sync.WaitGroup
		both.Go(func() {
			if b := want(t, r, "b.example", ErrNoAnswer); len(b.Addrs) > 0 {
				t.Errorf("%s servers: %v", name, b.Addrs)
			}
		})
		a := want(t, r, "a.example", ErrNoAnswer)
		both.Wait()
		if len(a.Addrs) != 1 || a.Addrs[0] != netip.MustParseAddr("192.0.2.1") {
			t.Errorf("%s servers: the old answer is %v", name, a.Addrs)
		}
		if _, _, err := r.LookupAddr(t.Context(), netip.Addr{}, "a.example"); err == nil {
			t.Errorf("%s servers: LookupAddr returns an old answer", name)
		}
	}
	s.answer("a.example.", nil)
	r.addrs.expire()
	want(t, r, "a.example", "192.0.2.1")

	r, _ = newResolver(t, "options timeout:30\n", s)
	want(t, r, "a.example", "192.0.2.1")
	s.answer("a.example.", silence)
	r.addrs.expire()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if a, err := r.Lookup(ctx, netip.Addr{}, "a.example"); !errors.Is(err, context.DeadlineExceeded) || len(a.Addrs) != 1 {
		t.Errorf("with too little time: %v, %v", a.Addrs, err)
	}
}

// Of a name with thousands of addresses, and an address with thousands of names, the
// first are used, with a warning that clients cannot multiply.
func TestTooManyRecords(t *testing.T) {
	t.Parallel()
	s := serve(t)
	var lines []string
	for i := range 3000 {
		lines = append(lines, fmt.Sprintf("a.example. 60 IN A 192.0.%d.%d", i/250, i%250), fmt.Sprintf("1.2.0.192.in-addr.arpa. 60 IN PTR n%d.example.", i))
	}
	s.set(append(lines, "b.example. 60 IN A 192.0.2.1")...)
	var log bytes.Buffer // written before the answer returns
	_, f := newResolver(t, "", s)
	r := New(Options{Hosts: filepath.Join(f.dir, "hosts"), ResolvConf: filepath.Join(f.dir, "resolv.conf"), Log: slog.New(slog.NewTextHandler(&log, nil))})
	addrs, _, err := r.LookupAddr(t.Context(), netip.Addr{}, "a.example")
	if len(addrs) != maxAddrs || err != nil {
		t.Errorf("%d addresses, %v", len(addrs), err)
	}
	if want := "level=WARN msg=\"too many records\" name=a.example. used=256\n"; !strings.HasSuffix(log.String(), want) {
		t.Errorf("log %q, want %q", &log, want)
	}
	log.Reset()
	names, err := r.LookupNames(t.Context(), netip.Addr{}, netip.MustParseAddr("192.0.2.1"))
	if len(names) != maxNames || err != nil {
		t.Errorf("%d names, %v", len(names), err)
	}
	if log.Len() > 0 {
		t.Errorf("a second warning: %s", &log)
	}
	want(t, r, "b.example", "192.0.2.1")
}

// A truncated answer is queried again by TCP.
func TestTruncated(t *testing.T) {
	t.Parallel()
	s := serve(t)
	var lines []string
	var wanted []any
	for i := range 200 {
		lines = append(lines, fmt.Sprintf("big.example. 60 IN A 192.0.2.%d", i))
		wanted = append(wanted, fmt.Sprintf("192.0.2.%d", i))
	}
	s.set(lines...)
	r, _ := newResolver(t, "", s)
	asked := queriesOf(t, s, r, "big.example", func() { want(t, r, "big.example", wanted...) })
	if diff := cmp.Diff([]string{"big.example. A tcp", "big.example. A udp", "big.example. AAAA udp"}, asked); diff != "" {
		t.Error(diff)
	}
	// 60 addresses fit, thanks to EDNS.
	s.set(lines[:60]...)
	asked = queriesOf(t, s, r, "big.example", func() { want(t, r, "big.example", wanted[:60]...) })
	if diff := cmp.Diff([]string{"big.example. A udp", "big.example. AAAA udp"}, asked); diff != "" {
		t.Error(diff)
	}
}

// Servers without EDNS, without recursion, and with answers to other questions.
func TestOddServers(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set("old.example. 60 IN A 192.0.2.1", "end.example. 60 IN A 192.0.2.2")
	s.answer("old.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(q, dns.RcodeFormatError)
		if q.IsEdns0() == nil {
			m.SetReply(q)
			if rr, err := dns.NewRR("old.example. 60 IN A 192.0.2.1"); err == nil && q.Question[0].Qtype == dns.TypeA {
				m.Answer = append(m.Answer, rr)
			}
			m.RecursionAvailable = true
		}
		_ = w.WriteMsg(m)
	})
	s.answer("alias.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		if rr, err := dns.NewRR("alias.example. 7 IN CNAME end.example."); err == nil {
			m.Answer = append(m.Answer, rr)
		}
		_ = w.WriteMsg(m)
	})
	s.answer("other.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		q.Question[0].Name = "end.example."
		s.ServeDNS(w, q)
	})
	s.answer("referral.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		_ = w.WriteMsg(m)
	})
	r, _ := newResolver(t, "", s)
	want(t, r, "old.example", "192.0.2.1")
	wantExpires(t, want(t, r, "alias.example", "192.0.2.2"), 7*time.Second)
	want(t, r, "other.example", ErrNoAnswer)
	want(t, r, "referral.example", ErrNoAnswer)
}

// A failure of one record type does not delay the other; IPv6 addresses alone are no
// answer if the IPv4 ones are unknown.
func TestOneKindFails(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set("a.example. 60 IN A 192.0.2.1", "a.example. 60 IN AAAA 2001:db8::1",
		"b.example. 60 IN A 192.0.2.2", "c.example. 60 IN AAAA 2001:db8::3", "e.example. 60 IN A 192.0.2.5")
	s.answer("a.example. AAAA", silence)
	s.answer("b.example. AAAA", code(dns.RcodeNameError))
	s.answer("c.example. A", code(dns.RcodeServerFailure))
	s.answer("d.example. AAAA", silence)
	s.answer("e.example. AAAA", code(dns.RcodeServerFailure))
	// A resolver that waits for AAAA records does so for longer than the test does.
	r, _ := newResolver(t, "options timeout:30 attempts:5\n", s)
	want(t, r, "a.example", "192.0.2.1")
	want(t, r, "b.example", "192.0.2.2")
	want(t, r, "c.example", ErrNoAnswer)
	want(t, r, "d.example", ErrNoName)
	want(t, r, "e.example", "192.0.2.5")
	for name, only := range map[string]bool{"a.example": true, "b.example": false, "e.example": true} { // from the cache
		if answer, err := r.Lookup(t.Context(), netip.Addr{}, name); err != nil || answer.OnlyIPv4 != only {
			t.Errorf("%s: %+v, error %v; want OnlyIPv4 %v", name, answer, err, only)
		}
	}

	// For a caller that reaches both families they are an answer.
	r.either = true
	r.addrs.expire()
	want(t, r, "a.example", "192.0.2.1")
	want(t, r, "c.example", "2001:db8::3")
	want(t, r, "d.example", ErrNoName)
	for name, only := range map[string]bool{"a.example": false, "c.example": true} {
		if answer, err := r.Lookup(t.Context(), netip.Addr{}, name); err != nil || answer.OnlyIPv6 != only {
			t.Errorf("either family, %s: %+v, error %v; want OnlyIPv6 %v", name, answer, err, only)
		} else if left := time.Until(answer.Expires); left > MaxNegativeTTL {
			t.Errorf("either family, %s: the other one is asked for again after %v", name, left)
		}
	}
}

// If a server does not answer or fails, the next one is queried.
func TestServers(t *testing.T) {
	t.Parallel()
	first, second := serve(t), serve(t)
	for _, s := range []*server{first, second} {
		s.set("a.example. 60 IN A 192.0.2.1", "b.example. 60 IN A 192.0.2.2", "c.example. 60 IN A 192.0.2.3", "d.example. 60 IN A 192.0.2.4")
	}
	first.answer("a.example.", code(dns.RcodeServerFailure))
	first.answer("b.example.", silence)
	r, _ := newResolver(t, "options timeout:1\n", first, second)
	want(t, r, "a.example", "192.0.2.1")
	want(t, r, "b.example", "192.0.2.2")
	if q := queriesOf(t, second, r, "c.example", func() { want(t, r, "c.example", "192.0.2.3") }); len(q) > 0 {
		t.Errorf("needless queries to the second server: %v", q)
	}

	// A server that does not exist.
	absent := &server{addr: "127.9.9.9"}
	r, _ = newResolver(t, "", absent, second)
	want(t, r, "a.example", "192.0.2.1")
	r, _ = newResolver(t, "", absent)
	want(t, r, "a.example", ErrNoAnswer)

	// In turn.
	r, _ = newResolver(t, "options rotate\n", first, second)
	for {
		r.addrs.expire()
		first.queries()
		second.queries()
		begin := time.Now()
		for _, host := range []string{"c.example", "d.example"} {
			if _, err := r.Lookup(t.Context(), netip.Addr{}, host); err != nil {
				t.Error(err)
			}
		}
		if time.Since(begin) >= ednsPatience {
			continue // the resolver may have repeated a query without EDNS
		}
		if a, b := first.queries(), second.queries(); len(a) != 2 || len(b) != 2 {
			t.Errorf("not in turn: %v and %v", a, b)
		}
		break
	}
}

func TestSearchList(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set(
		"web.ns.cluster. 60 IN A 192.0.2.1",
		"web.cluster. 60 IN A 192.0.2.2",
		"db.cluster. 60 IN A 192.0.2.3",
		"www.example.com. 60 IN A 192.0.2.4",
		"www.example.com.ns.cluster. 60 IN A 192.0.2.5",
		"deep.sub.ns.cluster. 60 IN A 192.0.2.6",
		"nodata.ns.cluster. 60 IN TXT x",
		"single. 60 IN A 192.0.2.7",
	)
	s.answer("failing.ns.cluster.", code(dns.RcodeServerFailure))
	s.answer("failing.cluster.", func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.RecursionAvailable = true
		if rr, err := dns.NewRR("failing.cluster. 60 IN A 192.0.2.8"); err == nil && q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, rr)
		}
		_ = w.WriteMsg(m)
	})
	s.answer("down.example.com.", code(dns.RcodeServerFailure))
	const list = "search ns.cluster cluster.\n"
	r, _ := newResolver(t, list, s)
	want(t, r, "web", "192.0.2.1")
	want(t, r, "db", "192.0.2.3")
	want(t, r, "single", "192.0.2.7")
	want(t, r, "web.", ErrNoName)
	want(t, r, "www.example.com", "192.0.2.4")
	want(t, r, "deep.sub", "192.0.2.6") // the name as it is does not exist
	want(t, r, "nodata", ErrNoAddress)
	want(t, r, "absent", ErrNoName)
	want(t, r, "failing", "192.0.2.8")
	want(t, r, "down.example.com", ErrNoAnswer)
	if q := of("down.example.com", s.queries()); slices.ContainsFunc(q, func(s string) bool { return strings.Contains(s, "cluster") }) {
		t.Errorf("queries below other domains for a name whose servers fail: %v", q)
	}

	// With the option of Kubernetes, a name with a dot is still looked up as it is
	// first, and alone if it exists.
	r, f := newResolver(t, list+"options ndots:5\n", s)
	if asked := queriesOf(t, s, r, "www.example.com", func() { want(t, r, "www.example.com", "192.0.2.4") }); len(asked) != 2 {
		t.Errorf("queries for a name that exists as it is: %v", asked)
	}
	want(t, r, "www.example.com.", "192.0.2.4")
	want(t, r, "gone.example.com", ErrNoName)
	want(t, r, "deep.sub.", ErrNoName)

	// The names whose addresses a look-up may return, and the one of which it does.
	f.write("hosts", "192.0.2.9 known\n")
	await(t, r, "known", "192.0.2.9")
	for host, test := range map[string]struct{ full, found string }{
		"WEB":             {"web.ns.cluster web.cluster web", "web.ns.cluster"},
		"db":              {"db.ns.cluster db.cluster db", "db.cluster"},
		"single.":         {"single", "single"},
		"deep.sub":        {"deep.sub deep.sub.ns.cluster deep.sub.cluster", "deep.sub.ns.cluster"},
		"www.example.com": {"www.example.com www.example.com.ns.cluster www.example.com.cluster", "www.example.com"},
		"Known":           {"known", "known"},
	} {
		if full := strings.Join(r.FullNames(host), " "); full != test.full {
			t.Errorf("names of %s: %s", host, full)
		}
		if _, found, err := r.LookupAddr(t.Context(), netip.Addr{}, host); err != nil || found != test.found {
			t.Errorf("%s was found as %q, %v", host, found, err)
		}
	}
	asked := queriesOf(t, s, r, "single", func() { want(t, r, "single", "192.0.2.7") })
	// The AAAA query for a name that does not exist is cancelled, maybe before it is
	// sent.
	asked = slices.DeleteFunc(asked, func(q string) bool { return strings.HasSuffix(q, "cluster. AAAA udp") })
	if diff := cmp.Diff([]string{"single. A udp", "single. AAAA udp", "single.cluster. A udp", "single.ns.cluster. A udp"}, asked); diff != "" {
		t.Error(diff)
	}
}

// Concurrent look-ups of a name share one query, also if the first of them ends early.
func TestShared(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set("a.example. 60 IN A 192.0.2.1")
	release := make(chan struct{})
	s.answer("a.example.", func(w dns.ResponseWriter, q *dns.Msg) {
		<-release
		s.answer("a.example.", nil)
		s.ServeDNS(w, q)
	})
	r, _ := newResolver(t, "", s)
	impatient, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Lookup(impatient, netip.Addr{}, "a.example"); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { want(t, r, "a.example", "192.0.2.1") })
	}
	close(release)
	all.Wait()
	distinct := slices.Compact(s.queries())
	if diff := cmp.Diff([]string{"a.example. A udp", "a.example. AAAA udp"}, distinct); diff != "" {
		t.Error(diff)
	}
}

// Changes of both files are followed.
func TestFiles(t *testing.T) {
	t.Parallel()
	s, other := serve(t), serve(t)
	s.set("a.example. 300 IN A 192.0.2.1", "b.example. 300 IN A 192.0.2.2")
	other.set("a.example. 300 IN A 192.0.2.3", "b.example. 300 IN A 192.0.2.4")
	r, f := newResolver(t, "", s)
	want(t, r, "localhost", "127.0.0.1")
	want(t, r, "a.example", "192.0.2.1")
	want(t, r, "b.example", "192.0.2.2")

	f.write("hosts", "192.0.2.8 A.example # mine\n2001:db8::8 a.example\n192.0.2.9 a.example x\nnonsense a.example\n")
	f.write("resolv.conf", "nameserver "+other.addr+"\n")
	await(t, r, "a.example", "192.0.2.8")
	await(t, r, "b.example", "192.0.2.4")
	wantExpires(t, want(t, r, "a.example.", "192.0.2.8", "192.0.2.9", "2001:db8::8"), checkEvery)

	f.write("hosts", "")
	await(t, r, "a.example", "192.0.2.3")
}

// await waits until a host's first address is the expected one.
func await(t *testing.T, r *Resolver, host, want string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		a, err := r.Lookup(t.Context(), netip.Addr{}, host)
		if err == nil && a.Addrs[0] == netip.MustParseAddr(want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still %v, %v; want %s", host, a.Addrs, err, want)
		}
	}
}

func TestLookupNames(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set(
		"1.2.0.192.in-addr.arpa. 60 IN PTR one.example.",
		"1.2.0.192.in-addr.arpa. 60 IN PTR uno.example.",
		"2.2.0.192.in-addr.arpa. 60 IN CNAME 2.0-31.2.0.192.in-addr.arpa.", // RFC 2317
		"2.0-31.2.0.192.in-addr.arpa. 60 IN PTR two.example.",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. 60 IN PTR six.example.",
		"5.2.0.192.in-addr.arpa. 60 IN TXT x",
	)
	s.answer("4.2.0.192.in-addr.arpa.", code(dns.RcodeServerFailure))
	r, f := newResolver(t, "", s)
	f.write("hosts", "192.0.2.9 nine.example nine\n::ffff:192.0.2.9 neuf.example\n")
	for addr, want := range map[string][]string{
		"192.0.2.1":        {"one.example", "uno.example"},
		"192.0.2.2":        {"two.example"},
		"2001:db8::1":      {"six.example"},
		"192.0.2.9":        {"nine.example", "nine", "neuf.example"},
		"::ffff:192.0.2.1": {"one.example", "uno.example"},
	} {
		if got, err := r.LookupNames(t.Context(), netip.Addr{}, netip.MustParseAddr(addr)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v; want %q", addr, got, err, want)
		}
	}
	for addr, want := range map[string]error{"192.0.2.3": ErrNoName, "192.0.2.5": ErrNoName, "192.0.2.4": ErrNoAnswer} {
		if got, err := r.LookupNames(t.Context(), netip.Addr{}, netip.MustParseAddr(addr)); !errors.Is(err, want) {
			t.Errorf("%s: %q, %v; want %v", addr, got, err, want)
		}
	}
}

// Errors convert to the standard library's, with the reason without the name, and
// whether it is a timeout.
func TestDNSError(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set("text.example. 60 IN TXT x")
	s.answer("failing.example.", code(dns.RcodeServerFailure))
	s.answer("silent.example.", silence)
	brief, _ := newResolver(t, "options timeout:1 attempts:1\n", s)
	patient, _ := newResolver(t, "options timeout:30 attempts:1\n", s)
	for host, want := range map[string]net.DNSError{
		"gone.example":    {Err: "no such name", IsNotFound: true},
		"text.example":    {Err: "no address records", IsNotFound: true},
		"failing.example": {Err: "no answer from the name servers: name server " + s.addr + ":53: SERVFAIL"},
		"silent.example":  {Err: "no answer from the name servers: querying name server " + s.addr + ":53: ", IsTimeout: true},
	} {
		r := patient
		if want.IsTimeout {
			r = brief
		}
		_, _, err := r.LookupAddr(t.Context(), netip.Addr{}, host)
		got, ok := errors.AsType[*net.DNSError](fmt.Errorf("wrapped: %w", err))
		if !ok || !strings.HasPrefix(got.Err, want.Err) || strings.TrimSuffix(got.Name, ".") != host ||
			got.IsNotFound != want.IsNotFound || got.IsTimeout != want.IsTimeout || !errors.Is(got, err) {
			t.Errorf("%s: %+v of %v, want %+v", host, got, err, want)
		}
		var timeout net.Error
		if is := errors.As(err, &timeout) && timeout.Timeout(); is != want.IsTimeout {
			t.Errorf("%s: timeout %v, want %v", host, is, want.IsTimeout)
		}
	}
}
