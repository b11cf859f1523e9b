package tcpproxy

import (
	"net/netip"
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
// It belongs to whoever looks for the server, and from the moment at which the
// server's socket is in a loop to that loop alone.
type relay struct {
	attempt attempt
	from    netip.AddrPort // the client
	begin   time.Time      // for the access log
	header  []byte         // what the server is told first

	loop           *loop
	id             uint64 // in the loop
	client, server end
	up, down       flow // to the server, to the client

	joined  bool   // the server is connected
	watched bool   // the loop hears of the client
	queued  bool   // the loop comes back to it without an event
	over    bool   // the loop has let go of it
	cut     bool   // a stream ended before its end
	outcome string // the first that was found

	active uint32 // the loop's tick in which something happened last
	quiet  bool   // at the last look nobody had anything to take
	acked  uint64 // bytes that both peers had acknowledged at the last look
}

func newRelay(client int32) *relay {
	r := &relay{client: end{fd: client, prompt: true}}
	r.up.from, r.up.to, r.up.back = &r.client, &r.server, &r.down
	r.down.from, r.down.to, r.down.back = &r.server, &r.client, &r.up
	return r
}

// An end is one of a relay's two sockets, and what is known of it from the
// loop's events, which tell only of changes (EPOLLET).
type end struct {
	fd       int32
	readable bool // there may be something to read
	ended    bool // the peer has ended its stream: a short read has the last of it
	more     bool // a short read does not tell that there is nothing more
	urgent   bool // there were urgent data, at which a splice comes to a stop
	full     bool // it takes nothing now
	watched  bool // the loop hears when it takes something again
	written  bool // to
	prompt   bool // it sends at once (TCP_NODELAY)
}

// see takes what epoll_ctl(2) has to say.
func (e *end) see(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		e.full = false
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		e.readable = true
	}
	// After the end of the stream, or a reset, there is no other event. A read
	// also stops short of urgent data (tcp(7)), and the next goes on behind them:
	// they are left out.
	const last = unix.EPOLLRDHUP | unix.EPOLLERR | unix.EPOLLHUP
	if events&(last|unix.EPOLLPRI) != 0 {
		e.more = true
	}
	if events&unix.EPOLLPRI != 0 {
		e.urgent = true
	}
	// Alone, it is no reset.
	e.ended = events&(last|unix.EPOLLPRI) == unix.EPOLLRDHUP
}

// beforeWrite makes the second piece of data, and those after it, go out at once:
// the first does so anyway, since nothing is under way that Nagle's algorithm would
// wait for (RFC 9293 section 3.7.4), and many connections have no other.
func (e *end) beforeWrite() {
	if e.written && !e.prompt {
		e.prompt = true
		rawOption(e.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	e.written = true
}

// A flow is one direction of a relay.
//
// As long as pieces are short they are read and written: a splice takes as many
// calls and a pipe besides, and most connections never have more than a question
// and an answer. How long the last piece was tells how to move the next.
type flow struct {
	from, to *end
	back     *flow // the other direction

	bytes int64  // that were delivered
	rest  []byte // of a short piece, which the peer has yet to take
	pipe  *pipe  // the same of a long one; nil: none
	long  bool   // the last piece was
	over  bool   // the end of the stream was passed on, or could not be
}

// holds reports whether there is something that the receiver has yet to take.
func (f *flow) holds() bool { return len(f.rest) > 0 || f.pipe != nil }

const (
	// shortPiece is what is read and written, in bytes. More at a time is spliced.
	shortPiece = 16 << 10
	// turn is after how many bytes others have theirs.
	turn = 1 << 20
)

// run moves what there is to move, in both directions, and reports whether there
// is more. The relay may be over after it.
func (r *relay) run() (more bool) {
	more = r.move(&r.up)
	if !r.over {
		more = r.move(&r.down) || more
	}
	// What one direction found out may be the end of both.
	if !r.over && r.up.over && r.down.over {
		r.finish()
	}
	return more && !r.over
}

// move moves one direction until it would have to wait, or its turn is over.
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
			f.pipe = r.loop.pipes.get()
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
		// What comes now is an event (epoll(7), question 9).
		f.from.readable = false
	}
	return written
}

// fill moves a long piece into the pipe.
func (r *relay) fill(f *flow) {
	n, errno := rawSplice(f.from.fd, f.pipe.in, pipeSize)
	if errno != 0 {
		r.empty(f)
		r.nothing(f, errno)
		return
	}
	f.pipe.size, f.long = n, n >= shortPiece
	if n == 0 {
		r.empty(f) // it may be urgent data and no end, of which a read tells
	}
}

// deliver gives the receiver what it did not take before, and reports whether it
// has to be waited for.
func (r *relay) deliver(f *flow) (n int, waits bool) {
	if f.to.full {
		return 0, true
	}
	f.to.beforeWrite()
	var errno syscall.Errno
	if f.pipe != nil {
		n, errno = rawSplice(f.pipe.out, f.to.fd, f.pipe.size)
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
		if f.pipe.size -= n; f.pipe.size == 0 {
			r.empty(f)
		}
	} else if f.rest = f.rest[n:]; len(f.rest) == 0 {
		f.rest = nil
	}
	return n, false
}

// empty gives the pipe back.
func (r *relay) empty(f *flow) {
	if f.pipe != nil {
		r.loop.pipes.put(f.pipe)
		f.pipe = nil
	}
}

// nothing is told that there was nothing to read: now, or at all.
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

// pass passes the end of a stream on. The other direction goes on (RFC 9293
// section 3.6, half-close); if it has ended before, closing the connections says
// the same.
func (r *relay) pass(f *flow) {
	f.over = true
	if f.back.over {
		return
	}
	if errno := rawEnd(f.to.fd); errno != 0 {
		r.lose(f, errno)
	}
}

// lose is told that the receiver is gone. What it had sent before is still there,
// and the other direction delivers it before it ends too. After a reset that
// followed the end of its stream (EPIPE, tcp_reset in net/ipv4/tcp_input.c) that
// is all of it.
func (r *relay) lose(f *flow, errno syscall.Errno) {
	f.over, f.rest = true, nil
	r.empty(f)
	r.say(r.resetBy(f.to))
	if errno != unix.EPIPE {
		r.cut = true
	}
}

// gone is told that an end was reset. Where all that it sent was passed on, no read
// tells; but there is nobody left to deliver to.
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

func (r *relay) say(outcome string) {
	if r.outcome == "" {
		r.outcome = outcome
	}
}

// finish ends a relay both of whose directions have ended.
func (r *relay) finish() {
	if r.cut {
		r.abort(outcomeDone)
		return
	}
	r.close(outcomeDone)
}

// close ends both connections in order.
func (r *relay) close(outcome string) { r.leave(outcome, rawClose) }

// abort ends both connections by a reset.
func (r *relay) abort(outcome string) { r.leave(outcome, rawReset) }

func (r *relay) leave(outcome string, how func(int32)) {
	r.say(outcome)
	r.empty(&r.up)
	r.empty(&r.down)
	how(r.client.fd)
	how(r.server.fd)
	r.over = true
	delete(r.loop.relays, r.id)
	r.loop.ended(r)
}
