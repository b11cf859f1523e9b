package endpoints

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// connectTimeout is the time for a TCP connection and the TLS handshake.
const connectTimeout = time.Second

// besideAfter is the time without an answer after which another attempt begins beside the first
// one: of a request, on a new connection, and of a connection, from another port. The path of a
// kept connection may have ended with a node, and the address of the API server lead to several of
// which one has. The kernel itself repeats a lost SYN after a second (RFC 6298, section 2.1).
const besideAfter = 200 * time.Millisecond

// errNoAnswer reports that the API server was silent. Waiting for it has cost the server nothing.
var errNoAnswer = errors.New("no answer")

// largest is the limit of an answer in bytes. The API server's limit of an object is 3 MiB.
const largest = 4 << 20

// absentVersion is the resource version with which a slice is applied that does not exist.
// The API server ignores the version of an object that it creates, and refuses it if another
// router has created the object in between. No object has this version: an empty etcd does.
const absentVersion = "1"

// A client speaks with the API server as the pod's service account. It is used by one
// goroutine.
type client struct {
	o         Options
	transport *http.Transport
	// fresh opens a connection for each request: also of several kept ones the paths may have ended.
	fresh   *http.Transport
	timeout time.Duration // for one request

	// connectTimeout, besideAfter and that of a net.Dialer, but for tests.
	connect, beside time.Duration
	dialTCP         func(d *net.Dialer, ctx context.Context, network, server string) (net.Conn, error)
}

func newClient(o Options) *client {
	c := &client{o: o, connect: connectTimeout, beside: besideAfter, dialTCP: (*net.Dialer).DialContext}
	// The proxy of the environment is for servers outside of the cluster.
	c.transport = &http.Transport{DialTLSContext: c.dial, MaxIdleConnsPerHost: 1}
	c.fresh = &http.Transport{DialTLSContext: c.dial, DisableKeepAlives: true}
	return c
}

func (c *client) close() { c.transport.CloseIdleConnections() }

// dial connects to the API server from the address of the pod, with TLS. The certificates
// are read for each connection, since they may change.
func (c *client) dial(ctx context.Context, network, server string) (net.Conn, error) {
	file := filepath.Join(c.o.Account, "ca.crt")
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading %q: expected a certificate, found none", file)
	}
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, err
	}
	d := new(net.Dialer)
	// From the cluster side: the default route leads to the physical network.
	if to, err := netip.ParseAddrPort(server); err == nil {
		family := ipv4
		if to.Addr().Is6() {
			family = ipv6
		}
		if from := address(c.o.Addresses, family); from.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, c.connect)
	defer cancel()
	conn, err := sideBySide(ctx, c.beside, int(c.connect/c.beside), func(error) bool { return false }, func(ctx context.Context) (net.Conn, error) {
		return c.dialTCP(d, ctx, network, server)
	}, func(late net.Conn) { _ = late.Close() })
	if err == nil {
		secure := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host})
		if err = secure.HandshakeContext(ctx); err == nil {
			return secure, nil
		}
		_ = conn.Close()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no connection in %s: %w", c.connect, errNoAnswer)
	}
	return nil, err
}

// sideBySide returns the first result of several attempts, or the last error. Another attempt
// begins after each time beside without a result, up to most. An error that final accepts is a
// result. It passes to closeLate what later attempts return.
func sideBySide[T any](ctx context.Context, beside time.Duration, most int, final func(error) bool, attempt func(context.Context) (T, error), closeLate func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	most = max(most, 1)
	results := make(chan result, most)
	begun, ended := 0, 0
	begin := func() {
		begun++
		go func() {
			value, err := attempt(ctx)
			results <- result{value, err}
		}()
	}
	defer func() {
		go func() {
			for ; ended < begun; ended++ {
				if r := <-results; r.err == nil {
					closeLate(r.value)
				}
			}
		}()
	}()
	ticker := time.NewTicker(beside)
	defer ticker.Stop()
	for begin(); ; {
		select {
		case r := <-results:
			ended++
			if r.err == nil || final(r.err) || ended == begun {
				return r.value, r.err
			}
		case <-ticker.C:
			if begun < most {
				begin()
			}
		}
	}
}

// service reads a Service.
func (c *client) service(ctx context.Context, name string) (*service, error) {
	var s serviceObject
	if err := c.do(ctx, request{verb: "get", resource: "services", name: name}, &s); err != nil {
		return nil, err
	}
	return s.service(c.o)
}

// revision reads the revision of a slice.
func (c *client) revision(ctx context.Context, name string) (revision, error) {
	var s slice
	err := c.do(ctx, request{verb: "get", resource: endpointSlices, name: name}, &s)
	if hasCode(err, http.StatusNotFound) {
		return revision{}, nil
	}
	return s.Metadata.revision, err
}

// apply writes a slice if it still has a revision, and returns its new one.
func (c *client) apply(ctx context.Context, s slice, at revision) (revision, error) {
	r := request{verb: "patch", resource: endpointSlices, name: s.Metadata.Name}
	if at == (revision{}) {
		at.ResourceVersion, r.creates = absentVersion, true
	}
	s.Metadata.revision = at
	r.body = s.text()
	var now slice
	err := c.do(ctx, r, &now)
	return now.Metadata.revision, err
}

