package router_test

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A run that is killed after any of its steps is completed by the next, which finds the
// egress interface in any state of IPv6: while the kernel still looks for a duplicate of
// its link-local address (RFC 4862, section 5.4), the route to that address is missing.
func TestKilledRunIsCompleted(t *testing.T) {
	t.Parallel()
	reference := newIPv6Pod(t)
	reference.OK()
	want := reference.State()
	wantLinkLocal(reference)
	var killed atomic.Int32
	t.Run("killed", func(t *testing.T) {
		for lines := range 24 { // of the log; a run has about 20
			t.Run(fmt.Sprintf("after %d lines", lines), func(t *testing.T) {
				t.Parallel()
				p := newIPv6Pod(t)
				if killAfter(p, lines) {
					killed.Add(1)
				}
				p.OK()
				p.WantState(want)
				p.WantUnchanged(p.OK())
				p.WantExample()
				wantLinkLocal(p)
			})
		}
	})
	if n := killed.Load(); n < 5 {
		t.Errorf("%d runs were killed, want at least 5", n)
	}
}

// newIPv6Pod returns a pod whose interfaces have IPv6, and whose router creates macvlan0.
func newIPv6Pod(t *testing.T) *labtest.Pod {
	t.Helper()
	p := labtest.New(t, lab.Options{NoMacvlan: true}, labtest.Nftables)
	p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_HOST_NETNS"], p.Env["EGRESS_LOG_LEVEL"] = "true", labtest.File(p.Lab.Node), "debug"
	believesAdvertisements(p, "default")
	return p
}

// killAfter starts the router and kills it after a number of lines of its log. It
// reports false if the router ends before.
func killAfter(p *labtest.Pod, lines int) bool {
	p.Helper()
	cmd := p.Command("egress-router")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		p.Fatal(err)
	}
	if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
		p.Fatal(err)
	}
	log := bufio.NewReader(stderr)
	for range lines {
		if _, err := log.ReadString('\n'); err == io.EOF {
			break
		} else if err != nil {
			p.Fatal(err)
		}
	}
	_ = cmd.Process.Kill() // an error: it has ended
	err = cmd.Wait()
	_, failed := err.(*exec.ExitError)
	return failed
}

// wantLinkLocal waits until macvlan0 has its link-local address and both routes of it.
func wantLinkLocal(p *labtest.Pod) {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	p.Until("macvlan0 has a link-local address", func() bool {
		addresses, err := h.AddrList(macvlan, netlink.FAMILY_V6)
		if err != nil {
			p.Fatal(err)
		}
		if len(addresses) != 1 || !addresses[0].IP.IsLinkLocalUnicast() || addresses[0].Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
			return false
		}
		found := 0
		for _, table := range []int{unix.RT_TABLE_LOCAL, unix.RT_TABLE_MAIN} {
			routes, err := h.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: table, LinkIndex: macvlan.Attrs().Index}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
			if err != nil {
				p.Fatal(err)
			}
			for _, r := range routes {
				if r.Dst != nil && r.Dst.IP.IsLinkLocalUnicast() {
					found++
				}
			}
		}
		return found >= 2
	})
}
