package httpproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// pseudonym is the name of this proxy in Via (RFC 9110 section 7.6.3).
const pseudonym = "egress-router"

// forward sends a request in absolute form to its server, and the response back.
func (p *Proxy) forward(x *exchange) {
	if last, refusal := countForwards(x.request); last {
		x.refuse(refusal)
		return
	}
	if refusal := p.route(x); refusal != nil {
		x.refuse(refusal)
		return
	}
	if x.plain {
		p.forwardPlain(x)
		return
	}
	p.forwarder.ServeHTTP(x, x.request)
}

// countForwards decrements Max-Forwards, and reports whether this proxy is the last
// recipient (RFC 9110 section 7.6.2).
func countForwards(r *http.Request) (last bool, answer *refusal) {
	if r.Method != http.MethodOptions && r.Method != http.MethodTrace {
		return false, nil
	}
	n, err := strconv.ParseUint(r.Header.Get("Max-Forwards"), 10, 32)
	switch {
	case err != nil:
		return false, nil
	case n > 0:
		r.Header.Set("Max-Forwards", strconv.FormatUint(n-1, 10))
		return false, nil
	case r.Method == http.MethodTrace:
		return true, &refusal{http.StatusMethodNotAllowed, "TRACE is not supported: Max-Forwards is 0"}
	}
	return true, &refusal{http.StatusOK, "response of the proxy: Max-Forwards is 0"}
}

// rewrite derives the request to the server from that of the client. ReverseProxy has
// removed the hop-by-hop headers, and a few others, which are restored here:
// ReverseProxy is designed for the server's side, which does not trust the client.
func rewrite(pr *httputil.ProxyRequest) {
	in, out := pr.In, pr.Out
	out.Host = in.Host // taken from the URL by net/http (RFC 9112 section 3.2.2)
	out.URL.RawQuery = in.URL.RawQuery
	out.URL.Opaque = path(in)
	out.Trailer = in.Trailer // the same map, which is filled at the end of the body
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if values, ok := in.Header[name]; ok && !namedByConnection(in.Header, name) {
			out.Header[name] = values
		}
	}
	if !in.ProtoAtLeast(1, 1) { // RFC 9110 section 7.8
		out.Header.Del("Upgrade")
		out.Header.Del("Connection")
	}
	addVia(out.Header, in.ProtoMajor, in.ProtoMinor)
}

// path returns the path of a request as it was written, since a server may distinguish
// equivalent paths. It is empty if that form cannot be sent; then that of net/url is.
func path(r *http.Request) string {
	_, rest, _ := strings.Cut(r.RequestURI, "://")
	p, _, _ := strings.Cut(rest, "?")
	i := strings.IndexByte(p, '/')
	switch {
	case i < 0 && r.Method == http.MethodOptions && !strings.Contains(rest, "?"):
		return "*" // RFC 9112 section 3.2.4
	case i < 0 || strings.HasPrefix(p[i:], "//") || strings.Contains(p, "#"):
		return ""
	}
	return p[i:]
}

func namedByConnection(h http.Header, name string) bool {
	return slices.ContainsFunc(h["Connection"], func(list string) bool { return hasToken(list, name) })
}

// modifyResponse derives the response to the client from that of the server.
func modifyResponse(r *http.Response) error {
	return r.Request.Context().Value(exchangeKey{}).(*exchange).modify(r)
}

func (x *exchange) modify(r *http.Response) error {
	if x.closing {
		r.Header.Set("Connection", "close")
	}
	if _, x.reason, _ = strings.Cut(r.Status, " "); strings.ContainsFunc(x.reason, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
		return errBadReason
	}
	x.answered = true
	addVia(r.Header, r.ProtoMajor, r.ProtoMinor)
	return nil
}

func addVia(h http.Header, major, minor int) {
	via := "1.1 " + pseudonym
	if major != 1 || minor != 1 {
		via = fmt.Sprintf("%d.%d %s", major, minor, pseudonym)
	}
	h["Via"] = append(h["Via"], via)
}

// RoundTrip is roundTrip for ReverseProxy.
func (p *Proxy) RoundTrip(out *http.Request) (*http.Response, error) {
	return p.roundTrip(out.Context().Value(exchangeKey{}).(*exchange), out)
}

// roundTrip sends a request to its server and returns the response.
//
// A request that may be repeated uses an idle connection, and is repeated if the server
// has closed that connection. Others have a new one: they are not lost then, and never
// run twice (RFC 9110 section 9.2.2, RFC 9112 section 9.3.1).
func (p *Proxy) roundTrip(x *exchange, out *http.Request) (*http.Response, error) {
	key := x.route.serverKey(out.URL.Scheme)
	login := connectionScheme(out.Header["Authorization"])
	repeatable := isSafe(out.Method) && out.Body == nil

	c := x.client.unpark(key)
	switch {
	case c == nil:
	case c.alive() && (c.login || repeatable):
	case c.login:
		_ = c.Close()
		return nil, errLoginLost
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
			if c, err = p.connectServer(x.life.context(), &x.route, key); err != nil {
				return nil, err
			}
		}
		authenticated := c.login
		if login {
			c.client, c.login = x.client, true
		}
		x.server = c.RemoteAddr()
		r, err := c.exchange(out, x, p.release)
		// Without an error the connection may have another exchange already.
		switch stale := errors.Is(err, errBeforeAnswer) && c.used; {
		case stale && authenticated:
			return nil, errLoginLost
		case stale && repeatable:
			c = nil
			continue
		}
		return r, err
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

// connectServer connects to the server of a route. https URLs in absolute form, which
// few clients send, need TLS.
func (p *Proxy) connectServer(ctx context.Context, r *route, key serverKey) (*serverConn, error) {
	tcp, err := p.dial(ctx, r)
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
		config.ServerName = r.target.host.String()
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

// answerFailure responds to the client if the server does not respond, or with an
// invalid response.
func (p *Proxy) answerFailure(w http.ResponseWriter, _ *http.Request, err error) {
	x := w.(*exchange)
	if x.status == http.StatusSwitchingProtocols {
		return // net/http no longer owns the connection
	}
	if errors.Is(err, errLoginLost) {
		x.dropClient()
		return
	}
	x.refuse(x.explain(err))
}

func (x *exchange) explain(err error) *refusal {
	if x.body != nil {
		if bad := x.body.err.Load(); bad != nil {
			x.Header().Set("Connection", "close")
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
