package router_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// A host is another one on the physical network.
type host struct {
	*labtest.Pod
	h   *netlink.Handle
	nic netlink.Link
	mac string
}

// addHost adds a host that has the reserved address.
func addHost(p *labtest.Pod) *host {
	p.Helper()
	ns, err := netns.New()
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = ns.Close() })
	outside := p.Handle(p.Lab.Outside)
	a := netlink.NewLinkAttrs()
	a.Name, a.Index, a.ParentIndex, a.Namespace = "nic0", 200, p.Link(outside, lab.LANLink).Attrs().Index, netlink.NsFd(ns.Fd())
	if err := outside.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		p.Fatal(err)
	}
	// A new namespace may have the machine's settings.
	if err := p.Lab.SetSysctl(ns, "net/ipv4/conf/all/arp_ignore", "0"); err != nil {
		p.Fatal(err)
	}
	h := p.Handle(ns)
	nic := p.Link(h, "nic0")
	host := &host{p, h, nic, nic.Attrs().HardwareAddr.String()}
	if err := h.AddrAdd(nic, reserved()); err != nil {
		p.Fatal(err)
	}
	if err := h.LinkSetUp(nic); err != nil {
		p.Fatal(err)
	}
	p.Until("the other host's NIC is up", func() bool { return p.Link(h, "nic0").Attrs().OperState == netlink.OperUp })
	return host
}

// leave gives the reserved address up.
func (h *host) leave() {
	h.Helper()
	if err := h.h.AddrDel(h.nic, reserved()); err != nil {
		h.Fatal(err)
	}
}

func reserved() *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source.AsSlice(), Mask: net.CIDRMask(24, 32)}}
}

// captureMacvlan captures on the router's macvlan0.
func captureMacvlan(p *labtest.Pod) *lab.Capture {
	p.Helper()
	c, err := p.Lab.Capture(p.Lab.Router, "macvlan0")
	if err != nil {
		p.Fatal(err)
	}
	return c
}

// captureLAN captures on the physical network, also while there is no macvlan0.
func captureLAN(p *labtest.Pod) *lab.Capture {
	p.Helper()
	c, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
	if err != nil {
		p.Fatal(err)
	}
	return c
}

// An arpKind is the kind of an ARP message of the router.
type arpKind string

const (
	arpProbe       arpKind = "probe"
	arpAnnounced   arpKind = "announcement"
	arpGateway     arpKind = "gateway"
	arpOther       arpKind = "other"
	arpPair                = 2 // an announcement has two forms
	anotherMAC             = "02:00:00:00:00:09"
	yetAnotherMAC          = "02:00:00:00:00:0a"
	claimed                = "reserved address conflict"
	holds                  = "reserved address already in use"
	gatewayAnswers         = "gateway answers ARP"
)

// kind returns the kind of an ARP message about the reserved address.
func kind(a lab.ARP) arpKind {
	switch {
	case a.SenderIP == netip.IPv4Unspecified() && a.TargetIP == lab.Source && a.Op == 1:
		return arpProbe
	case a.SenderIP == lab.Source && a.Announces():
		return arpAnnounced
	case a.SenderIP == lab.Source && a.TargetIP == lab.GatewayAddr && a.Op == 1:
		return arpGateway
	}
	return arpOther
}

// sent returns the kinds of the ARP messages that were sent from a hardware
// address.
func sent(c *lab.Capture, mac string) []arpKind {
	var kinds []arpKind
	for _, f := range c.Frames() {
		if a, ok := f.ARP(); ok && f.Source().String() == mac {
			kinds = append(kinds, kind(a))
		}
	}
	return kinds
}

// count returns how many ARP messages of a kind were sent from a hardware
// address.
func count(c *lab.Capture, mac string, want arpKind) int {
	n := 0
	for _, k := range sent(c, mac) {
		if k == want {
			n++
		}
	}
	return n
}

// macOf returns the hardware address of the router.
func macOf(p *labtest.Pod) string {
	p.Helper()
	return p.Link(p.Handle(p.Lab.Router), "macvlan0").Attrs().HardwareAddr.String()
}

// setMacvlanUp sets macvlan0 up before the router starts, as some CNI plugins do.
func setMacvlanUp(p *labtest.Pod) {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	if err := h.LinkSetUp(p.Link(h, "macvlan0")); err != nil {
		p.Fatal(err)
	}
	p.Until("macvlan0 is up", func() bool { return p.Link(h, "macvlan0").Attrs().OperState == netlink.OperUp })
}

