package httpproxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A clientConn is the connection of a client. A tunnel uses its TCPConn.
//
// While it waits for a request it has no buffers, so that an idle client costs little.
type clientConn struct {
	*net.TCPConn
	proxy  *Proxy
	raw    syscall.RawConn
	since  time.Time // of being accepted
	from   netip.Addr
	shares *shares
	logins logins
	idle   idleWatch
	once   sync.Once
	number int32 // see hangups

	state        atomic.Int32 // see shares
	served       atomic.Bool  // it had a request
	partial      atomic.Bool  // a part of a request has come
	writeLimited atomic.Bool  // an exchange has limited the time of writing

	// Used by the goroutine alone that serves the connection.
	reader  *bufio.Reader // nil: there are no data
	direct  bool          // a read of fd must not wait
	fd      int
	limited bool // the time of reading the header is limited
	fill    func(fd uintptr) bool
	err     error // of fill

	mu   sync.Mutex
	x    *exchange // the active one; nil: none
	gone bool      // the client has closed its half, or all
}

func newClientConn(p *Proxy, conn *net.TCPConn, s *shares) (*clientConn, error) {
	raw, err := conn.SyscallConn()
	c := &clientConn{TCPConn: conn, proxy: p, raw: raw, since: time.Now(), from: remoteIP(conn), shares: s}
	c.fill = c.readNow
	return c, err
}

// serve serves the client until its connection ends.
func (c *clientConn) serve() {
	defer c.Close()
	defer c.freeReader()
	defer func() {
		if c.proxy.panicked(recover(), c) {
			c.reader = nil // whoever may still hold it
		}
	}()
	// One limit holds for the wait and the header of the first request.
	c.limited = true
	_ = c.SetReadDeadline(time.Now().Add(c.proxy.config.HeaderTimeout))
	for c.serveNext() {
		c.limited = false
		_ = c.SetReadDeadline(time.Now().Add(c.proxy.config.KeepAliveTimeout))
	}
}

// serveNext serves one request. It reports whether another one may follow.
func (c *clientConn) serveNext() bool {
	if err := c.wait(); err != nil {
		return false
	}
	x := newExchange(c)
	defer x.free()
	if err := c.readRequest(&x.request); err != nil {
		c.reject(&x.request, err)
		return false
	}
	if !c.begin() {
		return false // it was closed for another client
	}
	c.partial.Store(false)
	c.served.Store(true)
	return c.serveRequest(x)
}

// serveRequest serves a request that was read.
func (c *clientConn) serveRequest(x *exchange) (again bool) {
	p := c.proxy
	p.running.add(1)
	defer p.running.add(-1)
	defer x.freeWriter()
	defer func() {
		if p.panicked(recover(), c) {
			again = false
			x.setTaken()
			if !x.over {
				x.end()
			}
		}
		if x.taken && x.body != nil {
			_ = c.Close()
			x.body.close()
		}
	}()
	x.begin()
	p.handle(x)
	if x.taken {
		x.end()
		return false
	}
	again = x.complete(x.response.body.trailers)
	x.end()
	if x.body != nil && !x.body.ended.Load() {
		c.dropRest(x.body)
		return false
	}
	// From here the end of a server's connection ends this one.
	c.logins.between.Store(true)
	c.state.CompareAndSwap(active, reading)
	return again && !p.stopping.Load()
}

// panicked logs the result of recover in a goroutine that handles data of a client or of
// its server, and reports whether there was a panic: a fault of the proxy must not end the
// service of others. Every such goroutine calls it.
func (p *Proxy) panicked(fault any, c *clientConn) bool {
	if fault == nil {
		return false
	}
	p.log.Error("panic while serving a client", "client", c.RemoteAddr(), "panic", fault, "stack", string(debug.Stack()))
	return true
}

// lingerTime is how long a client may send after a response that came before the end of
// its request. An earlier end of the connection would take the response from it (RFC 9112
// section 9.6).
const lingerTime = 500 * time.Millisecond

// dropRest reads the rest of a body, for which the limit is that of a header. No request
// follows, and the place may be another client's.
func (c *clientConn) dropRest(b *requestBody) {
	c.state.CompareAndSwap(active, reading)
	_ = c.SetReadDeadline(time.Now().Add(c.proxy.config.HeaderTimeout))
	buf := c.proxy.buffers.Get()
	defer c.proxy.buffers.Put(buf)
	if !b.drop(buf) {
		c.linger(buf)
	}
}

// linger ends the response, and reads until the client ends the connection.
func (c *clientConn) linger(buf []byte) {
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(lingerTime))
	for {
		if _, err := c.TCPConn.Read(buf); err != nil {
			return
		}
	}
}

// reject responds to a request that cannot be read.
func (c *clientConn) reject(r *request, err error) {
	text := rejection(r, err)
	if text == "" {
		return
	}
	c.state.CompareAndSwap(reading, resting)
	_ = c.SetWriteDeadline(time.Now().Add(c.proxy.config.HeaderTimeout))
	if _, err := io.WriteString(c.TCPConn, text); err != nil {
		return
	}
	buf := c.proxy.buffers.Get()
	defer c.proxy.buffers.Put(buf)
	c.linger(buf)
}

// errAgain is the error of a read that would have to wait.
var errAgain = errors.New("no data")

