package httpproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
)

// A Config is the configuration of a proxy. Every field must be set unless its comment
// states the meaning of the zero value.
type Config struct {
	Listen netip.AddrPort // the zero Addr: all addresses

	Rules Rules // initial ones, see SetRules

	ConnectTimeout   time.Duration // limit of a name look-up, and of connecting to its addresses
	HeaderTimeout    time.Duration // limit of reading a request's header
	KeepAliveTimeout time.Duration // limit of waiting for the next request on a connection
	IdleTimeout      time.Duration // limit of a request or tunnel without data in both directions
	ShutdownGrace    time.Duration // limit of active requests and tunnels after the end of Run's context

	MaxHeaderBytes int // limit of the header of a request or response
	MaxConnections int // limit of client connections; 0: three quarters of the limit of open files

	AccessLog bool // log one line for each request and tunnel
}

// A Proxy is an HTTP proxy, see New.
type Proxy struct {
	config   Config
	log      *slog.Logger
	resolver Resolver
	rules    atomic.Pointer[ruleSet]
	silence  silence
	unnamed  unnamed

	connections int // limit of those to clients and servers together; 0: none
	servers     pool
	pipes       pipes
	buffers     buffers
	tls         *tls.Config
	hangups     hangups
	stopping    atomic.Bool
	running     counter

	listener atomic.Pointer[listener] // while it serves
	file     fileState
	counters counters

	// own reports whether an address is one of the pod.
	own func(netip.Addr) (bool, error)
}

// The limits of idle connections to servers. A request that is sent while its server
// closes the connection has to be repeated, so keptFor is shorter than the idle timeout
// of most servers, a minute or more.
const (
	keptPerServer = 256
	kept          = 1024
	keptFor       = 50 * time.Second
)

// expectPatience is how long a request with Expect: 100-continue waits for the server
// before its body is sent (RFC 9110 section 10.1.1).
const expectPatience = time.Second

// New returns a proxy.
func New(c Config, log *slog.Logger, resolver Resolver) *Proxy {
	files := openFiles()
	if c.MaxConnections == 0 {
		c.MaxConnections = max(1, files/4*3) // idle clients need no second file
	}
	p := &Proxy{config: c, log: log, resolver: resolver, own: new(netns.Addresses).Has}
	p.rules.Store(newRuleSet(c.Rules, nil))
	p.silence.log = log
	p.file.set(nil)
	p.servers.most, p.connections = kept, connectionFiles(files)
	p.pipes.most = min(files/pipeShare, mostPipes)
	p.tls = &tls.Config{MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	return p
}

// SetRules sets the rules for the next requests. Active requests and tunnels continue.
func (p *Proxy) SetRules(rules Rules) {
	p.file.set(nil)
	if before := p.rules.Load(); !before.Equal(rules) {
		p.rules.Store(newRuleSet(rules, before))
		p.counters.reloads.Add(1)
		p.log.Info("rules changed", "rules", len(rules))
	}
}

// Rejected records the error of an invalid rule list. The rules stay in effect.
func (p *Proxy) Rejected(err error) {
	p.file.set(err)
	p.counters.reloadFailures.Add(1)
}

// The shares of the open files. A client takes one, and another one for the server's
// connection of a tunnel or a request. The reserve is for pipes, two files each, clients
// that wait, name look-ups, addresses that are dialled at the same time, and files.
const (
	mostReserve  = 512
	reserveShare = 8  // of 1,024 files 128
	pipeShare    = 32 // of 1,024 files 32 pipes
)

// connectionFiles returns how many connections to clients and servers may be open.
func connectionFiles(files int) int { return max(2, files-min(files/reserveShare, mostReserve)) }

// openFiles returns the limit of open files.
func openFiles() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1 << 10
	}
	return int(min(limit.Cur, 1<<24))
}

// Run serves clients until ctx ends, and then waits up to ShutdownGrace for active
// requests and tunnels. It returns nil after the end of ctx.
func (p *Proxy) Run(ctx context.Context) error {
	l, err := listen(ctx, p.config.Listen)
	if err != nil {
		return err
	}
	return p.Serve(ctx, l)
}

