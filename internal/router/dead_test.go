package router_test

import (
	"bufio"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// accept starts a listener in the outside and returns a function that returns its
// next connection.
func accept(p *labtest.Pod, addr string) (next func() net.Conn) {
	p.Helper()
	var l net.Listener
	if err := p.Lab.Outside.Do(func() (err error) {
		l, err = net.Listen("tcp4", addr)
		return err
	}); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = l.Close() })
	return func() net.Conn {
		p.Helper()
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(labtest.Patience))
		conn, err := l.Accept()
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

// wantReset checks that a peer that sends data learns that its connection is dead.
func wantReset(p *labtest.Pod, what string, conn net.Conn) {
	p.Helper()
	_ = conn.SetDeadline(time.Now().Add(labtest.Patience))
	_, err := conn.Write([]byte("still there?\n"))
	if err == nil {
		_, err = bufio.NewReader(conn).ReadString('\n')
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		p.Errorf("%s: %v, want a reset", what, err)
	}
}

// A server that sends on a connection that the pod no longer has gets a reset: after
// a take-over by a new pod, and after its line was removed. Ident queries are
// refused. All answers leave by the egress side.
func TestDeadSessionIsReset(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25 7000\n81 tcp 203.0.113.25 80\n"
		p.OK()
		next := accept(p, "203.0.113.25:7000")
		open := func() net.Conn {
			p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			return next()
		}
		w := p.Watch(p.Lab.Router, "eth0", "macvlan0")

		takenOver := open()
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil { // as in the new pod
			p.Fatal(err)
		}
		wantReset(p, "after a take-over", takenOver)

		removed := open()
		p.Env["EGRESS_DESTINATION"] = "81 tcp 203.0.113.25 80\n"
		p.OK()
		wantReset(p, "after its line was removed", removed)

		wantRefusedFrom(p, p.Lab.Outside, "tcp", "192.168.12.99:113")
		w.WantSource()
		w.WantNothing("eth0", func(ip lab.Packet) bool { return ip.Src.Port() == 113 || ip.Src.Addr() == lab.Source })
		p.WantAnswer("tcp", 81, "203.0.113.25:80")
	})
}
