package httpproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
)

// pseudonym is the name of this proxy in Via (RFC 9110 section 7.6.3).
const pseudonym = "egress-router"

// forward sends a request in absolute form to its server, and the response back.
func (p *Proxy) forward(x *exchange) {
	if last, refusal := x.request.countForwards(); last {
		x.refuse(refusal)
		return
	}
	if refusal := p.route(x); refusal != nil {
		x.refuse(refusal)
		return
	}
	err := x.outgoing()
	if err == nil {
		err = p.roundTrip(x)
	}
	switch {
	case err != nil:
		x.fail(err)
	case x.response.status == http.StatusSwitchingProtocols:
		x.switchProtocols()
	default:
		x.forwardResponse()
	}
}

// countForwards decrements Max-Forwards, and reports whether this proxy is the last
// recipient (RFC 9110 section 7.6.2).
func (r *request) countForwards() (last bool, answer *refusal) {
	if r.method != http.MethodOptions && r.method != http.MethodTrace {
		return false, nil
	}
	n, err := strconv.ParseUint(r.fields.get("Max-Forwards"), 10, 32)
	switch {
	case err != nil:
		return false, nil
	case n > 0:
		r.fields = append(r.fields.without("Max-Forwards"), field{"Max-Forwards", strconv.FormatUint(n-1, 10)})
		return false, nil
	case r.method == http.MethodTrace:
		return true, &refusal{http.StatusMethodNotAllowed, "TRACE is not supported: Max-Forwards is 0"}
	}
	return true, &refusal{http.StatusOK, "response of the proxy: Max-Forwards is 0"}
}

// outgoing derives the fields of the request to the server from those of the client.
func (x *exchange) outgoing() error {
	r := &x.request
	upgrade, trailers := r.fields.upgrade(), r.fields.hasToken("Te", "trailers")
	if !isPrintable(upgrade) {
		return fmt.Errorf("client tried to switch to invalid protocol %q", upgrade)
	}
	f := r.fields.withoutHopByHop()
	if trailers {
		f = append(f, field{"Te", "trailers"})
	}
	if upgrade != "" && r.atLeast11() { // RFC 9110 section 7.8
		x.upgrade = upgrade
		f = append(f, field{"Connection", "Upgrade"}, field{"Upgrade", upgrade})
	}
	f = append(f, via(r.major, r.minor))
	f.sort()
	r.fields = f
	return nil
}

// isPrintable reports whether a string is of printable ASCII alone.
func isPrintable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}

// forwardResponse sends the response of the server to the client.
func (x *exchange) forwardResponse() {
	r := &x.response
	defer r.finish(io.ErrUnexpectedEOF) // if it has not ended
	if err := x.checkReason(); err != nil {
		x.fail(err)
		return
	}
	f := r.fields.withoutHopByHop()
	if x.closing {
		f = append(f, field{"Connection", "close"})
	}
	if len(r.trailers) > 0 {
		f = append(f, field{"Trailer", strings.Join(r.trailers, ", ")})
	}
	f = append(f, via(r.major, r.minor))
	x.reply.trailers = len(r.trailers) > 0
	x.reply.reason, x.reply.own = r.reason, true
	x.head(r.status, f)
	if err := x.copyBody(); err != nil {
		x.proxy.log.Debug("response incomplete", "error", err)
		x.flush()
		x.drop()
	}
}

func (x *exchange) checkReason() error {
	if strings.ContainsFunc(x.response.reason, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
		return errBadReason
	}
	return nil
}

// via returns the field that names this proxy, for a message in a version of HTTP.
func via(major, minor int) field {
	if major == 1 && minor == 1 {
		return field{"Via", "1.1 " + pseudonym}
	}
	return field{"Via", fmt.Sprintf("%d.%d %s", major, minor, pseudonym)}
}

