package httpproxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

	// Fields of the current response.
	answered bool // the server has sent a part of it
	inHeader bool
	left     int64 // bytes to the limit of the header
	line     []byte
	named    []string // by the header Connection
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
	errHeaderLimit  = errors.New("the header of the response is too long")
	errBadReason    = errors.New("malformed HTTP response: control characters in the reason phrase")
	errBadStatus    = errors.New("malformed HTTP response: the status is below 100")
	errNoUpgrade    = errors.New("the server switched protocols without a request for it")
	errFinalAnswer  = errors.New("the server has responded without the request's body")
	errBeforeAnswer = errors.New("the server closed the connection")
)

// The buffers of connections, which idle ones do not need.
var (
	readers = sync.Pool{New: func() any { return bufio.NewReader(nil) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriter(nil) }}
)

// exchange sends a request and returns the response. done is called when both have
// ended and the connection may have another exchange; otherwise it is closed.
func (c *serverConn) exchange(out *http.Request, x *exchange, done func(*serverConn)) (*http.Response, error) {
	c.answered = false
	if c.reader == nil {
		c.reader = readers.Get().(*bufio.Reader)
		c.reader.Reset(c)
	}
	x.life.hold(c)
	sent, expect := c.send(out, x)
	r, err := c.receive(out, expect, x)
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
		return nil, err
	}
	c.used = true
	if offersLogin(r) {
		c.client = x.client
	}
	x.closing = c.login && r.Close
	c.removeNamed(r.Header)
	if r.StatusCode == http.StatusSwitchingProtocols {
		r.Body = &switchedServer{c, x.life.release} // ends with the exchange
		return r, nil
	}
	removeForbidden(r.Trailer)
	if (x.plain || !flushes(r)) && (r.ContentLength < 0 || r.ContentLength > int64(c.reader.Buffered())) {
		c.tcp.pause = x.flush
	}
	body := &responseBody{ReadCloser: r.Body, end: func(whole bool) {
		removeForbidden(r.Trailer)
		c.tcp.pause = nil
		whole = whole && !r.Close && c.reader.Buffered() == 0 && x.sentWhole(c, sent)
		if !x.life.release() || !whole {
			_ = c.Close()
			return
		}
		readers.Put(c.reader)
		c.reader = nil
		done(c)
	}}
	r.Body = body
	if body.ReadCloser == http.NoBody {
		body.finish(true)
	}
	return r, nil
}

// flushes reports whether ReverseProxy flushes a response, by a goroutine of its own:
// beside that nothing else may flush.
func flushes(r *http.Response) bool {
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return r.ContentLength < 0 || kind == "text/event-stream"
}

// send sends a request. A body is sent in the background, since the server may respond
// before its end, and its end is reported by the channel.
func (c *serverConn) send(out *http.Request, x *exchange) (sent <-chan error, expect *expectation) {
	if c.sent == nil {
		c.sent = make(chan error, 1)
	}
	result := c.sent // empty: a connection has another exchange after sentWhole only
	if out.Body == nil {
		err := c.write(out)
		result <- err
		if err != nil && !onNetwork(err) {
			_ = c.Close()
		}
		return result, nil
	}
	if strings.EqualFold(out.Header.Get("Expect"), "100-continue") {
		expect = newExpectation()
		out = out.WithContext(out.Context()) // a copy
		out.Body = &expectedBody{out.Body, expect}
	}
	go func() {
		err := c.write(out)
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

func (c *serverConn) write(out *http.Request) error {
	w := writers.Get().(*bufio.Writer)
	w.Reset(c)
	err := out.Write(w)
	if err == nil {
		err = w.Flush()
	}
	w.Reset(nil)
	writers.Put(w)
	return err
}

// ReadFrom forwards each piece of a request's body at once, which a bufio.Writer would
// collect.
func (c *serverConn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c.duplex}, r)
}

