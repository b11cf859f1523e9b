package arp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/ndp"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// A host is a namespace of the lab with its link on the physical network.
type host struct {
	*netlink.Handle

	t     *testing.T
	do    func(func() error) error // in the namespace
	link  netlink.Link
	index int
	mac   net.HardwareAddr
}

func newHost(t *testing.T, do func(func() error) error, name string) *host {
	t.Helper()
	h := &host{t: t, do: do}
	h.must(do(func() (err error) {
		h.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}))
	t.Cleanup(h.Close)
	var err error
	h.link, err = h.LinkByName(name)
	h.must(err)
	h.index, h.mac = h.link.Attrs().Index, h.link.Attrs().HardwareAddr
	return h
}

// network returns a lab whose router has macvlan0 up, without an address.
func network(t *testing.T) (l *lab.Lab, router, outside *host) {
	t.Helper()
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	router, outside = newHost(t, l.Router.Do, l.MacvlanName), newHost(t, l.Outside.Do, lab.LANLink)
	router.up()
	return l, router, outside
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) up()   { h.t.Helper(); h.must(h.LinkSetUp(h.link)) }
func (h *host) down() { h.t.Helper(); h.must(h.LinkSetDown(h.link)) }

func (h *host) take(a netip.Addr) {
	h.t.Helper()
	h.must(h.AddrAdd(h.link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(lab.LAN.Bits(), 32)}}))
}

// transmit sends frames with any content.
func (h *host) transmit(frames ...[]byte) {
	h.t.Helper()
	h.must(h.do(func() error {
		s, err := Open(h.index)
		if err != nil {
			return err
		}
		defer s.Close()
		for _, f := range frames {
			if err := s.c.Send(f); err != nil {
				return err
			}
		}
		return nil
	}))
}

// repeat sends frames every 10 ms until stop is called. One frame may be lost: all namespaces share
// the queues of the processors (net.core.netdev_max_backlog), which other tests fill.
func (h *host) repeat(frames ...[]byte) (stop func()) {
	h.t.Helper()
	var sender *Socket
	h.must(h.do(func() (err error) {
		sender, err = Open(h.index)
		return err
	}))
	stopped, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for every := time.Tick(10 * time.Millisecond); ; {
			for _, f := range frames {
				_ = sender.c.Send(f) // the interface may be down
			}
			select {
			case <-stopped:
				return
			case <-every:
			}
		}
	}()
	return func() {
		close(stopped)
		<-ended
		sender.Close()
	}
}

func (h *host) listen() *conn {
	h.t.Helper()
	var c *conn
	h.must(h.do(func() (err error) {
		c, err = listen(h.index, []netip.Addr{lab.Source}, lab.GatewayAddr)
		return err
	}))
	h.t.Cleanup(c.close)
	return c
}

func (h *host) ask() *Question { return h.askFor(lab.Source) }

func (h *host) askFor(a netip.Addr) *Question {
	h.t.Helper()
	var q *Question
	h.must(h.do(func() (err error) {
		q, err = Ask(h.index, h.mac, a)
		return err
	}))
	return q
}

// again asks until an answer comes: a frame may be lost, as for repeat.
func again(ask func() *Question) (holder net.HardwareAddr, err error) {
	for end := soon(); holder == nil && err == nil && time.Now().Before(end); {
		holder, err = ask().Answer(context.Background(), time.Now().Add(time.Second))
	}
	return holder, err
}

// acquire probes for the reserved address. A thread does not leave its namespace
// while it waits.
func (h *host) acquire(ctx context.Context) (holder net.HardwareAddr, err error) {
	err = h.do(func() (err error) {
		holder, err = Acquire(ctx, h.index, h.mac, lab.Source)
		return err
	})
	return holder, err
}

// claim returns a claim of another holder of the address.
func claim(mac net.HardwareAddr) []byte {
	return Packet{Request, mac, lab.Source, unknown(), lab.Source}.frame()
}

// soon returns a time later than any event of a test.
func soon() time.Time { return time.Now().Add(lab.Patience) }

// The socket receives exactly the frames that the filter accepts, out of all on the
// physical network, and the kernel counts no others for it. The receiver is a
// veth, which also gets frames for other hosts.
func TestKernelFilters(t *testing.T) {
	_, speaker, listener := network(t)
	accepted, dropped := framesBy(t)
	var err error
	for range 5 { // a frame may be lost, as for repeat; one too many is an error each time
		if err = filter(t, speaker, listener, accepted, dropped); err == nil {
			return
		}
		t.Log(err)
	}
	t.Error(err)
}

