package httpproxy

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A request is the head of a client's request.
type request struct {
	method, uri  string
	major, minor int    // of the version
	scheme, host string // of the URL, in lower case and as it is; empty: it is none
	path         string // of the URL, with the query, as it is sent
	fields       fields // without Host and those of the framing

	length    int64    // of the body; -1: in chunks
	trailers  []string // announced ones
	expects   bool     // the client waits for 100 (RFC 9110 section 10.1.1)
	closes    bool     // the client closes the connection after the response
	keepAlive bool     // the client asks for the opposite in HTTP/1.0
}

// atLeast11 reports whether the version is HTTP/1.1 or later.
func (r *request) atLeast11() bool { return r.major > 1 || r.major == 1 && r.minor >= 1 }

// replyVersion returns the version of HTTP of a response to the request.
func (r *request) replyVersion() string {
	if r.atLeast11() {
		return "HTTP/1.1"
	}
	return "HTTP/1.0"
}

// The faults of a request on whose end two programs could disagree (RFC 9112 section
// 11.2, request smuggling). Lenient programs take them for valid.
var (
	errTwoFramings = errors.New("both Content-Length and Transfer-Encoding (RFC 9112 section 6.1)")
	errTwoLengths  = errors.New("more than one Content-Length (RFC 9112 section 6.3)")
	errOldChunked  = errors.New("Transfer-Encoding in HTTP/1.0 (RFC 9112 section 6.1)")
)

// Other faults of a request.
var (
	errMalformed     = errors.New("malformed HTTP request")
	errUnknownCoding = errors.New("unsupported transfer encoding")
	errVersion       = errors.New("unsupported protocol version")
	errNoHost        = errors.New("missing required Host header")
	errBadHost       = errors.New("malformed Host header")
	errBadName       = errors.New("invalid header name")
	errExpectation   = errors.New("unknown expectation")
)

// rejection returns the response to a request that cannot be read. The connection ends
// with it. It is empty if there was no request.
func rejection(r *request, err error) string {
	const header = "\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"
	page := func(status string) string { return "HTTP/1.1 " + status + header + status }
	switch {
	case errors.Is(err, errHeaderLimit):
		return page("431 Request Header Fields Too Large")
	case errors.Is(err, errUnknownCoding):
		return "HTTP/1.1 501 Not Implemented" + header + "Unsupported transfer encoding"
	case errors.Is(err, errVersion):
		return page("505 HTTP Version Not Supported: " + err.Error())
	case errors.Is(err, errNoHost), errors.Is(err, errBadHost), errors.Is(err, errBadName):
		return page("400 Bad Request: " + err.Error())
	case errors.Is(err, errTwoFramings), errors.Is(err, errTwoLengths), errors.Is(err, errOldChunked), errors.Is(err, errFoldedHeader):
		return page("400 Bad Request") + ": " + err.Error() + "\n"
	case errors.Is(err, errExpectation): // RFC 9110 section 10.1.1
		return r.replyVersion() + " 417 Expectation Failed\r\nConnection: close\r\nDate: " + time.Now().UTC().Format(http.TimeFormat) + "\r\nContent-Length: 0\r\n\r\n"
	case isReadError(err):
		return ""
	}
	return page("400 Bad Request")
}

// checkRequestLine checks a request line without its URL (RFC 9112 section 3).
func checkRequestLine(line []byte) error {
	method, rest, _ := bytes.Cut(line, []byte(" "))
	_, version, found := bytes.Cut(rest, []byte(" "))
	if _, _, ok := parseVersion(version); !found || !ok || !isToken(method) {
		return errMalformed
	}
	return nil
}

// parseVersion parses the version of HTTP (RFC 9112 section 2.3).
func parseVersion[S []byte | string](s S) (major, minor int, ok bool) {
	const form = "HTTP/1.1"
	digit := func(b byte) bool { return '0' <= b && b <= '9' }
	if len(s) != len(form) || string(s[:5]) != form[:5] || !digit(s[5]) || s[6] != '.' || !digit(s[7]) {
		return 0, 0, false
	}
	return int(s[5] - '0'), int(s[7] - '0'), true
}

// parse sets the parts of a request. Its line has passed checkRequestLine. Faults come in
// the order in which net/http finds them.
func (r *request) parse(line string, f fields) error {
	var rest, version string
	r.method, rest, _ = strings.Cut(line, " ")
	r.uri, version, _ = strings.Cut(rest, " ")
	r.major, r.minor, _ = parseVersion(version)
	if err := r.parseURL(); err != nil {
		return err
	}
	if err := r.checkFraming(f); err != nil {
		return err
	}
	hosts, host := f.count("Host"), f.get("Host")
	if hosts > 1 {
		return errMalformed
	}
	r.fields = f.addCacheControl()
	r.closes = r.major < 1 || r.fields.hasToken("Connection", "close")
	r.keepAlive = r.major == 1 && r.minor == 0 && !r.closes && r.fields.hasToken("Connection", "keep-alive")
	if r.major == 1 && r.minor == 0 && !r.keepAlive {
		r.closes = true
	}
	if err := r.frame(); err != nil {
		return err
	}
	preface := r.isPreface()
	r.closes = r.closes || preface && len(f) == 0
	switch {
	case r.major != 1 && !preface:
		return errVersion
	case r.atLeast11() && hosts == 0 && r.method != http.MethodConnect && (!preface || len(f) > 0):
		return errNoHost
	case !isHostText(host):
		return errBadHost
	case slices.ContainsFunc(r.fields, func(one field) bool { return !isToken(one.name) }):
		return errBadName
	}
	if expect := r.fields.get("Expect"); hasToken(expect, "100-continue") {
		r.expects = r.atLeast11() && r.length != 0
	} else if expect != "" {
		return errExpectation
	}
	r.fields = r.fields.without("Host")
	return nil
}

