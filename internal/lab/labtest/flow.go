package labtest

import (
	"bufio"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// Silence is how long a test waits for an answer that must not come. A wrong answer
// that takes longer, on a busy machine, is found by the other runs.
const Silence = 300 * time.Millisecond

// A Flow is a UDP client with one local port, and so one connection of the kernel.
type Flow struct {
	p       *Pod
	conn    net.Conn
	r       *bufio.Reader
	waiting int // questions without an answer so far
}

// Flow opens a flow from the client to a port of the pod.
func (p *Pod) Flow(port uint16) *Flow {
	p.Helper()
	conn := p.Dial(p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, port))
	return &Flow{p: p, conn: conn, r: bufio.NewReader(conn)}
}

// Ask sends one datagram and returns the answer to it.
func (f *Flow) Ask() lab.Answer {
	f.p.Helper()
	a, err := f.ask(Patience)
	if err != nil {
		f.p.Fatal(err)
	}
	return a
}

// Try sends one datagram and returns the answer, or an error if there is none
// within Silence.
func (f *Flow) Try() (lab.Answer, error) { return f.ask(Silence) }

func (f *Flow) ask(patience time.Duration) (lab.Answer, error) {
	if _, err := f.conn.Write([]byte("?\n")); err != nil {
		return lab.Answer{}, err
	}
	f.waiting++
	return f.read(patience)
}

func (f *Flow) read(patience time.Duration) (lab.Answer, error) {
	if err := f.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return lab.Answer{}, err
	}
	a, err := lab.ReadAnswer(f.r)
	if err == nil {
		f.waiting--
	}
	return a, err
}

// WantAnswer asks until the answer is the expected one: datagrams that were under way
// when the router changed something may be answered late. It then reads the answers to
// all questions, so that none is taken for the answer to a later one.
func (f *Flow) WantAnswer(what, server, saw string) {
	f.p.Helper()
	var a lab.Answer
	var err error
	right := func() bool { return err == nil && a.Server.String() == server && a.Peer.Addr().String() == saw }
	for begin := time.Now(); !right(); a, err = f.Try() {
		if time.Since(begin) > Patience {
			f.p.Errorf("%s: answer %v, error %v; want %s, which sees %s", what, a, err, server, saw)
			return
		}
	}
	for late := error(nil); late == nil && f.waiting > 0; {
		_, late = f.read(5 * Silence) // the router has dropped the others
	}
	f.waiting = 0
}
