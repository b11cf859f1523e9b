package httpproxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// A field is a line of a header or of trailers. Its name has the canonical form of
// net/http, as in "User-Agent", and its value no blanks around it, but for those of empty
// lines by which it was continued.
type field struct{ name, value string }

// fields are a header or trailers, in the order in which they came.
type fields []field

// get returns the first value of a field, or "".
func (f fields) get(name string) string {
	for i := range f {
		if f[i].name == name {
			return f[i].value
		}
	}
	return ""
}

// count returns how many lines have a name.
func (f fields) count(name string) (n int) {
	for i := range f {
		if f[i].name == name {
			n++
		}
	}
	return n
}

// all returns all values of a field.
func (f fields) all(name string) (values []string) {
	for i := range f {
		if f[i].name == name {
			values = append(values, f[i].value)
		}
	}
	return values
}

// hasToken reports whether a field, which is a list, has a token (RFC 9110 section 5.6.1).
func (f fields) hasToken(name, token string) bool {
	for i := range f {
		if f[i].name == name && hasToken(f[i].value, token) {
			return true
		}
	}
	return false
}

// hasToken reports whether a list has a token (RFC 9110 section 5.6.1).
func hasToken(list, token string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if equalFold(trim(one), token) {
			return true
		}
	}
	return false
}

// equalFold reports whether two protocol words are equal without regard to the case of
// ASCII letters. strings.EqualFold also takes U+212A (KELVIN SIGN) for a k and U+017F (LONG
// S) for an s: a proxy that reads "chunked" or "close" there, and a server that does not,
// disagree on the end of a message.
func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && (a[i]|0x20 != b[i]|0x20 || a[i]|0x20 < 'a' || a[i]|0x20 > 'z') {
			return false
		}
	}
	return true
}

// without removes fields. It changes the slice.
func (f fields) without(name string) fields {
	return slices.DeleteFunc(f, func(one field) bool { return one.name == name })
}

// sort sorts fields by their names, as net/http sends them.
func (f fields) sort() {
	slices.SortStableFunc(f, func(a, b field) int { return strings.Compare(a.name, b.name) })
}

// write writes fields. Those whose name is no token, which no recipient accepts, are left out.
func (f fields) write(w *bufio.Writer) {
	for i := range f {
		if isToken(f[i].name) {
			writeField(w, f[i].name, trim(f[i].value))
		}
	}
}

// writeField writes one line. The writer keeps the first error.
func writeField(w *bufio.Writer, name, value string) {
	_, _ = w.WriteString(name)
	_, _ = w.WriteString(": ")
	_, _ = w.WriteString(value)
	_, _ = w.WriteString("\r\n")
}

