package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// Options are the options of a Proxy.
type Options struct {
	Resolver  Resolver
	Idle      time.Duration // timeout of a connection without data; 0: none
	SendProxy bool          // send the client's address to servers by the PROXY protocol, version 2
	AccessLog bool          // log one line for each connection
	Log       *slog.Logger
}

// A Proxy relays connections. Its methods may be called from any goroutine.
type Proxy struct {
	o           Options
	dialer      *dialer
	dialTimeout time.Duration // limit of one connection attempt
	local       func(netip.Addr) bool
	listening   atomic.Pointer[map[rules.Port]bool] // the ports of the list

	alive context.Context // context of the connections
	kill  context.CancelFunc

	loops   []*loop
	loop    atomic.Uint32 // counter to distribute relays
	looping sync.WaitGroup

	mu        sync.Mutex
	stopped   bool
	list      []Destination
	ports     map[rules.Port]*port
	refused   map[rules.Port]refusal // the ports of the list on which the proxy cannot listen
	accepting sync.WaitGroup
	relaying  sync.WaitGroup
	open      atomic.Int64 // connections
}

// A port is a port on which the proxy listens.
type port struct {
	listener *os.File
	pool     atomic.Pointer[pool] // pool of the destination, which may change
}

// New returns a Proxy without destinations.
func New(o Options) *Proxy {
	p := &Proxy{o: o, dialer: newDialer(), dialTimeout: connectTimeout, local: new(ownAddresses).has, ports: map[rules.Port]*port{}}
	p.alive, p.kill = context.WithCancel(context.Background())
	p.dialer.keepAlive = asks(o.Idle)
	return p
}

// asks reports whether to send keepalive probes. They are useless if the idle timeout
// is shorter than the time of ten probes (see keepAlive), and cost four system calls
// per connection.
func asks(idle time.Duration) bool { return idle == 0 || idle > 10*15*time.Second }

// start starts one loop per processor, once.
func (p *Proxy) start() error {
	if len(p.loops) > 0 {
		return nil
	}
	var all []*loop
	for range runtime.GOMAXPROCS(0) {
		l, err := newLoop()
		if err != nil {
			for _, l := range all {
				l.close()
			}
			return err
		}
		l.idle, l.dialTimeout, l.ended, l.failed = p.o.Idle, p.dialTimeout, p.ended, p.failed
		all = append(all, l)
	}
	for _, l := range all {
		p.looping.Go(l.run)
	}
	p.loops = all
	return nil
}

// Apply sets the destinations. Ports of both the old and the new list stay open, and
// existing connections continue, even if the destination of their port changes. The
// error has a *ListenError for each port on which the proxy cannot listen; the others
// work, and applying the same list again retries the failed ones.
func (p *Proxy) Apply(list []Destination) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	if err := p.start(); err != nil {
		return err
	}
	wanted := map[rules.Port]bool{}
	for _, d := range list {
		wanted[d.Port] = true
	}
	p.listening.Store(&wanted)
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

// close ends listening. Accepted connections continue.
func (l *port) close() {
	_ = l.listener.Close()
	l.pool.Load().stop()
}

func (p *Proxy) newPool(d Destination) *pool {
	pool := &pool{
		destination: d, resolver: p.o.Resolver, probe: p.probe, log: p.o.Log, local: p.local,
		listens: func(number rules.Port) bool { return (*p.listening.Load())[number] },
	}
	pool.start(p.alive)
	return pool
}

// A ListenError is the error of listening on a port.
type ListenError struct {
	Port rules.Port
	Err  error
}

// Error names the port.
func (e *ListenError) Error() string { return fmt.Sprintf("listening on port %d: %v", e.Port, e.Err) }

// Unwrap returns the cause.
func (e *ListenError) Unwrap() error { return e.Err }

// Hint returns what to do.
func (e *ListenError) Hint(wording.Names) string {
	switch {
	case errors.Is(e.Err, syscall.EACCES):
		return "ports below 1024 need the capability NET_BIND_SERVICE or the pod's sysctl net.ipv4.ip_unprivileged_port_start=0"
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return "another process in the pod listens on this port"
	}
	return ""
}

// listen listens on all addresses, also the IPv6 ones. Accepted sockets inherit its
// options.
func (p *Proxy) listen(number rules.Port) (*os.File, error) {
	// Go would listen with Multipath TCP (since 1.24), whose sockets lack functions
	// that a relay needs.
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			rawOption(int32(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			if p.dialer.keepAlive {
				keepAlive(int32(fd))
			}
		})
	}}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp", fmt.Sprintf(":%d", number))
	if err != nil {
		if inner, ok := errors.AsType[*net.OpError](err); ok {
			err = inner.Err
		}
		return nil, &ListenError{number, err}
	}
	file, err := listener.(*net.TCPListener).File() // a duplicate descriptor
	_ = listener.Close()
	if err != nil {
		return nil, &ListenError{number, err}
	}
	return file, nil
}

