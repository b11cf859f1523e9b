package resolver

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// ednsSize is the size of UDP answers that queries request (RFC 6891), in bytes:
	// an answer of that size fits into one packet on any link (RFC 9715 section 3.1;
	// 1232 is the value of the DNS flag day 2020).
	ednsSize = 1232
	// ednsPatience is how long a server may be silent before it is queried without
	// EDNS too: some servers and firewalls drop such queries. It is shorter than
	// slowQuery.
	ednsPatience = 400 * time.Millisecond
	// ednsMemory is how long a server is taken for one without EDNS, and for one
	// with it.
	ednsMemory = 10 * time.Minute
	// maxUDP is the size of the largest UDP answer, in bytes, which is more than
	// was requested: some servers ignore that.
	maxUDP = 4 << 10
	// maxRecords is the maximum number of records of an answer that are used, more
	// than those of a name with its aliases. 64 KiB have room for 4,000.
	maxRecords = 2 * maxAddrs
)

// An ednsMap has the name servers of which it is known whether they support EDNS.
type ednsMap struct {
	mu      sync.Mutex
	with    map[string]time.Time // time of the last answer with EDNS
	without map[string]time.Time // time of the first answer without
}

func (e *ednsMap) lacks(server string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Since(e.without[server]) < ednsMemory
}

// answered records that a server has answered a query with EDNS by EDNS.
func (e *ednsMap) answered(server string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.with[server] = time.Now()
}

// plain records that a server has answered only the query without EDNS. Silence is no
// proof if the server has answered with EDNS before: a packet may be lost.
func (e *ednsMap) plain(server string, silent bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !silent || time.Since(e.with[server]) >= ednsMemory {
		e.without[server] = time.Now()
	}
}

// exchange queries one server by UDP, and again by TCP if the answer is truncated
// (RFC 7766).
func (r *Resolver) exchange(ctx context.Context, c *conf, server, name string, qtype uint16) (*dns.Msg, error) {
	q := new(dns.Msg)
	q.SetQuestion(name, qtype)
	m, q, err := r.overUDP(ctx, c, server, q)
	if err == nil && m.Truncated {
		m, err = overTCP(ctx, c, server, q)
	}
	if err != nil {
		if _, refused := errors.AsType[*refusal](err); !refused {
			err = fmt.Errorf("querying name server %s: %w", server, err)
		}
		return nil, err
	}
	switch {
	case m.Truncated:
		return nil, &refusal{server, "truncated answer over TCP"}
	case failed(m):
		return nil, refusalBy(server, m)
	case m.Rcode == dns.RcodeSuccess && len(m.Answer) == 0 && !hasSOA(m) && !m.Authoritative && !m.RecursionAvailable:
		// A lame delegation (RFC 8499). Only a recursive resolver follows a referral.
		return nil, &refusal{server, "referral to other servers"}
	}
	return m, nil
}

func failed(m *dns.Msg) bool { return m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError }

// overUDP queries a server with EDNS, and without if the server does not answer or
// fails, which is how servers react that do not know EDNS (RFC 6891 section 7). It
// returns the answer and the query that it is for.
//
// Each look-up has a socket of its own. A forger of an answer has to guess the port,
// which the kernel chooses for each socket, and the random ID (RFC 5452).
func (r *Resolver) overUDP(ctx context.Context, c *conf, server string, plain *dns.Msg) (*dns.Msg, *dns.Msg, error) {
	var dialer net.Dialer
	socket, err := dialer.DialContext(ctx, "udp", server)
	if err != nil {
		return nil, nil, err
	}
	defer socket.Close()
	// Reading does not watch the context.
	defer context.AfterFunc(ctx, func() { _ = socket.Close() })()
	conn := &dns.Conn{Conn: socket}

	edns := plain.Copy()
	edns.SetEdns0(ednsSize, false)
	for edns.Id == plain.Id {
		edns.Id = dns.Id()
	}
	end := time.Now().Add(c.timeout)
	send := func(q *dns.Msg, limit time.Time) error {
		if err := socket.SetDeadline(limit); err != nil {
			return err
		}
		return conn.WriteMsg(q)
	}
	sentPlain := r.edns.lacks(server)
	if sentPlain {
		err = send(plain, end)
	} else {
		err = send(edns, time.Now().Add(min(ednsPatience, c.timeout/2)))
	}
	sentEDNS := !sentPlain
	var refused error // answer to the query with EDNS
	buf := make([]byte, maxUDP)
	for err == nil {
		var n int
		n, err = conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) && !sentPlain {
			sentPlain, err = true, send(plain, end)
			continue
		}
		if err != nil || n < 2 {
			continue
		}
		switch binary.BigEndian.Uint16(buf) {
		case plain.Id:
			m, err := parse(server, buf[:n], plain)
			if err == nil && !failed(m) && sentEDNS {
				r.edns.plain(server, refused == nil)
			}
			return m, plain, err
		case edns.Id:
			var m *dns.Msg
			if m, refused = parse(server, buf[:n], edns); refused == nil {
				if m.IsEdns0() != nil {
					r.edns.answered(server)
				}
				if !mayLackEDNS(m) {
					return m, edns, nil
				}
				refused = refusalBy(server, m)
			}
			if !sentPlain {
				sentPlain, err = true, send(plain, end)
			}
		}
	}
	if refused != nil {
		err = refused
	}
	return nil, nil, err
}

// mayLackEDNS reports whether an answer to a query with EDNS may be that of a server
// that does not know EDNS. Many answer with other codes than FORMERR.
func mayLackEDNS(m *dns.Msg) bool {
	switch m.Rcode {
	case dns.RcodeFormatError, dns.RcodeNotImplemented, dns.RcodeBadVers:
		return !m.Truncated
	}
	return failed(m) && !m.Truncated && m.IsEdns0() == nil
}

func refusalBy(server string, m *dns.Msg) error {
	return &refusal{server, cmp.Or(dns.RcodeToString[m.Rcode], fmt.Sprintf("RCODE %d", m.Rcode))}
}

// overTCP queries a server by TCP.
func overTCP(ctx context.Context, c *conf, server string, q *dns.Msg) (*dns.Msg, error) {
	dialer := net.Dialer{Timeout: c.timeout}
	socket, err := dialer.DialContext(ctx, "tcp", server)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	defer context.AfterFunc(ctx, func() { _ = socket.Close() })()
	if err := socket.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		return nil, err
	}
	conn := &dns.Conn{Conn: socket}
	q.Id = dns.Id()
	if err := conn.WriteMsg(q); err != nil {
		return nil, err
	}
	raw, err := conn.ReadMsgHeader(nil)
	if err != nil {
		return nil, err
	}
	m, err := parse(server, raw, q)
	if err == nil && len(m.Answer) > maxRecords {
		m.Answer = slices.Clone(m.Answer[:maxRecords])
	}
	return m, err
}

// parse parses an answer to a query. The error is a *refusal: an answer that cannot be
// read, or that has fewer records than its header states, is none.
func parse(server string, raw []byte, q *dns.Msg) (*dns.Msg, error) {
	const header = 12 // octets (RFC 1035 section 4.1.1)
	malformed := &refusal{server, "malformed answer"}
	m := new(dns.Msg)
	err := m.Unpack(raw)
	switch {
	case len(raw) < header || !m.Response || m.Opcode != dns.OpcodeQuery || m.Id != q.Id:
		return nil, malformed
	case m.Truncated: // maybe within a record
		return m, nil
	case len(raw) == header && failed(m): // some servers do not repeat the question
		return m, nil
	case err != nil:
		return nil, malformed
	}
	for i, n := range []int{len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra)} {
		if n != int(binary.BigEndian.Uint16(raw[4+2*i:])) {
			return nil, malformed
		}
	}
	if len(m.Question) == 0 && failed(m) {
		return m, nil
	}
	if len(m.Question) != 1 || !strings.EqualFold(m.Question[0].Name, q.Question[0].Name) || m.Question[0].Qtype != q.Question[0].Qtype {
		return nil, &refusal{server, "answer does not match the question"}
	}
	return m, nil
}