// hopHeaders are the headers of one connection (RFC 9110 section 7.6.1, and
// Proxy-Connection and Keep-Alive of older clients).
var hopHeaders = []string{
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

// withoutHopByHop removes the headers of one connection, and those that Connection names.
// It changes the slice.
func (f fields) withoutHopByHop() fields {
	named := f.named()
	return slices.DeleteFunc(f, func(one field) bool { return named.has(one.name) || slices.Contains(hopHeaders, one.name) })
}

// A nameSet is a set of names of fields. A look-up takes the same time however many they
// are: whoever sends a header chooses both the names and the fields.
type nameSet struct {
	n    int
	few  [4]string           // the first ones, in any case
	many map[string]struct{} // the others, in canonical form
}

// add adds a name.
func (s *nameSet) add(name string) {
	if s.n < len(s.few) {
		s.few[s.n] = name
		s.n++
		return
	}
	if s.many == nil {
		s.many = map[string]struct{}{}
	}
	s.many[http.CanonicalHeaderKey(name)] = struct{}{}
}

// has reports whether a name in canonical form was added.
func (s *nameSet) has(name string) bool {
	for _, one := range s.few[:s.n] {
		if equalFold(one, name) {
			return true
		}
	}
	_, found := s.many[name]
	return found
}

// named returns the names in the fields Connection.
func (f fields) named() (s nameSet) {
	for i := range f {
		if f[i].name != "Connection" {
			continue
		}
		for name := range strings.SplitSeq(f[i].value, ",") {
			if name = trim(name); name != "" {
				s.add(name)
			}
		}
	}
	return s
}

// forbiddenTrailers are the headers that must not be sent as trailers, since a recipient
// that merges trailers into the header would change the framing, the target, the
// authentication or the processing of a message (RFC 9110 section 6.5.1).
var forbiddenTrailers = []string{
	"Authorization", "Cache-Control", "Connection", "Content-Encoding", "Content-Length", "Content-Range", "Content-Type", "Cookie", "Expect",
	"Host", "Keep-Alive", "Max-Forwards", "Pragma", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Range", "Set-Cookie", "Te",
	"Trailer", "Transfer-Encoding", "Upgrade", "Www-Authenticate",
}

func isForbiddenTrailer(name string) bool {
	return slices.Contains(forbiddenTrailers, name) || strings.HasPrefix(name, "If-")
}

// announcedTrailers removes the field Trailer and returns the names in it, without
// forbidden ones. Some that would change the framing are an error.
func (f fields) announcedTrailers() (fields, []string, error) {
	var names []string
	var known nameSet
	for i := range f {
		if f[i].name != "Trailer" {
			continue
		}
		for name := range strings.SplitSeq(f[i].value, ",") {
			switch name = http.CanonicalHeaderKey(trim(name)); {
			case name == "Transfer-Encoding" || name == "Trailer" || name == "Content-Length":
				return f, nil, fmt.Errorf("bad trailer key %q", name)
			case isToken(name) && !isForbiddenTrailer(name) && !known.has(name):
				known.add(name)
				names = append(names, name)
			}
		}
	}
	return f.without("Trailer"), names, nil
}

// addCacheControl adds the meaning that Pragma had before HTTP/1.1 (RFC 9111 section 5.4).
func (f fields) addCacheControl() fields {
	if f.get("Pragma") == "no-cache" && f.count("Cache-Control") == 0 {
		f = append(f, field{"Cache-Control", "no-cache"})
	}
	return f
}

// trim removes blanks around a value (RFC 9110 section 5.6.3).
func trim(s string) string { return strings.Trim(s, " \t") }

// isToken reports whether a string is a token, as the name of a field and a method
// have to be (RFC 9110 section 5.6.2).
func isToken[S []byte | string](s S) bool {
	for i := range len(s) {
		if !tokenBytes[s[i]] {
			return false
		}
	}
	return len(s) > 0
}

var tokenBytes = func() (is [256]bool) {
	for _, b := range "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" {
		is[b] = true
	}
	return is
}()

// The faults of a header.
var (
	errHeaderLimit  = errors.New("the header of the response is too long")
	errFoldedHeader = errors.New("header folded over several lines (RFC 9112 section 5.2)")
	errTrailerLimit = errors.New("http: suspiciously long trailer after chunked body")
	errTrailerEnd   = errors.New("http: unexpected EOF reading trailer")
)

// A headReader reads the heads of messages: a start line and fields. The text of one is
// copied once, into a string of which all names and values are parts.
type headReader struct {
	left  int  // bytes to the limit
	folds bool // a field may continue in the next line (RFC 9112 section 5.2)

	text []byte // the start line, names and values
	ends []int  // of each of them
	long []byte // a line that is longer than the buffer of the bufio.Reader
}

var headReaders = sync.Pool{New: func() any { return new(headReader) }}

// newHeadReader returns a reader for heads of a number of bytes together.
func newHeadReader(limit int) *headReader {
	h := headReaders.Get().(*headReader)
	h.left, h.folds = limit, false
	return h
}

// free returns the reader to the pool.
func (h *headReader) free() {
	if cap(h.text)+cap(h.long) <= 16<<10 { // longer ones are rare
		headReaders.Put(h)
	}
}

// line returns the next line without its end, which may be LF alone (RFC 9112 section
// 2.2). It is valid until the next call.
func (h *headReader) line(r *bufio.Reader) ([]byte, error) {
	h.long = h.long[:0]
	for {
		part, err := r.ReadSlice('\n')
		if h.left -= len(part); h.left < 0 {
			return nil, errHeaderLimit
		}
		if err != nil || len(h.long) > 0 {
			h.long = append(h.long, part...)
			part = h.long
		}
		switch {
		case err == nil:
			return bytes.TrimSuffix(part[:len(part)-1], []byte("\r")), nil
		case errors.Is(err, bufio.ErrBufferFull):
		case err == io.EOF && len(part) > 0:
			return part, nil // the next call returns the error
		default:
			return nil, err
		}
	}
}

// read reads a head. The start line has to pass a check; nil: there is none. The fields
// are appended to a slice without elements.
func (h *headReader) read(r *bufio.Reader, check func(line []byte) error, to fields) (start string, f fields, err error) {
	h.text, h.ends = h.text[:0], h.ends[:0]
	if check != nil {
		line, err := h.line(r)
		if err != nil {
			return "", nil, err
		}
		if err := check(line); err != nil {
			return "", nil, err
		}
		h.text = append(h.text, line...)
	}
	h.ends = append(h.ends, len(h.text))
	for {
		line, err := h.line(r)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return "", nil, err
		}
		if len(line) == 0 {
			break
		}
		if err := h.add(line); err != nil {
			return "", nil, err
		}
	}
	text, begin := string(h.text), h.ends[0]
	for i := 1; i < len(h.ends); i += 2 {
		name, end := h.ends[i], h.ends[i+1]
		to = append(to, field{text[begin:name], text[name:end]})
		begin = end
	}
	return text[:h.ends[0]], to, nil
}