// hasSource reports whether macvlan0 has the reserved address.
func hasSource(p *labtest.Pod) bool {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	addresses, err := h.AddrList(p.Link(h, "macvlan0"), netlink.FAMILY_V4)
	if err != nil {
		p.Fatal(err)
	}
	for _, a := range addresses {
		if a.IP.Equal(lab.Source.AsSlice()) {
			return true
		}
	}
	return false
}

// claim announces the reserved address from another host on the physical network.
func claim(p *labtest.Pod, mac string) {
	p.Helper()
	parsed, err := net.ParseMAC(mac)
	if err != nil {
		p.Fatal(err)
	}
	frame, err := arp.Announcement(arp.Request, parsed, lab.Source)
	if err != nil {
		p.Fatal(err)
	}
	index := p.Link(p.Handle(p.Lab.Outside), lab.LANLink).Attrs().Index
	if err := p.Lab.Outside.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}})
	}); err != nil {
		p.Fatal(err)
	}
}

// deleteMacvlan deletes macvlan0.
func deleteMacvlan(p *labtest.Pod) {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	if err := h.LinkDel(p.Link(h, "macvlan0")); err != nil {
		p.Fatal(err)
	}
}

// If no other host has the address, the only probe is the first frame that leaves
// the pod, and nothing is logged about it.
func TestConflictProbeUnanswered(t *testing.T) {
	t.Parallel()
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("up before: %v", up), func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.Nftables)
			if up {
				setMacvlanUp(p)
			}
			capture, mac := captureMacvlan(p), macOf(p)
			r := p.OK()
			if strings.Contains(r.Stderr, "another host") {
				t.Errorf("stderr has a conflict, want none:\n%s", r.Stderr)
			}
			if got, want := fmt.Sprint(sent(capture, mac)), "[probe announcement announcement gateway]"; got != want {
				t.Errorf("sent %s, want %s", got, want)
			}
			for _, f := range capture.Frames() {
				if f.Outgoing {
					if a, ok := f.ARP(); !ok || kind(a) != arpProbe {
						t.Errorf("the first frame that left is %s, want a probe", f)
					}
					break
				}
			}
			p.WantExample()
		})
	}
}

// By default the router takes an address that another host has, as the original
// did, and logs that host. With defend it announces the address again after the
// answer.
func TestConflictWarnTakesAddress(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		choice        string
		announcements int
	}{{"", 1}, {"warn", 1}, {"defend", 2}} {
		for _, up := range []bool{true, false} {
			t.Run(fmt.Sprintf("%q, up before: %v", test.choice, up), func(t *testing.T) {
				t.Parallel()
				var p *labtest.Pod
				var other *host
				var capture *lab.Capture
				var mac string
				var r labtest.Result
				// A busy machine may deliver the answer later than the router waits for it.
				for range 20 {
					p = labtest.New(t, lab.Options{}, labtest.Nftables)
					p.Env["EGRESS_CONFLICT"] = test.choice
					other = addHost(p)
					if up {
						setMacvlanUp(p)
					}
					capture, mac = captureMacvlan(p), macOf(p)
					if r = p.OK(); strings.Contains(r.Stderr, holds) {
						break
					}
				}
				if n := strings.Count(r.Stderr, holds); n != 1 || strings.Count(r.Stderr, "mac="+other.mac) != 1 {
					t.Errorf("%d warnings, want 1 with mac=%s:\n%s", n, other.mac, r.Stderr)
				}
				if !hasSource(p) {
					t.Error("macvlan0 lacks the reserved address")
				}
				kinds := sent(capture, mac)
				if len(kinds) == 0 || kinds[0] != arpProbe || count(capture, mac, arpProbe) != 1 {
					t.Errorf("sent %v, want one probe first", kinds)
				}
				if n := count(capture, mac, arpAnnounced); n != test.announcements*arpPair {
					t.Errorf("sent %v, want %d announcements of %d frames", kinds, test.announcements, arpPair)
				}
				answered := false // before the last announcement
				for _, f := range capture.Frames() {
					a, ok := f.ARP()
					if ok && a.SenderMAC.String() == other.mac && a.Op == 2 {
						answered = true
					} else if ok && test.choice == "defend" && answered && kind(a) == arpAnnounced {
						return
					}
				}
				if test.choice == "defend" {
					t.Error("no announcement after the answer of the other host")
				}
			})
		}
	}
}