// copyBody forwards the body of a response. Before it waits for the server, serverConn
// forwards what is buffered.
func (x *exchange) copyBody() error {
	r := &x.response
	if r.noBody {
		return nil
	}
	if n := r.body.left; r.body.chunks == nil && n >= 0 && n <= int64(r.body.r.Buffered()) { // the most frequent case
		p, _ := r.body.r.Peek(int(n)) // cannot fail
		err := x.write(p)
		_, _ = r.body.r.Discard(int(n))
		r.finish(io.EOF)
		return err
	}
	buf := x.proxy.buffers.Get()
	defer x.proxy.buffers.Put(buf)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if err := x.write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// roundTrip sends the request to its server and receives the response.
//
// A request that may be repeated uses an idle connection, and is repeated if the server
// has closed that connection. Others have a new one: they are not lost then, and never
// run twice (RFC 9110 section 9.2.2, RFC 9112 section 9.3.1).
func (p *Proxy) roundTrip(x *exchange) error {
	key := x.route.serverKey(x.request.scheme)
	login := x.request.fields.connectionScheme("Authorization")
	repeatable := isSafe(x.request.method) && x.body == nil

	c := x.client.unpark(key)
	switch {
	case c == nil:
	case c.alive() && (c.login || repeatable):
	case c.login:
		_ = c.Close()
		return errLoginLost
	default:
		_ = c.Close()
		c = nil
	}
	if c == nil && repeatable && !login {
		c = p.servers.get(key)
	}
	for {
		if c == nil {
			var err error
			if c, err = p.connectServer(x.life.context(), x.route.target, x.route.addrs, key); err != nil {
				return err
			}
		}
		authenticated := c.login
		if login {
			c.client, c.login = x.client, true
		}
		x.server = c.RemoteAddr()
		x.conn = c
		err := c.exchange(x, p.release)
		// Without an error the connection may have another exchange already.
		switch stale := errors.Is(err, errBeforeAnswer) && c.used; {
		case stale && authenticated:
			return errLoginLost
		case stale && repeatable:
			c = nil
			continue
		}
		return err
	}
}

// errLoginLost is the end of a server connection that the client has authenticated.
var errLoginLost = errors.New("the server closed the authenticated connection")

// isSafe reports whether a request may be repeated: it changes nothing on the server
// (RFC 9110 section 9.2.1).
func isSafe(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return false
}

// release keeps a connection for another exchange.
func (p *Proxy) release(c *serverConn) {
	if c.client != nil {
		c.client.park(c)
	} else {
		p.servers.put(c)
	}
}

// connectServer connects to one of the addresses of a server. https URLs in absolute form, which
// few clients send, need TLS.
func (p *Proxy) connectServer(ctx context.Context, t target, addrs []netip.Addr, key serverKey) (*serverConn, error) {
	tcp, err := p.dial(ctx, t, addrs)
	if err != nil {
		return nil, err
	}
	below, err := newSocket(tcp)
	if err != nil {
		_ = tcp.Close()
		p.leave()
		return nil, err
	}
	c := &serverConn{duplex: below, tcp: below, key: key, closed: sync.OnceFunc(p.leave)}
	if key.scheme == "https" {
		config := p.tls.Clone()
		config.ServerName = t.host.String()
		conn := tls.Client(below, config)
		ctx, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
		defer cancel()
		if err := conn.HandshakeContext(ctx); err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		c.duplex = conn
	}
	return c, nil
}

// fail responds to the client if the server does not respond, or with an invalid response.
func (x *exchange) fail(err error) {
	if errors.Is(err, errLoginLost) {
		x.status = http.StatusBadGateway // for the access log
		x.drop()
		return
	}
	x.refuse(x.explain(err))
}

func (x *exchange) explain(err error) *refusal {
	if x.body != nil {
		if bad := x.body.err.Load(); bad != nil {
			return &refusal{http.StatusBadRequest, "reading the request: " + (*bad).Error()}
		}
	}
	if _, ok := errors.AsType[*dialError](err); ok || errors.Is(err, errBusy) {
		return undialled(err)
	}
	switch {
	case isTimeout(err):
		return &refusal{http.StatusGatewayTimeout, fmt.Sprintf("%s: %v", x.route.target, err)}
	case errors.Is(err, errBeforeAnswer) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return &refusal{http.StatusBadGateway, fmt.Sprintf("%s: the server closed the connection without a response", x.route.target)}
	}
	return &refusal{http.StatusBadGateway, fmt.Sprintf("%s: %s", x.route.target, plain(err))}
}
