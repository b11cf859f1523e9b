package httpproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// What ends a request from the inside.
var (
	errIdle     = errors.New("idle timeout")
	errStopping = errors.New("the proxy is stopping")
)

// statusClientGone is what the access log has for a client that did not wait for
// the answer. It is never sent.
const statusClientGone = 499

// A refusal is an answer of the proxy itself, in place of a server's.
type refusal struct {
	status int
	text   string // one line
}

// write sends the refusal. It is plain text for a person, whatever the client
// accepts: most see it in a terminal or a log.
func (r *refusal) write(w http.ResponseWriter) {
	body := fmt.Sprintf("egress-router: %s\n", r.text)
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(r.status)
	_, _ = io.WriteString(w, body) // a client that is gone needs none
}

// denied is what a client gets that asks for what the rules do not allow.
func denied(r *route, a netip.Addr) *refusal {
	what := r.target.host.String()
	if r.target.host.Name != "" && a.IsValid() {
		what += " (" + a.String() + ")"
	}
	v := r.verdict
	switch {
	case v.Rule.Number > 0:
		what += fmt.Sprintf(" is denied by rule %d: %s", v.Rule.Number, v.Rule)
	case v.Local:
		what += " is a local address of the proxy: only a rule for this address allows it"
	default:
		what = "no rule allows " + what
	}
	if r.aside.IsValid() {
		what += fmt.Sprintf("; its address %s is allowed, but IPv6 is used only if the name has no IPv4 address", r.aside)
	}
	return &refusal{http.StatusForbidden, what}
}

// unresolved is what a client gets that asks for a name without an address.
func unresolved(t target, err error) *refusal {
	status, reason := http.StatusBadGateway, err.Error()
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		reason = dns.Err
	}
	if isTimeout(err) {
		status, reason = http.StatusGatewayTimeout, "no answer from the name servers"
	}
	return &refusal{status, fmt.Sprintf("looking up %s: %s", t.host, reason)}
}

// failed is for what should not happen.
func failed(err error) *refusal {
	return &refusal{http.StatusInternalServerError, err.Error()}
}

// undialled is what a client gets for a server that cannot be reached.
func undialled(err error) *refusal {
	status := http.StatusBadGateway
	if dial, ok := errors.AsType[*dialError](err); ok && dial.timeout {
		status = http.StatusGatewayTimeout
	}
	return &refusal{status, err.Error()}
}
