package labtest

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/vishvananda/netlink"
)

// Remote are the servers beyond the gateway.
var Remote = netip.MustParsePrefix("203.0.113.0/24")

// AddRoute leads to a network by a neighbour.
func (p *Pod) AddRoute(ns *netns.Namespace, name, to, via string) {
	p.Helper()
	h := p.Handle(ns)
	r := &netlink.Route{Dst: IPNet(to), Gw: netip.MustParseAddr(via).AsSlice(), LinkIndex: p.Link(h, name).Attrs().Index}
	if err := h.RouteReplace(r); err != nil {
		p.Fatal(err)
	}
}

// A Watch captures on several links, and says afterwards what they have seen.
type Watch struct {
	p        *Pod
	Captures map[string]*lab.Capture
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

// WantSource checks that whatever left by the egress side had the reserved
// address.
func (w Watch) WantSource() {
	w.p.Helper()
	for _, f := range w.Outgoing("macvlan0") {
		if ip, _ := f.IPv4(); ip.Src.Addr() != lab.Source {
			w.p.Errorf("by macvlan0: %s", f)
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

// Traffic sends by an open connection, by open flows and by new ones until it is
// told to stop; that returns how many packets it sent.
func (p *Pod) Traffic(conn net.Conn) (stop func() int) {
	flow := p.Flow(53)
	done, sent := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-done:
				sent <- n
				return
			default:
			}
			_ = conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
			_, _ = conn.Write([]byte("more\n"))
			_, _ = flow.conn.Write([]byte("?\n"))
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Millisecond)
			_, _ = p.Lab.Ask(ctx, p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 54))
			_, _ = p.Lab.Ask(ctx, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
			cancel()
		}
	}()
	return func() int {
		close(done)
		return <-sent
	}
}

// IPNet returns a network as netlink takes it.
func IPNet(s string) *net.IPNet {
	n := netip.MustParsePrefix(s)
	return &net.IPNet{IP: n.Addr().AsSlice(), Mask: net.CIDRMask(n.Bits(), n.Addr().BitLen())}
}

// ToServers picks packets to the servers beyond the gateway.
func ToServers(ip lab.Packet) bool { return Remote.Contains(ip.Dst.Addr()) }

func Addr(s string) *netlink.Addr { return &netlink.Addr{IPNet: IPNet(s)} }

func Everywhere() *net.IPNet { return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)} }
