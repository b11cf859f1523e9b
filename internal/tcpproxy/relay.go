package tcpproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How a connection can end, for the access log.
const (
	outcomeDone        = "done"            // both sides have said that they are done
	outcomeIdle        = "idle"            // nothing happened for too long
	outcomeStopped     = "stopped"         // the process had to end
	outcomeClientReset = "reset by client" // or it vanished
	outcomeServerReset = "reset by server"
	outcomeNoServer    = "not connected" // no address of the destination answered
)

// A relay joins the connection of a client to one to a server.
//
// Each direction is an endpoint's wait for data and then a copy of just that
// data. As long as pieces are short they are read and written: a splice takes
// twice as many calls, and most connections never have more than a question and
// an answer. Longer ones go by io.CopyN between two plain *net.TCPConn, which the
// standard library does with splice(2). A copy until the end of the stream would
// do the same, but hold a pipe for each direction all the time that it waits: two
// descriptors and, for a process without CAP_SYS_RESOURCE, a share of what its
// user may have of pipes before the kernel makes them small (pipe(7),
// pipe-user-pages-soft).
type relay struct {
	client, server *net.TCPConn

	ended              atomic.Int32           // directions, in order
	outcome            atomic.Pointer[string] // the first that was found
	cut                atomic.Bool            // a stream ended before its end
	toServer, toClient int64                  // bytes; of use after run
}

// run relays until both directions have ended, nothing has happened for the
// time idle, if that is not zero, or the context ends. It closes both.
func (r *relay) run(ctx context.Context, idle time.Duration) string {
	defer context.AfterFunc(ctx, func() { r.abort(outcomeStopped) })()
	if idle > 0 {
		w := &watch{relay: r, idle: idle}
		w.begin()
		defer w.end()
	}
	var both sync.WaitGroup
	both.Go(func() { r.toServer = r.direction(r.server, r.client, outcomeServerReset, outcomeClientReset) })
	r.toClient = r.direction(r.client, r.server, outcomeClientReset, outcomeServerReset)
	both.Wait()

	r.say(outcomeDone)
	if r.cut.Load() {
		r.abort(outcomeDone)
	}
	r.close()
	return *r.outcome.Load()
}

func (r *relay) say(outcome string) { r.outcome.CompareAndSwap(nil, &outcome) }

// abort ends both connections by a reset, since one that was not ended by its
// peers must not look as if it were. That also leaves nothing behind in the
// state TIME_WAIT, which would keep a local port (RFC 9293 section 3.6).
func (r *relay) abort(outcome string) {
	r.say(outcome)
	reset(r.client)
	reset(r.server)
}

// close ends both connections in order. It does nothing where that was done.
func (r *relay) close() {
	_ = r.client.Close()
	_ = r.server.Close()
}

func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}

// direction relays one direction to its end and passes that on.
func (r *relay) direction(dst, src *net.TCPConn, dstReset, srcReset string) int64 {
	n, err := forward(dst, src)
	if err == nil && r.ended.Add(1) == 1 {
		// The other direction goes on (RFC 9293 section 3.6, half-close). If it
		// has ended before, closing the connections says the same.
		err = dst.CloseWrite()
	}
	switch {
	case err == nil || errors.Is(err, net.ErrClosed):
	case isClosed(dst):
		// What dst had sent before is still there, and the other direction
		// delivers it before it ends too. After a reset that followed the end
		// of dst's stream (EPIPE, tcp_reset in net/ipv4/tcp_input.c) that is
		// all of it.
		r.say(dstReset)
		if !errors.Is(err, syscall.EPIPE) {
			r.cut.Store(true)
		}
	default:
		r.abort(srcReset)
	}
	return n
}

// shortPiece is what is read and written, in bytes. More at a time is spliced.
const shortPiece = 16 << 10

// pieces are the buffers of short pieces.
var pieces = sync.Pool{New: func() any { return new([shortPiece]byte) }}

// forward copies what src sends to dst, until src has sent all. How long the last
// piece was tells how to copy the next.
func forward(dst, src *net.TCPConn) (int64, error) {
	raw, err := src.SyscallConn()
	if err != nil {
		return 0, err
	}
	p := piece{raw: raw, dst: dst}
	var total int64
	for long := false; ; {
		var n int64
		if long {
			var size int64
			if size, err = awaitData(raw); size > 0 && err == nil {
				n, err = io.CopyN(dst, src, size)
			}
		} else {
			n, err = p.copy()
		}
		total += n
		if n == 0 || err != nil {
			return total, err
		}
		long = n >= shortPiece
	}
}

// A piece copies short pieces from one connection to another.
type piece struct {
	raw syscall.RawConn
	dst *net.TCPConn
	buf *[shortPiece]byte // nil while it waits, for which it may take long
	n   int
	err error
}

// copy waits for data and copies it. It returns 0 at the end of the stream.
func (p *piece) copy() (int64, error) {
	if err := p.raw.Read(p.read); err != nil {
		return 0, err
	}
	defer p.release()
	if p.n <= 0 || p.err != nil {
		return 0, p.err
	}
	n, err := p.dst.Write(p.buf[:p.n])
	return int64(n), err
}

// read reads if there is something to read.
func (p *piece) read(fd uintptr) bool {
	p.buf = pieces.Get().(*[shortPiece]byte)
	n, err := unix.Read(int(fd), p.buf[:])
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), p.buf[:])
	}
	if err == unix.EAGAIN {
		p.release()
		return false
	}
	p.n, p.err = n, err
	return true
}

func (p *piece) release() {
	pieces.Put(p.buf)
	p.buf = nil
}

// awaitData waits for data and returns how many bytes there are to read without
// waiting, none at the end of the stream.
func awaitData(raw syscall.RawConn) (size int64, err error) {
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
		for err == unix.EINTR {
			n, _, err = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
		}
		if err == unix.EAGAIN {
			return false
		}
		if failed = err; err != nil || n == 0 {
			return true
		}
		size = 1
		if queued, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ); err == nil && queued > 1 { // tcp(7)
			size = int64(queued)
		}
		return true
	})
	if err == nil {
		err = failed
	}
	return size, err
}

// stateClose is TCP_CLOSE, the state of a connection that was reset
// (include/net/tcp_states.h).
const stateClose = 7

func isClosed(conn *net.TCPConn) bool {
	info, err := tcpInfo(conn)
	return err != nil || info.State == stateClose
}

func tcpInfo(conn *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		info, failed = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if err == nil {
		err = failed
	}
	return info, err
}
