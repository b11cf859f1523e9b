package resolver

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// raw returns a handler that changes the octets of a failure, or of an answer without
// records.
func raw(rcode int, change func([]byte) []byte) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(q, rcode)
		m.RecursionAvailable = true
		b, err := m.Pack()
		if err != nil {
			panic(err)
		}
		_, _ = w.Write(change(b))
	}
}

const header = 12 // octets of a message's header

// claim sets the number of records in a section, from 0 for questions.
func claim(section int, n uint16) func([]byte) []byte {
	return func(b []byte) []byte {
		b[4+2*section], b[5+2*section] = byte(n>>8), byte(n)
		return b
	}
}

// A server that does not answer queries with EDNS, or refuses them in any form, is
// queried without, and then remembered as one.
func TestServersWithoutEDNS(t *testing.T) {
	t.Parallel()
	short := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	bare := func(b []byte) []byte { return claim(0, 0)(b)[:header] }
	for name, refuse := range map[string]func(dns.ResponseWriter, *dns.Msg){
		"silence":                   silence,
		"FORMERR":                   code(dns.RcodeFormatError),
		"FORMERR without question":  raw(dns.RcodeFormatError, bare),
		"FORMERR, truncated":        raw(dns.RcodeFormatError, short(header)),
		"FORMERR, less than header": raw(dns.RcodeFormatError, short(5)),
		"FORMERR within question":   raw(dns.RcodeFormatError, short(header+3)),
		"NOTIMP":                    code(dns.RcodeNotImplemented),
		"BADVERS":                   code(dns.RcodeBadVers),
		"REFUSED":                   code(dns.RcodeRefused),
		"SERVFAIL":                  code(dns.RcodeServerFailure),
		"no question":               raw(dns.RcodeSuccess, bare),
		"records that are not":      raw(dns.RcodeSuccess, claim(1, 1)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t)
			s.set("a.example. 60 IN A 192.0.2.1", "b.example. 60 IN A 192.0.2.2")
			var again atomic.Int64
			s.before(func(w dns.ResponseWriter, q *dns.Msg) bool {
				if q.IsEdns0() == nil {
					return false
				}
				if q.Question[0].Name == "b.example." {
					again.Add(1)
				}
				refuse(w, q)
				return true
			})
			r, _ := newResolver(t, "options timeout:30 attempts:1\n", s)
			want(t, r, "a.example", "192.0.2.1")
			if !r.edns.lacks(s.addr + ":53") {
				t.Error("the server is not remembered")
			}
			want(t, r, "b.example", "192.0.2.2")
			if n := again.Load(); n > 0 {
				t.Errorf("%d queries with EDNS for the next name", n)
			}
		})
	}
}

// A server that knows EDNS is not taken for one without for a lost packet, and any
// server is tried with EDNS again.
func TestEDNSMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := ednsMap{with: map[string]time.Time{}, without: map[string]time.Time{}}
		step := func(what string, want bool) {
			t.Helper()
			if e.lacks("a") != want {
				t.Errorf("%s: lacks EDNS: %t", what, !want)
			}
		}
		step("unknown", false)
		e.plain("a", true)
		step("silent", true)
		time.Sleep(ednsMemory)
		step("a while later", false)
		e.answered("a")
		e.plain("a", true)
		step("silent after an answer", false)
		e.plain("a", false)
		step("refused", true)
		time.Sleep(ednsMemory)
		e.plain("a", true)
		step("silent for a while", true)
	})
}

// An answer that cannot be read is none: the previous addresses stay.
func TestMalformedAnswersKeepTheList(t *testing.T) {
	t.Parallel()
	s := serve(t)
	s.set("a.example. 60 IN A 192.0.2.1")
	r, _ := newResolver(t, "options timeout:1 attempts:1\n", s)
	want(t, r, "a.example", "192.0.2.1")
	record := func(rr string, change func([]byte) []byte) func(dns.ResponseWriter, *dns.Msg) {
		return func(w dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg)
			m.SetReply(q)
			m.RecursionAvailable = true
			parsed, err := dns.NewRR(rr)
			if err != nil {
				panic(err)
			}
			m.Answer = append(m.Answer, parsed)
			b, err := m.Pack()
			if err != nil {
				panic(err)
			}
			_, _ = w.Write(change(b))
		}
	}
	for name, how := range map[string]func(dns.ResponseWriter, *dns.Msg){
		"65,535 records and none": raw(dns.RcodeSuccess, claim(1, 65535)),
		"one record too few":      record("a.example. 60 IN A 192.0.2.9", claim(1, 2)),
		"authority that is not":   raw(dns.RcodeSuccess, claim(2, 1)),
		"questions that are not":  raw(dns.RcodeNameError, claim(0, 2)),
		"a question, no answer":   raw(dns.RcodeSuccess, func(b []byte) []byte { b[2] &^= 0x80; return b }),
		"another operation":       raw(dns.RcodeSuccess, func(b []byte) []byte { b[2] |= 0x20; return b }),
		"no question":             raw(dns.RcodeSuccess, func(b []byte) []byte { return claim(0, 0)(b)[:header] }),
		"no question, no name":    raw(dns.RcodeNameError, func(b []byte) []byte { return claim(0, 0)(b)[:header] }),
		"a cut record":            record("a.example. 60 IN A 192.0.2.9", func(b []byte) []byte { return b[:len(b)-2] }),
		"an empty address": record("a.example. 60 IN A 192.0.2.9", func(b []byte) []byte {
			b = b[:len(b)-4]
			b[len(b)-1] = 0 // length of the data
			return b
		}),
		"another name": record("b.example. 60 IN A 192.0.2.9", func(b []byte) []byte { return b }),
	} {
		s.answer("a.example. A", how)
		r.addrs.expire()
		answer, err := r.Lookup(t.Context(), netip.Addr{}, "a.example")
		if err == nil || fmt.Sprint(answer.Addrs) != "[192.0.2.1]" {
			t.Errorf("%s: %v, %v", name, answer.Addrs, err)
		}
	}
	s.answer("a.example. A", nil)
	r.addrs.expire()
	want(t, r, "a.example", "192.0.2.1")
}