// With refuse the router does not take an address that another host has. It removes
// the rules that it has loaded by then.
func TestConflictRefuseChangesNothing(t *testing.T) {
	t.Parallel()
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("up before: %v", up), func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_CONFLICT"] = "refuse"
				other := addHost(p)
				if up {
					setMacvlanUp(p)
				}
				before, capture, mac := p.State(), captureLAN(p), macOf(p)
				p.WantRefusal("", "take reserved address 192.168.12.99: already in use by "+other.mac, "hint: stop the host with that hardware address")
				p.WantState(before)
				if n := count(capture, mac, arpAnnounced); n > 0 {
					p.Errorf("%d announcements of an address that is in use, want none", n)
				}
				if n := count(capture, mac, arpProbe); n != 1 {
					p.Errorf("%d probes, want 1", n)
				}
			})
		})
	}
}

// With refuse the router probes three times for an address that no host has (RFC
// 5227, section 2.1.1).
func TestConflictRefuseProbesThreeTimes(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_CONFLICT"] = "refuse"
	capture, mac := captureMacvlan(p), macOf(p)
	p.OK()
	if got, want := fmt.Sprint(sent(capture, mac)), "[probe probe probe announcement announcement gateway]"; got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
	p.WantExample()
	// A second run does not probe for the pod's own address.
	p.WantUnchanged(p.OK())
	if n := count(capture, mac, arpProbe); n != 3 {
		t.Errorf("%d probes after a second run, want 3 as before", n)
	}
}

// A router that stays waits until the other host gives up the address, and logs the
// conflict once.
func TestConflictRefuseWaitsUntilFree(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_CONFLICT"] = "refuse"
	other := addHost(p)
	capture, mac := captureLAN(p), macOf(p)
	r := p.Start("legacy")
	r.AwaitLog(1, other.mac)
	p.Until("four probes are sent", func() bool { return count(capture, mac, arpProbe) >= 4 })
	if n := strings.Count(r.Logged(), other.mac); n != 1 {
		t.Errorf("%d lines with mac=%s, want 1", n, other.mac)
	}
	if hasSource(p) {
		t.Error("macvlan0 has the reserved address, which is in use")
	}
	if n := count(capture, mac, arpAnnounced); n > 0 {
		t.Errorf("%d announcements of an address that is in use, want none", n)
	}
	begin := time.Now()
	other.leave()
	p.Until("macvlan0 has the reserved address", func() bool { return hasSource(p) })
	t.Logf("address taken %s after the other host left", time.Since(begin).Round(time.Millisecond))
	p.Until("the address is announced", func() bool { return count(capture, mac, arpAnnounced) >= arpPair })
	p.Until("the example works", func() bool {
		_, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		return err == nil
	})
	p.WantExample()
}

// While another host has the address, a router that stays closes the pod, and repairs its
// rules.
func TestConflictRefuseKeepsPodClosed(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_CONFLICT"] = "refuse"
		other := addHost(p)
		setMacvlanUp(p)
		p.Strict()
		r := p.Start("legacy")
		r.AwaitLog(1, other.mac)
		closed := func() bool {
			state := p.State()
			return strings.Contains(state, "net/ipv6/conf/macvlan0/accept_ra = 0\n") && strings.Contains(p.Rules(), "192.168.12.99")
		}
		p.Until("the pod is closed", closed)
		if hasSource(p) {
			p.Error("macvlan0 has the reserved address, which is in use")
		}
		other.leave()
		p.Until("macvlan0 has the reserved address", func() bool { return hasSource(p) })
		p.Until("the example works", func() bool {
			_, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			return err == nil
		})
		translates := func() bool { return strings.Contains(strings.ToLower(p.Rules()), "snat") }

		second := addHost(p)
		h := p.Handle(p.Lab.Router)
		if err := h.AddrDel(p.Link(h, "macvlan0"), reserved()); err != nil {
			p.Fatal(err)
		}
		r.AwaitLog(1, second.mac)
		if !translates() {
			p.Errorf("no SNAT rule in\n%s", p.Rules())
		}
		// On a busy machine the other host may answer the single probe for an address that
		// was the router's too late.
		p.FlushSourceRule()
		p.Until("the SNAT rule is back", translates)
	})
}

// A router that is stopped while it probes leaves the namespace as it was.
func TestConflictProbeStopped(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_CONFLICT"] = "refuse"
	before, capture, mac := p.State(), captureMacvlan(p), macOf(p)
	p.Cleanup(func() { p.WantState(before) }) // after the router has ended
	r := p.Start("legacy")
	p.Until("a probe is sent", func() bool { return count(capture, mac, arpProbe) > 0 })
	r.Terminate()
	r.AwaitLog(1, `level=INFO msg="stopping, start interrupted"`)
}

