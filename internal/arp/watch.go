package arp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	// defendInterval is the least time between two defences, so that two hosts
	// that both defend do not flood the link (RFC 5227 section 2.4 c,
	// DEFEND_INTERVAL in section 1.1).
	defendInterval = 10 * time.Second

	// reportInterval is the least time between two reports of one hardware
	// address: RFC 5227 section 2.4 c requires notifying an administrator, without
	// flooding.
	reportInterval = 10 * time.Second

	// maxReported is the largest number of hardware addresses reported in that
	// time. Any host on the link can invent any number of them.
	maxReported = 16

	// maxMisses is the number of unanswered requests in a row after which the
	// gateway is unreachable.
	maxMisses = 3

	// gatewayPoll is the time from the gateway's answer to the next request. One request
	// a second is the recommended maximum (RFC 1122 section 2.3.2.1, which also
	// recommends to poll by unicast), and the kernel's own rate (retrans_time_ms in
	// Documentation/networking/ip-sysctl.rst).
	gatewayPoll = time.Second

	// gatewayPause is the time from another packet of the gateway to the next request.
	// It is longer than the second between two requests of arping(8), which counts all
	// answers and fails if it has more than requests: while it runs, its answers are
	// enough.
	gatewayPause = 1500 * time.Millisecond

	// gatewayRetry is the time for an answer until the gateway is unreachable, which is
	// known within gatewayPause + maxMisses*gatewayRetry, less than 3 s. After that
	// requests follow each other by gatewayPoll again.
	gatewayRetry = 450 * time.Millisecond
)

// Options configure a Watch.
//
// The callbacks are called one at a time and in order. A callback must not call
// ProbeGateway, and blocks the Watch.
type Options struct {
	Index     int              // index of the interface
	MAC       net.HardwareAddr // its own; if it changes, make another Watch
	Addresses []netip.Addr     // the reserved addresses of one family, at least one
	Gateway   netip.Addr       // the zero Addr: no gateway
	Misses    int              // unanswered requests to the gateway before the Watch

	// Conflict is called for another host that claims an address: for each address and
	// hardware address at most once in 10 s, for at most 16 of them in that time.
	Conflict func(address netip.Addr, mac net.HardwareAddr)

	// GatewayChanged is called when the gateway becomes reachable or unreachable,
	// and when its state is first known. The hardware address is that of the last
	// answer; nil: there was none. Without a carrier it is not called for an
	// unreachable gateway, but if that is still unreachable when the carrier is back.
	GatewayChanged func(reachable bool, mac net.HardwareAddr)

	// Holds reports whether this host holds the addresses, of which other hosts may be the
	// holder in turn. While it does not, the Watch claims nothing: its requests are probes,
	// and claims of others are no conflicts. Nil: it always does.
	Holds func() bool
	// Peer reports whether a hardware address is that of another host that may be the holder:
	// its claims are no conflicts. Nil: there is none.
	Peer func(mac net.HardwareAddr) bool

	Log *slog.Logger // may be nil
}

// State is the state of a Watch.
type State struct {
	Conflicts   int              // packets of other hosts that claim an address
	ConflictMAC net.HardwareAddr // sender of the last one
	Conflicting netip.Addr       // the address that it claimed
	ConflictAt  time.Time
	Defences    int // announcements after conflicts

	Gateway GatewayState
}

// GatewayState is a Watch's state of the gateway.
type GatewayState struct {
	Known     bool // Reachable is valid: the gateway answered, or missed three requests
	Reachable bool
	Since     time.Time        // time of the last change of Reachable
	MAC       net.HardwareAddr // sender of the last answer; with VRRP it may change at any time
	Answered  time.Time        // time of the last answer
	Misses    int              // unanswered requests in a row
}

// A Watch detects other hosts that claim a router's addresses, defends them,
// and tracks whether the gateway is reachable. Only ARP, or neighbour discovery, of those
// addresses wakes it.
type Watch struct {
	options Options
	port    port

	// turn serializes packets and their callbacks; mu guards only state, so that
	// State never waits for a callback.
	turn sync.Mutex
	mu   sync.Mutex

	state    State
	asked    bool        // a request to the gateway is unanswered
	retry    *time.Timer // calls repeat; stopped before ProbeGateway
	polls    bool        // ProbeGateway was called
	cut      bool        // the interface has no carrier
	lost     bool        // the gateway is unreachable, and GatewayChanged not yet called
	defended map[netip.Addr]time.Time
	reported map[string]time.Time // last report, by address and hardware address
}

