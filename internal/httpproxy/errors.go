package httpproxy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// The causes with which the proxy ends a request.
var (
	errIdle     = errors.New("idle timeout")
	errStopping = errors.New("the proxy is stopping")
)

// statusClientGone is the status in the access log of a client that did not wait for
// the response. It is never sent.
const statusClientGone = 499

// A refusal is a response of the proxy itself instead of a server.
type refusal struct {
	status int
	text   string // one line
}

// write sends the refusal as plain text, regardless of the header Accept, since people
// read it in a terminal or a log. closes adds the end of the connection.
func (r *refusal) write(x *exchange, closes bool) {
	body := "egress-router: " + r.text + "\n"
	f := fields{
		{"Content-Length", strconv.Itoa(len(body))},
		{"Content-Type", "text/plain; charset=utf-8"},
		{"X-Content-Type-Options", "nosniff"},
	}
	if closes {
		f = append(f, field{"Connection", "close"})
	}
	x.reply = reply{w: x.reply.w, err: x.reply.err}
	x.head(r.status, f)
	_ = x.write([]byte(body)) // the client may be gone
}

// denied returns the response to a request that the rules do not allow.
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

// unresolved returns the response to a request for a name without an address.
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

// failed returns the response to an internal error.
func failed(err error) *refusal {
	return &refusal{http.StatusInternalServerError, err.Error()}
}

// undialled returns the response for an unreachable server.
func undialled(err error) *refusal {
	status := http.StatusBadGateway
	if dial, ok := errors.AsType[*dialError](err); ok && dial.timeout {
		status = http.StatusGatewayTimeout
	}
	if errors.Is(err, errBusy) {
		status = http.StatusServiceUnavailable
	}
	return &refusal{status, err.Error()}
}
