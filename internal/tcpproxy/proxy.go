package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// Options are what a Proxy needs.
type Options struct {
	Resolver  Resolver
	Idle      time.Duration // after which a connection without data ends; 0: never
	SendProxy bool          // tell servers of the client by the PROXY protocol, version 2
	AccessLog bool          // one line for each connection
	Log       *slog.Logger
}

// A Proxy relays connections. Its methods may be called from any goroutine.
type Proxy struct {
	o      Options
	dialer *dialer

	alive context.Context // of the connections
	kill  context.CancelFunc

	mu        sync.Mutex
	stopped   bool
	list      []Destination
	ports     map[rules.Port]*port
	refused   map[rules.Port]refusal // of the list, those that are not in ports
	accepting sync.WaitGroup
	relaying  sync.WaitGroup
	open      atomic.Int64 // connections
}

// A port is one that is listened on.
type port struct {
	listener *net.TCPListener
	pool     atomic.Pointer[pool] // of the destination, which may change
}

// New returns a Proxy without destinations.
func New(o Options) *Proxy {
	p := &Proxy{o: o, dialer: newDialer(), ports: map[rules.Port]*port{}}
	p.alive, p.kill = context.WithCancel(context.Background())
	p.dialer.keepAlive = keepAlive(o.Idle)
	return p
}

// keepAlive returns whether peers are to be asked if they are there, as
// net.Dialer and net.ListenConfig have it: below zero, not. Those that do not
// answer ten probes, 15 s apart (net.KeepAliveConfig), are given up, which is of no
// use where the watch is not slower. Asking for it takes a short connection as
// long as its data does: four calls at each end.
func keepAlive(idle time.Duration) time.Duration {
	if idle > 0 && idle <= 10*15*time.Second {
		return -1
	}
	return 0
}

// Apply makes the destinations be those of a list. Ports that are in it already
// stay open, and connections that there are go on, whatever changes for their
// port. On an error, which has all ports that cannot be listened on, the others
// work; applying the same list again tries those again.
func (p *Proxy) Apply(list []Destination) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	wanted := map[rules.Port]bool{}
	for _, d := range list {
		wanted[d.Port] = true
	}
	for number, l := range p.ports {
		if !wanted[number] {
			l.close()
			delete(p.ports, number)
		}
	}
	var failed []error
	before := p.refused
	p.list, p.refused = slices.Clone(list), map[rules.Port]refusal{}
	for _, d := range list {
		l := p.ports[d.Port]
		if l == nil {
			listener, err := p.listen(d.Port)
			if err != nil {
				failed = append(failed, err)
				since := time.Now()
				if was, known := before[d.Port]; known {
					since = was.since
				}
				p.refused[d.Port] = refusal{err, since}
				continue
			}
			l = &port{listener: listener}
			l.pool.Store(p.newPool(d))
			p.ports[d.Port] = l
			p.accepting.Go(func() { p.accept(l) })
		} else if was := l.pool.Load(); was.destination != d {
			l.pool.Store(p.newPool(d))
			was.stop()
		}
	}
	return errors.Join(failed...)
}

// close ends listening. Connections that were accepted go on.
func (l *port) close() {
	_ = l.listener.Close()
	l.pool.Load().stop()
}

func (p *Proxy) newPool(d Destination) *pool {
	pool := &pool{destination: d, resolver: p.o.Resolver, dial: p.dialer.dial, probe: p.probe, log: p.o.Log}
	pool.start(p.alive)
	return pool
}

// A ListenError says that a port cannot be listened on.
type ListenError struct {
	Port rules.Port
	Err  error
}

// Error names the port.
func (e *ListenError) Error() string { return fmt.Sprintf("listening on port %d: %v", e.Port, e.Err) }

// Unwrap returns the cause.
func (e *ListenError) Unwrap() error { return e.Err }