// wait waits for data of the client. Without any it holds no buffer.
func (c *clientConn) wait() error {
	if c.reader != nil && c.reader.Buffered() > 0 {
		return nil
	}
	c.freeReader()
	c.rest()
	if c.logins.over() {
		return io.EOF
	}
	if err := c.raw.Read(c.fill); err != nil {
		return err
	}
	if c.err != nil {
		return c.err
	}
	return c.arrived()
}

// readNow reads data into a buffer, and reports whether it need not wait.
func (c *clientConn) readNow(fd uintptr) bool {
	c.reader, c.direct, c.fd = getReader(c), true, int(fd)
	_, c.err = c.reader.Peek(1)
	c.direct = false
	if errors.Is(c.err, errAgain) {
		c.freeReader()
		return false
	}
	return true
}

// rest marks that the client has no request: its place may be another client's.
func (c *clientConn) rest() {
	if c.state.CompareAndSwap(reading, resting) && c.shares.waits.Load() {
		c.shares.rests()
	}
}

// arrived marks that data have come. It fails if the place is another client's.
func (c *clientConn) arrived() error {
	c.logins.between.Store(false)
	if c.state.Load() == active || c.state.CompareAndSwap(resting, reading) {
		return nil
	}
	return net.ErrClosed
}

// Read reads from the client, for the header or the body of a request. A client that does
// not send the rest of a header has no request.
func (c *clientConn) Read(p []byte) (int, error) {
	if c.direct {
		return c.readDirect(p)
	}
	if c.state.Load() == active { // a body
		n, err := c.TCPConn.Read(p)
		if err != nil {
			c.interrupt(errGone) // an earlier cause counts, as that of a deadline
		}
		return n, err
	}
	if !c.limited {
		c.limited = true
		_ = c.SetReadDeadline(time.Now().Add(c.proxy.config.HeaderTimeout))
	}
	c.rest()
	n, err := c.TCPConn.Read(p)
	if n > 0 {
		err = errors.Join(err, c.arrived())
	}
	return n, err
}

// readDirect reads what the kernel has.
func (c *clientConn) readDirect(p []byte) (int, error) {
	for {
		n, err := unix.Read(c.fd, p)
		switch {
		case n == 0 && err == nil:
			return 0, io.EOF
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EAGAIN):
			return 0, errAgain
		case !errors.Is(err, unix.EINTR):
			return 0, os.NewSyscallError("read", err)
		}
	}
}

// freeReader returns the buffer to the pool.
func (c *clientConn) freeReader() {
	if c.reader != nil {
		putReader(c.reader)
		c.reader = nil
	}
}

// readRequest reads the head of a request. Empty lines before it are skipped (RFC 9112
// section 2.2).
func (c *clientConn) readRequest(r *request) error {
	h := newHeadReader(c.proxy.config.MaxHeaderBytes + c.reader.Size())
	defer h.free()
	c.partial.Store(true)
	for {
		first, err := c.reader.Peek(1)
		if err != nil {
			return err
		}
		if first[0] != '\r' && first[0] != '\n' {
			break
		}
		_, _ = c.reader.Discard(1)
		if h.left--; h.left < 0 {
			return errHeaderLimit
		}
	}
	line, f, err := h.read(c.reader, checkRequestLine, r.fields[:0])
	if err != nil {
		return err
	}
	return r.parse(line, f)
}

// isReadError reports whether an error is that of reading from a connection: there is no
// request to respond to.
func isReadError(err error) bool {
	_, network := errors.AsType[*net.OpError](err)
	return network || errors.Is(err, io.EOF) || isTimeout(err) || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded)
}

// setExchange sets the active exchange. It ends if the client is already gone.
func (c *clientConn) setExchange(x *exchange) {
	c.mu.Lock()
	c.x = x
	gone := c.gone
	c.mu.Unlock()
	if gone {
		c.checkGone()
	}
}

var errGone = errors.New("the client has closed the connection")

// hungUp handles the client's end of the connection, or of its half.
func (c *clientConn) hungUp() {
	defer func() { c.proxy.panicked(recover(), c) }()
	c.mu.Lock()
	c.gone = true
	c.mu.Unlock()
	c.checkGone()
}

// checkGone ends the active exchange if the client is gone. A tunnel may begin with the
// end of the client's half, and a client that has sent more than this request may wait for
// all responses.
func (c *clientConn) checkGone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.x
	if x == nil || !c.gone || x.taken || x.request.method == "CONNECT" || x.body != nil && !x.body.ended.Load() || c.unread() {
		return
	}
	x.life.end(errGone)
}

// interrupt ends the active exchange.
func (c *clientConn) interrupt(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.x != nil {
		c.x.life.end(cause)
	}
}

// isIdle reports whether the connection may be closed before a request: it waits for the
// next one, or for the first one since a while.
func (c *clientConn) isIdle() bool {
	return c.state.Load() == resting && !c.partial.Load() && !c.unread() && (c.served.Load() || time.Since(c.since) > firstPatience)
}

// firstPatience is how long a client that has just connected may take for its first
// request when the proxy stops.
const firstPatience = 5 * time.Second

// Close closes the client's server connections too, and releases the place.
func (c *clientConn) Close() error {
	err := c.TCPConn.Close()
	c.once.Do(func() {
		c.idle.close()
		c.logins.close()
		c.shares.end(c)
		c.proxy.hangups.remove(c)
	})
	return err
}
