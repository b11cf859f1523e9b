package httpproxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A Config says how a proxy behaves. Every field has to be set but those that say
// what their zero value means.
type Config struct {
	Listen netip.AddrPort // the zero Addr: at all addresses

	Rules Rules // to begin with

	ConnectTimeout   time.Duration // to look a name up, and again to connect to one of its addresses
	HeaderTimeout    time.Duration // for a client to send a request's header
	KeepAliveTimeout time.Duration // for a client's next request on a connection
	IdleTimeout      time.Duration // for anything to move, either way, in a request or a tunnel
	ShutdownGrace    time.Duration // for what still runs when the proxy is told to stop

	MaxHeaderBytes int // of a request or an answer
	MaxConnections int // of clients; 0: three quarters of the files that the process may open

	AccessLog bool // one line for each request and each tunnel
}

// A Proxy serves clients. Make one with New.
type Proxy struct {
	config   Config
	log      *slog.Logger
	resolver Resolver
	rules    atomic.Pointer[Rules]

	transport *http.Transport
	forwarder *httputil.ReverseProxy
	running   counter

	listener atomic.Pointer[listener] // while it serves
	file     fileState
	counters counters

	// own reports whether an address is one of the pod's.
	own func(netip.Addr) (bool, error)
}

// Of the connections to servers, how many are kept for the next request to the
// same one, and how long. A server that closes one at the same moment as it is
// used costs that request if it cannot be repeated; most wait for a minute or more.
const (
	keptPerServer = 256
	kept          = 2048
	keptFor       = 50 * time.Second
)

// expectPatience is how long a request's body waits for a server that was asked
// whether it wants it (RFC 9110 section 10.1.1), and does not say.
const expectPatience = time.Second

// New makes a proxy.
func New(c Config, log *slog.Logger, resolver Resolver) *Proxy {
	if c.MaxConnections == 0 {
		c.MaxConnections = connectionLimit()
	}
	p := &Proxy{config: c, log: log, resolver: resolver, own: new(ownAddresses).has}
	p.rules.Store(&c.Rules)
	p.file.set(nil)
	p.transport = &http.Transport{
		DialContext:            p.dialPlain,
		DialTLSContext:         p.dialTLS,
		DisableCompression:     true, // the client says what it accepts
		MaxIdleConns:           kept,
		MaxIdleConnsPerHost:    keptPerServer,
		IdleConnTimeout:        keptFor,
		ExpectContinueTimeout:  expectPatience,
		MaxResponseHeaderBytes: int64(c.MaxHeaderBytes),
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(0)},
	}
	p.forwarder = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		ModifyResponse: modifyResponse,
		ErrorHandler:   p.answerFailure,
		Transport:      p.transport,
		BufferPool:     &buffers{},
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return p
}

// SetRules changes the rules. Requests and tunnels that are under way stay; the
// next request is asked by the new rules.
func (p *Proxy) SetRules(rules Rules) {
	p.file.set(nil)
	if before := p.rules.Swap(&rules); !before.Equal(rules) {
		p.counters.reloads.Add(1)
		p.log.Info("rules changed", "rules", len(rules))
	}
}

// Rejected notes why rules that were to take the place of those in force are not
// right.
func (p *Proxy) Rejected(err error) {
	p.file.set(err)
	p.counters.reloadFailures.Add(1)
}

// connectionLimit leaves a quarter of the files that may be open to connections
// to servers; clients that are idle have none.
func connectionLimit() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1 << 10
	}
	return int(max(1, min(limit.Cur, 1<<24)/4*3))
}

// Run serves clients until ctx ends, and then what they are in the middle of for
// as long as the grace lasts. It returns nil if it was told to stop.
func (p *Proxy) Run(ctx context.Context) error {
	l, err := listen(ctx, p.config.Listen)
	if err != nil {
		return err
	}
	return p.Serve(ctx, l)
}

// Serve is Run with a listener, which it closes.
func (p *Proxy) Serve(ctx context.Context, l *net.TCPListener) error {
	// What runs goes on when ctx ends: it has a grace.
	base, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(errStopping)
	server := &http.Server{
		Handler:                      p,
		DisableGeneralOptionsHandler: true, // it would answer for a server
		ReadHeaderTimeout:            p.config.HeaderTimeout,
		IdleTimeout:                  p.config.KeepAliveTimeout,
		MaxHeaderBytes:               p.config.MaxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelWarn),
		BaseContext:                  func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			conn.(*clientConn).proxy = base
			return context.WithValue(ctx, clientKey{}, conn)
		},
	}
	var background sync.WaitGroup
	defer background.Wait()
	clients := newListener(l, p.config.MaxConnections)
	p.listener.Store(clients)
	defer p.listener.Store(nil)
	p.log.Info("ready", "listen", l.Addr(), "rules", len(*p.rules.Load()))
	var err error
	served := make(chan struct{})
	background.Go(func() {
		err = server.Serve(clients)
		close(served)
	})
	select {
	case <-served:
		_ = server.Close()
		return fmt.Errorf("accepting clients: %w", err)
	case <-ctx.Done():
	}
	p.stop(base, server, abandon)
	p.transport.CloseIdleConnections()
	return nil
}

// stop waits for what still runs, and ends it when the grace is over.
func (p *Proxy) stop(base context.Context, server *http.Server, abandon context.CancelCauseFunc) {
	grace, cancel := context.WithTimeout(base, p.config.ShutdownGrace)
	defer cancel()
	p.log.Info("stopping", "running", p.running.count(), "grace", p.config.ShutdownGrace)
	err := server.Shutdown(grace)
	if err == nil {
		err = p.running.wait(grace) // net/http forgets those that were hijacked
	}
	if err == nil {
		return
	}
	if n := p.running.count(); n > 0 {
		p.log.Warn("shutdown timeout, closing active requests", "running", n)
	}
	abandon(errStopping)
	_ = server.Close()
	// All of them see it at once; a second is for a machine that is busy.
	last, cancel := context.WithTimeout(context.WithoutCancel(base), time.Second)
	defer cancel()
	_ = p.running.wait(last)
}

// clientKey is where the context of a request has its *clientConn.
type clientKey struct{}

// ServeHTTP answers one request. It is for the server that Serve makes.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.running.add(1)
	defer p.running.add(-1)
	x := p.begin(w, r)
	defer x.end()
	t, err := targetOf(r)
	x.route = &route{target: t}
	switch {
	case err != nil:
		x.refuse(&refusal{http.StatusBadRequest, err.Error()})
	case r.Method == http.MethodConnect:
		p.connect(x)
	default:
		p.forward(x)
	}
}

// A counter counts what runs, and can wait until nothing does.
type counter struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n gets zero; nil if nobody waits
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

// buffers are what bodies are copied by.
type buffers struct{ pool sync.Pool }

const bufferSize = 32 << 10

// Get returns a buffer.
func (b *buffers) Get() []byte {
	if buf, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return buf[:]
	}
	return make([]byte, bufferSize)
}

// Put takes it back.
func (b *buffers) Put(buf []byte) { b.pool.Put((*[bufferSize]byte)(buf)) }