// The router logs a host that claims the address, and answers by an announcement,
// but not each time.
func TestClaimIsAnsweredOnce(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers) // the physical network is watched
	capture, mac := captureLAN(p), macOf(p)
	for range 5 {
		claim(p, anotherMAC)
	}
	claim(p, yetAnotherMAC)
	r.AwaitLog(1, "mac="+yetAnotherMAC) // the last claim
	if n := strings.Count(r.Logged(), "mac="+anotherMAC); n != 1 || strings.Count(r.Logged(), claimed) != 2 {
		t.Errorf("%d lines with mac=%s, want 1", n, anotherMAC)
	}
	if n := count(capture, mac, arpAnnounced); n != arpPair {
		t.Errorf("%d announcement frames, want %d", n, arpPair)
	}
	p.WantExample()
}

const gatewaySilent = `msg="gateway does not answer ARP" gateway=`

// silence makes the gateway answer no ARP request, or answer again.
func silence(p *labtest.Pod, silent bool) {
	p.Helper()
	value := "0"
	if silent {
		value = "8"
	}
	if err := p.Lab.SetSysctl(p.Lab.Outside, "net/ipv4/conf/lan0/arp_ignore", value); err != nil {
		p.Fatal(err)
	}
}

// An init run logs a gateway that does not answer, whether the address is new or not,
// and succeeds. With a gateway that answers it does not.
func TestInitLogsSilentGateway(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		const outside = "EGRESS_GATEWAY is outside of the subnet of EGRESS_SOURCE, 192.168.12.0/24"
		for gateway, hint := range map[string]string{
			"192.168.12.77": `hint="check that EGRESS_GATEWAY is right`,
			"192.168.77.1":  `hint="` + outside,
		} {
			p.Env["EGRESS_GATEWAY"] = gateway
			for range 2 {
				r := p.OK()
				want := "level=WARN " + gatewaySilent + gateway + " within=50ms " + hint
				if !strings.Contains(r.Last(), want) {
					p.Errorf("last line:\n got %s\nwant %s", r.Last(), want)
				}
			}
		}
		p.Env["EGRESS_GATEWAY"] = lab.GatewayAddr.String()
		p.Until("the gateway answers in time", func() bool { return !strings.Contains(p.OK().Stderr, "ARP") })
		p.WantExample()
	})
}

// A router that stays probes a gateway that does not answer without waiting for the
// interval, and reports it; also a gateway that answers later.
func TestSilentGatewayIsReported(t *testing.T) {
	t.Parallel()
	for mode, misses := range map[string]int{"legacy": 2, "monitor": 3} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.Nftables)
			if mode == "monitor" {
				p.OK()
			}
			silence(p, true)
			p.Env["EGRESS_HEALTH_INTERVAL"] = "1h"
			capture, mac := captureLAN(p), macOf(p)
			r := p.Start(mode)
			r.AwaitLog(1, "level=ERROR "+gatewaySilent)
			if code, out := p.Health(); code != 1 || !strings.Contains(out, "not ready: gateway 192.168.12.1 does not answer ARP\n") ||
				!strings.Contains(out, "192.168.12.1 does not answer ARP, no answer yet\n") {
				t.Errorf("health: exit code %d:\n%s", code, out)
			}
			if n := count(capture, mac, arpGateway); n < misses+1 {
				t.Errorf("%d requests, want at least %d", n, misses+1)
			}
			silence(p, false)
			r.AwaitLog(1, gatewayAnswers)
			p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
			outside := p.Link(p.Handle(p.Lab.Outside), lab.LANLink).Attrs().HardwareAddr.String()
			_, out := p.Health()
			for _, re := range []string{
				`  interface +ok +\S+ +macvlan0 at ` + mac + "\n",
				`  gateway +ok +\S+ +192\.168\.12\.1 answers ARP, last answer \S+ ago by ` + outside + "\n",
				`  address +ok +\S+ +192\.168\.12\.99/24, no conflict\n`,
			} {
				if !regexp.MustCompile(re).MatchString(out) {
					t.Errorf("health lacks %s:\n%s", re, out)
				}
			}
		})
	}
}

