package tcpproxy

import (
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/splice"
)

// The outcomes of a connection in the access log.
const (
	outcomeDone        = "done"            // both streams have ended
	outcomeIdle        = "idle"            // the idle timeout
	outcomeStopped     = "stopped"         // the end of the process
	outcomeClientReset = "reset by client" // or unreachable
	outcomeServerReset = "reset by server"
	outcomeNoServer    = "not connected" // no address of the destination was reachable
)

// A relay joins the connection of a client to one to a server.
//
// It belongs to the goroutine that searches for the server, and from the moment at
// which the server's socket is in a loop to that loop alone.
type relay struct {
	attempt attempt
	from    netip.AddrPort // the client
	begin   time.Time      // for the access log
	header  []byte         // sent to the server first

	loop           *loop
	id             uint64 // in the loop
	client, server end
	up, down       flow // to the server, to the client

	joined  bool   // the server is connected
	watched bool   // the client is registered with the epoll
	queued  bool   // it is in loop.again
	over    bool   // it has left the loop
	cut     bool   // a stream was cut off
	outcome string // the first cause

	active uint32 // the loop's tick of the last activity
	quiet  bool   // at the last look no data were in flight
	acked  uint64 // bytes that both peers had acknowledged at the last look
}

func newRelay(client int32) *relay {
	r := &relay{client: end{fd: client, prompt: true}}
	r.up.from, r.up.to, r.up.back = &r.client, &r.server, &r.down
	r.down.from, r.down.to, r.down.back = &r.server, &r.client, &r.up
	return r
}

// An end is one of a relay's two sockets and its state according to the loop's
// events, which are edge-triggered (EPOLLET).
type end struct {
	fd       int32
	readable bool // a read may return data
	ended    bool // the peer has ended its stream: a short read is the last
	more     bool // after a short read there may be more
	urgent   bool // there were urgent data, at which a splice stops
	full     bool // its send buffer is full
	watched  bool // it is registered for EPOLLOUT
	written  bool // data were written
	prompt   bool // TCP_NODELAY is set
}

// see applies the events of epoll_ctl(2).
func (e *end) see(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		e.full = false
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		e.readable = true
	}
	// There is no event after the end of the stream or a reset. A read also stops
	// at urgent data (tcp(7)), and the next read continues after them: they are
	// skipped.
	const last = unix.EPOLLRDHUP | unix.EPOLLERR | unix.EPOLLHUP
	if events&(last|unix.EPOLLPRI) != 0 {
		e.more = true
	}
	if events&unix.EPOLLPRI != 0 {
		e.urgent = true
	}
	// EPOLLRDHUP alone is no reset.
	e.ended = events&(last|unix.EPOLLPRI) == unix.EPOLLRDHUP
}

