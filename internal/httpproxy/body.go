package httpproxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http/httputil"
	"slices"
	"sync"
	"sync/atomic"
)

// A body is the body of a message: in chunks, of a length, or up to the end of the
// connection.
type body struct {
	r        *bufio.Reader
	chunks   io.Reader // nil: none
	left     int64     // of a length; negative: up to the end
	trailers fields    // complete at the end
	err      error     // io.EOF after the end
}

// setChunks sets that the body is in chunks.
func (b *body) setChunks() { b.chunks = httputil.NewChunkedReader(b.r) }

// Read returns io.EOF at the end of the body, also together with its last data.
func (b *body) Read(p []byte) (n int, err error) {
	switch {
	case b.err != nil:
		return 0, b.err
	case b.chunks != nil:
		if n, err = b.chunks.Read(p); errors.Is(err, io.EOF) {
			err = b.readTrailers()
		}
	case b.left < 0:
		n, err = b.r.Read(p)
	case b.left == 0:
		err = io.EOF
	default:
		n, err = b.r.Read(p[:min(int64(len(p)), b.left)])
		if b.left -= int64(n); b.left == 0 {
			err = io.EOF
		} else if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
	}
	b.err = err
	return n, err
}

// readTrailers reads the end of a body in chunks. As net/http does, it accepts every form
// of lines that a header may have, but only if there is an empty line that ends with CR LF,
// as its end or behind it.
func (b *body) readTrailers() error {
	end, _ := b.r.Peek(2)
	switch {
	case len(end) < 2:
		return errTrailerEnd
	case string(end) == "\r\n":
		_, _ = b.r.Discard(2)
		return io.EOF
	case !b.seeTrailerEnd():
		return errTrailerLimit
	}
	h := newHeadReader(b.r.Size())
	defer h.free()
	h.folds = true
	_, trailers, err := h.read(b.r, nil, nil)
	if err != nil {
		return err
	}
	b.trailers = slices.DeleteFunc(trailers, func(one field) bool { return isForbiddenTrailer(one.name) })
	b.trailers.sort()
	return io.EOF
}

// seeTrailerEnd reports whether an empty line comes before the buffer is full, which limits
// the length of trailers.
func (b *body) seeTrailerEnd() bool {
	for seen := 0; ; {
		p, err := b.r.Peek(max(seen+1, b.r.Buffered()))
		if bytes.Contains(p[max(seen-3, 0):], []byte("\r\n\r\n")) {
			return true
		}
		if seen = len(p); err != nil {
			return false
		}
	}
}

// A requestBody is the body of a client's request. It records how much of it was read,
// its end and its error.
type requestBody struct {
	x     *exchange
	read  atomic.Int64
	ended atomic.Bool
	err   atomic.Pointer[error]

	mu     sync.Mutex // for the rest of fields
	body   body
	closed bool
}

var errBodyClosed = errors.New("read after the end of the request")

// Read reads from the client. The first one sends the interim response that the client
// may expect.
func (b *requestBody) Read(p []byte) (int, error) {
	b.x.sendContinue()
	n, err := b.readOpen(p)
	b.read.Add(int64(n))
	switch {
	case errors.Is(err, io.EOF):
		b.ended.Store(true)
		b.x.client.checkGone() // only now its end is one before the response
	case err != nil:
		b.err.Store(&err)
	}
	return n, err
}

func (b *requestBody) readOpen(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, errBodyClosed
	}
	return b.body.Read(p)
}

// restLimit is the limit in bytes of the rest of a body that is read after the response,
// so that a client that sends it all first gets the response. net/http has the same.
const restLimit = 256 << 10

// drop reads the rest of a body, up to restLimit, and reports whether its end has come.
// The read deadline of the client limits it. After it, all reads fail.
func (b *requestBody) drop(buf []byte) bool {
	for n := 0; n <= restLimit; {
		part, err := b.readOpen(buf)
		n += part
		if err != nil {
			break
		}
	}
	return b.close()
}

// close makes all further reads fail, since the buffer will be another connection's. It
// waits for one that runs, and reports whether the end of the body has come.
func (b *requestBody) close() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return errors.Is(b.body.err, io.EOF)
}
