package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
)

// Patience is how long Ask, Dial and Capture.Wait wait under a context without a
// deadline. It only ends a test that hangs: an answer takes less than a millisecond on
// an idle machine, and seconds on a machine with a high load. A test that expects no
// answer passes a context with a deadline of its own.
const Patience = time.Minute

// Server answers every connection or datagram with one line: the address it was
// reached at and the one it was asked from, which is how a test sees both
// translations. It then echoes a connection until its end, so that one can be
// kept and used.
type Server struct {
	// Addr is where it listens. The port is the kernel's choice if 0 was asked for.
	Addr netip.AddrPort

	socket  io.Closer
	serving sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

// Serve starts a server in ns for proto, "tcp" or "udp". The address must be one
// of ns and not the unspecified one: with that a UDP server would not know where
// it was reached, and might answer from elsewhere. It ends with the lab, or
// before if closed.
func (l *Lab) Serve(ns *netns.Namespace, proto string, addr netip.AddrPort) (*Server, error) {
	s, err := listen(ns, proto, addr)
	if err != nil {
		return nil, fmt.Errorf("serving %s at %q: %w", proto, addr, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.servers = append(l.servers, s)
	return s, nil
}

func listen(ns *netns.Namespace, proto string, addr netip.AddrPort) (*Server, error) {
	network, err := network(proto, addr)
	if err != nil {
		return nil, err
	}
	if addr.Addr().IsUnspecified() {
		return nil, errors.New("not one address")
	}
	s := &Server{conns: map[net.Conn]struct{}{}}
	err = ns.Do(func() error {
		if proto == "udp" {
			conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(addr))
			if err != nil {
				return err
			}
			s.socket, s.Addr = conn, conn.LocalAddr().(*net.UDPAddr).AddrPort()
			s.serving.Go(func() { s.answerDatagrams(conn) })
			return nil
		}
		// Go listens with Multipath TCP since 1.24; what goes over the wire here
		// is to be what the tests' reader expects.
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		listener, err := config.Listen(context.Background(), network, addr.String())
		if err != nil {
			return err
		}
		s.socket, s.Addr = listener, listener.Addr().(*net.TCPAddr).AddrPort()
		s.serving.Go(func() { s.accept(listener) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Close stops the server: new connections are refused, those there are end. It
// returns when nothing of it runs any more.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	_ = s.socket.Close()
	for conn := range s.conns {
		_ = conn.Close()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

func (s *Server) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return // closed
		}
		s.mu.Lock()
		if s.closed {
			_ = conn.Close()
		} else {
			s.conns[conn] = struct{}{}
			s.serving.Go(func() { s.answer(conn) })
		}
		s.mu.Unlock()
	}
}

// answer serves one connection. Its errors are the client's to notice.
func (s *Server) answer(conn net.Conn) {
	defer func() {
		_ = conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	if _, err := fmt.Fprintf(conn, "%s %s\n", conn.LocalAddr(), conn.RemoteAddr()); err != nil {
		return
	}
	_, _ = io.Copy(conn, conn)
}

func (s *Server) answerDatagrams(conn *net.UDPConn) {
	buf := make([]byte, 64<<10)
	for {
		_, peer, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier answer
		}
		_, _ = conn.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %s\n", s.Addr, peer), peer)
	}
}

// Answer is what a [Server] says.
type Answer struct {
	Server netip.AddrPort // that answered
	Peer   netip.AddrPort // that the server saw
}

// Ask sends one request from ns and returns the answer. It waits until the
// context's deadline, or [Patience] without one. An error is a
// syscall.ECONNREFUSED if something refused and an os.ErrDeadlineExceeded if
// nothing answered (errors.Is).
func (l *Lab) Ask(ctx context.Context, ns *netns.Namespace, proto string, addr netip.AddrPort) (Answer, error) {
	ctx, cancel := patient(ctx)
	defer cancel()
	answer, err := ask(ctx, ns, proto, addr)
	if err != nil {
		return Answer{}, fmt.Errorf("asking %s %q: %w", proto, addr, plain(ctx, err))
	}
	return answer, nil
}

func ask(ctx context.Context, ns *netns.Namespace, proto string, addr netip.AddrPort) (Answer, error) {
	conn, err := dial(ctx, ns, proto, addr)
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if proto == "udp" {
		if _, err := conn.Write([]byte("?\n")); err != nil {
			return Answer{}, err
		}
	}
	return ReadAnswer(bufio.NewReader(conn))
}

// Dial opens a connection from ns, for tests that keep it. It waits as
// [Lab.Ask] does and has the same errors. The answer of a [Server] is the first
// line to read ([ReadAnswer]).
func (l *Lab) Dial(ctx context.Context, ns *netns.Namespace, proto string, addr netip.AddrPort) (net.Conn, error) {
	ctx, cancel := patient(ctx)
	defer cancel()
	conn, err := dial(ctx, ns, proto, addr)
	if err != nil {
		return nil, fmt.Errorf("dialing %s %q: %w", proto, addr, plain(ctx, err))
	}
	return conn, nil
}

func dial(ctx context.Context, ns *netns.Namespace, proto string, addr netip.AddrPort) (net.Conn, error) {
	network, err := network(proto, addr)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	err = ns.Do(func() (err error) {
		// For a single address, not a name, Dialer makes the socket on the
		// calling goroutine, and so in ns.
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr.String())
		return err
	})
	return conn, err
}

// ReadAnswer reads the line that a [Server] answers with.
func ReadAnswer(r *bufio.Reader) (Answer, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return Answer{}, err
	}
	server, peer, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	var a Answer
	if a.Server, err = netip.ParseAddrPort(server); err != nil {
		return Answer{}, fmt.Errorf("reading answer %q: %w", line, err)
	}
	if a.Peer, err = netip.ParseAddrPort(peer); err != nil {
		return Answer{}, fmt.Errorf("reading answer %q: %w", line, err)
	}
	return a, nil
}

// network is net's word for a protocol and the family of an address. Naming the
// family keeps IPv4 addresses from turning into IPv6 ones.
func network(proto string, addr netip.AddrPort) (string, error) {
	if proto != "tcp" && proto != "udp" {
		return "", net.UnknownNetworkError(proto)
	}
	if addr.Addr().Is4() {
		return proto + "4", nil
	}
	return proto + "6", nil
}

func patient(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, Patience)
}

// plain makes all of net's ways to say "too late" one: which it is depends on
// whether the context or the connection's deadline comes first. Being cancelled
// is not being late.
func plain(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%w: %w", context.Canceled, err)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w: %w", os.ErrDeadlineExceeded, err)
	}
	return err
}