// filter sends all frames, and checks that the socket gets those that are accepted.
func filter(t *testing.T, speaker, listener *host, accepted, dropped map[string][]byte) error {
	t.Helper()
	c := listener.listen()
	own, err := Announcement(Request, listener.mac, lab.Source)
	listener.must(err)
	listener.must(c.send(own))
	passed := 0
	for _, frame := range dropped {
		if len(frame) >= fixedOffset { // the kernel sends no shorter frame (packet_snd in net/packet/af_packet.c)
			copy(frame, broadcast)
			speaker.transmit(frame)
			passed++
		}
	}
	toOther := claim(speaker.mac)
	copy(toOther, otherMAC)
	inVLAN := slices.Concat(broadcast, speaker.mac, []byte{0x81, 0x00, 0, 5}, claim(speaker.mac)[etherTypeOffset:])
	speaker.transmit(toOther, inVLAN)
	for _, frame := range accepted {
		copy(frame, broadcast)
		speaker.transmit(frame)
	}
	speaker.transmit(claim(speaker.mac)) // the last one

	for {
		p, err := c.receive(time.Now().Add(10 * time.Second))
		if err != nil {
			return fmt.Errorf("wait for the last frame: %w", err)
		}
		if bytes.Equal(p.SenderMAC, speaker.mac) {
			break
		}
	}
	if p, err := c.receive(time.Now()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("then %v, %v", p, err)
	}
	var stats *unix.TpacketStats
	listener.must(c.Control(func(fd int) (err error) {
		stats, err = unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		return err
	}))
	want := len(accepted) + 1
	if int(stats.Packets) != want || stats.Drops != 0 {
		err = fmt.Errorf("the socket got %d packets, want %d; %d others passed", stats.Packets, want, passed+3)
	}
	if int(stats.Packets) > want {
		t.Fatal(err)
	}
	return err
}

// A receiver survives that the interface is down, before and during a receive.
func TestKernelDownAndUp(t *testing.T) {
	_, router, outside := network(t)
	router.down()
	c := router.listen()
	if _, err := c.receive(time.Now().Add(time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("down: %v", err)
	}
	for range 3 {
		router.up()
		stop := outside.repeat(claim(outside.mac))
		if p, err := c.receive(soon()); err != nil || !bytes.Equal(p.SenderMAC, outside.mac) {
			t.Fatalf("up: %v, %v", p, err)
		}
		stop()
		router.down()
		if err := c.send(claim(router.mac)); !errors.Is(err, unix.ENETDOWN) {
			t.Errorf("sending while down: %v, want %v", err, unix.ENETDOWN)
		}
	}
	router.up()
	router.must(c.send(claim(router.mac))) // does not return the earlier error

	// During a receive.
	got := make(chan error)
	go func() {
		_, err := c.receive(soon())
		got <- err
	}()
	router.down()
	router.up()
	stop := outside.repeat(claim(outside.mac))
	router.must(<-got)
	stop()
}

// A deleted interface ends the receiver: deleted while up, while down, or moved.
func TestKernelGone(t *testing.T) {
	for name, test := range map[string]struct {
		before, end func(l *lab.Lab, h *host) error
	}{
		"deleted": {
			func(*lab.Lab, *host) error { return nil },
			func(_ *lab.Lab, h *host) error { return h.LinkDel(h.link) },
		},
		"deleted while down": {
			func(_ *lab.Lab, h *host) error { return h.LinkSetDown(h.link) },
			func(_ *lab.Lab, h *host) error { return h.LinkDel(h.link) },
		},
		"moved away and back": {
			func(*lab.Lab, *host) error { return nil },
			func(l *lab.Lab, h *host) error {
				if err := h.LinkSetNsFd(h.link, l.Client.Fd()); err != nil {
					return err
				}
				there, err := l.Netlink(l.Client)
				if err != nil {
					return err
				}
				defer there.Close()
				return there.LinkSetNsFd(h.link, l.Router.Fd())
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, router, _ := network(t)
			var w *Watch
			router.must(router.do(func() (err error) {
				w, err = NewWatch(Options{Index: router.index, MAC: router.mac, Addresses: []netip.Addr{lab.Source}, Gateway: lab.GatewayAddr})
				return err
			}))
			ended := make(chan error)
			go func() { ended <- w.Run(t.Context()) }()
			router.must(test.before(l, router))
			router.must(test.end(l, router))
			if err := <-ended; !errors.Is(err, ErrGone) {
				t.Errorf("%v, want %v", err, ErrGone)
			}
		})
	}
}

func TestKernelCloseEndsReceive(t *testing.T) {
	_, router, _ := network(t)
	for range 20 {
		c := router.listen()
		got := make(chan error)
		go func() {
			_, err := c.receive(time.Time{})
			got <- err
		}()
		c.close()
		c.close()
		if err := <-got; !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v, want %v", err, os.ErrClosed)
		}
		if err := c.send(claim(router.mac)); !errors.Is(err, os.ErrClosed) {
			t.Errorf("sending: %v, want %v", err, os.ErrClosed)
		}
	}
}

