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
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
)

// Patience is how long Ask, Dial and Capture.Wait wait under a context without a
// deadline. It only ends a test that hangs: an answer takes less than a millisecond on
// an idle machine, and seconds on a machine with a high load. A virtual machine may be
// suspended for a minute or two while its clock goes on, and then every shorter wait ends
// at once. A test that expects no answer passes a context with a deadline of its own.
const Patience = 10 * time.Minute

// Server answers every connection or datagram with one line: its own address and the
// client's address, as the server sees them, which shows a test both translations. It then
// echoes a connection until its end, for tests that keep a connection.
type Server struct {
	// Addr is the address that it listens on. For port 0 the kernel has chosen the port.
	Addr netip.AddrPort

	socket  io.Closer
	serving sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

// Serve starts a server in ns for proto, "tcp", "udp" or, if the kernel has it, "sctp". The
// address must be an address of ns, not the unspecified one: a UDP server would not know its own
// address of a datagram, and could answer from another one. The server ends with the lab or with
// Close.
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

// Bind calls a function that listens in a namespace, until the address is free: a process that this
// one starts has the sockets of this one, also those closed meanwhile, until it executes its
// program, which takes a while on a busy machine.
func Bind(ns *netns.Namespace, listen func() error) error {
	for end := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		err := ns.Do(listen)
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(end) {
			return err
		}
	}
}

func listen(ns *netns.Namespace, proto string, addr netip.AddrPort) (*Server, error) {
	network, err := network(proto, addr)
	if err != nil {
		return nil, err
	}
	if addr.Addr().IsUnspecified() {
		return nil, errors.New("the unspecified address")
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
		listener, err := listenStream(network, addr)
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

// listenStream listens in the calling thread's namespace.
func listenStream(network string, addr netip.AddrPort) (net.Listener, error) {
	if strings.HasPrefix(network, "sctp") {
		return listenSCTP(addr)
	}
	// Go listens with Multipath TCP since 1.24, whose options tests do not expect in captured
	// frames.
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	return config.Listen(context.Background(), network, addr.String())
}

// Close stops the server: new connections are refused, existing ones end. It returns when
// all of the server's goroutines have ended.
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

// answer serves one connection. Its client notices errors.
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

// Answer is the answer of a [Server].
type Answer struct {
	Server netip.AddrPort // address of the server
	Peer   netip.AddrPort // address of the client, as the server saw it
}

// Ask sends one request from ns and returns the answer. It waits until the context's
// deadline, or [Patience] without one. The error is a syscall.ECONNREFUSED if the request
// was refused and an os.ErrDeadlineExceeded if there was no answer (errors.Is).
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

// Dial opens a connection from ns, for tests that keep it. It waits like [Lab.Ask] and has
// the same errors. The answer of a [Server] is the first line ([ReadAnswer]).
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
		if proto == "sctp" {
			conn, err = dialSCTP(ctx, addr)
			return err
		}
		// For an address, not a name, Dialer creates the socket on the calling goroutine,
		// and so in ns.
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr.String())
		return err
	})
	return conn, err
}

// ReadAnswer reads the answer of a [Server].
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

// network returns package net's name for a protocol and the family of an address. Without
// the family, net would use IPv6 sockets for IPv4 addresses.
func network(proto string, addr netip.AddrPort) (string, error) {
	if proto != "tcp" && proto != "udp" && proto != "sctp" {
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

// plain makes every timeout of package net an os.ErrDeadlineExceeded: whether the context
// or the connection's deadline comes first decides which error net returns. A cancelled
// context is not a timeout.
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