// A gateway that takes its time is no error. Proxy ARP answers after up to 0.8 s
// (proxy_delay in arp(7)).
func TestSlowGatewayIsNoError(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	for _, sysctl := range []string{"proxy_arp", "forwarding"} {
		if err := p.Lab.SetSysctl(p.Lab.Outside, "net/ipv4/conf/lan0/"+sysctl, "1"); err != nil {
			t.Fatal(err)
		}
	}
	const gateway = "192.168.77.1"
	h := p.Handle(p.Lab.Outside)
	to := &net.IPNet{IP: net.ParseIP(gateway), Mask: net.CIDRMask(32, 32)}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: p.Link(h, "lo").Attrs().Index, Dst: to}); err != nil {
		t.Fatal(err)
	}
	p.Env["EGRESS_GATEWAY"] = gateway
	p.Env["EGRESS_HEALTH_INTERVAL"] = "200ms"
	capture, mac := captureLAN(p), macOf(p)
	r := p.Start("legacy")
	p.Until("ten requests are answered", func() bool {
		n := 0
		for _, f := range capture.Frames() {
			if a, ok := f.ARP(); ok && a.Op == 2 && a.SenderIP.String() == gateway && a.TargetMAC.String() == mac {
				n++
			}
		}
		return n >= 10
	})
	r.AwaitLog(1, gatewayAnswers)
	if strings.Contains(r.Logged(), "level=ERROR "+gatewaySilent) {
		t.Errorf("the log has an error:\n%s", labtest.Tail(r.Logged()))
	}
	p.WantExample()
}

// The router logs a gateway that misses three requests, and one that answers again.
func TestGatewayLostAndFound(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_HEALTH_INTERVAL"] = "200ms"
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers)
	const lost = "level=ERROR " + gatewaySilent
	capture, mac := captureLAN(p), macOf(p)
	silence(p, true)
	before := count(capture, mac, arpGateway)
	r.AwaitAfter(gatewayAnswers, lost) // a busy machine may have had such a pair before
	losses, found := strings.Count(r.Logged(), lost), strings.Count(r.Logged(), gatewayAnswers)
	// The first request may have been answered.
	if n := count(capture, mac, arpGateway) - before; n < 3 {
		t.Errorf("logged as lost after %d requests, want at least 3", n)
	}
	asked := count(capture, mac, arpGateway)
	p.Until("four more requests are sent", func() bool { return count(capture, mac, arpGateway) >= asked+4 })
	if n := strings.Count(r.Logged(), lost); n != losses {
		t.Errorf("%d lines %q, want %d", n, lost, losses)
	}
	if n := strings.Count(r.Logged(), gatewayAnswers); n != found {
		t.Errorf("%d lines %q, want %d", n, gatewayAnswers, found)
	}
	silence(p, false)
	r.AwaitAfter(gatewaySilent, gatewayAnswers)
}

// A router that stays reports that the NIC below has no link when the kernel notifies
// it, and that the link is back. Meanwhile it does not blame the gateway, which no request
// can reach.
func TestCarrierLostAndFound(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_HEALTH_INTERVAL"] = "1h"
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers)
	mac, h := macOf(p), p.Handle(p.Lab.Outside)
	if err := h.LinkSetDown(p.Link(h, lab.LANLink)); err != nil {
		t.Fatal(err)
	}
	r.AwaitLog(1, `level=ERROR msg="egress interface without carrier" interface=macvlan0`)
	code, out := p.Health()
	if code != 1 || !strings.Contains(out, "not ready: egress interface macvlan0 without carrier\n") ||
		!regexp.MustCompile(`  interface +failed +\S+ +macvlan0 at `+mac+`, without carrier\n`).MatchString(out) {
		t.Errorf("health: exit code %d:\n%s", code, out)
	}
	p.Until("health has the silent gateway", func() bool {
		_, out := p.Health()
		return strings.Contains(out, "not ready: gateway 192.168.12.1 does not answer ARP\n")
	})
	if strings.Contains(after(r.Logged(), "without carrier"), gatewaySilent) {
		t.Errorf("log of a router without carrier has a silent gateway:\n%s", labtest.Tail(r.Logged()))
	}
	if err := h.LinkSetUp(p.Link(h, lab.LANLink)); err != nil {
		t.Fatal(err)
	}
	r.AwaitLog(1, `level=INFO msg="egress interface carrier restored" interface=macvlan0`)
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
}

// after returns the part of a log after the first occurrence of a text.
func after(log, text string) string {
	_, rest, _ := strings.Cut(log, text)
	return rest
}

