package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A loop moves the data of many relays, in one goroutine.
//
// A goroutine for each direction of each connection would be simpler, but takes a
// short connection half as much processor time again, for waking up goroutines and
// threads for them. A loop has an epoll(7) of its own, which the runtime's poller
// watches like any other descriptor: its goroutine waits as all others do, no
// thread is bound to it, and one call tells of all that has happened.
type loop struct {
	idle        time.Duration       // after which a relay without data ends; 0: never
	dialTimeout time.Duration       // after which connecting to a server fails
	ended       func(*relay)        // is told of a relay that is over
	failed      func(*relay, error) // is given back a relay whose server was not reached

	epoll  int32
	file   *os.File // the same, for the runtime's poller
	raw    syscall.RawConn
	events [128]unix.EpollEvent
	buffer [shortPiece]byte // of all short pieces
	pipes  pipeList

	relays map[uint64]*relay
	again  []*relay // that have more to do, of which no event tells
	ticks  uint32   // written with the lock held

	mu       sync.Mutex
	incoming []*relay // that are not in relays yet
	last     uint64   // number of a relay
	ticking  bool
	stopped  bool
}

// watched is what the loop hears of every socket: whenever it comes to be
// (EPOLLET), so that nothing need be said in between. That a socket can be written
// to is added where that matters.
const watched = unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET

func newLoop() (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// It never blocks, but os.NewFile has only those watched that say so.
	_ = unix.SetNonblock(epoll, true)
	l := &loop{epoll: int32(epoll), file: os.NewFile(uintptr(epoll), "epoll"), relays: map[uint64]*relay{}}
	// The runtime may have nothing left to watch it with, which it tells here only.
	if err = l.file.SetReadDeadline(time.Time{}); err == nil {
		l.raw, err = l.file.SyscallConn()
	}
	if err != nil {
		l.close()
		return nil, fmt.Errorf("registering epoll with the runtime poller: %w", err)
	}
	return l, nil
}

// take takes over a relay whose server's socket is being connected. Any goroutine
// may call it, and has no more to do with the relay if there is no error.
func (l *loop) take(r *relay, server int32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return context.Canceled
	}
	l.last++
	r.loop, r.id, r.active = l, l.last, l.ticks
	r.server = end{fd: server, watched: true}
	// It can be connected at once; the loop then waits for the lock (find).
	if err := l.control(unix.EPOLL_CTL_ADD, r, &r.server); err != nil {
		return err
	}
	if !l.ticking {
		if err := l.file.SetReadDeadline(time.Now().Add(l.period())); err != nil {
			return err
		}
		l.ticking = true
	}
	l.incoming = append(l.incoming, r)
	return nil
}

// control tells the epoll of a socket. What comes with an event is the number of
// the relay, none of which is given twice, and which of its ends it is.
func (l *loop) control(how int, r *relay, e *end) error {
	key := r.id << 1
	if e == &r.server {
		key |= 1
	}
	event := unix.EpollEvent{Events: watched, Fd: int32(uint32(key)), Pad: int32(uint32(key >> 32))}
	if e.watched {
		event.Events |= unix.EPOLLOUT
	}
	if errno := rawControl(l.epoll, how, e.fd, &event); errno != 0 {
		return os.NewSyscallError("epoll_ctl", errno)
	}
	return nil
}

// watch makes the loop hear when an end that is full takes something again, which
// it may do already.
func (l *loop) watch(r *relay, e *end) {
	if !e.watched {
		e.watched = true
		if r.watched {
			_ = l.control(unix.EPOLL_CTL_MOD, r, e)
		}
	}
}

// run runs the loop until it is closed.
func (l *loop) run() {
	defer l.pipes.close()
	var n int
	poll := func(uintptr) bool {
		var errno syscall.Errno
		if n, errno = rawPoll(l.epoll, l.events[:]); errno != 0 {
			n = 0
		}
		return n > 0 || len(l.again) > 0
	}
	var more []*relay
	for {
		n = 0
		switch err := l.raw.Read(poll); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			l.tick()
			// Where a turn of all takes as long as a tick lasts, this would
			// otherwise come each time instead of what has happened.
			_ = l.raw.Control(func(fd uintptr) { poll(fd) })
		case err != nil:
			return
		}
		more, l.again = l.again, more[:0]
		for i := range l.events[:n] {
			l.handle(&l.events[i])
		}
		for i, r := range more {
			more[i], r.queued = nil, false
			if !r.over {
				l.turn(r)
			}
		}
	}
}

func (l *loop) handle(event *unix.EpollEvent) {
	key := uint64(uint32(event.Fd)) | uint64(uint32(event.Pad))<<32
	r := l.find(key >> 1)
	if r == nil {
		return // it ended in this very turn
	}
	e := &r.client
	if key&1 == 1 {
		e = &r.server
	}
	e.see(event.Events)
	if !r.joined {
		l.join(r, event.Events)
		return
	}
	l.turn(r)
	if !r.over && event.Events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		r.gone(e)
	}
}

func (l *loop) find(id uint64) *relay {
	if r := l.relays[id]; r != nil {
		return r
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admit()
	return l.relays[id]
}

// admit lets in the relays that were taken. The lock is held.
func (l *loop) admit() {
	for i, r := range l.incoming {
		l.relays[r.id], l.incoming[i] = r, nil
	}
	l.incoming = l.incoming[:0]
}

// turn lets a relay do what it can.
func (l *loop) turn(r *relay) {
	r.active, r.quiet = l.ticks, false
	if r.run() && !r.queued {
		r.queued = true
		l.again = append(l.again, r)
	}
}

// join begins a relay when its server is connected.
func (l *loop) join(r *relay, events uint32) {
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		code, err := unix.GetsockoptInt(int(r.server.fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err == nil && code != 0:
			err = syscall.Errno(code)
		case err == nil:
			err = unix.ECONNRESET
		}
		l.fail(r, os.NewSyscallError("connect", err))
		return
	}
	if events&unix.EPOLLOUT == 0 {
		return
	}
	if len(r.header) > 0 {
		r.server.beforeWrite()
		if n, errno := rawWrite(r.server.fd, r.header); errno != 0 {
			l.fail(r, os.NewSyscallError("write", errno))
			return
		} else if n < len(r.header) {
			l.fail(r, io.ErrShortWrite)
			return
		}
	}
	r.attempt.succeeds()
	r.joined, r.header = true, nil
	// The client has mostly asked by now. It is read before it is watched, which
	// saves an event.
	r.client.readable = true
	l.turn(r)
	if r.over {
		return
	}
	if err := l.control(unix.EPOLL_CTL_ADD, r, &r.client); err != nil {
		r.abort(outcomeStopped) // there is no memory for it
		return
	}
	r.watched = true
}

// fail gives a relay back whose server was not reached.
func (l *loop) fail(r *relay, err error) {
	rawReset(r.server.fd)
	delete(l.relays, r.id)
	l.failed(r, err)
}

// stop ends all relays, and takes no more.
func (l *loop) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	_ = l.file.SetReadDeadline(time.Unix(1, 0))
}

// close ends a loop that has no relays any more.
func (l *loop) close() { _ = l.file.Close() }
