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
	"time"
)

// connectTimeout is the time for a TCP connection and the TLS handshake.
const connectTimeout = time.Second

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
	connect   time.Duration // time for a connection: connectTimeout, but for tests
	timeout   time.Duration // for one request
}

func newClient(o Options) *client {
	c := &client{o: o, connect: connectTimeout}
	// The proxy of the environment is for servers outside of the cluster.
	c.transport = &http.Transport{DialTLSContext: c.dial}
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
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: c.connect}, Config: &tls.Config{RootCAs: roots}}
	// From the cluster side: the default route leads to the physical network.
	if to, err := netip.ParseAddrPort(server); err == nil {
		family := ipv4
		if to.Addr().Is6() {
			family = ipv6
		}
		if from := address(c.o.Addresses, family); from.IsValid() {
			d.NetDialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
	}
	return d.DialContext(ctx, network, server)
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

// do sends a request and decodes the answer. Every error names the request.
func (c *client) do(ctx context.Context, r request, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if err := c.send(ctx, r, answer); err != nil {
		if _, refused := errors.AsType[*statusError](err); refused {
			return err
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("no answer in %s", c.timeout)
		}
		if op, ok := errors.AsType[*net.OpError](err); ok {
			op.Source = nil // its port makes each failure another one
		}
		return fmt.Errorf("API server %s, %s %s %q: %w", c.o.Server, r.verb, r.resource, r.name, err)
	}
	return nil
}

func (c *client) send(ctx context.Context, r request, answer any) error {
	token, err := c.read("token")
	if err != nil {
		return err
	}
	namespace, err := c.read("namespace")
	if err != nil {
		return err
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
		return err
	}
	q.Header.Set("Authorization", "Bearer "+token)
	q.Header.Set("Accept", "application/json")
	q.Header.Set("User-Agent", manager)
	if r.body != "" {
		q.Header.Set("Content-Type", "application/apply-patch+yaml") // JSON is YAML
	}
	a, err := c.transport.RoundTrip(q)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	body, err := io.ReadAll(io.LimitReader(a.Body, largest))
	if err != nil {
		return err
	}
	if a.StatusCode < 200 || a.StatusCode > 299 {
		return newStatusError(c.o.Server, r, a, body)
	}
	return json.Unmarshal(body, answer)
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
