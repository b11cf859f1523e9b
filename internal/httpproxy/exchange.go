package httpproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

// An exchange is one request and its response, or one tunnel. It records the values of
// the access log.
type exchange struct {
	proxy   *Proxy
	client  *clientConn
	request request
	body    *requestBody // nil: none
	upgrade string       // protocol to which the client wants to switch; empty: none
	begun   time.Time
	life    life

	route    route
	server   net.Addr // nil: none
	conn     *serverConn
	response response // of the server
	closing  bool     // the server closes a connection that the client has authenticated
	reply    reply    // to the client
	status   int
	failure  string       // text of the proxy's own response to a failure of a server or a look-up
	received atomic.Int64 // from the client, in a tunnel
	sent     atomic.Int64 // to the client

	continues   sync.Mutex // of interim responses
	mayContinue bool       // the client expects 100

	over  bool // end was called
	taken bool // the connection is a tunnel, or was closed; written with its mutex
}

// exchanges are those that have ended. One is used again only if no goroutine but that of
// its client can hold it any more:
//   - A body is sent by a goroutine of its own, and a connection that is taken has others:
//     these exchanges are left to the garbage collector.
//   - Goroutines of look-ups and of attempts to connect may outlive the exchange. They get
//     values of it, copies of slices, and the context of its life, which no other life uses.
//   - Watches for the end of the client, for idleness and for the end of the proxy call it
//     under a mutex, which end acquires to unset it.
var exchanges = sync.Pool{New: func() any { return new(exchange) }}

// newExchange returns an exchange for the next request of a client.
func newExchange(c *clientConn) *exchange {
	x := exchanges.Get().(*exchange)
	x.proxy, x.client = c.proxy, c
	return x
}

// free returns an exchange that has ended to the pool, with the memory for fields.
func (x *exchange) free() {
	if x.body != nil || x.taken || cap(x.request.fields)+cap(x.response.fields) > 128 {
		return
	}
	asked, got, addrs := x.request.fields, x.response.fields, x.route.addrs
	clear(asked[:cap(asked)])
	clear(got[:cap(got)])
	*x = exchange{request: request{fields: asked[:0]}, response: response{fields: got[:0]}, route: route{addrs: addrs[:0]}}
	exchanges.Put(x)
}

// begin starts the exchange of a request that was read.
func (x *exchange) begin() {
	c, r := x.client, &x.request
	c.limited = true // until the header of the next request
	x.begun, x.mayContinue = time.Now(), r.expects
	if r.length != 0 {
		x.body = &requestBody{x: x, body: body{r: c.reader, left: r.length}}
		if r.length < 0 {
			x.body.body.setChunks()
		}
		_ = c.SetReadDeadline(time.Time{})
	}
	if c.writeLimited.CompareAndSwap(true, false) { // by a previous exchange
		_ = c.SetWriteDeadline(time.Time{})
	}
	c.logins.between.Store(false)
	c.idle.start(c.TCPConn, c.proxy.config.IdleTimeout, x.expire)
	c.setExchange(x)
}

// expire ends an exchange at its idle timeout. Waiting for the server ends with the
// life, waiting for the client with the deadlines; that of writing leaves time for
// the response.
func (x *exchange) expire() {
	x.life.end(errIdle)
	x.client.writeLimited.Store(true)
	_ = x.client.SetReadDeadline(time.Now())
	_ = x.client.SetWriteDeadline(time.Now().Add(time.Second))
}

// end updates the counters and writes the access log.
func (x *exchange) end() {
	x.over = true
	x.client.idle.stop()
	x.client.setExchange(nil)
	x.life.end(context.Canceled)
	received := x.received.Load()
	if x.body != nil {
		received += x.body.read.Load()
	}
	x.proxy.counters.count(x, received, x.sent.Load())
	if !x.proxy.config.AccessLog {
		return
	}
	attrs := []slog.Attr{
		slog.String("client", x.client.RemoteAddr().String()),
		slog.String("method", x.request.method),
	}
	if x.route.target.port != 0 {
		attrs = append(attrs, slog.String("destination", x.route.target.String()))
	}
	if x.server != nil {
		attrs = append(attrs, slog.String("address", x.server.String()))
	}
	attrs = append(attrs, slog.String("rule", x.route.verdict.Rule.String()),
		slog.Int("status", x.status),
		slog.Int64("received", received),
		slog.Int64("sent", x.sent.Load()),
		slog.Duration("duration", time.Since(x.begun)))
	if x.failure != "" {
		attrs = append(attrs, slog.String("url", x.request.plainURL()), slog.String("error", x.failure))
	}
	x.proxy.log.LogAttrs(context.Background(), slog.LevelInfo, "access", attrs...)
}

// refuse responds instead of a server. After a CONNECT it closes the connection, since
// the data behind it are for the tunnel.
func (x *exchange) refuse(r *refusal) {
	cause, closes := x.life.cause(), x.request.method == http.MethodConnect
	switch {
	case errors.Is(cause, errIdle):
		r = &refusal{http.StatusGatewayTimeout, x.route.target.String() + ": idle timeout, no data for " + x.proxy.config.IdleTimeout.String()}
		closes = true
	case errors.Is(cause, errStopping):
		r = &refusal{http.StatusServiceUnavailable, errStopping.Error()}
		closes = true
	case cause != nil:
		// A client that has closed only its half still reads this.
		r = &refusal{http.StatusBadGateway, "the client closed the connection before the response"}
		closes = true
		defer func() { x.status = statusClientGone }()
	}
	if r.status >= 500 {
		x.failure = r.text
	}
	if r.status == http.StatusForbidden { // set by the rules only
		x.proxy.counters.denied.Add(1)
	}
	r.write(x, closes || x.body != nil && x.body.err.Load() != nil)
}

// plainURL returns the URL of a request for the access log, without a user and a query,
// which often contain credentials.
func (r *request) plainURL() string {
	if r.method == http.MethodConnect {
		return r.uri
	}
	u, err := url.ParseRequestURI(r.uri)
	if err != nil { // it was parsed before
		return ""
	}
	u.User, u.RawQuery, u.Opaque, u.Fragment = nil, "", "", ""
	return u.String()
}

// take takes the connection for a tunnel, and returns the data that were read behind the
// request.
func (x *exchange) take() []byte {
	x.setTaken()
	x.client.proxy.hangups.end(x.client)
	x.stopContinue()
	_ = x.client.SetReadDeadline(time.Time{})
	early, _ := x.client.reader.Peek(x.client.reader.Buffered()) // cannot fail
	return early
}

// drop ends the connection of a client without the rest of a response.
func (x *exchange) drop() {
	x.setTaken()
	_ = x.client.Close()
}

func (x *exchange) setTaken() {
	x.client.mu.Lock()
	defer x.client.mu.Unlock()
	x.taken = true
}
