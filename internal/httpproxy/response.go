package httpproxy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// A response is the head of a server's response, and its body.
type response struct {
	status       int
	reason       string
	major, minor int // of the version
	fields       fields

	noBody   bool     // the body is empty
	trailers []string // announced ones
	closes   bool     // the server closes the connection after it
	body     body
	end      func(whole bool) // ends the exchange; nil: it has ended
}

var (
	errBadReason = errors.New("malformed HTTP response: control characters in the reason phrase")
	errBadStatus = errors.New("malformed HTTP response: the status is below 100")
)

// checkStatusLine checks a status line (RFC 9112 section 4).
func checkStatusLine(line []byte) error {
	version, status, found := bytes.Cut(line, []byte(" "))
	if !found {
		return fmt.Errorf("malformed HTTP response %q", line)
	}
	code, _, _ := bytes.Cut(bytes.TrimLeft(status, " "), []byte(" "))
	for i := range code {
		if code[i] < '0' || code[i] > '9' {
			return fmt.Errorf("malformed HTTP status code %q", code)
		}
	}
	if len(code) != 3 {
		return fmt.Errorf("malformed HTTP status code %q", code)
	}
	if _, _, ok := parseVersion(version); !ok {
		return fmt.Errorf("malformed HTTP version %q", version)
	}
	return nil
}

// parse sets the head of a response to a request with a method. The line has passed
// checkStatusLine.
func (r *response) parse(line string, f fields, method string) error {
	version, status, _ := strings.Cut(line, " ")
	r.major, r.minor, _ = parseVersion(version)
	code, reason, _ := strings.Cut(strings.TrimLeft(status, " "), " ")
	r.status, r.reason = int(code[0]-'0')*100+int(code[1]-'0')*10+int(code[2]-'0'), reason
	r.fields = f.addCacheControl()
	if r.major < 1 || r.fields.hasToken("Connection", "close") ||
		r.major == 1 && r.minor == 0 && !r.fields.hasToken("Connection", "keep-alive") {
		r.closes = true
	}
	return r.frame(method)
}

// frame sets the framing of the body (RFC 9112 section 6.3). Of two framings, which
// servers do send, chunks count.
func (r *response) frame(method string) error {
	chunked := false
	if n := r.fields.count("Transfer-Encoding"); n > 0 && (r.major > 1 || r.major == 1 && r.minor >= 1) {
		coding := r.fields.get("Transfer-Encoding")
		switch {
		case n > 1:
			return fmt.Errorf("too many transfer encodings: %q", r.fields.all("Transfer-Encoding"))
		case !equalFold(coding, "chunked"):
			return fmt.Errorf("unsupported transfer encoding: %q", coding)
		}
		chunked = true
	}
	length := int64(-1)
	if r.fields.count("Content-Length") > 0 {
		if err := r.fields.equalLengths(); err != nil {
			return err
		}
		var err error
		if length, err = parseLength(r.fields.get("Content-Length")); err != nil {
			return err
		}
	}
	r.noBody = method == http.MethodHead || !bodyAllowed(r.status)
	if chunked {
		var err error
		if r.fields, r.trailers, err = r.fields.announcedTrailers(); err != nil {
			return err
		}
	}
	switch {
	case r.noBody:
	case chunked:
		r.fields = r.fields.without("Content-Length")
		r.body.setChunks()
	case length >= 0:
		r.body.left, r.noBody = length, length == 0
	default:
		r.body.left, r.closes = -1, true
	}
	return nil
}

// equalLengths removes all lines of Content-Length but one. They must be equal.
func (f *fields) equalLengths() error {
	if f.count("Content-Length") == 1 {
		return nil
	}
	length := f.get("Content-Length")
	for _, one := range *f {
		if one.name == "Content-Length" && one.value != length {
			return fmt.Errorf("http: message cannot contain multiple Content-Length headers; got %q", f.all("Content-Length"))
		}
	}
	*f = append(f.without("Content-Length"), field{"Content-Length", length})
	return nil
}

// bodyAllowed reports whether a response with a status may have a body (RFC 9110 section
// 6.4.1).
func bodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}

// known reports whether the length of the body is known.
func (r *response) known() bool { return r.noBody || r.body.chunks == nil && r.body.left >= 0 }

// Read reads the body from the server, and ends the exchange with its end.
func (r *response) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	if err != nil {
		r.finish(err)
	}
	return n, err
}

// finish ends the exchange. The connection may have another one if the error is io.EOF.
func (r *response) finish(err error) {
	if r.end != nil {
		end := r.end
		r.end = nil
		end(errors.Is(err, io.EOF))
	}
}

// offersLogin reports whether a response asks for credentials that may hold for the
// connection.
func (r *response) offersLogin() bool {
	return r.status == http.StatusUnauthorized && r.fields.connectionScheme("Www-Authenticate") ||
		r.status == http.StatusProxyAuthRequired && r.fields.connectionScheme("Proxy-Authenticate")
}