// probe connects to an address to check that it is reachable.
func (p *Proxy) probe(ctx context.Context, to netip.AddrPort) error {
	var header []byte
	if p.o.SendProxy {
		header = localHeader
	}
	return p.dialer.reach(ctx, to, header)
}

// accept accepts the connections of one port until the port is closed.
func (p *Proxy) accept(l *port) {
	const most = 100 * time.Millisecond
	var wait time.Duration
	raw, err := l.listener.SyscallConn()
	for err == nil {
		var client int32
		var from netip.AddrPort
		var failed syscall.Errno
		err = raw.Read(func(fd uintptr) bool {
			client, from, failed = rawAccept(fd)
			return failed != unix.EAGAIN
		})
		switch {
		case err != nil: // closed
		case failed != 0:
			// Descriptors or memory are exhausted until connections end. New
			// connections wait in the kernel's queue.
			if wait == 0 {
				p.o.Log.Error("accepting connections failed", "port", l.pool.Load().destination.Port, "error", os.NewSyscallError("accept4", failed))
			}
			wait = min(max(2*wait, time.Millisecond), most)
			pause(p.alive, wait)
		default:
			wait = 0
			p.begin(l.pool.Load(), client, from)
		}
	}
}

// begin starts the relay of a client.
func (p *Proxy) begin(pool *pool, client int32, from netip.AddrPort) {
	p.relaying.Add(1)
	p.open.Add(1)
	pool.count.connections.Add(1)
	pool.count.open.Add(1)
	r := newRelay(client)
	r.attempt.pool, r.from = pool, from
	if p.o.AccessLog {
		r.begin = time.Now()
	}
	if p.o.SendProxy {
		r.header = proxyHeader(from, localAddr(client))
	}
	// Waiting must not delay the next client.
	if r.attempt.waits() || !p.try(r) {
		go p.connect(r)
	}
}

// connect tries servers until one connects or none is left.
func (p *Proxy) connect(r *relay) {
	for !p.try(r) {
	}
}

// try begins a connection to a server and hands it to a loop. It reports whether the
// search is over.
func (p *Proxy) try(r *relay) bool {
	if err := r.attempt.next(p.alive); err != nil {
		p.refuse(r, err)
		return true
	}
	server, err := p.dialer.dial(r.attempt.to)
	if err == nil {
		l := p.loops[p.loop.Add(1)%uint32(len(p.loops))]
		if err = l.take(r, server); err == nil {
			return true
		}
		rawReset(server)
	}
	r.attempt.fails(p.alive, err)
	return false
}

// failed continues the search after a failed connection.
func (p *Proxy) failed(r *relay, err error) {
	go func() {
		r.attempt.fails(p.alive, err)
		p.connect(r)
	}()
}

// refuse ends a relay without a server by a reset, since the client must not take the
// end for an empty answer.
func (p *Proxy) refuse(r *relay, err error) {
	rawReset(r.client.fd)
	r.outcome = outcomeNoServer
	r.attempt.pool.count.failed.Add(1)
	p.end(r, err)
}

// ended counts a relay that has ended.
func (p *Proxy) ended(r *relay) {
	r.attempt.pool.count.sent.Add(r.up.bytes)
	r.attempt.pool.count.received.Add(r.down.bytes)
	p.end(r, nil)
}

// end updates the counters and the log at the end of a connection.
func (p *Proxy) end(r *relay, err error) {
	r.attempt.pool.count.open.Add(-1)
	p.open.Add(-1)
	if !p.o.AccessLog {
		p.relaying.Done()
		return
	}
	// Writing to the log may block, and a loop must not.
	took := time.Since(r.begin)
	go func() {
		defer p.relaying.Done()
		p.log(r, took, err)
	}()
}

// log logs the end of a connection.
func (p *Proxy) log(r *relay, took time.Duration, err error) {
	destination := r.attempt.pool.destination
	attributes := []any{
		"client", r.from, "port", destination.Port, "destination", destination.Target(), "address", r.attempt.to,
		"to_server", r.up.bytes, "to_client", r.down.bytes, "duration", took.Round(time.Millisecond), "outcome", r.outcome,
	}
	if err != nil {
		attributes = append(attributes, "error", err)
	}
	p.o.Log.Info("connection", attributes...)
}

// Shutdown stops listening, waits up to grace for the connections to end, and then
// resets the rest.
func (p *Proxy) Shutdown(grace time.Duration) {
	p.mu.Lock()
	p.stopped = true
	for _, l := range p.ports {
		_ = l.listener.Close()
	}
	p.mu.Unlock()
	p.accepting.Wait()
	timer := time.AfterFunc(grace, p.abort)
	defer timer.Stop()
	p.relaying.Wait()
	p.abort()
	for _, l := range p.loops {
		l.close()
	}
	p.looping.Wait()
}

// abort ends all connections.
func (p *Proxy) abort() {
	p.kill()
	for _, l := range p.loops {
		l.stop()
	}
}
