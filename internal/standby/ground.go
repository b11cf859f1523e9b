package standby

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/echo"
	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/packet"
	"github.com/egress-router/egress-router/internal/spec"
)

// A ground is the physical network, by the sockets of the current interface. Run waits for
// nothing here: the kernel's lock of all interfaces (rtnl) can be held for a tenth of a second
// on a busy node.
type ground struct {
	o    Options
	post func(election.Event)

	now      atomic.Pointer[sockets] // nil: there is no interface
	gateways sync.Map                // hardware addresses of gateways, of their last packets: netip.Addr, [6]byte
	reached  chan struct{}           // has a value after a call of reach
	reading  sync.WaitGroup

	// Used by Run only.
	numbers [remembered]uint32
	times   [remembered]time.Duration
	next    int
}

// remembered is the number of pings whose times are kept: more than are on their way.
const remembered = 64

// sockets are those of one interface.
type sockets struct {
	index    int
	mac      [6]byte
	stations []*arp.Station // one for each family
	asked    *arp.Station   // for the addresses of IPv4; nil: the kernel answers
	echoes   *packet.Conn
}

func (s *sockets) close() {
	for _, station := range s.stations {
		station.Close()
	}
	if s.asked != nil {
		s.asked.Close()
	}
	if s.echoes != nil {
		s.echoes.Close()
	}
}

func newGround(o Options, post func(election.Event)) *ground {
	return &ground{o: o, post: post, reached: make(chan struct{}, 1)}
}

// hardware returns the interface's hardware address.
func (g *ground) hardware() (mac [6]byte) {
	if s := g.now.Load(); s != nil {
		mac = s.mac
	}
	return mac
}

// index returns the interface's index; zero: there is none.
func (g *ground) index() int {
	if s := g.now.Load(); s != nil {
		return s.index
	}
	return 0
}

// follow follows the interface until ctx ends: it may come, go, be another one, and lose its
// carrier.
func (g *ground) follow(ctx context.Context, trouble func(error)) {
	var changed <-chan struct{} // nil: changes are found by time alone
	if changes, err := events.SubscribeLinks(); err != nil {
		trouble(fmt.Errorf("follow the egress interface: %w", err))
	} else {
		defer changes.Close()
		changed = changes.Changed()
	}
	defer func() {
		if s := g.now.Swap(nil); s != nil {
			s.close()
		}
		g.reading.Wait()
	}()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for before := false; ; {
		up, err := g.look()
		if err != nil {
			trouble(err)
		}
		if up != before {
			before = up
			g.post(election.Event{Kind: election.Link, OK: up})
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-ticker.C:
		}
	}
}

// look opens sockets on the interface if it is another one than before. It reports whether the
// interface is there with a carrier.
func (g *ground) look() (up bool, err error) {
	before := g.now.Load()
	leave := func() {
		if before != nil {
			g.now.Store(nil)
			before.close()
		}
	}
	i, err := net.InterfaceByName(g.o.Interface)
	if err != nil { // the router's reconcile reports it
		leave()
		return false, nil
	}
	if len(i.HardwareAddr) != 6 {
		leave()
		return false, fmt.Errorf("interface %s: expected a hardware address of Ethernet, found %q", i.Name, i.HardwareAddr)
	}
	up = i.Flags&net.FlagRunning != 0
	if mac := [6]byte(i.HardwareAddr); before == nil || before.index != i.Index || before.mac != mac {
		leave()
		s, err := g.join(i.Index, mac)
		if err != nil {
			s.close()
			return false, err
		}
		g.now.Store(s)
	}
	return up, nil
}