// receive returns the final response. Interim ones are forwarded to the client.
func (c *serverConn) receive(out *http.Request, expect *expectation, x *exchange) (*http.Response, error) {
	c.inHeader, c.line, c.named = true, c.line[:0], nil
	c.left = int64(x.proxy.config.MaxHeaderBytes + c.reader.Size()) // a part of the body may come along
	for {
		r, err := http.ReadResponse(c.reader, out)
		switch {
		case err != nil && !c.answered && c.gone(err):
			return nil, errBeforeAnswer
		case err != nil:
			return nil, err
		case r.StatusCode < 100:
			return nil, errBadStatus
		case r.StatusCode >= 200:
			return r, nil
		case r.StatusCode == http.StatusSwitchingProtocols:
			if out.Header.Get("Upgrade") == "" {
				return nil, errNoUpgrade
			}
			return r, nil
		case r.StatusCode == http.StatusContinue:
			expect.end(nil)
		}
		c.removeNamed(r.Header)
		x.forwardInterim(r)
		c.inHeader, c.named = true, nil
		next, _ := c.reader.Peek(c.reader.Buffered()) // cannot fail
		c.scan(next)
	}
}

// removeNamed removes the headers that Connection names.
func (c *serverConn) removeNamed(h http.Header) {
	for _, name := range c.named {
		if !strings.EqualFold(name, "Upgrade") && !strings.EqualFold(name, "Connection") { // ReverseProxy looks at these
			h.Del(name)
		}
	}
}

// gone reports whether an error is that of a connection that the server has closed.
func (c *serverConn) gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Read reads from the server. It collects the names in the header Connection of a
// response (RFC 9110 section 7.6.1), which net/http drops if one of them is close.
func (c *serverConn) Read(p []byte) (int, error) {
	if c.inHeader && c.left < 0 { // net/http may not have seen the error
		return 0, errHeaderLimit
	}
	n, err := c.duplex.Read(p)
	if n > 0 {
		c.answered = true
	}
	if c.inHeader {
		c.scan(p[:n])
		if c.left -= int64(n); c.left < 0 {
			return 0, errHeaderLimit
		}
	}
	return n, err
}

func (c *serverConn) scan(p []byte) {
	for c.inHeader {
		part, rest, ended := bytes.Cut(p, []byte("\n"))
		c.line = append(c.line, part...)
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
		c.inHeader = false
	case len(line) > len(name) && (line[0]|0x20) == 'c' && strings.EqualFold(string(line[:len(name)]), name):
		for token := range strings.SplitSeq(string(line[len(name):]), ",") {
			c.named = append(c.named, strings.TrimSpace(token))
		}
	}
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

// silent reports whether a read of a socket would block. poll(2) needs no memory.
func silent(fd uintptr) bool {
	wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(wait, 0)
		if !errors.Is(err, unix.EINTR) {
			return n == 0 && err == nil
		}
	}
}

// A responseBody ends an exchange when it has been read, or is closed before.
type responseBody struct {
	io.ReadCloser
	end func(whole bool) // nil: it was called
}

// Read reads from the server.
func (b *responseBody) Read(p []byte) (int, error) {
	if b.end == nil {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.finish(err == io.EOF)
	}
	return n, err
}

// Close ends the exchange.
func (b *responseBody) Close() error {
	b.finish(false)
	return nil
}

func (b *responseBody) finish(whole bool) {
	if b.end != nil {
		b.end(whole)
		b.end = nil
	}
}

// A switchedServer is the connection of a server after a protocol switch.
type switchedServer struct {
	*serverConn
	stop func() bool
}

// Read returns the data behind the response first.
func (s *switchedServer) Read(p []byte) (int, error) { return s.reader.Read(p) }

// Close closes the connection.
func (s *switchedServer) Close() error {
	s.stop()
	return s.serverConn.Close()
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
	e.timer = time.AfterFunc(expectPatience, func() { e.end(nil) })
	return e
}

// end ends the waiting; only the first call counts. The zero expectation is no waiting.
func (e *expectation) end(err error) {
	if e != nil {
		e.once.Do(func() {
			e.err = err
			e.timer.Stop()
			close(e.met)
		})
	}
}

// An expectedBody is the body of a request with an expectation.
type expectedBody struct {
	io.ReadCloser
	expect *expectation
}

// Read waits for the server before it reads from the client.
func (b *expectedBody) Read(p []byte) (int, error) {
	<-b.expect.met
	if b.expect.err != nil {
		return 0, b.expect.err
	}
	return b.ReadCloser.Read(p)
}