// NewWatch makes a Watch for an interface in the network namespace of the calling
// thread. It receives packets from now on; Run reads them. Call Close unless you
// call Run.
func NewWatch(o Options) (*Watch, error) {
	if len(o.Addresses) == 0 {
		return nil, errors.New("watch: no address")
	}
	for _, a := range o.Addresses {
		if err := CheckAnnouncement(o.MAC, a); err != nil {
			return nil, fmt.Errorf("watch %s: %w", a, err)
		}
	}
	c, err := listen(o.Index, o.Addresses, o.Gateway)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", o.Addresses[0], err)
	}
	return newWatch(o, c), nil
}

func newWatch(o Options, p port) *Watch {
	if o.Conflict == nil {
		o.Conflict = func(netip.Addr, net.HardwareAddr) {}
	}
	if o.GatewayChanged == nil {
		o.GatewayChanged = func(bool, net.HardwareAddr) {}
	}
	if o.Holds == nil {
		o.Holds = func() bool { return true }
	}
	if o.Peer == nil {
		o.Peer = func(net.HardwareAddr) bool { return false }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	w := &Watch{options: o, port: p, defended: map[netip.Addr]time.Time{}, reported: map[string]time.Time{}}
	w.state.Gateway.Misses = o.Misses
	w.retry = time.AfterFunc(gatewayPoll, w.repeat)
	w.retry.Stop()
	return w
}

// Run watches until ctx ends or the Watch is closed, without an error. It
// continues while the interface is down, and returns [ErrGone] after it is deleted.
// Run closes the Watch.
func (w *Watch) Run(ctx context.Context) error {
	defer w.Close()
	defer context.AfterFunc(ctx, w.Close)()
	for {
		p, err := w.port.receive(time.Time{})
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.options.Addresses[0], err)
		}
		w.see(p)
	}
}

// Close ends Run. It may be called again.
func (w *Watch) Close() {
	w.port.close()
	w.retry.Stop()
}

// State returns the current state. It may be called at any time, also by
// callbacks.
func (w *Watch) State() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

// announce announces an address, as [Socket.Announce] does.
func (w *Watch) announce(address netip.Addr) error {
	return announce(w.port.send, w.options.MAC, address)
}

// see processes a packet.
func (w *Watch) see(p Packet) {
	if bytes.Equal(p.SenderMAC, w.options.MAC) {
		return // our own, sent back by a switch
	}
	w.turn.Lock()
	defer w.turn.Unlock()
	switch {
	case slices.Contains(w.options.Addresses, p.SenderIP):
		if w.options.Holds() && !w.options.Peer(p.SenderMAC) {
			w.conflict(p.SenderIP, p.SenderMAC)
		}
	case p.SenderIP == w.options.Gateway:
		w.answered(p.SenderMAC)
	}
	// Other packets that pass the filter are probes for the address, which the
	// kernel answers (arp_process in net/ipv4/arp.c).
}

// conflict counts, defends and reports a conflict.
func (w *Watch) conflict(address netip.Addr, mac net.HardwareAddr) {
	now := time.Now()
	w.mu.Lock()
	w.state.Conflicts++
	w.state.ConflictMAC, w.state.Conflicting, w.state.ConflictAt = mac, address, now
	w.mu.Unlock()

	if last, defended := w.defended[address]; !defended || now.Sub(last) >= defendInterval {
		w.defended[address] = now // even after an error, which the next one would repeat
		// Neighbours have just learned the other host's hardware address. The two
		// forms count as one announcement.
		if err := w.announce(address); err != nil {
			w.options.Log.Warn("address defence failed", "address", address, "mac", mac.String(), "error", err)
		} else {
			w.mu.Lock()
			w.state.Defences++
			w.mu.Unlock()
		}
	}

	for claim, at := range w.reported {
		if now.Sub(at) >= reportInterval {
			delete(w.reported, claim)
		}
	}
	claim := address.String() + string(mac)
	if _, recently := w.reported[claim]; !recently && len(w.reported) < maxReported {
		w.reported[claim] = now
		w.options.Conflict(address, mac)
	}
}