func TestKernelAsk(t *testing.T) {
	_, router, outside := network(t)
	start := time.Now()
	if holder, err := router.ask().Answer(t.Context(), start.Add(50*time.Millisecond)); holder != nil || err != nil {
		t.Errorf("free: holder %v, %v", holder, err)
	}
	outside.take(lab.Source)
	start = time.Now()
	holder, err := again(router.ask)
	if !bytes.Equal(holder, outside.mac) || err != nil {
		t.Errorf("held: holder %v, %v; want %v", holder, err, outside.mac)
	}
	t.Logf("answered after %s", time.Since(start))

	// Read long after the deadline, the answer is still there. The kernel passes a
	// frame to the newest socket first (dev_add_pack in net/core/dev.c), so the
	// question has each frame that an older socket has.
	witness := router.listen()
	q := router.ask()
	stop := outside.repeat(claim(outside.mac))
	if _, err := witness.receive(soon()); err != nil {
		t.Fatal(err)
	}
	stop()
	if holder, err := q.Answer(t.Context(), start); !bytes.Equal(holder, outside.mac) || err != nil {
		t.Errorf("late: holder %v, %v; want %v", holder, err, outside.mac)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	q = router.ask()
	if _, err := q.Answer(ctx, soon()); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v, want %v", err, context.Canceled)
	}
	router.ask().Close()

	router.down()
	err = router.do(func() error {
		_, err := Ask(router.index, router.mac, lab.Source)
		return err
	})
	if !errors.Is(err, unix.ENETDOWN) {
		t.Errorf("down: %v, want %v", err, unix.ENETDOWN)
	}
}

// A gateway answers the request, also by proxy ARP, by which it answers no probe. A
// Watch polls it by unicast.
func TestKernelAskGateway(t *testing.T) {
	for name, test := range map[string]struct {
		sysctls map[string]string // of the gateway
		gateway netip.Addr
		probed  bool // it answers a probe too
	}{
		"own address":                   {nil, lab.GatewayAddr, true},
		"only senders of its subnet":    {map[string]string{"arp_ignore": "2"}, lab.GatewayAddr, true},
		"proxy ARP, outside the subnet": {map[string]string{"proxy_arp": "1", "forwarding": "1"}, netip.MustParseAddr("169.254.1.1"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, router, outside := network(t)
			for sysctl, value := range test.sysctls {
				outside.must(l.SetSysctl(l.Outside, "net/ipv4/conf/lan0/"+sysctl, value))
			}
			if !test.probed {
				// The kernel answers for addresses that it routes to another interface.
				to := &net.IPNet{IP: test.gateway.AsSlice(), Mask: net.CIDRMask(32, 32)}
				lo, err := outside.LinkByName("lo")
				outside.must(err)
				outside.must(outside.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: to}))
			}
			ask := func(ask func() (*Question, error)) *Question {
				var q *Question
				router.must(router.do(func() (err error) {
					q, err = ask()
					return err
				}))
				return q
			}
			capture, err := l.Capture(l.Outside, lab.LANLink)
			outside.must(err)
			answered := func(to netip.Addr) bool {
				return slices.ContainsFunc(capture.Frames(), func(f lab.Frame) bool {
					a, ok := f.ARP()
					return ok && a.Op == 2 && a.SenderIP == test.gateway && a.TargetIP == to
				})
			}
			until := func(holds func() bool) { // a frame may be lost, as for repeat
				t.Helper()
				for end := soon(); !holds(); {
					if time.Now().After(end) {
						t.Fatal("no answer")
					}
				}
			}
			until(func() bool {
				ask(func() (*Question, error) { return Ask(router.index, router.mac, test.gateway) }).Close()
				if !test.probed {
					return true
				}
				time.Sleep(10 * time.Millisecond)
				return answered(netip.IPv4Unspecified())
			})
			router.take(lab.Source)
			until(func() bool {
				request := ask(func() (*Question, error) { return AskGateway(router.index, router.mac, lab.Source, test.gateway) })
				mac, err := request.Answer(t.Context(), time.Now().Add(time.Second))
				if err != nil || len(mac) > 0 && !bytes.Equal(mac, outside.mac) {
					t.Fatalf("request: %v, %v; want %v", mac, err, outside.mac)
				}
				return len(mac) > 0 && answered(lab.Source)
			})
			// The probe came first.
			if probed := answered(netip.IPv4Unspecified()); probed != test.probed {
				t.Errorf("probe answered: %v, want %v", probed, test.probed)
			}

			// The polls of a Watch.
			capture, err = l.Capture(l.Outside, lab.LANLink)
			outside.must(err)
			reachable := make(chan bool, 10)
			var w *Watch
			router.must(router.do(func() (err error) {
				w, err = NewWatch(Options{
					Index: router.index, MAC: router.mac, Addresses: []netip.Addr{lab.Source}, Gateway: test.gateway,
					GatewayChanged: func(now bool, _ net.HardwareAddr) { reachable <- now },
				})
				return err
			}))
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- w.Run(ctx) }()
			router.must(w.ProbeGateway())
			poll := func(f lab.Frame) bool {
				a, ok := f.ARP()
				return ok && a.Op == 1 && a.SenderIP == lab.Source && bytes.Equal(f.Destination(), outside.mac)
			}
			if _, err := capture.Wait(t.Context(), poll); err != nil {
				t.Error(err)
			}
			cancel()
			router.must(<-ended)
			if s := w.State().Gateway; !s.Reachable || len(reachable) != 1 {
				t.Errorf("gateway %+v after %d changes, want it reachable after one", s, len(reachable))
			}
		})
	}
}

