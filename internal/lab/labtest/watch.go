package labtest

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// Servers are the networks of the servers beyond the gateway.
var Servers = netip.MustParsePrefix("203.0.113.0/24")

// ToServers picks packets to the servers beyond the gateway.
func ToServers(ip lab.Packet) bool { return Servers.Contains(ip.Dst.Addr()) }

// A Watch captures on several links.
type Watch struct {
	p        *Pod
	Captures map[string]*lab.Capture // by link
}

// Watch begins to capture on links of a namespace.
func (p *Pod) Watch(ns *netns.Namespace, links ...string) Watch {
	p.Helper()
	w := Watch{p, make(map[string]*lab.Capture)}
	for _, name := range links {
		c, err := p.Lab.Capture(ns, name)
		if err != nil {
			p.Fatal(err)
		}
		w.Captures[name] = c
	}
	return w
}

// Outgoing returns the IPv4 frames that left by a link so far.
func (w Watch) Outgoing(name string) []lab.Frame {
	return slices.DeleteFunc(w.Captures[name].Frames(), func(f lab.Frame) bool {
		_, ok := f.IPv4()
		return !ok || !f.Outgoing
	})
}

// WantSource checks that every packet that left by the egress side had the reserved
// address.
func (w Watch) WantSource() {
	w.p.Helper()
	for _, f := range w.Outgoing("macvlan0") {
		if ip, _ := f.IPv4(); ip.Src.Addr() != lab.Source {
			w.p.Errorf("frame on macvlan0 without the source %s: %s", lab.Source, f)
		}
	}
}

// WantNothing checks that no frame left by a link that match picks.
func (w Watch) WantNothing(name string, match func(lab.Packet) bool) {
	w.p.Helper()
	for _, f := range w.Outgoing(name) {
		if ip, _ := f.IPv4(); match(ip) {
			w.p.Errorf("by %s: %s", name, f)
		}
	}
}

// A Traffic sends without pause, by an open connection, an open flow and new
// connections and flows.
type Traffic struct {
	p      *Pod
	rounds atomic.Int64
	cancel context.CancelFunc
	done   chan struct{}
}

// Traffic begins to send.
func (p *Pod) Traffic(conn net.Conn) *Traffic {
	p.Helper()
	flow := p.Flow(53)
	ctx, cancel := context.WithCancel(p.Context())
	t := &Traffic{p: p, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		for ; ctx.Err() == nil; t.rounds.Add(1) {
			_ = conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
			_, _ = conn.Write([]byte("more\n"))
			_, _ = flow.conn.Write([]byte("?\n"))
			// Their first packets count, not the answers.
			once, done := context.WithTimeout(ctx, 2*time.Millisecond)
			_, _ = p.Lab.Ask(once, p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 54))
			_, _ = p.Lab.Ask(once, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
			done()
		}
	}()
	p.Cleanup(t.Stop)
	return t
}

// Await waits until each way has sent n more packets.
func (t *Traffic) Await(n int64) {
	t.p.Helper()
	end := t.rounds.Load() + n + 1 // one may be under way
	t.p.Until("traffic is sent", func() bool { return t.rounds.Load() >= end })
}

// Stop stops it.
func (t *Traffic) Stop() {
	t.cancel()
	<-t.done
}

// AddRoute leads to a network by a neighbour.
func (p *Pod) AddRoute(ns *netns.Namespace, name, to, via string) {
	p.Helper()
	h := p.Handle(ns)
	r := &netlink.Route{Dst: IPNet(to), Gw: netip.MustParseAddr(via).AsSlice(), LinkIndex: p.Link(h, name).Attrs().Index}
	if err := h.RouteReplace(r); err != nil {
		p.Fatal(err)
	}
}

// IPNet returns a network as netlink takes it.
func IPNet(s string) *net.IPNet {
	n := netip.MustParsePrefix(s)
	return &net.IPNet{IP: n.Addr().AsSlice(), Mask: net.CIDRMask(n.Bits(), n.Addr().BitLen())}
}

// Addr returns an address with its length as netlink takes it.
func Addr(s string) *netlink.Addr { return &netlink.Addr{IPNet: IPNet(s)} }

// Everywhere is the destination of an IPv4 default route.
func Everywhere() *net.IPNet { return IPNet("0.0.0.0/0") }
