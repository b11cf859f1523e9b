package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// Handler answers /healthz with 200 while the program works, /readyz while it is
// ready, and /metrics. alive returns why the program is stuck; nil stands for
// one that is not as long as it answers. Without metrics there are none.
func Handler(report func() Report, alive func() error, metrics http.Handler) http.Handler {
	pages := map[string]http.HandlerFunc{
		"/healthz": func(w http.ResponseWriter, _ *http.Request) {
			if alive != nil {
				if err := alive(); err != nil {
					say(w, http.StatusServiceUnavailable, err.Error())
					return
				}
			}
			say(w, http.StatusOK, "ok")
		},
		"/readyz": func(w http.ResponseWriter, _ *http.Request) {
			r := report()
			switch {
			case r.Ready:
				say(w, http.StatusOK, "ok")
			case len(r.Reasons) == 0:
				say(w, http.StatusServiceUnavailable, "not ready")
			default:
				say(w, http.StatusServiceUnavailable, r.Reasons...)
			}
		},
	}
	if metrics != nil {
		pages["/metrics"] = metrics.ServeHTTP
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page, known := pages[r.URL.Path]
		switch {
		case !known:
			say(w, http.StatusNotFound, "not found: the paths are /healthz, /readyz and /metrics")
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			say(w, http.StatusMethodNotAllowed, "method not allowed: use GET or HEAD")
		default:
			page(w, r)
		}
	})
}

// say answers with one line for each text.
func say(w http.ResponseWriter, status int, texts ...string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	for _, text := range texts {
		_, _ = io.WriteString(w, oneLine(text)+"\n") // a client that is gone needs none
	}
}

// What one who asks by HTTP may take. There are few of them: a kubelet, which
// takes a new connection for each probe, and somebody who collects metrics.
// Connections are not kept, so that idle ones cannot keep a probe waiting.
const (
	headerTimeout     = 5 * time.Second // of the request
	answerTimeout     = 10 * time.Second
	maxHeader         = 8 << 10 // bytes
	connectionsAtOnce = 32
)

// Listen serves at an address, at all addresses if it is the zero Addr, until
// ctx ends. The function that is returned waits for the end. An error says that
// the address cannot be had.
func Listen(ctx context.Context, at netip.AddrPort, handler http.Handler, log *slog.Logger) (wait func(), err error) {
	address := fmt.Sprintf(":%d", at.Port())
	if at.Addr().IsValid() {
		address = at.String()
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false) // there is one path to a pod
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, &ListenError{address, err}
	}
	return serveHTTP(ctx, l, handler, log), nil
}

// serveHTTP serves the connections of a listener until ctx ends. The function that
// it returns waits for the end.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) (wait func()) {
	server := &http.Server{
		Handler:                      handler,
		DisableGeneralOptionsHandler: true, // OPTIONS * is no page either
		ReadTimeout:                  headerTimeout,
		ReadHeaderTimeout:            headerTimeout,
		WriteTimeout:                 answerTimeout,
		MaxHeaderBytes:               maxHeader,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	server.SetKeepAlivesEnabled(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer context.AfterFunc(ctx, func() { _ = server.Close() })()
		few := &fewListener{Listener: l, slots: make(chan struct{}, connectionsAtOnce), closed: make(chan struct{})}
		if err := server.Serve(few); !errors.Is(err, http.ErrServerClosed) {
			log.Error("health server failed", "listen", l.Addr(), "error", err)
		}
	}()
	return func() { <-done }
}

// A ListenError says that the address for health cannot be listened at.
type ListenError struct {
	Address string
	Err     error
}

// Error names the address.
func (e *ListenError) Error() string {
	err := e.Err
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // the address is said
	}
	return fmt.Sprintf("listening on health address %s: %v", e.Address, err)
}

// Unwrap returns the cause.
func (e *ListenError) Unwrap() error { return e.Err }

// Hint says what to do about it.
func (e *ListenError) Hint() string {
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return "another container of the pod, or this program for its clients, listens on this port: set another port in EGRESS_HEALTH_LISTEN"
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		return "the pod does not have this address: set EGRESS_HEALTH_LISTEN to the port alone, such as :9465"
	case errors.Is(e.Err, os.ErrPermission):
		return "ports below 1024 need the capability NET_BIND_SERVICE: set another port in EGRESS_HEALTH_LISTEN"
	}
	return ""
}

// A fewListener hands out no more connections at a time than it has slots; more
// wait in the kernel's queue (listen(2)).
type fewListener struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

// Accept waits for a slot, and then for a connection.
func (l *fewListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &fewConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// Close ends an Accept that waits for a slot, too.
func (l *fewListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type fewConn struct {
	net.Conn
	release func()
}

// Close gives the slot back.
func (c *fewConn) Close() error {
	c.release()
	return c.Conn.Close()
}