func TestKernelAcquire(t *testing.T) {
	t.Run("free", func(t *testing.T) {
		t.Parallel()
		_, router, _ := network(t)
		start := time.Now()
		if holder, err := router.acquire(t.Context()); holder != nil || err != nil {
			t.Errorf("holder %v, %v; want none", holder, err)
		}
		if took := time.Since(start); took < 4*time.Second {
			t.Errorf("took %s, want at least 4s", took)
		}
	})
	t.Run("held", func(t *testing.T) {
		t.Parallel()
		_, router, outside := network(t)
		outside.take(lab.Source)
		// TestAcquireConflict has the time that it takes.
		if holder, err := router.acquire(t.Context()); !bytes.Equal(holder, outside.mac) || err != nil {
			t.Errorf("holder %v, %v; want %v", holder, err, outside.mac)
		}
	})
	// The host with the later probe has received the other's.
	t.Run("two at once", func(t *testing.T) {
		t.Parallel()
		_, router, outside := network(t)
		theirs := make(chan net.HardwareAddr)
		go func() {
			holder, _ := outside.acquire(t.Context())
			theirs <- holder
		}()
		holder, err := router.acquire(t.Context())
		if err != nil {
			t.Error(err)
		}
		if holder == nil && <-theirs == nil {
			t.Error("both may take the address")
		}
	})
}

// Two hosts with the reserved address, and a gateway that falls silent.
func TestKernelWatch(t *testing.T) {
	l, router, outside := network(t)
	router.take(lab.Source)
	conflicts, gateway := make(chan net.HardwareAddr, 10), make(chan bool, 10)
	var w *Watch
	router.must(router.do(func() (err error) {
		w, err = NewWatch(Options{
			Index: router.index, MAC: router.mac, Addresses: []netip.Addr{lab.Source}, Gateway: lab.GatewayAddr,
			Conflict:       func(_ netip.Addr, mac net.HardwareAddr) { conflicts <- mac },
			GatewayChanged: func(reachable bool, _ net.HardwareAddr) { gateway <- reachable },
		})
		return err
	}))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()

	router.must(w.ProbeGateway())
	if !<-gateway {
		t.Error("the gateway answers, and counts as unreachable")
	}
	outside.must(l.SetSysctl(l.Outside, "net/ipv4/conf/lan0/arp_ignore", "8")) // answers for no address
	if <-gateway {
		t.Error("reachable after three misses")
	}
	outside.must(l.SetSysctl(l.Outside, "net/ipv4/conf/lan0/arp_ignore", "0"))
	if !<-gateway {
		t.Error("the gateway answers again, and counts as unreachable")
	}
	if g := w.State().Gateway; !g.Known || !g.Reachable || !bytes.Equal(g.MAC, outside.mac) || g.Misses != 0 {
		t.Errorf("gateway %+v", g)
	}

	capture, err := l.Capture(l.Outside, lab.LANLink)
	router.must(err)
	outside.take(lab.Source)
	stop := outside.repeat(claim(outside.mac))
	if mac := <-conflicts; !bytes.Equal(mac, outside.mac) {
		t.Errorf("conflict with %s, want %s", mac, outside.mac)
	}
	defence := func(op uint16) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			a, ok := f.ARP()
			return ok && a.Op == op && a.Announces() && a.SenderIP == lab.Source && bytes.Equal(a.SenderMAC, router.mac)
		}
	}
	for _, op := range []uint16{2, 1} {
		if _, err := capture.Wait(t.Context(), defence(op)); err != nil {
			t.Error(err)
		}
	}
	stop()
	if s := w.State(); s.Conflicts == 0 || s.Defences == 0 || !bytes.Equal(s.ConflictMAC, outside.mac) {
		t.Errorf("state %+v", s)
	}

	cancel()
	router.must(<-ended)
}

