// Package splice moves data between two sockets without copying them (splice(2)).
//
// A pipe is the buffer in between. Each takes two descriptors and up to 256 pages, of
// which an unprivileged user has a limited number (pipe-user-pages-soft in proc(5)), so
// the proxies hold one only while it contains data.
package splice

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// A Pipe is the buffer of one direction of a connection while it contains data.
type Pipe struct {
	out, in int32
	size    int // bytes in it
}

const (
	// Capacity is the requested capacity of a pipe in bytes, the limit of an
	// unprivileged process (pipe-max-size in proc(5)).
	Capacity = 1 << 20
	// leastCapacity is the default capacity of a pipe. If the user has too many pages
	// in pipes (pipe-user-pages-soft), the request is refused and a new pipe has two
	// pages only, with which copying is faster.
	leastCapacity = 64 << 10
	// mostIdle is the maximum number of idle pipes of a list.
	mostIdle = 16
)

// newPipe returns a pipe, or nil if descriptors, memory or the user's pages are
// exhausted.
func newPipe() *Pipe {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	p := &Pipe{out: int32(fds[0]), in: int32(fds[1])}
	if _, err := unix.FcntlInt(uintptr(p.in), unix.F_SETPIPE_SZ, Capacity); err != nil {
		if n, err := unix.FcntlInt(uintptr(p.in), unix.F_GETPIPE_SZ, 0); err != nil || n < leastCapacity {
			p.close()
			return nil
		}
	}
	return p
}

// Size returns the number of bytes in the pipe.
func (p *Pipe) Size() int { return p.size }

// Fill moves available data of a socket into the empty pipe. It moves none at urgent
// data (tcp(7)) and at the end of the stream, which a read distinguishes.
func (p *Pipe) Fill(socket int32) (int, syscall.Errno) {
	n, errno := move(socket, p.in, Capacity)
	if errno != 0 {
		return 0, errno
	}
	p.size = n
	return n, 0
}

// Drain moves data of the pipe to a socket.
func (p *Pipe) Drain(socket int32) (int, syscall.Errno) {
	n, errno := move(p.out, socket, p.size)
	if errno != 0 {
		return 0, errno
	}
	p.size -= n
	return n, 0
}

// move is splice(2). It bypasses the scheduler, since the descriptors never block.
func move(from, to int32, most int) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(most), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func (p *Pipe) close() {
	_ = unix.Close(int(p.out))
	_ = unix.Close(int(p.in))
}

// A List holds idle pipes. It is not for concurrent use.
type List struct {
	idle  []*Pipe
	least int // the smallest number of idle pipes since the last trim
}

// Get returns an empty pipe, or nil if descriptors, memory or the user's pages are
// exhausted.
func (l *List) Get() *Pipe {
	n := len(l.idle)
	if n == 0 {
		l.least = 0
		return newPipe()
	}
	taken := l.idle[n-1]
	l.idle = l.idle[:n-1]
	l.least = min(l.least, n-1)
	return taken
}

// Put returns a pipe to the list. A pipe that still contains data is closed.
func (l *List) Put(used *Pipe) {
	if used.size > 0 || len(l.idle) == mostIdle {
		used.close()
		return
	}
	l.idle = append(l.idle, used)
}

// Trim closes the pipes that were idle since the last trim, and returns how many remain.
func (l *List) Trim() int {
	for _, spare := range l.idle[:l.least] {
		spare.close()
	}
	l.idle = append(l.idle[:0], l.idle[l.least:]...)
	l.least = len(l.idle)
	return l.least
}

// Close closes all idle pipes.
func (l *List) Close() {
	l.least = len(l.idle)
	l.Trim()
}
