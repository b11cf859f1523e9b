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

	"github.com/egress-router/egress-router/internal/splice"
)

// A loop moves the data of many relays, in one goroutine.
//
// A goroutine for each direction of each connection would be simpler, but would cost a
// short connection 50 % more processor time, to wake up goroutines and threads. A loop
// has an epoll(7) of its own, which the runtime's poller watches like any other
// descriptor: its goroutine waits like any other, no thread is bound to it, and one
// call returns all events.
type loop struct {
	idle        time.Duration       // after which a relay without activity ends; 0: never
	dialTimeout time.Duration       // after which connecting to a server fails
	ended       func(*relay)        // called when a relay has ended
	failed      func(*relay, error) // called when connecting to a server has failed

	epoll  int32
	file   *os.File // the same, for the runtime's poller
	raw    syscall.RawConn
	events [128]unix.EpollEvent
	buffer [shortPiece]byte // buffer of all short pieces
	pipes  splice.List

	relays map[uint64]*relay
	again  []*relay // relays with more data to move without an event
	ticks  uint32   // written with the lock held

	mu       sync.Mutex
	incoming []*relay // relays that are not in the map yet
	last     uint64   // ID of a relay
	ticking  bool
	stopped  bool
}

// watched are the events of every socket, edge-triggered (EPOLLET), so that the
// registration need not change. EPOLLOUT is added when a socket is full.
const watched = unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET

func newLoop() (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// os.NewFile registers only non-blocking descriptors with the poller.
	_ = unix.SetNonblock(epoll, true)
	l := &loop{epoll: int32(epoll), file: os.NewFile(uintptr(epoll), "epoll"), relays: map[uint64]*relay{}}
	// The registration may have failed (fs.epoll.max_user_watches), which shows here.
	if err = l.file.SetReadDeadline(time.Time{}); err == nil {
		l.raw, err = l.file.SyscallConn()
	}
	if err != nil {
		l.close()
		return nil, fmt.Errorf("registering epoll with the runtime poller: %w", err)
	}
	return l, nil
}

// take takes over a relay whose server's socket is being connected. It may be called
// from any goroutine. Unless it returns an error, the relay then belongs to the loop.
func (l *loop) take(r *relay, server int32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return context.Canceled
	}
	l.last++
	r.loop, r.id, r.active = l, l.last, l.ticks
	r.server = end{fd: server, watched: true}
	// Its event may come immediately; the loop then waits for the lock (find).
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

// control registers a socket with the epoll. The key of its events is the relay's ID,
// which is unique, and which of its ends it is.
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

// watch registers a full end for EPOLLOUT. The event comes immediately if the end is
// writable by then.
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
	defer l.pipes.Close()
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
			// If one turn of all relays takes longer than a tick, the deadline is
			// always over, and without this no event would be read.
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
		return // it ended in this turn
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

// admit adds the relays that were taken to the map. The lock is held.
func (l *loop) admit() {
	for i, r := range l.incoming {
		l.relays[r.id], l.incoming[i] = r, nil
	}
	l.incoming = l.incoming[:0]
}

// turn lets a relay move its data.
func (l *loop) turn(r *relay) {
	r.active, r.quiet = l.ticks, false
	if r.run() && !r.queued {
		r.queued = true
		l.again = append(l.again, r)
	}
}

// join starts a relay when its server is connected.
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
	// Most clients have sent their request by now. Reading before the registration
	// saves an event.
	r.client.readable = true
	l.turn(r)
	if r.over {
		return
	}
	if err := l.control(unix.EPOLL_CTL_ADD, r, &r.client); err != nil {
		r.abort(outcomeStopped) // out of memory
		return
	}
	r.watched = true
}

// fail hands back a relay whose server was not reached.
func (l *loop) fail(r *relay, err error) {
	rawReset(r.server.fd)
	delete(l.relays, r.id)
	l.failed(r, err)
}

// stop ends all relays. The loop takes no more.
func (l *loop) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	_ = l.file.SetReadDeadline(time.Unix(1, 0))
}

// close ends a loop without relays.
func (l *loop) close() { _ = l.file.Close() }
