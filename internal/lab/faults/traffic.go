package faults

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// Cadence is the time between two attempts of a [Traffic].
const Cadence = 5 * time.Millisecond

// ports is the number of new connections before one has the addresses of an old one: 250
// s at the cadence, and the kernel forgets a connection after 30 s
// (nf_conntrack_udp_timeout).
const ports = lab.LastPort - lab.FirstPort

// Traffic is a client that makes a new connection at each attempt, by every router: a
// datagram to a port that had none for minutes. A cluster would choose one of them, so an
// attempt is answered if one router's datagram is.
type Traffic struct {
	conn    *net.UDPConn
	routers []netip.Addr
	done    sync.WaitGroup
	stop    chan struct{}
	paused  atomic.Bool

	mu       sync.Mutex
	changed  chan struct{} // closed with each answer
	first    int           // number of attempts[0]
	attempts []Attempt
}

// StartTraffic starts a client of the site's routers, and the server.
func StartTraffic(s *lab.Site) (*Traffic, error) {
	if _, err := s.Serve(s.Server, "udp", netip.AddrPortFrom(lab.Remote[0], lab.FirstPort)); err != nil {
		return nil, err
	}
	t := &Traffic{stop: make(chan struct{}), changed: make(chan struct{})}
	for _, n := range s.Nodes {
		t.routers = append(t.routers, n.Addr)
	}
	err := s.Client.Do(func() (err error) {
		t.conn, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	t.done.Go(t.send)
	t.done.Go(t.receive)
	return t, nil
}

// Close ends the client.
func (t *Traffic) Close() {
	close(t.stop)
	_ = t.conn.Close()
	t.done.Wait()
}

// Pause stops the client's attempts until Resume.
func (t *Traffic) Pause() { t.paused.Store(true) }

// Resume goes on after Pause.
func (t *Traffic) Resume() { t.paused.Store(false) }

func (t *Traffic) send() {
	tick := time.NewTicker(Cadence)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-t.stop:
			return
		}
		if t.paused.Load() {
			continue
		}
		t.mu.Lock()
		port := t.first + len(t.attempts)
		t.attempts = append(t.attempts, Attempt{At: time.Now()})
		t.mu.Unlock()
		for _, r := range t.routers {
			// The kernel reports a refusal of an earlier datagram, which has no answer.
			_, _ = t.conn.WriteToUDPAddrPort([]byte{'?'}, netip.AddrPortFrom(r, uint16(lab.FirstPort+1+port%ports))) //nolint:gosec // at most LastPort
		}
	}
}

func (t *Traffic) receive() {
	buf := make([]byte, 1<<10)
	for {
		_, from, err := t.conn.ReadFromUDPAddrPort(buf)
		select {
		case <-t.stop:
			return
		default:
		}
		if err == nil {
			t.answered(int(from.Port()) - lab.FirstPort - 1)
		}
	}
}

// answered notes an answer to the last attempt with a port.
func (t *Traffic) answered(port int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := t.first + len(t.attempts) - 1
	i := last - (last-port)%ports - t.first
	if i < 0 || i >= len(t.attempts) || t.attempts[i].Answered {
		return
	}
	t.attempts[i].Answered = true
	close(t.changed)
	t.changed = make(chan struct{})
}

// Await waits until so many attempts in a row are answered, all of them later than the
// call, or until end is closed, and reports which.
func (t *Traffic) Await(inRow int, end <-chan struct{}) bool {
	t.mu.Lock()
	from := t.first + len(t.attempts)
	for {
		answered := 0
		for _, a := range t.attempts[max(0, from-t.first):] {
			answered++
			if !a.Answered {
				answered = 0
			}
			if answered == inRow {
				t.mu.Unlock()
				return true
			}
		}
		changed := t.changed
		t.mu.Unlock()
		select {
		case <-changed:
		case <-end:
			return false
		}
		t.mu.Lock()
	}
}

// Take returns the attempts since the last answered one of the last Take, with which a gap
// begins, and forgets those before the last answered one.
func (t *Traffic) Take() []Attempt {
	t.mu.Lock()
	defer t.mu.Unlock()
	taken := slices.Clone(t.attempts)
	for i, a := range slices.Backward(taken) {
		if a.Answered {
			t.first += i
			t.attempts = t.attempts[i:]
			break
		}
	}
	return taken
}
