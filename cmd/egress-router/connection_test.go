package main

import (
	"bufio"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
)

// A flow is a UDP client that never pauses for long, so that the kernel never
// forgets its connection.
type flow struct {
	conn net.Conn
	r    *bufio.Reader
}

func (p *pod) flow(port uint16) *flow {
	p.Helper()
	conn, err := p.lab.Dial(p.Context(), p.lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = conn.Close() })
	return &flow{conn, bufio.NewReader(conn)}
}

// ask sends one datagram and returns the answer to it, an error where there is
// none in time.
func (f *flow) ask() (lab.Answer, error) {
	if err := f.conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return lab.Answer{}, err
	}
	if _, err := f.conn.Write([]byte("?\n")); err != nil {
		return lab.Answer{}, err
	}
	return lab.ReadAnswer(f.r)
}

// wantAnswer asks until the answer is the wanted one: datagrams that were on
// their way when the router changed something may be answered late.
func (f *flow) wantAnswer(p *pod, what, server, saw string) {
	p.Helper()
	var a lab.Answer
	var err error
	for range 20 {
		if a, err = f.ask(); err == nil && a.Server.String() == server && a.Peer.Addr().String() == saw {
			return
		}
	}
	p.Errorf("%s: answer %v, error %v; want %s, which sees %s", what, a, err, server, saw)
}

// What the kernel decided for a connection before a run does not outlive the
// run where it is not what is planned.
func TestConnectionsFromBefore(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		const was, is = "203.0.113.25:53", "203.0.113.27:53"
		// Another program's rule makes the kernel track connections.
		p.iptables("-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "1", "-j", "ACCEPT")
		p.env["EGRESS_DESTINATION"] = "53 udp 203.0.113.25\n"
		f := p.flow(53)
		if a, err := f.ask(); err == nil {
			p.Errorf("%v answers before the router is there", a)
		}
		p.ok()
		f.wantAnswer(p, "there before the router", was, "192.168.12.99")

		p.env["EGRESS_DESTINATION"] = "53 udp 203.0.113.27\n"
		p.ok()
		f.wantAnswer(p, "to another destination", is, "192.168.12.99")

		p.env["EGRESS_SOURCE"] = "192.168.12.98/24"
		p.ok()
		f.wantAnswer(p, "from another source", is, "192.168.12.98")

		capture, err := p.lab.Capture(p.lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		begin := time.Now()
		p.flushSourceRule()
		during := p.flow(53) // begun without a source rule
		_, _ = during.ask()
		p.ok()
		for _, f := range []*flow{f, during} {
			f.wantAnswer(p, "begun without a source rule", is, "192.168.12.98")
		}
		_ = capture.Stop()
		for _, frame := range capture.Frames() {
			if ip, ok := frame.IPv4(); ok && !frame.Outgoing && ip.Src.Addr() != netip.MustParseAddr("192.168.12.98") && frame.At.After(begin) && ip.Dst.Port() == 53 {
				p.Errorf("with another source: %s", frame)
			}
		}
		if a, err := during.ask(); err != nil {
			p.Errorf("%v, %v", a, err)
		}
	})
}

// A connection that the NAT rules have not seen cannot leave with its own
// source, whatever happened to it before: the kernel drops its packets.
func TestNoOtherSourceGetsOut(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.env["EGRESS_DESTINATION"] = "53 udp 203.0.113.27\n"
		p.ok()
		p.flushSourceRule()
		f := p.flow(53)
		_, _ = f.ask()
		capture, err := p.lab.Capture(p.lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		for range 3 {
			if a, err := f.ask(); err == nil {
				p.Errorf("%v answers a datagram with the client's source", a)
			}
		}
		if err := capture.Stop(); err != nil {
			p.Fatal(err)
		}
		for _, frame := range capture.Frames() {
			if _, ok := frame.IPv4(); ok && !frame.Outgoing {
				p.Errorf("on the physical network: %s", frame)
			}
		}
		p.ok()
		f.wantAnswer(p, "after a run", "203.0.113.27:53", "192.168.12.99")
	})
}

// Two routers that start at the same time do it one after the other, and both
// succeed.
func TestTwoAtOnce(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	results := make(chan result)
	for range 4 {
		go func() { results <- p.run() }()
	}
	for range 4 {
		if r := <-results; r.code != 0 {
			t.Errorf("exit code %d:\n%s", r.code, r.stderr)
		}
	}
	p.wantExample()
	p.wantUnchanged(p.ok())
}

// An interface's alternative name is no name for a rule to match.
func TestAlternativeName(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	h := p.handle(p.lab.Router)
	eth := p.link(h, "eth0")
	if err := h.LinkAddAltName(eth, "cluster0"); err != nil {
		t.Fatal(err)
	}
	before := p.state()
	p.env["EGRESS_CLUSTER_INTERFACE"] = "cluster0"
	if r := p.run(); r.code != 1 || r.last() != `egress-router: interface "cluster0" not found; there are: eth0, macvlan0` {
		t.Errorf("exit code %d:\n%s", r.code, r.stderr)
	}
	p.wantState(before)
}

// Whatever happens to the egress side afterwards, redirected packets do not
// leave by another interface: they stop.
func TestNoOtherWayOut(t *testing.T) {
	for name, damage := range map[string]func(h *netlink.Handle, macvlan, eth netlink.Link) error{
		"default route back on eth0": func(h *netlink.Handle, _, eth netlink.Link) error {
			everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		},
		"macvlan0 gone": func(h *netlink.Handle, macvlan, eth netlink.Link) error {
			everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
			if err := h.LinkDel(macvlan); err != nil {
				return err
			}
			return h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachBackend(t, lab.Options{}, func(p *pod) {
				p.ok()
				open := p.flow(53)
				open.wantAnswer(p, "before", "203.0.113.27:53", "192.168.12.99")
				h := p.handle(p.lab.Router)
				macvlan := p.link(h, "macvlan0")
				eth := p.link(h, "eth0")
				capture, err := p.lab.Capture(p.lab.Router, "eth0")
				if err != nil {
					p.Fatal(err)
				}
				if err := damage(h, macvlan, eth); err != nil {
					p.Fatal(err)
				}
				for _, f := range []*flow{open, p.flow(53), p.flow(54)} {
					if a, err := f.ask(); err == nil {
						p.Errorf("%v answers", a)
					}
				}
				if err := capture.Stop(); err != nil {
					p.Fatal(err)
				}
				asked := 0
				for _, frame := range capture.Frames() {
					ip, ok := frame.IPv4()
					switch {
					case !ok:
					case !frame.Outgoing:
						asked++
					case netip.MustParsePrefix("203.0.113.0/24").Contains(ip.Dst.Addr()):
						p.Errorf("back on the cluster network: %s", frame)
					}
				}
				if asked < 3 {
					p.Errorf("the pod received %d datagrams, want 3", asked)
				}
			})
		})
	}
}
