package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// A path is the way from the client to a server through the router of a lab.
type path struct {
	lab    *lab.Lab
	to     netip.AddrPort // destination of the client's packets
	server netip.AddrPort // server that receives them
}

// check asks the server over the path, which must see the client as from.
func (p path) check(ctx context.Context, proto string, from netip.Addr) error {
	s, err := p.lab.Serve(p.lab.Outside, proto, p.server)
	if err != nil {
		return err
	}
	defer s.Close()
	answer, err := p.lab.Ask(ctx, p.lab.Client, proto, p.to)
	if err != nil {
		return err
	}
	if answer.Server != p.server || answer.Peer.Addr() != from {
		return fmt.Errorf("asking %s %q: %s answers %s, want %s and %s", proto, p.to, answer.Server, answer.Peer.Addr(), p.server, from)
	}
	return nil
}

// connections opens connections for some time, one after the other, and returns their
// number a second. It uses one thread: the kernel handles a packet on the processor that
// sends it, so the figure is the time of a connection on one processor, without effects
// of several processors on each other.
func (p path) connections(d time.Duration) (float64, error) {
	// The entries of an earlier measurement would fill the table.
	if err := p.lab.ForgetConnections(p.lab.Router); err != nil {
		return 0, err
	}
	listener, err := listen(p.lab.Outside, unix.SOCK_STREAM, p.server)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(listener) }()
	var figure float64
	err = p.lab.Client.Do(func() error {
		begin := time.Now()
		for opened := 1; ; opened++ {
			if err := p.connect(listener); err != nil {
				return fmt.Errorf("connecting to %q: %w", p.to, err)
			}
			if took := time.Since(begin); took >= d {
				figure = float64(opened) / took.Seconds()
				return nil
			}
		}
	})
	return figure, err
}

// connect opens a connection of four packets: three to open it, and a reset by the client,
// after which neither end waits (SO_LINGER in socket(7)). A lost packet is an error: the
// kernel repeats the first one after 1 s (TCP_TIMEOUT_INIT in include/net/tcp.h), and the
// figure would be the number of losses.
func (p path) connect(listener int) error {
	client, err := dial(unix.SOCK_STREAM, p.to)
	if err != nil {
		return err
	}
	server, err := accept(listener)
	if info, infoErr := unix.GetsockoptTCPInfo(client, unix.IPPROTO_TCP, unix.TCP_INFO); infoErr != nil {
		err = errors.Join(err, infoErr)
	} else if info.Total_retrans > 0 {
		err = errors.Join(err, fmt.Errorf("%d packets were lost", info.Total_retrans))
	}
	err = errors.Join(err, unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(client))
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(server) }()
	// If the server closed before it receives the reset, it would send packets, too.
	if _, err := read(server, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("waiting for the reset: %w", err)
	}
	return nil
}

// streams sends over a number of TCP connections at once for some time, and returns the
// rate of arrived bytes in Gbit/s.
func (p path) streams(number int, d time.Duration) (float64, error) {
	listener, err := listen(p.lab.Outside, unix.SOCK_STREAM, p.server)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(listener) }()
	var arrived atomic.Int64
	begin := time.Now()
	err = together(2*number, func(i int) error {
		if i%2 == 0 {
			return p.send(unix.SOCK_STREAM, bulk, begin.Add(d))
		}
		accepted, err := accept(listener)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(accepted) }()
		buf := make([]byte, bulk)
		for {
			n, err := read(accepted, buf)
			if n <= 0 || err != nil {
				return err
			}
			arrived.Add(int64(n))
		}
	})
	return float64(arrived.Load()) * 8 / 1e9 / time.Since(begin).Seconds(), err
}

// The sizes of one write, in bytes.
const (
	bulk  = 128 << 10 // a write of a stream
	small = 64        // a datagram, as a query to a name server
)

// settle has datagrams answered until the kernel takes them for a lasting connection: for more than
// two seconds (nf_conntrack_udp_packet in net/netfilter/nf_conntrack_proto_udp.c).
func (p path) settle() error {
	socket, err := listen(p.lab.Outside, unix.SOCK_DGRAM, p.server)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	return p.lab.Client.Do(func() error {
		client, err := dial(unix.SOCK_DGRAM, p.to)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(client) }()
		buf := make([]byte, small)
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if _, err := write(client, buf); err != nil {
				return fmt.Errorf("sending to %q: %w", p.to, err)
			}
			_, from, err := unix.Recvfrom(socket, buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue // lost, or not there yet
			}
			if err == nil {
				err = unix.Sendto(socket, buf, 0, from)
			}
			if err != nil {
				return fmt.Errorf("answering at %q: %w", p.server, err)
			}
		}
		return nil
	})
}

// datagrams sends small UDP datagrams for some time, from one thread without a pause, and
// returns how many thousand a second arrived.
func (p path) datagrams(d time.Duration) (float64, error) {
	socket, err := listen(p.lab.Outside, unix.SOCK_DGRAM, p.server)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(socket) }()
	var (
		arrived int
		took    time.Duration
		sent    atomic.Bool
	)
	err = together(2, func(i int) error {
		if i == 0 {
			defer sent.Store(true)
			begin := time.Now()
			err := p.send(unix.SOCK_DGRAM, small, begin.Add(d))
			took = time.Since(begin)
			return err
		}
		buf := make([]byte, small)
		for last := false; ; {
			_, err := read(socket, buf)
			switch {
			case err == nil:
				arrived++
			case !errors.Is(err, unix.EAGAIN):
				return err
			case last:
				return nil // a whole timeout of silence after the last datagram was sent
			default:
				last = sent.Load()
			}
		}
	})
	return float64(arrived) / 1e3 / took.Seconds(), err
}

// send sends from the client until a point in time.
func (p path) send(kind, size int, end time.Time) error {
	return p.lab.Client.Do(func() error {
		socket, err := dial(kind, p.to)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(socket) }()
		// At least once: on a busy machine the end can come before the connection.
		for buf := make([]byte, size); ; {
			if _, err := write(socket, buf); err != nil {
				return fmt.Errorf("sending to %q: %w", p.to, err)
			}
			if !time.Now().Before(end) {
				return nil
			}
		}
	})
}

// together runs a function n times at once and waits for all calls.
func together(n int, do func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}
