package httpproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// An exchange is one request and its response, or one tunnel. It is the ResponseWriter
// in between, and records the values of the access log.
type exchange struct {
	http.ResponseWriter
	proxy   *Proxy
	request *http.Request
	client  *clientConn
	begun   time.Time
	plain   bool // neither a body nor an upgrade
	life    life

	route    route
	server   net.Addr // nil: none
	closing  bool     // the server closes a connection that the client has authenticated
	status   int
	failure  string       // text of the proxy's own response to a failure of a server or a look-up
	answered bool         // the response is the server's
	reason   string       // its reason phrase
	body     *requestBody // nil: none
	received atomic.Int64 // from the client, in a tunnel
	sent     atomic.Int64 // to the client
}

// begin starts the exchange of a request. Its context ends with the client, with the
// idle timeout, and with the proxy.
func (p *Proxy) begin(w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{ResponseWriter: w, proxy: p, begun: time.Now()}
	x.client = r.Context().Value(clientKey{}).(*clientConn)
	_ = x.client.SetWriteDeadline(time.Time{}) // a previous exchange may have set one, see expire
	x.life = life{x: x, parent: r.Context()}
	if r.Method == http.MethodConnect {
		// net/http treats a client that has closed its half as gone, but a tunnel
		// may begin with that.
		x.life.parent = x.client.proxy
	}
	x.client.idle.start(x.client.TCPConn, p.config.IdleTimeout, x.expire)
	x.plain = r.Method != http.MethodConnect && (r.Body == nil || r.Body == http.NoBody) && len(r.Header["Upgrade"]) == 0
	if x.plain {
		x.request = r
		return x
	}
	if len(r.TransferEncoding) > 0 && r.Trailer == nil {
		r.Trailer = http.Header{} // net/http adds trailers that were not announced
	}
	x.request = r.WithContext(x.life.context())
	if r.Body != nil && r.Body != http.NoBody {
		removeForbidden(r.Trailer)
		x.body = &requestBody{ReadCloser: r.Body, trailer: r.Trailer}
		x.request.Body = x.body
		// Otherwise net/http reads the rest of a body before it writes the first
		// byte of a response, which would hold back an early response of the server.
		// HTTP/1 has no error.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	return x
}

// exchangeKey is the context key of a request's *exchange.
type exchangeKey struct{}

// expire ends an exchange at its idle timeout. Waiting for the server ends with the
// context, waiting for the client with the deadlines; that of writing leaves time for
// the response.
func (x *exchange) expire() {
	x.life.end(errIdle)
	_ = x.client.SetReadDeadline(time.Now())
	_ = x.client.SetWriteDeadline(time.Now().Add(time.Second))
}

// end updates the counters and writes the access log. After it net/http reads and
// drops the rest of the body, for which the limit is that of a header.
func (x *exchange) end() {
	x.client.idle.stop()
	x.life.end(context.Canceled)
	x.client.logins.between.Store(true)
	x.client.ended.Add(1)
	x.client.state.CompareAndSwap(active, finishing)
	if x.body != nil && !x.body.ended.Load() {
		x.client.limitRest(x.proxy.config.HeaderTimeout)
	}
	received := x.received.Load()
	if x.body != nil {
		received += x.body.read.Load()
	}
	x.proxy.counters.count(x, received, x.sent.Load())
	if !x.proxy.config.AccessLog {
		return
	}
	attrs := []slog.Attr{
		slog.String("client", x.request.RemoteAddr),
		slog.String("method", x.request.Method),
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
		attrs = append(attrs, slog.String("url", plainURL(x.request)), slog.String("error", x.failure))
	}
	x.proxy.log.LogAttrs(context.Background(), slog.LevelInfo, "access", attrs...)
}

// refuse responds instead of a server. After a CONNECT it closes the connection, since
// the data behind it are for the tunnel.
func (x *exchange) refuse(r *refusal) {
	cause := x.life.cause()
	switch {
	case errors.Is(cause, errIdle):
		r = &refusal{http.StatusGatewayTimeout, x.route.target.String() + ": idle timeout, no data for " + x.proxy.config.IdleTimeout.String()}
		x.Header().Set("Connection", "close")
	case errors.Is(cause, errStopping):
		r = &refusal{http.StatusServiceUnavailable, errStopping.Error()}
		x.Header().Set("Connection", "close")
	case cause != nil:
		// A client that has closed only its half still reads this.
		r = &refusal{http.StatusBadGateway, "the client closed the connection before the response"}
		x.Header().Set("Connection", "close")
		defer func() { x.status = statusClientGone }()
	}
	if x.request.Method == http.MethodConnect {
		x.Header().Set("Connection", "close")
	}
	if r.status >= 500 {
		x.failure = r.text
	}
	if r.status == http.StatusForbidden { // set by the rules only
		x.proxy.counters.denied.Add(1)
	}
	r.write(x)
}

// plainURL returns the URL of a request for the access log, without a user and a query,
// which often contain credentials.
func plainURL(r *http.Request) string {
	if r.Method == http.MethodConnect {
		return r.RequestURI
	}
	u := *r.URL
	u.User, u.RawQuery, u.Opaque, u.Fragment = nil, "", "", ""
	return u.String()
}

// WriteHeader forwards a status and the header.
func (x *exchange) WriteHeader(status int) {
	if status < 200 && status != http.StatusSwitchingProtocols {
		// HTTP/1.0 has no interim responses (RFC 9110 section 15.2). A 100 that the
		// client expects is sent by net/http when the body is read for the server,
		// which may be before the server's own comes here.
		expected := status == http.StatusContinue && x.body != nil && x.request.Header.Get("Expect") != ""
		if x.request.ProtoAtLeast(1, 1) && !expected {
			x.ResponseWriter.WriteHeader(status)
		}
		return
	}
	x.status = status
	// Otherwise net/http guesses a type that the server did not send.
	h := x.Header()
	if len(h["Content-Type"]) == 0 {
		h["Content-Type"] = nil
	}
	// The rest of the body may never arrive, and is no next request.
	if x.body != nil && !x.body.ended.Load() {
		h.Set("Connection", "close")
	}
	x.ResponseWriter.WriteHeader(status)
	if x.answered && x.reason != http.StatusText(status) {
		x.client.statusLine = fmt.Sprintf("%03d %s\r\n", status, x.reason)
	}
}

// forwardInterim forwards an interim response, without the headers of the server's
// connection: close in one of them would end that of the client.
func (x *exchange) forwardInterim(r *http.Response) {
	removeHopByHop(r.Header)
	h := x.Header()
	maps.Copy(h, r.Header)
	x.WriteHeader(r.StatusCode)
	clear(h) // net/http keeps it
}

// Write forwards a part of the body.
func (x *exchange) Write(p []byte) (int, error) {
	n, err := x.ResponseWriter.Write(p)
	x.sent.Add(int64(n))
	return n, err
}

// flush forwards the buffered data before the proxy waits for more of the server: a part
// of a response, even the header alone, may be all for a long time.
func (x *exchange) flush() { _ = x.FlushError() }

// FlushError forwards the buffered data.
func (x *exchange) FlushError() error {
	return http.NewResponseController(x.ResponseWriter).Flush()
}

// Hijack takes the connection for a protocol switch. Reads return the client's early
// data first, which ReverseProxy would leave in the buffer.
func (x *exchange) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	early, err := x.takeConnection()
	if err != nil {
		return nil, nil, err
	}
	x.status = http.StatusSwitchingProtocols
	conn := &switchedConn{clientConn: x.client, early: early, x: x}
	return conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(x.client)), nil
}