// read returns the content of a file of the service account. The files are read for each
// request: the kubelet replaces the token before it expires.
func (c *client) read(file string) (string, error) {
	content, err := os.ReadFile(filepath.Join(c.o.Account, file))
	if err != nil {
		return "", fmt.Errorf("reading service account: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}

// endpointSlices is the resource of slices.
const endpointSlices = "endpointslices"

// A request is one to the API server about one object of the pod's namespace.
type request struct {
	verb, resource, name string
	body                 string
	creates              bool // a patch that creates the object
}

// group returns the API group of the request's resource; empty: the core.
func (r request) group() string {
	if r.resource == endpointSlices {
		return "discovery.k8s.io"
	}
	return ""
}

// requestAttempts is the number of attempts side by side of a request. A patch may arrive twice: it
// is bound to a revision, so that the API server refuses the second one (409).
const requestAttempts = 2

// do sends a request and decodes the answer. Every error names the request.
func (c *client) do(ctx context.Context, r request, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	refused := func(err error) bool { _, is := errors.AsType[*statusError](err); return is }
	var attempts atomic.Int32
	body, err := sideBySide(ctx, c.beside, requestAttempts, refused, func(ctx context.Context) ([]byte, error) {
		if attempts.Add(1) == 1 {
			return c.send(ctx, c.transport, r)
		}
		return c.send(ctx, c.fresh, r)
	}, func([]byte) {})
	if err == nil {
		err = json.Unmarshal(body, answer)
	}
	if err == nil || refused(err) {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w in %s", errNoAnswer, c.timeout)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		op.Source = nil // its port makes each failure another one
	}
	return fmt.Errorf("API server %s, %s %s %q: %w", c.o.Server, r.verb, r.resource, r.name, err)
}

// send sends a request, and returns the body of the answer.
func (c *client) send(ctx context.Context, by *http.Transport, r request) ([]byte, error) {
	token, err := c.read("token")
	if err != nil {
		return nil, err
	}
	namespace, err := c.read("namespace")
	if err != nil {
		return nil, err
	}
	at := url.URL{Scheme: "https", Host: c.o.Server, Path: "/api/v1"}
	if r.group() != "" {
		at.Path = "/apis/" + r.group() + "/v1"
	}
	at.Path += "/namespaces/" + namespace + "/" + r.resource + "/" + r.name
	method := http.MethodGet
	if r.verb == "patch" {
		method, at.RawQuery = http.MethodPatch, "fieldManager="+manager+"&force=true"
	}
	q, err := http.NewRequestWithContext(ctx, method, at.String(), strings.NewReader(r.body))
	if err != nil {
		return nil, err
	}
	q.Header.Set("Authorization", "Bearer "+token)
	q.Header.Set("Accept", "application/json")
	q.Header.Set("User-Agent", manager)
	// Not sent: the transport repeats the request if a kept connection turns out to be closed.
	q.Header["Idempotency-Key"] = nil
	if r.body != "" {
		q.Header.Set("Content-Type", "application/apply-patch+yaml") // JSON is YAML
	}
	a, err := by.RoundTrip(q)
	if err != nil {
		return nil, err
	}
	defer a.Body.Close()
	body, err := io.ReadAll(io.LimitReader(a.Body, largest))
	if err != nil {
		return nil, err
	}
	if a.StatusCode < 200 || a.StatusCode > 299 {
		return nil, newStatusError(c.o.Server, r, a, body)
	}
	return body, nil
}

// A statusError is an answer of the API server that refuses a request.
type statusError struct {
	code       int    // of HTTP
	message    string // of the API server
	server     string
	request    request
	retryAfter time.Duration // that the server asks for; 0: nothing
}

func newStatusError(server string, r request, a *http.Response, body []byte) *statusError {
	e := &statusError{code: a.StatusCode, server: server, request: r}
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &status) == nil {
		e.message = status.Message
	}
	if e.message == "" {
		e.message = http.StatusText(a.StatusCode)
	}
	if seconds, err := strconv.Atoi(a.Header.Get("Retry-After")); err == nil && seconds > 0 {
		e.retryAfter = time.Duration(min(seconds, int(mostDelay/time.Second))) * time.Second
	}
	return e
}

// Error names the request and the answer, and, if the service account lacks a right, the
// rule that gives it.
func (e *statusError) Error() string {
	text := fmt.Sprintf("API server %s, %s %s %q: %d %s", e.server, e.request.verb, e.request.resource, e.request.name, e.code, e.message)
	rule := e.rule()
	if e.code != http.StatusForbidden || rule == "" {
		return text
	}
	return text + ": the Role of the service account needs the rule {" + rule + "}"
}

// rule returns the rule of a Role without which a request is forbidden; empty: it is
// forbidden for another reason, such as a namespace that is being deleted.
func (e *statusError) rule() string {
	r := e.request
	switch {
	case strings.Contains(e.message, "endpoint address"):
		// An admission plugin of OpenShift, for addresses of the cluster's networks.
		return fmt.Sprintf(`apiGroups: [%q], resources: ["%s/restricted"], verbs: ["create"]`, r.group(), r.resource)
	case !strings.Contains(e.message, " cannot "): // RBAC: User "…" cannot patch resource "…"
		return ""
	}
	verbs := strconv.Quote(r.verb)
	if r.creates {
		verbs += `, "create"`
	}
	return fmt.Sprintf("apiGroups: [%q], resources: [%q], resourceNames: [%q], verbs: [%s]", r.group(), r.resource, r.name, verbs)
}

// hasCode reports whether an error is an answer of the API server with a status code.
func hasCode(err error, code int) bool {
	refused, ok := errors.AsType[*statusError](err)
	return ok && refused.code == code
}
