package httpproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
)

// pseudonym is the name of this proxy in Via (RFC 9110 section 7.6.3).
const pseudonym = "egress-router"

// forward sends a request in absolute form to its server, and the response back.
func (p *Proxy) forward(x *exchange) {
	if last, refusal := countForwards(x.request); last {
		x.refuse(refusal)
		return
	}
	r, refusal := p.route(x.request.Context(), x.route.target)
	x.route = r
	if refusal != nil {
		x.refuse(refusal)
		return
	}
	x.request = x.request.WithContext(httptrace.WithClientTrace(x.request.Context(), x.trace()))
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
	x := in.Context().Value(exchangeKey{}).(*exchange)
	out.Host = in.Host // taken from the URL by net/http (RFC 9112 section 3.2.2)
	out.URL.Host = net.JoinHostPort(x.route.poolKey(), strconv.Itoa(int(x.route.target.port)))
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
	return slices.ContainsFunc(h["Connection"], func(list string) bool {
		return slices.ContainsFunc(strings.Split(list, ","), func(token string) bool {
			return strings.EqualFold(strings.TrimSpace(token), name)
		})
	})
}

// modifyResponse derives the response to the client from that of the server.
func modifyResponse(r *http.Response) error {
	if server := r.Request.Context().Value(exchangeKey{}).(*exchange).server.Load(); server != nil {
		server.removeNamed(r.Header)
	}
	addVia(r.Header, r.ProtoMajor, r.ProtoMinor)
	return nil
}

func addVia(h http.Header, major, minor int) {
	h.Add("Via", fmt.Sprintf("%d.%d %s", major, minor, pseudonym))
}

// dialPlain connects to the server of an exchange. It ignores the address argument,
// the pool's key, which stands for the same addresses as the route.
func (p *Proxy) dialPlain(ctx context.Context, _, _ string) (net.Conn, error) {
	conn, err := p.dial(ctx, ctx.Value(exchangeKey{}).(*exchange).route)
	if err != nil {
		return nil, err // not a nil *net.TCPConn in an interface
	}
	return &serverConn{duplex: conn}, nil
}

// dialTLS is dialPlain for an https URL in absolute form, which few clients send.
func (p *Proxy) dialTLS(ctx context.Context, _, _ string) (net.Conn, error) {
	r := ctx.Value(exchangeKey{}).(*exchange).route
	tcp, err := p.dial(ctx, r)
	if err != nil {
		return nil, err
	}
	config := p.transport.TLSClientConfig.Clone()
	config.ServerName = r.target.host.String()
	conn := tls.Client(tcp, config)
	ctx, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = tcp.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return &serverConn{duplex: conn}, nil
}

// answerFailure responds to the client if the server does not respond, or with an
// invalid response.
func (p *Proxy) answerFailure(w http.ResponseWriter, _ *http.Request, err error) {
	x := w.(*exchange)
	if x.status == http.StatusSwitchingProtocols {
		return // net/http no longer owns the connection
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
	if _, ok := errors.AsType[*dialError](err); ok {
		return undialled(err)
	}
	switch {
	case isTimeout(err):
		return &refusal{http.StatusGatewayTimeout, fmt.Sprintf("%s: %v", x.route.target, err)}
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return &refusal{http.StatusBadGateway, fmt.Sprintf("%s: the server closed the connection without a response", x.route.target)}
	}
	return &refusal{http.StatusBadGateway, fmt.Sprintf("%s: %s", x.route.target, plain(err))}
}