// takeConnection takes the connection from net/http, with the data that net/http has
// read behind the request.
func (x *exchange) takeConnection() (early []byte, err error) {
	_, rw, err := http.NewResponseController(x.ResponseWriter).Hijack()
	if err != nil {
		return nil, err
	}
	early, err = rw.Peek(rw.Reader.Buffered())
	return early, err
}

// A switchedConn is the connection of a client after a protocol switch.
type switchedConn struct {
	*clientConn
	early []byte
	x     *exchange
}

// Read returns the early data, and then the rest.
func (c *switchedConn) Read(p []byte) (n int, err error) {
	if len(c.early) > 0 {
		n = copy(p, c.early)
		c.early = c.early[n:]
	} else {
		n, err = c.TCPConn.Read(p)
	}
	c.x.received.Add(int64(n))
	return n, err
}

// Write writes to the client.
func (c *switchedConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	c.x.sent.Add(int64(n))
	return n, err
}

// ReadFrom hides that of the connection, which would not count bytes.
func (c *switchedConn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// WriteTo hides that of the connection, which would skip the early data.
func (c *switchedConn) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{c})
}

// A requestBody records how much of a body was read, its end and its error.
type requestBody struct {
	io.ReadCloser
	trailer http.Header // is complete at the end
	read    atomic.Int64
	ended   atomic.Bool
	err     atomic.Pointer[error]
}

// Read reads from the client.
func (b *requestBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read.Add(int64(n))
	if err == io.EOF {
		removeForbidden(b.trailer)
		b.ended.Store(true)
	} else if err != nil {
		b.err.Store(&err)
	}
	return n, err
}