// ProbeGateway begins to request the gateway's hardware address: by broadcast, and a
// second after each answer by unicast. After another packet of the gateway, which may be
// the answer to another program, it waits half a second longer. While the gateway does
// not answer, the Watch repeats the request by broadcast, and counts a miss each time.
// After 3 misses in a row the gateway is unreachable, until the next packet from it. A
// request that cannot be sent is an error, and a miss unless a packet arrives in that
// time.
//
// The sender of the request is the first reserved address, so the interface must have it,
// unless another host holds it. So the gateway keeps the hardware address of this interface
// for it, and a gateway that checks its own address for conflicts takes no request for one,
// as it would take a probe (RFC 5227 section 2.1.1). A second call does nothing.
func (w *Watch) ProbeGateway() error {
	w.turn.Lock()
	defer w.turn.Unlock()
	if w.polls || !w.options.Gateway.IsValid() {
		return nil
	}
	w.polls = true
	return w.request()
}

// SetCarrier sets whether the interface has a carrier; at first it has one. Requests
// without a carrier are misses, too, but no fault of the gateway: after it is back, 3
// other requests decide. A callback must not call it.
func (w *Watch) SetCarrier(carrier bool) {
	w.turn.Lock()
	defer w.turn.Unlock()
	back := carrier && w.cut
	w.cut = !carrier
	if !back || !w.polls {
		return
	}
	w.mu.Lock()
	if g := &w.state.Gateway; g.Known { // otherwise misses are all that is known of it
		g.Misses = 0
	}
	w.mu.Unlock()
	w.asked = false
	_ = w.request() // an error is a miss
}

// repeat sends the next request.
func (w *Watch) repeat() {
	w.turn.Lock()
	defer w.turn.Unlock()
	_ = w.request() // an error is a miss
}

// request sends a request to the gateway, and counts a miss if the last one is
// unanswered. The caller holds turn.
func (w *Watch) request() error {
	w.mu.Lock()
	g := w.state.Gateway
	w.mu.Unlock()
	var via net.HardwareAddr // nil: to all hosts
	if !w.asked {
		via = g.MAC
	}
	sender := w.options.Addresses[0]
	if !w.options.Holds() {
		via, sender = nil, unspecified(sender) // a probe goes to all (RFC 5227 section 2.1.1)
	}
	frame, err := requestBy(via, w.options.Gateway, w.options.MAC, sender)
	if err != nil {
		return err
	}
	err = w.port.send(frame)
	if errors.Is(err, os.ErrClosed) { // the Watch has ended
		return err
	}
	if w.asked {
		w.missed()
		g.Misses++
	}
	w.asked = true
	if g.Misses < maxMisses {
		w.retry.Reset(gatewayRetry)
	} else {
		w.retry.Reset(gatewayPoll)
	}
	if err != nil {
		return fmt.Errorf("request gateway %s: %w", w.options.Gateway, err)
	}
	return nil
}

// unspecified returns the unspecified address of a's family.
func unspecified(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// missed counts an unanswered request.
func (w *Watch) missed() {
	w.mu.Lock()
	g := &w.state.Gateway
	g.Misses++
	silent := g.Misses >= maxMisses
	w.lost = silent && w.setReachable(false) || w.lost
	mac := g.MAC
	w.mu.Unlock()
	if w.lost && silent && !w.cut {
		w.lost = false
		w.options.GatewayChanged(false, mac)
	}
}

// answered records a packet of the gateway, which proves that it is reachable.
func (w *Watch) answered(mac net.HardwareAddr) {
	switch {
	case w.polls && w.asked:
		w.retry.Reset(gatewayPoll)
	case w.polls:
		w.retry.Reset(gatewayPause)
	}
	w.asked, w.lost = false, false
	w.mu.Lock()
	g := &w.state.Gateway
	before := g.MAC
	g.MAC, g.Answered, g.Misses = mac, time.Now(), 0
	changed := w.setReachable(true)
	w.mu.Unlock()
	if before != nil && !bytes.Equal(before, mac) {
		w.options.Log.Debug("gateway hardware address changed", "gateway", w.options.Gateway, "mac", mac.String(), "before", before.String())
	}
	if changed {
		w.options.GatewayChanged(true, mac)
	}
}

// setReachable sets the state and reports whether it changed. The caller holds both
// locks.
func (w *Watch) setReachable(reachable bool) bool {
	g := &w.state.Gateway
	if g.Known && g.Reachable == reachable {
		return false
	}
	g.Known, g.Reachable, g.Since = true, reachable, time.Now()
	return true
}
