package httpproxy

import (
	"io"
	"maps"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
)

// hopHeaders are the headers of one connection (RFC 9110 section 7.6.1, and
// Proxy-Connection and Keep-Alive of older clients).
var hopHeaders = []string{
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

// removeHopByHop removes the headers of one connection, and those that Connection names.
func removeHopByHop(h http.Header) {
	for _, list := range h["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			h.Del(textproto.TrimString(name))
		}
	}
	for _, name := range hopHeaders {
		delete(h, name)
	}
}

// noUserAgent makes net/http send no User-Agent, instead of its own.
var noUserAgent = []string{""}

// forwardPlain forwards a request without a body and without an upgrade, as most are, and
// the response. ReverseProxy copies each header twice; without that, and without a context
// for each request, there is a third to a half less garbage. Each collection delays all
// active requests, so that the slowest answers depend on the number of collections.
func (p *Proxy) forwardPlain(x *exchange) {
	r, err := p.roundTrip(x, x.outgoing())
	if err != nil {
		p.answerFailure(x, x.request, err)
		return
	}
	defer r.Body.Close()
	removeHopByHop(r.Header)
	if err := x.modify(r); err != nil {
		p.answerFailure(x, x.request, err)
		return
	}
	h := x.Header()
	maps.Copy(h, r.Header)
	announced := len(r.Trailer)
	if announced > 0 {
		h["Trailer"] = []string{strings.Join(slices.Collect(maps.Keys(r.Trailer)), ", ")}
	}
	x.WriteHeader(r.StatusCode)
	if err := x.copyBody(r); err != nil {
		p.log.Debug("response incomplete", "error", err)
		x.flush()
		x.closeClient()
		return
	}
	if len(r.Trailer) == 0 {
		return
	}
	x.flush() // net/http must not set Content-Length in place of the trailers
	for name, values := range r.Trailer {
		if len(r.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
}

// outgoing derives the request to the server. It changes that of the client, which
// net/http does not read again.
func (x *exchange) outgoing() *http.Request {
	out := x.request
	out.Body, out.Close = nil, false
	out.URL.Opaque = path(out)
	h := out.Header
	trailers := slices.ContainsFunc(h["Te"], func(list string) bool { return hasToken(list, "trailers") })
	removeHopByHop(h)
	if trailers {
		h["Te"] = []string{"trailers"}
	}
	if len(h["User-Agent"]) == 0 {
		h["User-Agent"] = noUserAgent
	}
	addVia(h, out.ProtoMajor, out.ProtoMinor)
	return out
}

// hasToken reports whether a list has a token (RFC 9110 section 5.6.1).
func hasToken(list, token string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(textproto.TrimString(one), token) {
			return true
		}
	}
	return false
}

// copyBody forwards the body of a response. Before it waits for the server, serverConn
// forwards what is buffered. If the length is unknown each part is forwarded at once, also
// since net/http would add the length of a short one.
func (x *exchange) copyBody(r *http.Response) error {
	buf := x.proxy.buffers.Get()
	defer x.proxy.buffers.Put(buf)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := x.Write(buf[:n]); err != nil {
				return err
			}
			if r.ContentLength < 0 {
				x.flush()
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