// join opens the sockets of an interface.
func (g *ground) join(index int, mac [6]byte) (*sockets, error) {
	s := &sockets{index: index, mac: mac}
	for _, first := range g.o.Sources.Families() {
		addresses := g.o.Sources.Of(first.Prefix.Addr().Is6()).Addresses()
		station, err := arp.Join(index, addresses, first.Gateway, g.o.Mark)
		if err != nil {
			return s, err
		}
		s.stations = append(s.stations, station)
		g.reading.Go(func() { g.readNeighbours(station, first) })
	}
	if addresses := g.o.Sources.Of(false).Addresses(); g.o.Answers && len(addresses) > 0 {
		asked, err := arp.ListenRequests(index, addresses, g.o.Mark)
		if err != nil {
			return s, err
		}
		s.asked = asked
		g.reading.Go(func() { g.answer(asked, index, mac) })
	}
	// The gate lets no reply pass: nothing in the pod has asked for it.
	c, err := packet.Listen(index, packet.All, echoFilter(g.o.Witness))
	if err != nil {
		return s, err
	}
	s.echoes = c
	if err := c.Mark(g.o.Mark); err != nil {
		return s, err
	}
	g.reading.Go(func() { g.readEchoes(c) })
	return s, nil
}

// echoFilter returns the filter of a packet socket that accepts echo replies of a witness. A
// reply with IP options is missed in user space, and still counts in the kernel.
func echoFilter(witness netip.Addr) (filter []bpf.Instruction) {
	const etherTypeAt, etherHeader = 12, 14
	etherType, protocolAt, protocol, sourceAt, typeAt, reply := uint32(echo.EtherTypeIPv4), uint32(9), uint32(unix.IPPROTO_ICMP), uint32(12), uint32(20), uint32(0)
	if witness.Is6() {
		etherType, protocolAt, protocol, sourceAt, typeAt, reply = echo.EtherTypeIPv6, 6, unix.IPPROTO_ICMPV6, 8, 40, 129
	}
	source := witness.AsSlice()
	tests := []struct {
		load bpf.Instruction
		want uint32
	}{
		{bpf.LoadExtension{Num: bpf.ExtType}, unix.PACKET_HOST},
		{bpf.LoadAbsolute{Off: etherTypeAt, Size: 2}, etherType},
		{bpf.LoadAbsolute{Off: etherHeader + protocolAt, Size: 1}, protocol},
		{bpf.LoadAbsolute{Off: etherHeader + typeAt, Size: 1}, reply},
	}
	for at := 0; at < len(source); at += 4 {
		word := uint32(source[at])<<24 | uint32(source[at+1])<<16 | uint32(source[at+2])<<8 | uint32(source[at+3])
		tests = append(tests, struct {
			load bpf.Instruction
			want uint32
		}{bpf.LoadAbsolute{Off: etherHeader + sourceAt + uint32(at), Size: 4}, word}) //nolint:gosec // at most 12
	}
	for i, t := range tests {
		left := uint8(2 * (len(tests) - 1 - i)) //nolint:gosec // a short program
		filter = append(filter, t.load, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: t.want, SkipTrue: left + 1})
	}
	return append(filter, bpf.RetConstant{Val: 256}, bpf.RetConstant{Val: 0})
}

// readNeighbours passes on who claims an address, and keeps the gateway's hardware address.
func (g *ground) readNeighbours(s *arp.Station, first spec.Source) {
	for {
		p, err := s.Receive()
		if err != nil {
			return // closed, or the interface has gone; follow opens another
		}
		if len(p.SenderMAC) != 6 {
			continue
		}
		mac := [6]byte(p.SenderMAC)
		switch {
		case p.SenderIP == first.Gateway:
			g.gateways.Store(first.Gateway, mac)
		case mac == g.hardware(): // sent back by a switch
		case g.o.Sources.Have(p.SenderIP):
			g.post(election.Event{Kind: election.Defended, MAC: mac})
		}
	}
}

// answer answers ARP requests for the addresses.
func (g *ground) answer(s *arp.Station, index int, mac [6]byte) {
	for {
		p, err := s.Receive()
		if err != nil {
			return // as in readNeighbours
		}
		if frame := g.reply(p, index, mac); frame != nil {
			_ = s.Send(frame) // lost, as others are on the network: the host asks again
		}
	}
}