// A gateway that is still silent when the link is back is reported then.
func TestCarrierFoundWithoutGateway(t *testing.T) {
	t.Parallel()
	// A busy machine may notify of the link later than the gateway is lost.
	for range 20 {
		p := labtest.New(t, lab.Options{}, labtest.Nftables)
		p.Env["EGRESS_HEALTH_INTERVAL"] = "1h"
		r := p.Start("legacy")
		r.AwaitLog(1, gatewayAnswers)
		h := p.Handle(p.Lab.Outside)
		if err := h.LinkSetDown(p.Link(h, lab.LANLink)); err != nil {
			t.Fatal(err)
		}
		silence(p, true)
		r.AwaitLog(1, "egress interface without carrier")
		if before, _, _ := strings.Cut(r.Logged(), "egress interface without carrier"); strings.Contains(before, gatewaySilent) {
			continue
		}
		p.Until("health has the silent gateway", func() bool {
			_, out := p.Health()
			return strings.Contains(out, "not ready: gateway 192.168.12.1 does not answer ARP\n")
		})
		if err := h.LinkSetUp(p.Link(h, lab.LANLink)); err != nil {
			t.Fatal(err)
		}
		r.AwaitLog(1, "level=ERROR "+gatewaySilent)
		if !strings.Contains(after(r.Logged(), "carrier restored"), gatewaySilent) {
			t.Errorf("the gateway is logged before the link is back:\n%s", labtest.Tail(r.Logged()))
		}
		silence(p, false)
		r.AwaitAfter(gatewaySilent, gatewayAnswers)
		return
	}
	t.Error("the link was never notified of before the gateway was lost")
}

// A router that starts without a link logs that once, and does not blame the gateway
// at once.
func TestStartWithoutCarrier(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_HEALTH_INTERVAL"] = "1h"
	setMacvlanUp(p)
	h, inRouter := p.Handle(p.Lab.Outside), p.Handle(p.Lab.Router)
	if err := h.LinkSetDown(p.Link(h, lab.LANLink)); err != nil {
		t.Fatal(err)
	}
	p.Until("macvlan0 has no carrier", func() bool {
		return p.Link(inRouter, "macvlan0").Attrs().RawFlags&unix.IFF_LOWER_UP == 0
	})
	const lost = `level=WARN msg="egress interface without carrier" interface=macvlan0`
	if r := p.OK(); !strings.Contains(r.Stderr, lost) || strings.Contains(r.Stderr, gatewaySilent) {
		t.Errorf("log of init lacks %s, or has a silent gateway:\n%s", lost, r.Stderr)
	}
	r := p.Start("legacy")
	p.Until("health has the missing carrier", func() bool {
		code, out := p.Health()
		return code == 1 && strings.Contains(out, "not ready: egress interface macvlan0 without carrier\n")
	})
	if n := strings.Count(r.Logged(), "egress interface without carrier"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, labtest.Tail(r.Logged()))
	}
	if err := h.LinkSetUp(p.Link(h, lab.LANLink)); err != nil {
		t.Fatal(err)
	}
	r.AwaitLog(1, `level=INFO msg="egress interface carrier restored" interface=macvlan0`)
	r.AwaitLog(1, gatewayAnswers)
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
}

// syns returns how many times the router tried to connect to a port range of the first
// server. Each try has to come from the reserved address.
func syns(p *labtest.Pod, c *lab.Capture, from, to uint16) (tries int) {
	p.Helper()
	for _, f := range c.Frames() {
		ip, ok := f.IPv4()
		if !ok || f.Outgoing || ip.Dst.Addr() != lab.Remote[0] || ip.Dst.Port() < from || ip.Dst.Port() > to {
			continue
		}
		if ip.Src.Addr() != lab.Source {
			p.Errorf("a probe not from %s: %s", lab.Source, f)
		}
		tries++
	}
	return tries
}

