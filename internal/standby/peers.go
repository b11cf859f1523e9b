package standby

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/egress-router/egress-router/internal/election"
)

// A Lookup returns the addresses of the other routers, with or without the own one, and when
// to ask again.
type Lookup func(ctx context.Context) ([]netip.Addr, time.Time, error)

// forgetAfter is the time after which a router that is not heard is no peer any more, unless
// the look-up has it.
const forgetAfter = 10 * time.Second

// peers speaks with the other routers.
type peers struct {
	own       netip.AddrPort
	key       []byte
	only      bool          // heartbeats of other addresses than those of the look-up do not count
	detection time.Duration // without heartbeats, after which a router counts as lost
	conn      *net.UDPConn

	refused, lost atomic.Uint64

	mu      sync.Mutex
	known   []netip.Addr             // of the look-up
	kept    map[netip.Addr]uint64    // routers that an answer of the look-up lacks, and that were heard; see stays
	since   map[netip.Addr]time.Time // when an address of known became one, or was heard last
	heard   map[uint64]*heard
	active  time.Time // last heartbeat of an active router
	able    time.Time // last heartbeat of a router that holds the addresses, or could take them over
	unkeyed Unkeyed
	ports   map[netip.Addr]Ports // of the last heartbeat of each router
}

// heard is the last heartbeat of one router.
type heard struct {
	Peer
	sequence uint32
	arrived  time.Time // last heartbeat, which Run may not have noted yet
}

// listenPeers opens the socket of the heartbeats.
func listenPeers(o Options) (*peers, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(o.Listen))
	if err != nil {
		return nil, fmt.Errorf("listen for heartbeats: %w", err)
	}
	p := &peers{own: o.Listen, key: o.Key, only: o.Only, detection: o.Settings.Detection(), conn: conn, heard: make(map[uint64]*heard), ports: make(map[netip.Addr]Ports)}
	if o.Only { // before any heartbeat is read: one of a stranger would count until then
		addresses, _, err := o.Peers(context.Background())
		if err != nil {
			p.close()
			return nil, fmt.Errorf("look peers up: %w", err)
		}
		p.know(addresses)
	}
	return p, nil
}

func (p *peers) close() { _ = p.conn.Close() }

// read passes heartbeats on until close.
func (p *peers) read(post func(election.Event)) {
	buf := make([]byte, 256)
	for {
		n, from, err := p.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of a peer that is not there
		}
		h, err := election.Parse(buf[:n], p.key)
		if err != nil {
			p.refused.Add(1)
			if errors.Is(err, election.ErrKey) {
				p.unkey(from.Addr().Unmap(), n >= election.AuthenticatedSize) // with or without ports
			}
			continue
		}
		if !p.from(h.ID, from.Addr().Unmap()) {
			p.refused.Add(1)
			continue
		}
		post(election.Event{Kind: election.Heard, Heartbeat: h})
	}
}

// unkey keeps that a heartbeat of a router of the look-up is not authenticated by the own key.
// Packets of others say nothing about the routers.
func (p *peers) unkey(from netip.Addr, keyed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.known, from) {
		p.unkeyed = Unkeyed{Address: from, Keyed: keyed, At: time.Now()}
	}
}

// mostPeers is the number of routers that are kept, as many as those of an election: without a key
// anybody can invent more.
const mostPeers = 32

// from keeps the address of a router, and reports whether its heartbeats count. Without a key
// anybody can send some, so that
//
//   - an address has one router at a time: another process there follows once the one before is lost,
//     or at once if a key shows that it is a router;
//   - a router does not change its address while it is heard at one of the look-up;
//   - a router of the look-up always has a place, instead of the one silent for longest of the others.
func (p *peers) from(id uint64, address netip.Addr) bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	isKnown := p.isPeer
	known := isKnown(address)
	if p.only && !known && len(p.known) > 0 {
		return false
	}
	lost := func(h *heard) bool { return now.Sub(h.arrived) > p.detection }
	have := p.heard[id]
	if have != nil && have.Address == address {
		have.arrived = now
		return true
	}
	if have != nil && !lost(have) && (isKnown(have.Address) || !known) {
		return false
	}
	var mac [6]byte
	for other, h := range p.heard {
		if other == id || h.Address != address {
			continue
		}
		if !lost(h) && len(p.key) == 0 {
			return false
		}
		mac = h.MAC // of the same router, most likely, until it is noted
		delete(p.heard, other)
	}
	if have == nil {
		if len(p.heard) == mostPeers && !p.yield(isKnown, func(h *heard) bool { return known || lost(h) }) {
			return false
		}
		have = &heard{Peer: Peer{MAC: mac}}
		p.heard[id] = have
	}
	have.Address, have.arrived = address, now
	return true
}

// yield removes the router that is silent for longest of those that the look-up does not have. It
// reports whether there is one that may go. p.mu is locked.
func (p *peers) yield(isKnown func(netip.Addr) bool, may func(*heard) bool) bool {
	var oldest uint64
	for id, h := range p.heard {
		if !isKnown(h.Address) && (oldest == 0 || h.arrived.Before(p.heard[oldest].arrived)) {
			oldest = id
		}
	}
	if oldest == 0 || !may(p.heard[oldest]) {
		return false
	}
	delete(p.heard, oldest)
	return true
}

