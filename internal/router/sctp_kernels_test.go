//go:build kernels

package router_test

import (
	"bufio"
	"net/netip"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// Associations of the kernel's own SCTP, one message after another in both directions, reach the
// server of their redirect, of a range and of the fallback, which sees the reserved address, in
// both families, for clients of each subnet. An association lives through the next runs, also one
// without the fallback, whose ports refuse then.
func TestSCTP(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		dualStack(p, "2001:db8:12::99/64, 192.168.12.99/24", "192.168.12.1, fe80::1")
		const lines = "3868 sctp 203.0.113.26 3869\n5000-5010 sctp 203.0.113.26 5100-5110\n3868 sctp 2001:db8::26 3869\n"
		p.Env["EGRESS_DESTINATION"] = lines + "203.0.113.27\n"
		for _, addr := range []string{"203.0.113.26:3869", "203.0.113.26:5107", "203.0.113.27:2905", "[2001:db8::26]:3869"} {
			p.Serve(p.Lab.Outside, "sctp", addr)
		}
		p.OK()
		pod, pod6 := lab.RouterAddr.String(), "["+lab.RouterAddr6.String()+"]"
		want := func() {
			p.Helper()
			for _, from := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
				wantDual(p, from, "sctp", pod+":3868", "203.0.113.26:3869", lab.Source)
				wantDual(p, from, "sctp", pod+":5007", "203.0.113.26:5107", lab.Source)
				wantDual(p, from, "sctp", pod+":2905", "203.0.113.27:2905", lab.Source)
				wantDual(p, from, "sctp", pod6+":3868", "[2001:db8::26]:3869", lab.Source6)
			}
		}
		want()
		conn := p.Dial(p.Lab.Client, "sctp", netip.AddrPortFrom(lab.RouterAddr, 3868))
		r := bufio.NewReader(conn)
		if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source {
			p.Fatalf("%v, %v", a, err)
		}
		p.WantEcho("in the first run", conn, r)
		p.WantUnchanged(p.OK())
		p.WantEcho("after the second run", conn, r)
		want()

		p.Env["EGRESS_DESTINATION"] = lines
		p.OK()
		p.WantRefused("sctp", 2905)
		p.WantEcho("without the fallback", conn, r)
	})
}
