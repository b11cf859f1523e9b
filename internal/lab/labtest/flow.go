package labtest

import (
	"bufio"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// A Flow is a UDP client that never pauses for long, so that the kernel never
// forgets its connection.
type Flow struct {
	conn net.Conn
	r    *bufio.Reader
}

func (p *Pod) Flow(port uint16) *Flow {
	p.Helper()
	conn, err := p.Lab.Dial(p.Context(), p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = conn.Close() })
	return &Flow{conn, bufio.NewReader(conn)}
}

// Ask sends one datagram and returns the answer to it, an error where there is
// none in time.
func (f *Flow) Ask() (lab.Answer, error) {
	if err := f.conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return lab.Answer{}, err
	}
	if _, err := f.conn.Write([]byte("?\n")); err != nil {
		return lab.Answer{}, err
	}
	return lab.ReadAnswer(f.r)
}

// WantAnswer asks until the answer is the wanted one: datagrams that were on
// their way when the router changed something may be answered late.
func (f *Flow) WantAnswer(p *Pod, what, server, saw string) {
	p.Helper()
	var a lab.Answer
	var err error
	for range 20 {
		if a, err = f.Ask(); err == nil && a.Server.String() == server && a.Peer.Addr().String() == saw {
			return
		}
	}
	p.Errorf("%s: answer %v, error %v; want %s, which sees %s", what, a, err, server, saw)
}