// Hint says what to do about it.
func (e *ListenError) Hint() string {
	switch {
	case errors.Is(e.Err, syscall.EACCES):
		return "ports below 1024 take the capability NET_BIND_SERVICE, or for the pod the sysctl net.ipv4.ip_unprivileged_port_start=0"
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return "another process in the pod listens on that port"
	}
	return ""
}

// listen listens on all addresses, also those of IPv6 where there are any.
func (p *Proxy) listen(number rules.Port) (*net.TCPListener, error) {
	// Go would listen with Multipath TCP (since 1.24), whose sockets cannot do
	// everything that a relay needs.
	config := net.ListenConfig{KeepAlive: p.dialer.keepAlive}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp", fmt.Sprintf(":%d", number))
	if err != nil {
		if inner, ok := errors.AsType[*net.OpError](err); ok {
			err = inner.Err
		}
		return nil, &ListenError{number, err}
	}
	return listener.(*net.TCPListener), nil
}

// probe finds out whether an address answers. The connection ends by a reset,
// so that no port is kept (TIME_WAIT).
func (p *Proxy) probe(ctx context.Context, to netip.AddrPort) error {
	conn, err := p.dialer.dial(ctx, to)
	if err != nil {
		return err
	}
	if p.o.SendProxy {
		_, err = conn.Write(localHeader)
	}
	reset(conn)
	return err
}

// accept accepts the connections of one port until that is closed.
func (p *Proxy) accept(l *port) {
	const most = 100 * time.Millisecond
	var wait time.Duration
	for {
		client, err := l.listener.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// Descriptors or memory are short: connections that end give some
			// back. Those that come wait in the kernel's queue.
			if wait == 0 {
				p.o.Log.Error("accepting connections failed", "port", l.pool.Load().destination.Port, "error", err)
			}
			wait = min(max(2*wait, time.Millisecond), most)
			pause(p.alive, wait)
		default:
			wait = 0
			pool := l.pool.Load()
			p.relaying.Go(func() { p.serve(client, pool) })
		}
	}
}

// serve relays one connection from its beginning to its end.
func (p *Proxy) serve(client *net.TCPConn, pool *pool) {
	begin := time.Now()
	p.open.Add(1)
	defer p.open.Add(-1)
	pool.count.connections.Add(1)
	pool.count.open.Add(1)
	defer pool.count.open.Add(-1)
	r := relay{client: client}
	from, local := addrPort(client.RemoteAddr()), addrPort(client.LocalAddr())
	server, to, err := pool.connect(p.alive)
	outcome := outcomeNoServer
	if err == nil && p.o.SendProxy {
		if _, err = server.Write(proxyHeader(from, local)); err != nil {
			reset(server)
		}
	}
	if err != nil {
		// A client must not take the end for an empty answer.
		reset(client)
		pool.count.failed.Add(1)
	} else {
		r.server = server
		outcome = r.run(p.alive, p.o.Idle)
		pool.count.sent.Add(r.toServer)
		pool.count.received.Add(r.toClient)
	}
	if !p.o.AccessLog {
		return
	}
	attributes := []any{
		"client", from, "port", local.Port(), "destination", pool.destination.Target(), "address", to,
		"to_server", r.toServer, "to_client", r.toClient, "duration", time.Since(begin).Round(time.Millisecond), "outcome", outcome,
	}
	if err != nil {
		attributes = append(attributes, "error", err)
	}
	p.o.Log.Info("connection", attributes...)
}

// Shutdown stops listening, waits for the connections to end, for grace at most,
// and then ends them.
func (p *Proxy) Shutdown(grace time.Duration) {
	p.mu.Lock()
	p.stopped = true
	for _, l := range p.ports {
		_ = l.listener.Close()
	}
	p.mu.Unlock()
	p.accepting.Wait()
	timer := time.AfterFunc(grace, p.kill)
	defer timer.Stop()
	p.relaying.Wait()
	p.kill()
}
