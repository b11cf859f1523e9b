package faults

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// A Kind is what a connection of [Connections] does all the time.
type Kind byte

// The kinds of connections.
const (
	Talking Kind = 'T' // the client sends, and the server answers
	Pushed  Kind = 'P' // the server sends by itself
	Idle    Kind = 'I' // nothing
)

// Pace is a time between two messages of a connection that a busy machine keeps.
const Pace = 50 * time.Millisecond

// Connections are held TCP connections to a server of a site, by the pod of one node.
type Connections struct {
	listener net.Listener
	pace     time.Duration
	all      []*connection
	serving  sync.WaitGroup
	running  sync.WaitGroup
	stop     chan struct{}

	mu       sync.Mutex
	accepted map[net.Conn]bool
}

type connection struct {
	net.Conn
	kind Kind

	mu   sync.Mutex
	last time.Time // of the last message of the server
	gap  time.Duration
	got  uint64 // number of that message
	err  error
}

// Hold makes so many connections, of all kinds in turn, to a port of the server by the pod of a
// node. Those that are not idle have a message each pace.
func Hold(s *lab.Site, node, count int, port uint16, pace time.Duration) (*Connections, error) {
	c := &Connections{pace: pace, stop: make(chan struct{}), accepted: make(map[net.Conn]bool)}
	err := lab.Bind(s.Server, func() (err error) {
		c.listener, err = net.Listen("tcp4", netip.AddrPortFrom(lab.Remote[0], port).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	c.serving.Go(c.serve)
	kinds := []Kind{Talking, Pushed, Idle}
	for i := range count {
		if err := c.dial(s, netip.AddrPortFrom(s.Nodes[node].Addr, port), kinds[i%len(kinds)]); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// dial makes one connection. A router that was just started has no rules yet, and its kernel
// refuses: it has lab.Patience to load them.
func (c *Connections) dial(s *lab.Site, to netip.AddrPort, kind Kind) error {
	var conn net.Conn
	for begin := time.Now(); ; time.Sleep(c.pace) {
		err := s.Client.Do(func() (err error) {
			conn, err = net.DialTimeout("tcp4", to.String(), lab.Patience)
			return err
		})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ECONNREFUSED) || time.Since(begin) > lab.Patience {
			return err
		}
	}
	if _, err := conn.Write([]byte{byte(kind)}); err != nil {
		_ = conn.Close()
		return err
	}
	one := &connection{Conn: conn, kind: kind, last: time.Now()}
	c.all = append(c.all, one)
	c.running.Go(one.receive)
	if kind == Talking {
		c.running.Go(func() { one.talk(c.stop, c.pace) })
	}
	return nil
}

// talk sends numbers until stop.
func (c *connection) talk(stop chan struct{}, pace time.Duration) {
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	for n := uint64(1); ; n++ {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		if _, err := c.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
			return // receive has it
		}
	}
}

// receive reads the numbers of the server, which follow each other.
func (c *connection) receive() {
	var b [8]byte
	for {
		_, err := io.ReadFull(c, b[:])
		n := binary.BigEndian.Uint64(b[:])
		now := time.Now()
		c.mu.Lock()
		if err == nil && n != c.got+1 && c.kind != Idle {
			err = fmt.Errorf("number %d after %d", n, c.got)
		}
		if err != nil {
			c.err = errors.Join(c.err, err)
			c.mu.Unlock()
			return
		}
		c.gap = max(c.gap, now.Sub(c.last))
		c.got, c.last = n, now
		c.mu.Unlock()
	}
}

func (c *Connections) serve() {
	for {
		conn, err := c.listener.Accept()
		if err != nil {
			return
		}
		c.mu.Lock()
		c.accepted[conn] = true
		c.mu.Unlock()
		c.serving.Go(func() { c.answer(conn) })
	}
}

// answer sends back what arrives, and by itself on a connection that is Pushed.
func (c *Connections) answer(conn net.Conn) {
	var kind [1]byte
	if _, err := io.ReadFull(conn, kind[:]); err != nil {
		return
	}
	if Kind(kind[0]) != Pushed {
		_, _ = io.Copy(conn, conn)
		return
	}
	ticker := time.NewTicker(c.pace)
	defer ticker.Stop()
	for n := uint64(1); ; n++ {
		select {
		case <-c.stop:
			return
		case <-ticker.C:
		}
		if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
			return
		}
	}
}

// Await waits until all connections have moved on, for at most limit, and returns the
// number of those that have not, the longest time without an answer since the last call, and
// why some have not moved on. Idle ones send a message.
func (c *Connections) Await(limit time.Duration) (lost int, gap time.Duration, why error) {
	now := time.Now()
	for _, one := range c.all {
		if one.kind == Idle {
			_, _ = one.Write(binary.BigEndian.AppendUint64(nil, uint64(now.UnixNano()))) //nolint:gosec // receive has the error
		}
	}
	for _, one := range c.all {
		for {
			one.mu.Lock()
			moved, err := one.last.After(now), one.err
			if moved && one.kind != Idle {
				gap = max(gap, one.gap)
			}
			if moved {
				one.gap = 0
			}
			one.mu.Unlock()
			if err == nil && !moved && time.Since(now) > limit {
				err = errors.New("no answer")
			}
			if err != nil {
				lost++
				why = errors.Join(why, fmt.Errorf("connection of kind %c: %w", one.kind, err))
			}
			if moved || err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	return lost, gap, why
}

// Close ends the connections and the server.
func (c *Connections) Close() {
	close(c.stop)
	for _, one := range c.all {
		_ = one.Close()
	}
	_ = c.listener.Close()
	c.mu.Lock()
	for conn := range c.accepted {
		_ = conn.Close()
	}
	c.mu.Unlock()
	c.running.Wait()
	c.serving.Wait()
}
