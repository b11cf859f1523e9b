package httpproxy

import (
	"bytes"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
)

// A serverConn is a connection to a server. It collects the names in the header
// Connection of each response (RFC 9110 section 7.6.1), which net/http drops before
// any handler sees it if one of them is close.
type serverConn struct {
	duplex
	expect atomic.Bool // the next read begins a response

	// Fields of the current response.
	inHeader bool
	interim  bool // the status is 1xx: another response follows
	line     []byte
	named    []string
}

// A duplex is a connection whose two directions end separately, TCP or TLS.
type duplex interface {
	net.Conn
	CloseWrite() error
}

// trace records the connection of an exchange, and the start of its response.
func (x *exchange) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		x.server.Store(info.Conn.(*serverConn))
		info.Conn.(*serverConn).expect.Store(true)
	}}
}

// Read reads from the server.
func (c *serverConn) Read(p []byte) (int, error) {
	n, err := c.duplex.Read(p)
	if n > 0 && c.expect.CompareAndSwap(true, false) {
		c.inHeader, c.line, c.named = true, c.line[:0], nil
	}
	if c.inHeader {
		c.scan(p[:n])
	}
	return n, err
}

func (c *serverConn) scan(p []byte) {
	for c.inHeader {
		part, rest, ended := bytes.Cut(p, []byte("\n"))
		if len(c.line) < maxFramingLine {
			c.line = append(c.line, part...)
		}
		if !ended {
			return
		}
		c.endLine(bytes.TrimSuffix(c.line, []byte("\r")))
		c.line, p = c.line[:0], rest
	}
}

func (c *serverConn) endLine(line []byte) {
	const name = "connection:"
	switch {
	case len(line) == 0:
		c.inHeader, c.interim = c.interim, false
	case bytes.HasPrefix(line, []byte("HTTP/1.1 1")) && !bytes.HasPrefix(line, []byte("HTTP/1.1 101")):
		c.interim = true
	case len(line) > len(name) && (line[0]|0x20) == 'c' && strings.EqualFold(string(line[:len(name)]), name):
		for token := range strings.SplitSeq(string(line[len(name):]), ",") {
			c.named = append(c.named, strings.TrimSpace(token))
		}
	}
}

// removeNamed removes the headers of a response that Connection names.
func (c *serverConn) removeNamed(h http.Header) {
	for _, name := range c.named {
		if !strings.EqualFold(name, "Upgrade") && !strings.EqualFold(name, "Connection") { // ReverseProxy looks at these
			h.Del(name)
		}
	}
}