// The router logs a destination that refuses connections once, and again when it
// accepts them.
func TestDestinationProbeLogsChanges(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_DESTINATION"] = "9999 tcp 203.0.113.25\n9998 udp 203.0.113.25\n" + p.Env["EGRESS_DESTINATION"]
	p.Env["EGRESS_PROBE"], p.Env["EGRESS_PROBE_INTERVAL"] = "tcp", "200ms"
	capture := captureLAN(p)
	r := p.Start("legacy")
	const refused, again = "destination unreachable", "destination reachable again"
	const destination = "destination=203.0.113.25:9999"
	r.AwaitLog(1, refused)
	tried := func(n int) {
		p.Until("the destination is probed again", func() bool { tries := syns(p, capture, 9999, 9999); return tries >= n })
	}
	tried(4)
	if n := strings.Count(r.Logged(), refused); n != 1 || !strings.Contains(r.Logged(), destination) {
		t.Errorf("%d lines %q, want 1 with %s", n, refused, destination)
	}
	server := p.Serve(p.Lab.Outside, "tcp", "203.0.113.25:9999")
	r.AwaitLog(1, again)
	server.Close()
	r.AwaitLog(2, refused)
	if n := strings.Count(r.Logged(), again); n != 1 {
		t.Errorf("%d lines %q, want 1", n, again)
	}
	if n := syns(p, capture, 80, 80); n == 0 {
		t.Error("no probe of the destination that accepts connections")
	}
}

// The router probes few destinations at a time if none of many answers, and ends
// while it does.
func TestDestinationProbesAreLimited(t *testing.T) {
	t.Parallel()
	const many, atOnce = 2000, 16
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	var list strings.Builder
	for port := 10001; port <= 10000+many; port++ {
		fmt.Fprintf(&list, "%d tcp 203.0.113.25\n", port)
	}
	p.Env["EGRESS_DESTINATION"] = list.String()
	p.Env["EGRESS_PROBE"] = "tcp"
	var out strings.Builder
	drop := p.Command("nft", "add table ip silent; add chain ip silent in { type filter hook input priority 0 ; }; add rule ip silent in tcp dport 10001-12000 drop")
	drop.Stdout, drop.Stderr = &out, &out
	if err := p.Lab.Run(p.Lab.Outside, drop); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	capture := captureLAN(p)
	p.Start("legacy")
	// TCP sends the SYN again after a second, when all first probes still wait.
	p.Until("each SYN is sent twice", func() bool {
		tries := syns(p, capture, 10001, 10000+many)
		return tries >= 2*atOnce
	})
	const probe = 5 * time.Second // after which the next destinations have their turn
	ports := make(map[uint16]bool)
	var begin time.Time
	for _, f := range capture.Frames() { // this process may have stood still for longer
		ip, ok := f.IPv4()
		if !ok || f.Outgoing || ip.Dst.Port() <= 10000 || ip.Dst.Port() > 10000+many {
			continue
		}
		if begin.IsZero() {
			begin = f.At
		}
		if f.At.Sub(begin) < probe {
			ports[ip.Dst.Port()] = true
		}
	}
	if len(ports) != atOnce {
		t.Errorf("%d destinations are probed at a time, want %d", len(ports), atOnce)
	}
}

// The router announces the address at each interval, in both forms.
func TestAnnouncementsRepeat(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_ANNOUNCE_INTERVAL"] = "300ms"
	capture := captureLAN(p)
	p.Start("legacy")
	var forms []uint16
	p.Until("four announcements are sent", func() bool {
		forms = nil
		for _, f := range capture.Frames() {
			if a, ok := f.ARP(); ok && kind(a) == arpAnnounced {
				forms = append(forms, a.Op)
			}
		}
		return len(forms) >= 4*arpPair
	})
	if got, want := fmt.Sprint(forms[:4*arpPair]), "[2 1 2 1 2 1 2 1]"; got != want {
		t.Errorf("forms %s, want %s", got, want)
	}
}

// With an interval of 0 the router announces the address again only if neighbours have
// to update their entries.
func TestRepairAnnouncesIfNeighboursMustLearn(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_ANNOUNCE_INTERVAL"], p.Env["EGRESS_HEALTH_INTERVAL"] = "0", "100ms"
	p.Env["EGRESS_HEALTH_LISTEN"] = fmt.Sprint(":", labtest.HealthAddr.Port())
	capture, mac := captureLAN(p), macOf(p)
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers)
	announced := func(what, mac string, n int) {
		p.Helper()
		p.Until(what, func() bool { return count(capture, mac, arpAnnounced) >= n*arpPair })
		r.AwaitComparisons(5)
		if got := count(capture, mac, arpAnnounced); got != n*arpPair {
			t.Errorf("%s: %d announcement frames, want %d", what, got, n*arpPair)
		}
	}
	announced("announced at the start", mac, 1)

	h := p.Handle(p.Lab.Router)
	if err := h.LinkSetDown(p.Link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	announced("announced after it was down", mac, 2)

	other, err := net.ParseMAC(anotherMAC)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetHardwareAddr(p.Link(h, "macvlan0"), other); err != nil {
		t.Fatal(err)
	}
	announced("announced with another hardware address", anotherMAC, 1)
	if strings.Contains(r.Logged(), claimed) {
		t.Error("the log has a conflict with a hardware address of the router")
	}
	p.WantExample()
}