// The same by neighbour discovery, with two addresses and a link-local gateway.
func TestKernelWatchIPv6(t *testing.T) {
	l, err := lab.New(lab.Options{IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	router, outside := newHost(t, l.Router.Do, l.MacvlanName), newHost(t, l.Outside.Do, lab.LANLink)
	second := lab.Source6.Next()
	addresses := []netip.Addr{lab.Source6, second}
	router.must(l.SetSysctl(l.Router, "net/ipv6/conf/macvlan0/accept_dad", "0"))
	router.up()
	for _, a := range addresses {
		router.must(router.AddrAdd(router.link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}))
	}
	if mac, err := again(func() *Question { return router.askFor(lab.LANServer6) }); !bytes.Equal(mac, outside.mac) {
		t.Errorf("holder %v, %v, want %v", mac, err, outside.mac)
	}
	if mac, err := again(func() (q *Question) {
		router.must(router.do(func() (err error) {
			q, err = AskGateway(router.index, router.mac, lab.Source6, lab.GatewayLinkLocal)
			return err
		}))
		return q
	}); !bytes.Equal(mac, outside.mac) {
		t.Errorf("gateway %v, %v, want %v", mac, err, outside.mac)
	}

	type conflict struct {
		address netip.Addr
		mac     string
	}
	conflicts, gateway := make(chan conflict, 10), make(chan bool, 10)
	var w *Watch
	router.must(router.do(func() (err error) {
		w, err = NewWatch(Options{
			Index: router.index, MAC: router.mac, Addresses: addresses, Gateway: lab.GatewayLinkLocal,
			Conflict:       func(a netip.Addr, mac net.HardwareAddr) { conflicts <- conflict{a, mac.String()} },
			GatewayChanged: func(reachable bool, _ net.HardwareAddr) { gateway <- reachable },
		})
		return err
	}))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()
	capture, err := l.Capture(l.Outside, lab.LANLink)
	router.must(err)
	router.must(w.ProbeGateway())
	if !<-gateway {
		t.Error("the gateway answers, and counts as unreachable")
	}
	message := func(counts func(ndp.Message, lab.Frame) bool) func(lab.Frame) bool {
		return func(f lab.Frame) bool {
			m, err := ndp.Parse(f.Data)
			return err == nil && counts(m, f)
		}
	}
	// The poll after the answer is by unicast.
	if _, err := capture.Wait(t.Context(), message(func(m ndp.Message, f lab.Frame) bool {
		return m.Type == ndp.Solicitation && m.Source == lab.Source6 && m.Target == lab.GatewayLinkLocal && bytes.Equal(f.Destination(), outside.mac)
	})); err != nil {
		t.Error(err)
	}
	outside.must(outside.LinkSetDown(outside.link))
	if <-gateway {
		t.Error("reachable after three misses")
	}
	outside.must(outside.LinkSetUp(outside.link))
	outside.must(outside.AddrReplace(outside.link, &netlink.Addr{IPNet: &net.IPNet{IP: lab.GatewayLinkLocal.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}))
	if !<-gateway {
		t.Error("the gateway answers again, and counts as unreachable")
	}

	claim, err := ndp.Announce(outside.mac, second)
	outside.must(err)
	stop := outside.repeat(claim)
	if c := <-conflicts; c != (conflict{second, outside.mac.String()}) {
		t.Errorf("conflict %v, want %s at %s", c, second, outside.mac)
	}
	if _, err := capture.Wait(t.Context(), message(func(m ndp.Message, _ lab.Frame) bool {
		return m.Type == ndp.Advertisement && m.Target == second && bytes.Equal(m.MAC, router.mac)
	})); err != nil {
		t.Error(err)
	}
	stop()
	if s := w.State(); s.Conflicts == 0 || s.Defences == 0 || s.Conflicting != second {
		t.Errorf("state %+v", s)
	}
	cancel()
	router.must(<-ended)
}
