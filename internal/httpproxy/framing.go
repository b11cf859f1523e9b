package httpproxy

import (
	"errors"
	"strconv"
	"strings"
)

// maxFramingLine is how much of a line is looked at: more than any line has that
// frames a request.
const maxFramingLine = 256

// The faults of a request that could make two programs disagree on where it ends
// (RFC 9112 section 11.2, request smuggling).
var (
	errTwoFramings  = errors.New("both Content-Length and Transfer-Encoding (RFC 9112 section 6.1)")
	errTwoLengths   = errors.New("more than one Content-Length (RFC 9112 section 6.3)")
	errOldChunked   = errors.New("Transfer-Encoding in HTTP/1.0 (RFC 9112 section 6.1)")
	errFoldedHeader = errors.New("header folded over several lines (RFC 9112 section 5.2)")
)

// A framing follows the requests of one connection, byte by byte, to find those
// that net/http accepts because it can make sense of them: it drops the length
// where there is also a transfer encoding, either in HTTP/1.0, and one of two
// equal lengths, all before a handler sees the request. What net/http refuses
// by itself is left to it.
type framing struct {
	phase phase
	line  []byte // begun, without more than maxFramingLine
	left  uint64 // bytes until the phase ends, in inBody and inChunk

	connect, old, chunked bool // of the request whose header is read
	lengths               int
	length                uint64
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
	unframed // nothing more is looked at
)

// scan looks at what was read. At the end of a header that is not right it stops
// with how much comes before that end, so that the request is never complete.
func (f *framing) scan(p []byte) (n int, err error) {
	for n < len(p) {
		switch f.phase {
		case unframed:
			return len(p), nil
		case inBody, inChunk:
			n += f.skip(len(p) - n)
			continue
		}
		c := p[n]
		if c != '\n' {
			if len(f.line) < maxFramingLine {
				f.line = append(f.line, c)
			}
			n++
			continue
		}
		line := strings.TrimSuffix(string(f.line), "\r")
		f.line = f.line[:0]
		if err := f.endLine(line); err != nil {
			f.phase = unframed
			return n, err
		}
		n++
	}
	return n, nil
}

// skip passes over at most n bytes of a body or chunk.
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
	*f = framing{phase: inHeader, line: f.line}
	f.connect = strings.HasPrefix(line, "CONNECT ")
	f.old = len(line) < maxFramingLine && strings.HasSuffix(line, " HTTP/1.0")
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
	}
	return nil
}

// endHeader judges a header and goes on to what follows it.
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
