package who

import (
	"fmt"
	"net/netip"

	"golang.org/x/net/dns/dnsmessage"
)

// Names are host names with a final dot, and their IPv4 addresses.
type Names map[string]string

// Answer answers one DNS query (RFC 1035), for [ServeDatagrams].
func (n Names) Answer(question []byte, _ netip.AddrPort) ([]byte, error) {
	var q dnsmessage.Message
	if err := q.Unpack(question); err != nil || len(q.Questions) != 1 {
		return nil, fmt.Errorf("reading a question: %w", err)
	}
	a := dnsmessage.Message{Header: dnsmessage.Header{ID: q.ID, Response: true, RecursionAvailable: true}, Questions: q.Questions}
	addr, known := n[q.Questions[0].Name.String()]
	switch {
	case !known:
		a.RCode = dnsmessage.RCodeNameError
	case q.Questions[0].Type == dnsmessage.TypeA:
		a.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()},
		}}
	}
	return a.Pack()
}
