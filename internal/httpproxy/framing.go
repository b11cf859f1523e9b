package httpproxy

import (
	"bytes"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// The faults of a request on whose end two programs could disagree (RFC 9112 section
// 11.2, request smuggling).
var (
	errTwoFramings  = errors.New("both Content-Length and Transfer-Encoding (RFC 9112 section 6.1)")
	errTwoLengths   = errors.New("more than one Content-Length (RFC 9112 section 6.3)")
	errOldChunked   = errors.New("Transfer-Encoding in HTTP/1.0 (RFC 9112 section 6.1)")
	errFoldedHeader = errors.New("header folded over several lines (RFC 9112 section 5.2)")
)

// A framing follows the requests of one connection, byte by byte, to find the faults
// that net/http tolerates: before a handler sees the request, it drops the length
// beside a transfer encoding, either in HTTP/1.0, and one of two equal lengths. Faults
// that net/http refuses are left to it.
type framing struct {
	phase phase
	line  []byte // the part of the current line that was read; net/http limits it
	left  uint64 // bytes to the end of the phase, in inBody and inChunk
	begun int64  // requests

	connect, old, chunked, upgrade bool // properties of the current request
	lengths                        int
	length                         uint64
}

type phase uint8

const (
	inRequestLine phase = iota
	inHeader
	inBody
	inChunkSize
	inChunk
	inChunkEnd
	inTrailer
	unframed // the rest is not scanned
)

// scan scans data that were read, and returns how many bytes remain of them: empty lines
// before a request, which net/http refuses, are removed (RFC 9112 section 2.2). At the
// end of an invalid header the data end before that end, so that the request is never
// complete.
func (f *framing) scan(p []byte) (n int, err error) {
	for i := 0; i < len(p); {
		part := 0 // length of the next part to keep
		switch {
		case f.phase == unframed:
			part = len(p) - i
		case f.phase == inBody || f.phase == inChunk:
			part = f.skip(len(p) - i)
		case f.phase == inRequestLine && len(f.line) == 0 && !f.upgrade && (p[i] == '\r' || p[i] == '\n'):
			i++
			continue
		default:
			part = bytes.IndexByte(p[i:], '\n')
			if part < 0 {
				part = len(p) - i
				f.line = append(f.line, p[i:]...)
				break
			}
			line := p[i : i+part]
			if len(f.line) > 0 {
				f.line = append(f.line, line...)
				line = f.line
			}
			f.line = f.line[:0]
			err = f.endLine(string(bytes.TrimSuffix(line, []byte("\r"))))
			if err == nil {
				part++
			}
		}
		n += copy(p[n:], p[i:i+part])
		i += part
		if err != nil {
			f.phase = unframed
			return n, err
		}
	}
	return n, nil
}

// skip skips at most n bytes of a body or chunk.
func (f *framing) skip(n int) int {
	if uint64(n) < f.left {
		f.left -= uint64(n)
		return n
	}
	n = int(f.left)
	f.left = 0
	if f.phase == inBody {
		f.phase = inRequestLine
	} else {
		f.phase = inChunkEnd
	}
	return n
}

func (f *framing) endLine(line string) error {
	switch f.phase {
	case inRequestLine:
		if line != "" {
			f.begin(line)
		}
	case inHeader:
		if line == "" {
			return f.endHeader()
		}
		return f.header(line)
	case inChunkSize:
		size, _, _ := strings.Cut(line, ";")
		n, err := strconv.ParseUint(strings.TrimRight(size, " \t"), 16, 63)
		switch {
		case err != nil:
			f.phase = unframed // net/http refuses it
		case n == 0:
			f.phase = inTrailer
		default:
			f.phase, f.left = inChunk, n
		}
	case inChunkEnd:
		f.phase = inChunkSize
	case inTrailer:
		if line == "" {
			f.phase = inRequestLine
		}
	}
	return nil
}

func (f *framing) begin(line string) {
	if cap(f.line) > 4<<10 {
		f.line = nil // a long line is rare, a connection may stay
	}
	*f = framing{phase: inHeader, line: f.line, begun: f.begun + 1}
	f.connect = strings.HasPrefix(line, "CONNECT ")
	f.old = strings.HasSuffix(line, " HTTP/1.0")
}

// headers returns the number of requests whose header is complete.
func (f *framing) headers() int64 {
	if f.phase == inHeader {
		return f.begun - 1
	}
	return f.begun
}

func (f *framing) header(line string) error {
	if line[0] == ' ' || line[0] == '\t' {
		return errFoldedHeader
	}
	name, value, _ := strings.Cut(line, ":")
	switch {
	case strings.EqualFold(name, "Transfer-Encoding"):
		f.chunked = true
	case strings.EqualFold(name, "Content-Length"):
		f.lengths++
		f.length, _ = strconv.ParseUint(strings.Trim(value, " \t"), 10, 63)
	case strings.EqualFold(name, "Upgrade"): // the next data may be of another protocol
		f.upgrade = true
	}
	return nil
}

// endHeader checks a complete header and enters the phase that follows.
func (f *framing) endHeader() error {
	switch {
	case f.chunked && f.lengths > 0:
		return errTwoFramings
	case f.lengths > 1:
		return errTwoLengths
	case f.chunked && f.old:
		return errOldChunked
	case f.connect: // a tunnel, or the end of the connection
		f.phase = unframed
	case f.chunked:
		f.phase = inChunkSize
	case f.length > 0:
		f.phase, f.left = inBody, f.length
	default:
		f.phase = inRequestLine
	}
	return nil
}

// forbiddenTrailers are the headers that must not be sent as trailers, since a recipient
// that merges trailers into the header would change the framing, the target, the
// authentication or the processing of a message (RFC 9110 section 6.5.1).
var forbiddenTrailers = []string{
	"Authorization", "Cache-Control", "Connection", "Content-Encoding", "Content-Length", "Content-Range", "Content-Type", "Cookie", "Expect",
	"Host", "Keep-Alive", "Max-Forwards", "Pragma", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Range", "Set-Cookie", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade", "Www-Authenticate",
}

// removeForbidden removes forbidden trailers.
func removeForbidden(trailer http.Header) {
	for name := range trailer {
		if slices.Contains(forbiddenTrailers, name) || strings.HasPrefix(name, "If-") {
			delete(trailer, name)
		}
	}
}