// add adds a line of a field.
func (h *headReader) add(line []byte) error {
	folded := line[0] == ' ' || line[0] == '\t'
	name, value, found := bytes.Cut(line, []byte(":"))
	if !folded && !found {
		return fmt.Errorf("malformed MIME header: missing colon: %q", line)
	}
	for _, b := range line {
		if b < ' ' && b != '\t' || b == 0x7f {
			return fmt.Errorf("malformed MIME header line: %q", line)
		}
	}
	if folded {
		return h.fold(line)
	}
	if !h.addName(name) {
		return fmt.Errorf("malformed MIME header line: %q", line)
	}
	h.ends = append(h.ends, len(h.text))
	h.text = append(h.text, bytes.Trim(value, " \t")...)
	h.ends = append(h.ends, len(h.text))
	return nil
}

// addName adds a name in its canonical form. One with blanks in it stays as it is: who
// reads the fields has to decide what to do with it.
func (h *headReader) addName(name []byte) bool {
	begin, upper, blank := len(h.text), true, false
	for _, b := range name {
		switch {
		case upper && 'a' <= b && b <= 'z':
			b -= 'a' - 'A'
		case !upper && 'A' <= b && b <= 'Z':
			b += 'a' - 'A'
		case b == ' ':
			blank = true
		case !tokenBytes[b]:
			return false
		}
		upper = b == '-'
		h.text = append(h.text, b)
	}
	if blank {
		h.text = append(h.text[:begin], name...)
	}
	return len(name) > 0
}

// fold adds a line that continues the field before.
func (h *headReader) fold(line []byte) error {
	last := len(h.ends) - 1
	switch {
	case !h.folds:
		return errFoldedHeader
	case last == 0:
		return fmt.Errorf("malformed MIME header initial line: %q", line)
	}
	if h.ends[last] > h.ends[last-1] {
		h.text = append(h.text, ' ')
	}
	h.text = append(h.text, bytes.Trim(line, " \t")...)
	h.ends[last] = len(h.text)
	return nil
}
