package httpproxy

import (
	"errors"
	"strconv"
	"strings"
)

// maxFramingLine is how many bytes of a line are scanned. No line that is relevant to
// the framing is longer.
const maxFramingLine = 256

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
	line  []byte // the current line, up to maxFramingLine
	left  uint64 // bytes to the end of the phase, in inBody and inChunk

	connect, old, chunked bool // properties of the current request
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
	unframed // the rest is not scanned
)

// scan scans data that were read. At the end of an invalid header it returns the number
// of bytes before that end, so that the request is never complete.
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