// note keeps the latest state of a router.
func (p *peers) note(h election.Heartbeat, interval time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.heard[h.ID]
	if have == nil || have.sequence != 0 && int32(h.Sequence-have.sequence) <= 0 { //nolint:gosec // numbers begin again after the highest one
		return // of a router that is forgotten, or one that another overtook, or that was sent again
	}
	// A number that is not the next one: some were lost, unless the router has started again.
	if missing := h.Sequence - have.sequence - 1; have.sequence != 0 && missing < uint32(forgetAfter/interval) { //nolint:gosec // at most 1000
		p.lost.Add(uint64(missing))
	}
	have.sequence = h.Sequence
	if h.State == election.Active {
		p.active = now
	}
	if h.Healthy || h.State != election.Standby {
		p.able = now
	}
	if _, known := p.since[have.Address]; known {
		p.since[have.Address] = now
	}
	// The first look-up may come later. Of others, which may be anybody's, only some are kept.
	if h.LastPort != 0 && (p.isPeer(have.Address) || len(p.ports) < mostPeers) {
		p.ports[have.Address] = Ports{h.FirstPort, h.LastPort}
	}
	have.Peer = Peer{Address: have.Address, State: h.State, Priority: h.Priority, Healthy: h.Healthy, MAC: h.MAC, Heard: now}
	p.forget(now)
}

// forget removes the routers that are silent. p.mu is locked.
func (p *peers) forget(now time.Time) {
	for id, other := range p.heard {
		if now.Sub(other.Heard) > forgetAfter && !other.Heard.IsZero() {
			delete(p.heard, id)
		}
	}
}

// holderHeard returns when the last active router was heard; zero: for long none was, or this one has
// been active since.
func (p *peers) holderHeard() (last time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.active) > forgetAfter {
		return time.Time{}
	}
	return p.active
}

// held forgets the last active router: this one is it now.
func (p *peers) held() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active = time.Time{}
}

// last returns when a router was heard.
func (p *peers) last() (last time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.heard {
		if h.arrived.After(last) {
			last = h.arrived
		}
	}
	return last
}

// lastAble returns when a router was heard that holds the addresses, or could take them over.
func (p *peers) lastAble() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.able
}

// list returns the routers that are heard.
func (p *peers) list() []Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget(time.Now()) // also if none is heard any more
	var list []Peer
	for _, h := range p.heard {
		if !h.Heard.IsZero() {
			list = append(list, h.Peer)
		}
	}
	return list
}

// missing returns the routers of the look-up that have not been heard for so long that they
// would be forgotten, and the last heartbeat of another key.
func (p *peers) missing() (list []netip.Addr, last Unkeyed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, a := range p.known {
		if now.Sub(p.since[a]) > forgetAfter {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list, p.unkeyed
}

// isPeer reports whether a router has an address, by the look-up. p.mu is locked.
func (p *peers) isPeer(a netip.Addr) bool {
	return slices.Contains(p.known, a) || p.stays(a)
}

// stays reports whether the router at an address is still heard that the look-up had: an answer can
// lack one for a while. It is the same process, or has the key: an address can be another pod's soon.
// p.mu is locked.
func (p *peers) stays(a netip.Addr) bool {
	process, kept := p.kept[a]
	if !kept {
		return false
	}
	for id, h := range p.heard {
		if h.Address == a && (id == process || len(p.key) > 0) {
			return time.Since(h.arrived) <= forgetAfter
		}
	}
	return false
}

// keep keeps the routers of the look-up that the next answer lacks. p.mu is locked.
func (p *peers) keep(answer []netip.Addr) {
	kept := make(map[netip.Addr]uint64)
	for id, h := range p.heard {
		if p.isPeer(h.Address) && !slices.Contains(answer, h.Address) {
			kept[h.Address] = id
		}
	}
	p.kept = kept
}

// know keeps the addresses of the look-up.
func (p *peers) know(addresses []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, now := p.since, time.Now()
	p.keep(addresses)
	p.known = slices.DeleteFunc(slices.Clone(addresses), func(a netip.Addr) bool { return a == p.own.Addr() })
	p.since = make(map[netip.Addr]time.Time, len(p.known))
	for _, a := range p.known {
		p.since[a] = now
		if since, known := before[a]; known {
			p.since[a] = since
		}
	}
	maps.DeleteFunc(p.ports, func(a netip.Addr, _ Ports) bool { return !p.isPeer(a) })
}

// has reports whether a router has a hardware address.
func (p *peers) has(mac [6]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.heard {
		if h.MAC == mac {
			return true
		}
	}
	return false
}

// send sends a heartbeat to every router that is known. One that cannot be sent is lost as any
// other: the reference tells whether the cluster side works.
func (p *peers) send(h election.Heartbeat) {
	message := h.Append(nil, p.key)
	p.mu.Lock()
	to := make(map[netip.Addr]bool, len(p.known)+len(p.heard))
	for _, a := range p.known {
		to[a] = true
	}
	for _, other := range p.heard {
		to[other.Address] = true
	}
	p.mu.Unlock()
	delete(to, p.own.Addr())
	for a := range to {
		_, _ = p.conn.WriteToUDPAddrPort(message, netip.AddrPortFrom(a, p.own.Port()))
	}
}

// The least time between look-ups, and that after a failed one.
const leastLookup = time.Second

// lookUp follows the addresses of the peers until ctx ends.
func (p *peers) lookUp(ctx context.Context, o Options) {
	failed := ""
	for {
		addresses, again, err := o.Peers(ctx)
		wait := max(leastLookup, time.Until(again))
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if err.Error() != failed {
				o.Log.Warn("peers not looked up", "error", err)
			}
			failed, wait = err.Error(), leastLookup
		default:
			failed = ""
			p.know(addresses)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
