package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/limit"
	"github.com/egress-router/egress-router/internal/wording"
)

// Handler serves /healthz, with status 200 while alive returns nil, /readyz, with
// status 200 while the report is ready, and others by their path; the status is 503
// otherwise. alive returns why the program is stuck; a nil alive is always healthy.
func Handler(report func() Report, alive func() error, others map[string]http.Handler) http.Handler {
	pages := map[string]http.HandlerFunc{
		"/healthz": func(w http.ResponseWriter, _ *http.Request) {
			if alive != nil {
				if err := alive(); err != nil {
					write(w, http.StatusServiceUnavailable, err.Error())
					return
				}
			}
			write(w, http.StatusOK, "ok")
		},
		"/readyz": func(w http.ResponseWriter, _ *http.Request) {
			r := report()
			switch {
			case r.Ready:
				write(w, http.StatusOK, "ok")
			case len(r.Reasons) == 0:
				write(w, http.StatusServiceUnavailable, "not ready")
			default:
				write(w, http.StatusServiceUnavailable, r.Reasons...)
			}
		},
	}
	for path, h := range others {
		pages[path] = h.ServeHTTP
	}
	known := slices.Sorted(maps.Keys(pages))
	last := len(known) - 1
	notFound := "not found: the paths are " + strings.Join(known[:last], ", ") + " and " + known[last]
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page, found := pages[r.URL.Path]
		switch {
		case !found:
			write(w, http.StatusNotFound, notFound)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			write(w, http.StatusMethodNotAllowed, "method not allowed: use GET or HEAD")
		default:
			page(w, r)
		}
	})
}

// write writes a response with one line for each text.
func write(w http.ResponseWriter, status int, texts ...string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	for _, text := range texts {
		_, _ = io.WriteString(w, wording.OneLine(text)+"\n") // the client may be gone
	}
}

// The limits of clients. There are few: a kubelet, which opens a new connection for
// each probe, and Prometheus. A connection serves one request, so that idle connections
// do not delay a probe.
const (
	headerTimeout   = 2 * time.Second  // limit of reading the request's header: a probe has one second by default
	responseTimeout = 10 * time.Second // limit of writing the response
	maxHeader       = 8 << 10          // bytes
	maxConnections  = 32
	clientShare     = 4 // connections of one address that others do not displace
)

// Listen serves on an address and port, on all addresses if the address is the zero
// Addr, until ctx ends. wait waits for the end. The error is a *ListenError.
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

// connKey is the key of a request's connection, a *limit.Conn.
type connKey struct{}

// serveHTTP serves the connections of a listener until ctx ends. wait waits for the
// end.
func serveHTTP(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) (wait func()) {
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conn := r.Context().Value(connKey{}).(*limit.Conn)
			conn.Busy()
			defer conn.Idle()
			handler.ServeHTTP(w, r)
		}),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		DisableGeneralOptionsHandler: true, // for OPTIONS *
		ReadTimeout:                  headerTimeout,
		ReadHeaderTimeout:            headerTimeout,
		WriteTimeout:                 responseTimeout,
		MaxHeaderBytes:               maxHeader,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	server.SetKeepAlivesEnabled(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer closeAfter(ctx, server.Close)()
		if err := server.Serve(limit.New(l, maxConnections, clientShare)); !errors.Is(err, http.ErrServerClosed) {
			log.Error("health server failed", "listen", l.Addr(), "error", err)
		}
	}()
	return func() { <-done }
}

// A ListenError is the error of listening on the health address.
type ListenError struct {
	Address string
	Err     error
}

// Error names the address.
func (e *ListenError) Error() string {
	err := e.Err
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // without the address
	}
	return fmt.Sprintf("listening on health address %s: %v", e.Address, err)
}

// Unwrap returns the cause.
func (e *ListenError) Unwrap() error { return e.Err }

// Hint returns what to do.
func (e *ListenError) Hint(names wording.Names) string {
	hint := "set %s to the port alone, such as :9465"
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		hint = "another container of the pod, or this program for its clients, listens on this port: set another port in %s"
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		hint = "the pod does not have this address: " + hint
	case errors.Is(e.Err, os.ErrPermission):
		hint = "ports below 1024 need the capability NET_BIND_SERVICE: set another port in %s"
	}
	return wording.Textf(hint, wording.HealthListen).In(names)
}
