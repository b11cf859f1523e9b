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
	"sync"
	"time"
)

const (
	// defendInterval is the least time between two defences, so that two hosts
	// that both defend do not flood the link (RFC 5227 section 2.4 c,
	// DEFEND_INTERVAL in section 1.1).
	defendInterval = 10 * time.Second

	// reportInterval is the least time between two reports of one hardware
	// address: RFC 5227 section 2.4 c wants an administrator to be told, and not
	// to be flooded.
	reportInterval = 10 * time.Second

	// maxReported is how many hardware addresses are reported in that time.
	// Anybody on the link can make up any number of them.
	maxReported = 16

	// maxMisses is how many requests in a row the gateway may leave unanswered.
	maxMisses = 3
)

// Options say what a Watch watches and whom it tells.
//
// Callbacks come one at a time, in order, from Run and from ProbeGateway. They
// must not call ProbeGateway, and while one runs nothing else is seen.
type Options struct {
	Index   int              // of the interface
	MAC     net.HardwareAddr // its own; if it changes, make another Watch
	Address netip.Addr       // the reserved one
	Gateway netip.Addr       // the zero Addr if there is none to watch

	// Conflict is told of another host that claims the address: of each hardware
	// address at most once in 10 s, of at most 16 of them in that time.
	Conflict func(mac net.HardwareAddr)

	// GatewayChanged is told when the gateway is reachable or not any more, and
	// first when either is known. The hardware address is that of the last answer,
	// nil if there was none ever.
	GatewayChanged func(reachable bool, mac net.HardwareAddr)

	Log *slog.Logger // may be nil
}

// State is what a Watch has seen.
type State struct {
	Conflicts   int              // packets of others that claim the address
	ConflictMAC net.HardwareAddr // of the last one
	ConflictAt  time.Time
	Defences    int // times the address was announced because of that

	Gateway GatewayState
}

// GatewayState is what a Watch knows of the gateway.
type GatewayState struct {
	Known     bool // it answered, or did not three times: only then Reachable says something
	Reachable bool
	Since     time.Time        // when that was first known
	MAC       net.HardwareAddr // of the last answer; with VRRP it may change at any time
	Answered  time.Time        // when that came
	Misses    int              // requests in a row that were not answered
}

// A Watch sees, for a router that has its address, who else claims it, defends it,
// and knows whether the gateway is reachable. Nothing wakes it but ARP of those
// two addresses.
type Watch struct {
	options Options
	port    port

	// turn is held while something is seen and told, so that callbacks come in
	// order; mu only while state is touched, so that State never waits for one.
	turn sync.Mutex
	mu   sync.Mutex

	state    State
	asked    bool // the gateway, and no answer yet
	defended time.Time
	reported map[string]time.Time // by hardware address
}

// NewWatch makes a Watch for an interface in the network namespace of the calling
// thread. It sees what comes from now on; Run reads it. Whoever does not call Run
// calls Close.
func NewWatch(o Options) (*Watch, error) {
	if err := check(o.MAC, o.Address); err != nil {
		return nil, fmt.Errorf("watch %s: %w", o.Address, err)
	}
	c, err := listen(o.Index, o.Address, o.Gateway)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", o.Address, err)
	}
	return newWatch(o, c), nil
}

func newWatch(o Options, p port) *Watch {
	if o.Conflict == nil {
		o.Conflict = func(net.HardwareAddr) {}
	}
	if o.GatewayChanged == nil {
		o.GatewayChanged = func(bool, net.HardwareAddr) {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Watch{options: o, port: p, reported: map[string]time.Time{}}
}

// Run watches until ctx ends or the Watch is closed, which is no error. That the
// interface goes down is none either; that it is gone is an [ErrGone]. Run closes
// the Watch.
func (w *Watch) Run(ctx context.Context) error {
	defer w.Close()
	defer context.AfterFunc(ctx, w.Close)()
	for {
		p, err := w.port.receive(time.Time{})
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.options.Address, err)
		}
		w.see(p)
	}
}

// Close ends Run. Closing again is harmless.
func (w *Watch) Close() { w.port.close() }

// State returns what has been seen so far. It may be called at any time, also by
// callbacks.
func (w *Watch) State() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

// Announce announces the address, as [Socket.Announce] does.
func (w *Watch) Announce() error { return announce(w.port.send, w.options.MAC, w.options.Address) }

// see takes note of a packet.
func (w *Watch) see(p Packet) {
	if bytes.Equal(p.SenderMAC, w.options.MAC) {
		return // our own, sent back by a switch
	}
	w.turn.Lock()
	defer w.turn.Unlock()
	switch p.SenderIP {
	case w.options.Address:
		w.conflict(p.SenderMAC)
	case w.options.Gateway:
		w.answered(p.SenderMAC)
	}
	// What else the filter lets in is a probe for the address, which the kernel
	// answers (arp_process in net/ipv4/arp.c).
}

// conflict counts, defends and reports.
func (w *Watch) conflict(mac net.HardwareAddr) {
	now := time.Now()
	w.mu.Lock()
	w.state.Conflicts++
	w.state.ConflictMAC, w.state.ConflictAt = mac, now
	w.mu.Unlock()

	if w.defended.IsZero() || now.Sub(w.defended) >= defendInterval {
		w.defended = now // also if it fails: the next one would, too
		// Neighbours have just learned the other's hardware address. The two forms
		// count as one announcement.
		if err := w.Announce(); err != nil {
			w.options.Log.Warn("address defence failed", "address", w.options.Address, "mac", mac.String(), "error", err)
		} else {
			w.mu.Lock()
			w.state.Defences++
			w.mu.Unlock()
		}
	}

	for mac, at := range w.reported {
		if now.Sub(at) >= reportInterval {
			delete(w.reported, mac)
		}
	}
	if _, recently := w.reported[string(mac)]; !recently && len(w.reported) < maxReported {
		w.reported[string(mac)] = now
		w.options.Conflict(mac)
	}
}

// ProbeGateway asks for the gateway's hardware address, and notes a miss if it has
// not answered since the last call. After 3 misses in a row it is unreachable,
// until anything is heard of it. A request that cannot be sent is an error, and a
// miss if nothing is heard until the next call.
//
// The sender of the request is the reserved address, so the interface must have
// it. The Watch has no clock of its own: how often to ask is up to the caller.
func (w *Watch) ProbeGateway() error {
	if !w.options.Gateway.IsValid() {
		return nil
	}
	request, err := RequestFor(w.options.Gateway, w.options.MAC, w.options.Address)
	if err != nil {
		return err
	}
	w.turn.Lock()
	defer w.turn.Unlock()
	if w.asked {
		w.missed()
	}
	w.asked = true
	if err := w.port.send(request); err != nil {
		return fmt.Errorf("request gateway %s: %w", w.options.Gateway, err)
	}
	return nil
}

// missed notes that the gateway has not answered.
func (w *Watch) missed() {
	w.mu.Lock()
	g := &w.state.Gateway
	g.Misses++
	changed := g.Misses >= maxMisses && w.setReachable(false)
	mac := g.MAC
	w.mu.Unlock()
	if changed {
		w.options.GatewayChanged(false, mac)
	}
}

// answered notes that the gateway is there: what it sends, it can also be sent.
func (w *Watch) answered(mac net.HardwareAddr) {
	w.asked = false
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

// setReachable says whether that is news. The caller has both locks.
func (w *Watch) setReachable(reachable bool) bool {
	g := &w.state.Gateway
	if g.Known && g.Reachable == reachable {
		return false
	}
	g.Known, g.Reachable, g.Since = true, reachable, time.Now()
	return true
}
