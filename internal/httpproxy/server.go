package httpproxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/poll"
)

// A serverConn is a connection to a server, for one exchange at a time.
//
// http.Transport is not used, since it shares every connection between clients, sends
// requests that must not be repeated on connections that the server may be closing, and
// writes lines of its own to the log.
type serverConn struct {
	duplex
	tcp    *socket // the same, or below TLS
	closed func()  // called by the first Close
	key    serverKey
	reader *bufio.Reader
	used   bool          // it has had a response
	client *clientConn   // the only client that may use it; nil: any
	login  bool          // a request on it had credentials that may hold for the connection
	parked time.Time     // start of being idle
	watch  chan struct{} // closed at the end of a watch, see clientConn.park
	sent   chan error    // has the result of sending the current request

	answered bool // the server has sent a part of the current response
}

// A duplex is a connection whose two directions end separately, TCP or TLS.
type duplex interface {
	net.Conn
	CloseWrite() error
}

// A socket is the TCP connection of a server.
type socket struct {
	*net.TCPConn
	raw   syscall.RawConn
	pause func() // called before a read waits for data; nil: nothing to do

	// The parts of a read with pause, which is one system call if there are data.
	p      []byte
	n      int
	err    error
	paused bool
	read   func(fd uintptr) bool
}

func newSocket(tcp *net.TCPConn) (*socket, error) {
	raw, err := tcp.SyscallConn()
	s := &socket{TCPConn: tcp, raw: raw}
	s.read = s.readNow
	return s, err
}