// The router creates its macvlan0 again when it is deleted.
func TestDeletedMacvlanIsMadeAgain(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	capture := captureLAN(p)
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers)
	const repaired = "msg=repaired kind=interface"
	for n := 1; n <= 2; n++ {
		p.WantExample()
		before := macOf(p)
		deleteMacvlan(p)
		r.AwaitLog(n, repaired)
		p.Until("the new interface is announced", func() bool {
			for _, f := range capture.Frames() {
				if a, ok := f.ARP(); ok && kind(a) == arpAnnounced && a.SenderMAC.String() != before && a.SenderMAC.String() == macOf(p) {
					return true
				}
			}
			return false
		})
		p.Until("the example works", func() bool { return answers(p) })
		r.AwaitAfter(repaired, gatewayAnswers)
	}
	p.WantExample()
	claim(p, anotherMAC)
	r.AwaitLog(1, "mac="+anotherMAC)
}

// answers reports whether the first destination answers.
func answers(p *labtest.Pod) bool {
	ctx, cancel := context.WithTimeout(p.Context(), 2*time.Second)
	defer cancel()
	a, err := p.Lab.Ask(ctx, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
	return err == nil && a.Peer.Addr() == lab.Source
}

// missing is the router's error for a missing macvlan0, as it is quoted in the log.
const missing = `interface \"macvlan0\" not found`

// The router logs once that a macvlan0 of another program is missing, and uses it
// as soon as it is back: the event comes before the next attempt.
func TestMissingInterfaceIsUsedOnceBack(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_LOG_LEVEL"] = "debug"
	r := p.Start("legacy")
	r.AwaitLog(1, gatewayAnswers)
	p.WantExample()
	deleteMacvlan(p)
	var last time.Time
	var pause time.Duration
	p.Until("the pause between attempts is longer than a repair on a busy machine", func() bool {
		if times := logTimes(r, missing); len(times) > 1 {
			last = times[len(times)-1]
			pause = last.Sub(times[len(times)-2])
		}
		return pause > 3500*time.Millisecond
	})
	if n := strings.Count(r.Logged(), `reconcile failed" error="`+missing); n != 1 {
		t.Errorf("%d lines \"reconcile failed\", want 1", n)
	}
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	r.AwaitLog(1, labtest.RepairLogged)
	// The next pause is twice as long, less a random part of up to a quarter.
	if took := logTimes(r, labtest.RepairLogged)[0].Sub(last); took > pause*3/2 {
		t.Errorf("repaired %s after the last attempt, want before the next one; the last pause was %s", took, pause)
	}
	p.Until("the example works", func() bool { return answers(p) })
	p.WantExample()
	r.AwaitLog(2, gatewayAnswers) // on the new interface
	claim(p, anotherMAC)
	r.AwaitLog(1, "mac="+anotherMAC)
}

// After an init run monitor changes nothing, and repairs later damage.
func TestMonitorRepairs(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.OK()
	before, capture, mac := p.State(), captureLAN(p), macOf(p)
	r := p.Start("monitor")
	r.AwaitLog(1, gatewayAnswers)
	p.WantState(before)
	if n := count(capture, mac, arpAnnounced) + count(capture, mac, arpProbe); n > 0 {
		t.Errorf("%d probes and announcements, want none", n)
	}
	if strings.Contains(r.Logged(), "repaired") {
		t.Error("the log has a repair, want none")
	}
	h := p.Handle(p.Lab.Router)
	if err := h.AddrDel(p.Link(h, "macvlan0"), reserved()); err != nil {
		t.Fatal(err)
	}
	r.AwaitLog(1, "msg=repaired kind=address")
	p.Until("the example works", func() bool { return answers(p) })
	p.WantExample()
	p.WantState(before)
	if n := count(capture, mac, arpAnnounced); n != arpPair {
		t.Errorf("%d announcement frames, want %d", n, arpPair)
	}
}

// Monitor waits for the interface if it starts first.
func TestMonitorWaitsForInterface(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{NoMacvlan: true}, labtest.Nftables)
	r := p.Start("monitor")
	r.AwaitLog(1, missing)
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	p.Until("the example works", func() bool { return answers(p) })
	p.WantExample()
	if err := r.Cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the router has ended: %v", err)
	}
}