// isPreface reports whether the request is the preface of HTTP/2 (RFC 9113 section 3.4),
// which is no URL for a proxy.
func (r *request) isPreface() bool {
	return r.method == "PRI" && r.uri == "*" && r.major == 2 && r.minor == 0
}

// checkFraming finds the faults that net/http tolerates.
func (r *request) checkFraming(f fields) error {
	lengths, codings := f.count("Content-Length"), f.count("Transfer-Encoding")
	switch {
	case codings > 0 && lengths > 0:
		return errTwoFramings
	case lengths > 1:
		return errTwoLengths
	case codings > 0 && r.major == 1 && r.minor == 0:
		return errOldChunked
	}
	return nil
}

// frame sets the framing of the body, and removes its fields.
func (r *request) frame() (err error) {
	switch {
	case r.fields.count("Transfer-Encoding") > 0 && r.atLeast11():
		if r.fields.count("Transfer-Encoding") > 1 || !equalFold(r.fields.get("Transfer-Encoding"), "chunked") {
			return errUnknownCoding
		}
		r.length = -1
		if r.fields, r.trailers, err = r.fields.announcedTrailers(); err != nil {
			return err
		}
		r.fields = r.fields.without("Transfer-Encoding")
	case r.fields.count("Content-Length") > 0:
		if r.length, err = parseLength(r.fields.get("Content-Length")); err != nil {
			return err
		}
		r.fields = r.fields.without("Content-Length")
	}
	return nil
}

// parseLength parses the value of Content-Length (RFC 9110 section 8.6).
func parseLength(s string) (int64, error) {
	if s == "" {
		return 0, fmt.Errorf("invalid empty Content-Length %q", s)
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("bad Content-Length %q", s)
	}
	return int64(n), nil
}

func isAlphanumeric(b byte) bool {
	return '0' <= b && b <= '9' || 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z'
}

// isHostText reports whether all bytes of a Host may be in one (RFC 9110 section 7.2).
func isHostText(s string) bool {
	for i := range len(s) {
		if !isAlphanumeric(s[i]) && strings.IndexByte("!$%&'()*+,-.:;=[]_~", s[i]) < 0 {
			return false
		}
	}
	return true
}

// parseURL sets the scheme, the host and the path.
func (r *request) parseURL() error {
	if r.method == http.MethodConnect && !strings.HasPrefix(r.uri, "/") {
		_, err := url.ParseRequestURI("http://" + r.uri)
		return err
	}
	if r.parseSimpleURL() {
		return nil
	}
	u, err := url.ParseRequestURI(r.uri)
	if err != nil {
		return err
	}
	r.scheme, r.host = u.Scheme, u.Host
	u.Opaque = r.pathAsWritten()
	r.path = u.RequestURI()
	return nil
}

// parseSimpleURL parses an http URL in absolute form of a plain host, and a path without
// percent-encoding, as most are. It reports whether it is one.
func (r *request) parseSimpleURL() bool {
	rest, ok := strings.CutPrefix(r.uri, "http://")
	end := strings.IndexByte(rest, '/')
	if !ok || end <= 0 || strings.HasPrefix(rest[end:], "//") {
		return false
	}
	port := false
	for i := range end {
		switch b := rest[i]; {
		case '0' <= b && b <= '9':
		case b == ':' && !port && i > 0:
			port = true
		case port || !isAlphanumeric(b) && b != '-' && b != '.':
			return false
		}
	}
	query := false
	for i := end; i < len(rest); i++ {
		switch b := rest[i]; {
		case b <= ' ' || b >= 0x7f || b == '#' || b == '%' && !query:
			return false
		case b == '?':
			query = true
		}
	}
	r.scheme, r.host, r.path = "http", rest[:end], rest[end:]
	return true
}

// pathAsWritten returns the path of the URL as it was written, since a server may
// distinguish equivalent paths. It is empty if that form cannot be sent; then that of
// net/url is.
func (r *request) pathAsWritten() string {
	_, rest, _ := strings.Cut(r.uri, "://")
	p, _, _ := strings.Cut(rest, "?")
	i := strings.IndexByte(p, '/')
	switch {
	case i < 0 && r.method == http.MethodOptions && !strings.Contains(rest, "?"):
		return "*" // RFC 9112 section 3.2.4
	case i < 0 || strings.HasPrefix(p[i:], "//") || strings.Contains(p, "#"):
		return ""
	}
	return p[i:]
}

// upgrade returns the protocol to which the client wants to switch, or "" (RFC 9110
// section 7.8).
func (f fields) upgrade() string {
	if !f.hasToken("Connection", "Upgrade") {
		return ""
	}
	return f.get("Upgrade")
}