// Read reads from the server.
func (s *socket) Read(p []byte) (int, error) {
	if s.pause == nil || len(p) == 0 {
		return s.TCPConn.Read(p)
	}
	s.p, s.paused = p, false
	err := s.raw.Read(s.read)
	s.p = nil
	switch {
	case err != nil:
		return 0, err
	case s.err != nil:
		return 0, &net.OpError{Op: "read", Net: "tcp", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: os.NewSyscallError("read", s.err)}
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

// readNow reads, and reports whether it need not wait.
func (s *socket) readNow(fd uintptr) bool {
	for {
		if s.n, s.err = unix.Read(int(fd), s.p); !errors.Is(s.err, unix.EINTR) {
			break
		}
	}
	if !errors.Is(s.err, unix.EAGAIN) {
		return true
	}
	if !s.paused {
		s.paused = true
		s.pause()
	}
	return false
}

var (
	errNoUpgrade    = errors.New("the server switched protocols without a request for it")
	errFinalAnswer  = errors.New("the server has responded without the request's body")
	errPanic        = errors.New("the request was not sent")
	errBeforeAnswer = errors.New("the server closed the connection")
)

// The buffers of connections, which idle ones do not need.
var (
	readers = sync.Pool{New: func() any { return bufio.NewReader(nil) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriter(nil) }}
)

// getReader returns a buffered reader of a connection.
func getReader(conn io.Reader) *bufio.Reader {
	r := readers.Get().(*bufio.Reader)
	r.Reset(conn)
	return r
}

// putReader returns a reader to the pool.
func putReader(r *bufio.Reader) {
	r.Reset(nil)
	readers.Put(r)
}

// getWriter returns a buffered writer to a connection.
func getWriter(conn io.Writer) *bufio.Writer {
	w := writers.Get().(*bufio.Writer)
	w.Reset(conn)
	return w
}

// putWriter returns a writer to the pool.
func putWriter(w *bufio.Writer) {
	w.Reset(nil)
	writers.Put(w)
}

// exchange sends the request of an exchange and receives the response. done is called when
// both have ended and the connection may have another exchange; otherwise it is closed.
func (c *serverConn) exchange(x *exchange, done func(*serverConn)) error {
	c.answered = false
	if c.reader == nil {
		c.reader = getReader(c)
	}
	x.life.hold(c)
	sent, expect := c.send(x)
	err := c.receive(x, expect)
	expect.end(errFinalAnswer)
	if err != nil {
		x.life.release()
		_ = c.Close()
		select {
		case fault := <-sent:
			if fault != nil && !onNetwork(fault) {
				err = fault
			}
		default:
		}
		if cause := x.life.cause(); cause != nil {
			err = cause
		}
		return err
	}
	c.used = true
	r := &x.response
	if r.offersLogin() {
		c.client = x.client
	}
	x.closing = c.login && r.closes
	if r.status == http.StatusSwitchingProtocols {
		return nil // the connection ends with the exchange
	}
	if !r.noBody && (!r.known() || r.body.left > int64(c.reader.Buffered())) {
		c.tcp.pause = x.flush
	}
	r.end = func(whole bool) {
		c.tcp.pause = nil
		whole = whole && !r.closes && c.reader.Buffered() == 0 && x.sentWhole(c, sent)
		putReader(c.reader)
		c.reader = nil
		if !x.life.release() || !whole {
			_ = c.Close()
			return
		}
		done(c)
	}
	if r.noBody {
		r.finish(io.EOF)
	}
	return nil
}

// send sends a request. A body is sent in the background, since the server may respond
// before its end, and its end is reported by the channel.
func (c *serverConn) send(x *exchange) (sent <-chan error, expect *expectation) {
	if c.sent == nil {
		c.sent = make(chan error, 1)
	}
	result := c.sent // empty: a connection has another exchange after sentWhole only
	if x.body == nil {
		err := c.write(x, nil, false)
		result <- err
		if err != nil && !onNetwork(err) {
			_ = c.Close()
		}
		return result, nil
	}
	from := io.Reader(x.body)
	if equalFold(x.request.fields.get("Expect"), "100-continue") {
		expect = newExpectation()
		from = &expectedBody{x.body, expect}
	}
	// The head waits for the first piece of the body if that has come with it.
	alone := x.request.length < 0 || x.request.expects || x.client.reader.Buffered() == 0
	go func() {
		err := errPanic
		defer func() {
			if x.proxy.panicked(recover(), x.client) {
				result <- err
				_ = c.Close()
			}
		}()
		err = c.write(x, from, alone)
		result <- err
		// The server must not wait for a rest that will not come. After an error of
		// its connection it may have responded.
		if err != nil && !errors.Is(err, errFinalAnswer) && (x.body.err.Load() != nil || !onNetwork(err)) {
			_ = c.Close()
		}
	}()
	return result, expect
}

// onNetwork reports whether an error is that of a connection.
func onNetwork(err error) bool {
	_, ok := errors.AsType[*net.OpError](err)
	return ok
}

// sentWhole reports whether the request was sent, now that the response has ended. A
// server may respond before the end of a request; then the connection is of no more use.
func (x *exchange) sentWhole(c *serverConn, sent <-chan error) bool {
	select {
	case err := <-sent:
		return err == nil
	default:
	}
	if c.client == nil || x.body == nil || !x.body.ended.Load() {
		return false
	}
	// The connection cannot be replaced, and the goroutine that sends the request may be
	// about to end.
	select {
	case err := <-sent:
		return err == nil
	case <-time.After(time.Second):
		return false
	}
}

// write sends the request of an exchange, with its body. Each piece is sent at once; alone
// means that the head is too. The exchange may end before.
func (c *serverConn) write(x *exchange, body io.Reader, alone bool) error {
	w := getWriter(c.duplex)
	defer putWriter(w)
	x.writeRequest(w)
	if body == nil {
		return w.Flush()
	}
	buf := x.proxy.buffers.Get()
	defer x.proxy.buffers.Put(buf)
	chunked := x.request.length < 0
	for ; ; alone = true {
		if alone {
			if err := w.Flush(); err != nil {
				return err
			}
		}
		n, err := body.Read(buf)
		if n > 0 {
			writePiece(w, buf[:n], chunked)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			if n > 0 {
				_ = w.Flush() // before the fault, which is the error
			}
			return err
		}
	}
	if chunked {
		writeLastChunk(w, x.body.body.trailers)
	}
	return w.Flush()
}

// writePiece writes a part of a body.
func writePiece(w *bufio.Writer, p []byte, chunked bool) {
	if chunked {
		_, _ = w.Write(strconv.AppendUint(w.AvailableBuffer(), uint64(len(p)), 16))
		_, _ = w.WriteString("\r\n")
	}
	_, _ = w.Write(p)
	if chunked {
		_, _ = w.WriteString("\r\n")
	}
}

// writeLastChunk writes the end of a body in chunks (RFC 9112 section 7.1).
func writeLastChunk(w *bufio.Writer, trailers fields) {
	_, _ = w.WriteString("0\r\n")
	trailers.write(w)
	_, _ = w.WriteString("\r\n")
}

// receive receives the final response. Interim ones are forwarded to the client.
func (c *serverConn) receive(x *exchange, expect *expectation) error {
	h := newHeadReader(x.proxy.config.MaxHeaderBytes + c.reader.Size())
	defer h.free()
	h.folds = true
	for {
		r := &x.response
		*r = response{fields: r.fields[:0], body: body{r: c.reader}}
		line, f, err := h.read(c.reader, checkStatusLine, r.fields)
		if err == nil {
			err = r.parse(line, f, x.request.method)
		}
		switch {
		case err != nil && !c.answered && c.gone(err):
			return errBeforeAnswer
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case r.status < 100:
			return errBadStatus
		case r.status >= 200:
			return nil
		case r.status == http.StatusSwitchingProtocols:
			if x.upgrade == "" {
				return errNoUpgrade
			}
			return nil
		case r.status == http.StatusContinue:
			expect.end(nil)
		}
		x.forwardInterim()
	}
}

// gone reports whether an error is that of a connection that the server has closed.
func (c *serverConn) gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Read reads from the server.
func (c *serverConn) Read(p []byte) (int, error) {
	n, err := c.duplex.Read(p)
	if n > 0 {
		c.answered = true
	}
	return n, err
}

// Close closes the connection.
func (c *serverConn) Close() error {
	c.closed()
	return c.duplex.Close()
}

// alive reports whether an idle connection may have another exchange: its server has
// neither closed it nor sent anything, which nobody has asked for.
func (c *serverConn) alive() bool {
	waiting := false
	err := c.tcp.raw.Control(func(fd uintptr) { waiting = silent(fd) })
	return err == nil && waiting
}

// silent reports whether a read of a socket would block.
func silent(fd uintptr) bool {
	readable, err := poll.Ready(fd, unix.POLLIN)
	return !readable && err == nil
}

// An expectation is that of a request with Expect: 100-continue. Its body waits for the
// server, or expectPatience (RFC 9110 section 10.1.1).
type expectation struct {
	met   chan struct{}
	once  sync.Once
	err   error // with which the body ends; nil: it is sent
	timer *time.Timer
}

func newExpectation() *expectation {
	e := &expectation{met: make(chan struct{})}
	e.timer = time.AfterFunc(expectPatience, func() { e.meet(nil) })
	return e
}

// meet ends the waiting; only the first call counts. The timer, which calls it, may not be
// set yet.
func (e *expectation) meet(err error) {
	e.once.Do(func() {
		e.err = err
		close(e.met)
	})
}

// end ends the waiting, as meet does, and the timer. A nil expectation is no waiting.
func (e *expectation) end(err error) {
	if e != nil {
		e.meet(err)
		e.timer.Stop()
	}
}

// An expectedBody is the body of a request with an expectation.
type expectedBody struct {
	*requestBody
	expect *expectation
}

// Read waits for the server before it reads from the client.
func (b *expectedBody) Read(p []byte) (int, error) {
	<-b.expect.met
	if b.expect.err != nil {
		return 0, b.expect.err
	}
	return b.requestBody.Read(p)
}