// Serve is Run for a listener, which it closes.
func (p *Proxy) Serve(ctx context.Context, l *net.TCPListener) error {
	clients := newListener(l, p)
	defer clients.Close()
	if err := p.hangups.open(); err != nil {
		return fmt.Errorf("watching clients: %w", err)
	}
	p.listener.Store(clients)
	defer p.listener.Store(nil)
	p.log.Info("ready", "listen", l.Addr(), "rules", len(p.rules.Load().Rules))
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(p.hangups.run)
	defer p.hangups.close()
	var err error
	ended := make(chan struct{})
	background.Go(func() {
		err = p.accept(clients)
		close(ended)
	})
	select {
	case <-ended:
		clients.each(func(c *clientConn) { _ = c.Close() })
		return fmt.Errorf("accepting clients: %w", err)
	case <-ctx.Done():
	}
	p.stop(clients)
	p.servers.close()
	return nil
}

// accept serves clients until the listener is closed. The errors of accept(2) that belong
// to one connection, or to a lack of files or memory, end nothing.
func (p *Proxy) accept(l *listener) error {
	const least, most = 5 * time.Millisecond, time.Second
	pause := least
	for {
		c, err := l.Accept()
		switch temporary, ok := errors.AsType[interface {
			error
			Temporary() bool
		}](err); {
		case err == nil:
			pause = least
			if err := p.hangups.add(c); err != nil {
				if !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) { // for another client, or at the end
					p.log.Warn("watching a client failed", "client", c.RemoteAddr(), "error", err)
				}
				_ = c.Close()
				continue
			}
			go c.serve()
		case ok && temporary.Temporary():
			p.log.Warn("accept failed", "error", err, "retry", pause)
			select {
			case <-time.After(pause):
			case <-l.closed:
			}
			pause = min(2*pause, most)
		default:
			return err
		}
	}
}

// stop waits for active requests and tunnels, and ends them after ShutdownGrace.
func (p *Proxy) stop(clients *listener) {
	grace, cancel := context.WithTimeout(context.Background(), p.config.ShutdownGrace)
	defer cancel()
	p.log.Info("stopping", "running", p.running.count(), "grace", p.config.ShutdownGrace)
	p.stopping.Store(true)
	_ = clients.Close()
	if p.drain(grace, clients) {
		return
	}
	if n := p.running.count(); n > 0 {
		p.log.Warn("shutdown timeout, closing active requests", "running", n)
	}
	clients.each(func(c *clientConn) { c.interrupt(errStopping) })
	// They end immediately; a second is for a busy machine.
	last, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = p.running.wait(last)
	clients.each(func(c *clientConn) { _ = c.Close() })
}

// drain closes connections without a request until there are none, or the context ends.
func (p *Proxy) drain(ctx context.Context, clients *listener) bool {
	const least, most = time.Millisecond, 100 * time.Millisecond
	for pause := least; ; pause = min(2*pause, most) {
		left := 0
		clients.each(func(c *clientConn) {
			if !c.isIdle() || !c.state.CompareAndSwap(resting, evicted) {
				left++
				return
			}
			_ = c.Close()
		})
		if left == 0 {
			return true
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}

// handle handles one request.
func (p *Proxy) handle(x *exchange) {
	t, err := targetOf(&x.request)
	x.route.target = t
	switch {
	case err != nil:
		x.refuse(&refusal{http.StatusBadRequest, err.Error()})
	case x.request.method == http.MethodConnect:
		p.connect(x)
	default:
		p.forward(x)
	}
}

// A counter counts active requests and tunnels, and can wait for zero.
type counter struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n becomes zero; nil without a waiter
}

func (c *counter) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += n
	if c.n == 0 && c.none != nil {
		close(c.none)
		c.none = nil
	}
}

func (c *counter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *counter) wait(ctx context.Context) error {
	c.mu.Lock()
	if c.n == 0 {
		c.mu.Unlock()
		return nil
	}
	if c.none == nil {
		c.none = make(chan struct{})
	}
	none := c.none
	c.mu.Unlock()
	select {
	case <-none:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// buffers is the pool of buffers to copy bodies.
type buffers struct{ pool sync.Pool }

const bufferSize = 32 << 10

// Get returns a buffer.
func (b *buffers) Get() []byte {
	if buf, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return buf[:]
	}
	return make([]byte, bufferSize)
}

// Put returns a buffer to the pool.
func (b *buffers) Put(buf []byte) { b.pool.Put((*[bufferSize]byte)(buf)) }