// beforeWrite sets TCP_NODELAY before the second write. The first needs none, since
// Nagle's algorithm delays only data behind unacknowledged data (RFC 9293 section
// 3.7.4), and many connections have no second.
func (e *end) beforeWrite() {
	if e.written && !e.prompt {
		e.prompt = true
		rawOption(e.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	e.written = true
}

// A flow is one direction of a relay.
//
// Short pieces are read and written: a splice needs as many calls and a pipe, and most
// connections have only a request and a response. The length of the last piece decides
// how to move the next.
type flow struct {
	from, to *end
	back     *flow // the other direction

	bytes int64        // delivered
	rest  []byte       // undelivered rest of a short piece
	pipe  *splice.Pipe // undelivered data of a long piece; nil: none
	long  bool         // the last piece was long
	over  bool         // the end of the stream was forwarded, or its receiver is lost
}

// holds reports whether there are undelivered data.
func (f *flow) holds() bool { return len(f.rest) > 0 || f.pipe != nil }

const (
	// shortPiece is the size of the read buffer, in bytes. Longer pieces are spliced.
	shortPiece = 16 << 10
	// turn is the number of bytes after which other relays have their turn.
	turn = 1 << 20
)

// run moves the available data in both directions, and reports whether there is more.
// It may end the relay.
func (r *relay) run() (more bool) {
	more = r.move(&r.up)
	if !r.over {
		more = r.move(&r.down) || more
	}
	// One direction may have ended both.
	if !r.over && r.up.over && r.down.over {
		r.finish()
	}
	return more && !r.over
}

// move moves one direction until it would block, or its turn is over.
func (r *relay) move(f *flow) (more bool) {
	for moved := 0; moved < turn; {
		if f.over {
			return false
		}
		if f.holds() {
			n, waits := r.deliver(f)
			if waits {
				return false
			}
			moved += n
			continue
		}
		if !f.from.readable {
			return false
		}
		if f.long && !f.from.urgent {
			f.pipe = r.loop.pipes.Get()
		}
		if f.pipe != nil {
			r.fill(f)
		} else {
			moved += r.copy(f)
		}
		if r.over {
			return false
		}
	}
	return true
}

// copy moves a short piece.
func (r *relay) copy(f *flow) int {
	buffer := r.loop.buffer[:]
	n, errno := rawRead(f.from.fd, buffer)
	if errno != 0 || n == 0 {
		r.nothing(f, errno)
		return 0
	}
	f.long = n == len(buffer)
	f.to.beforeWrite()
	written, errno := rawWrite(f.to.fd, buffer[:n])
	if errno != 0 {
		written = 0
	}
	f.bytes += int64(written)
	if errno != 0 && errno != unix.EAGAIN {
		r.lose(f, errno)
		return written
	}
	if written < n {
		f.rest = append(f.rest, buffer[written:n]...)
	}
	switch {
	case n == len(buffer):
	case f.from.ended && len(f.rest) == 0:
		r.pass(f)
	case !f.from.more:
		// New data cause an event (epoll(7), question 9).
		f.from.readable = false
	}
	return written
}

// fill moves a long piece into the pipe.
func (r *relay) fill(f *flow) {
	n, errno := f.pipe.Fill(f.from.fd)
	if errno != 0 {
		r.empty(f)
		r.nothing(f, errno)
		return
	}
	f.long = n >= shortPiece
	if n == 0 {
		r.empty(f) // urgent data or the end, which a read distinguishes
	}
}

// deliver writes the undelivered data, and reports whether the receiver is full.
func (r *relay) deliver(f *flow) (n int, waits bool) {
	if f.to.full {
		return 0, true
	}
	f.to.beforeWrite()
	var errno syscall.Errno
	if f.pipe != nil {
		n, errno = f.pipe.Drain(f.to.fd)
	} else {
		n, errno = rawWrite(f.to.fd, f.rest)
	}
	switch {
	case errno == unix.EAGAIN:
		f.to.full = true
		r.loop.watch(r, f.to)
		return 0, true
	case errno != 0:
		r.lose(f, errno)
		return 0, true
	}
	f.bytes += int64(n)
	if f.pipe != nil {
		if f.pipe.Size() == 0 {
			r.empty(f)
		}
	} else if f.rest = f.rest[n:]; len(f.rest) == 0 {
		f.rest = nil
	}
	return n, false
}

// empty returns the pipe to the loop.
func (r *relay) empty(f *flow) {
	if f.pipe != nil {
		r.loop.pipes.Put(f.pipe)
		f.pipe = nil
	}
}

// nothing handles a read without data: none now, the end, or an error.
func (r *relay) nothing(f *flow, errno syscall.Errno) {
	switch errno {
	case unix.EAGAIN:
		f.from.readable = false
	case 0:
		r.pass(f)
	default:
		r.abort(r.resetBy(f.from))
	}
}

// pass forwards the end of a stream. The other direction continues (RFC 9293 section
// 3.6, half-close); if it has ended before, closing the connections has the same
// effect.
func (r *relay) pass(f *flow) {
	f.over = true
	if f.back.over {
		return
	}
	if errno := rawEnd(f.to.fd); errno != 0 {
		r.lose(f, errno)
	}
}

// lose handles the loss of the receiver. The other direction still delivers what the
// receiver sent before, and then ends too. After a reset that followed the end of its
// stream (EPIPE, tcp_reset in net/ipv4/tcp_input.c) nothing is missing.
func (r *relay) lose(f *flow, errno syscall.Errno) {
	f.over, f.rest = true, nil
	r.empty(f)
	r.setOutcome(r.resetBy(f.to))
	if errno != unix.EPIPE {
		r.cut = true
	}
}

// gone handles the reset of an end whose stream has already been forwarded, so that no
// read returns an error: the other direction has no receiver any more.
func (r *relay) gone(e *end) {
	f := &r.up
	if e == &r.client {
		f = &r.down
	}
	if f.over || !f.back.over {
		return
	}
	if code, err := unix.GetsockoptInt(int(e.fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
		r.lose(f, syscall.Errno(code))
		r.finish()
	}
}

func (r *relay) resetBy(e *end) string {
	if e == &r.client {
		return outcomeClientReset
	}
	return outcomeServerReset
}

func (r *relay) setOutcome(outcome string) {
	if r.outcome == "" {
		r.outcome = outcome
	}
}

// finish ends a relay when both directions have ended.
func (r *relay) finish() {
	if r.cut {
		r.abort(outcomeDone)
		return
	}
	r.close(outcomeDone)
}

// close closes both connections in order.
func (r *relay) close(outcome string) { r.leave(outcome, rawClose) }

// abort resets both connections.
func (r *relay) abort(outcome string) { r.leave(outcome, rawReset) }

func (r *relay) leave(outcome string, how func(int32)) {
	r.setOutcome(outcome)
	r.empty(&r.up)
	r.empty(&r.down)
	how(r.client.fd)
	how(r.server.fd)
	r.over = true
	delete(r.loop.relays, r.id)
	r.loop.ended(r)
}