// reply returns the answer to an ARP request, or nil unless the kernel's gate is open: a process that
// was stopped, and has lost the addresses meanwhile, does not answer what it reads late.
func (g *ground) reply(p arp.Packet, index int, mac [6]byte) []byte {
	if left, err := g.o.Gate(index).Left(); err != nil || left == 0 {
		return nil
	}
	frame, err := p.Answer(mac[:])
	if err != nil { // no request of a host
		return nil
	}
	return frame
}

// readEchoes passes on the answers of the witness.
func (g *ground) readEchoes(c *packet.Conn) {
	for {
		frame, err := c.Receive(time.Time{})
		if err != nil {
			return
		}
		if r, err := echo.Parse(frame); err == nil && r.Source == g.o.Witness && r.Target == g.source() {
			g.post(election.Event{Kind: election.Echoed, Number: r.Number})
		}
	}
}

// source returns the address that asks the witness.
func (g *ground) source() netip.Addr { return g.o.Sources[0].Prefix.Addr() }

// each calls do for the first source of each family with its station. Without an interface all
// is lost, as on a network that loses every frame.
func (g *ground) each(do func(*arp.Station, net.HardwareAddr, spec.Source) error) error {
	s := g.now.Load()
	if s == nil {
		return nil
	}
	var errs []error
	for i, first := range g.o.Sources.Families() {
		errs = append(errs, lost(do(s.stations[i], s.mac[:], first)))
	}
	return errors.Join(errs...)
}

// lost returns an error of sending, or nil if the frame is lost as others are on the network: the
// gate has dropped it (ENOBUFS; packet_snd in net/packet/af_packet.c), or the interface has gone
// or is down, which is an event of its own.
func lost(err error) error {
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// ping asks the witness, by way of the gateway. Before the gateway's hardware address is
// known the ping is lost.
func (g *ground) ping(number uint32, now time.Duration) error {
	s := g.now.Load()
	via, known := g.gateways.Load(g.o.Sources[0].Gateway)
	if s == nil || !known {
		return nil
	}
	mac := via.([6]byte)
	frame, err := echo.Request{From: s.mac[:], Via: mac[:], Source: g.source(), Target: g.o.Witness, Number: number}.Frame()
	if err != nil {
		return err
	}
	g.numbers[g.next], g.times[g.next] = number, now
	g.next = (g.next + 1) % remembered
	return lost(s.echoes.Send(frame))
}

// sent returns when a ping was sent.
func (g *ground) sent(number uint32) (time.Duration, bool) {
	for i, n := range g.numbers {
		if n == number && g.times[i] != 0 {
			return g.times[i], true
		}
	}
	return 0, false
}

// probe asks who has the addresses, without a claim (RFC 5227, section 2.1.1).
func (g *ground) probe() error {
	return g.each(func(s *arp.Station, mac net.HardwareAddr, first spec.Source) error {
		frame, err := arp.Probe(mac, first.Prefix.Addr())
		if err != nil {
			return err
		}
		return s.Send(frame)
	})
}

// announce claims all addresses, and asks each gateway, so that it has its entry and we have
// its hardware address.
func (g *ground) announce() error {
	return g.each(func(s *arp.Station, mac net.HardwareAddr, first spec.Source) error {
		for _, a := range g.o.Sources.Of(first.Prefix.Addr().Is6()) {
			if err := s.Announce(mac, a.Prefix.Addr()); err != nil {
				return err
			}
		}
		frame, err := arp.RequestFor(first.Gateway, mac, first.Prefix.Addr())
		if err != nil {
			return err
		}
		return s.Send(frame)
	})
}

// reach has the kernel told the hardware addresses of the gateways that are known.
func (g *ground) reach() {
	select {
	case g.reached <- struct{}{}:
	default: // about to be done
	}
}

// tell tells the kernel after each reach, until ctx ends.
func (g *ground) tell(ctx context.Context, trouble func(error)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.reached:
		}
		g.gateways.Range(func(gateway, mac any) bool {
			if err := g.o.Reach(gateway.(netip.Addr), mac.([6]byte)); err != nil {
				trouble(err)
			}
			return true
		})
	}
}
