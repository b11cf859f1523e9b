package httpproxy

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// hangups notice that a client closes its connection or its half while it has a request,
// whose data nobody reads then. One instance of epoll(7) for all clients needs no goroutine
// and no system call for each request, unlike a read that waits.
type hangups struct {
	file *os.File
	raw  syscall.RawConn

	mu    sync.Mutex
	last  int32
	conns map[int32]*clientConn // by their numbers
}

// open creates the instance.
func (h *hangups) open() error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // or os.NewFile would not poll it
		_ = unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	h.file, h.conns = os.NewFile(uintptr(fd), "epoll"), map[int32]*clientConn{}
	h.raw, err = h.file.SyscallConn()
	return err
}

// close ends run.
func (h *hangups) close() { _ = h.file.Close() }

// add watches a connection until it is closed.
func (h *hangups) add(c *clientConn) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.last++; h.conns[h.last] != nil || h.last == 0; h.last++ {
	}
	event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLET, Fd: h.last}
	var err error
	add := func(to, fd uintptr) { err = unix.EpollCtl(int(to), unix.EPOLL_CTL_ADD, int(fd), &event) }
	closed := h.raw.Control(func(to uintptr) {
		if closed := c.raw.Control(func(fd uintptr) { add(to, fd) }); closed != nil {
			err = closed
		}
	})
	if err = cmp.Or(closed, err); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	h.conns[h.last], c.number = c, h.last
	return nil
}

// end ends the watch of a connection before it is closed: a tunnel notices by itself, and the
// end of each would wake run.
func (h *hangups) end(c *clientConn) {
	h.remove(c)
	// Errors do not matter: the connection may be closed already.
	_ = h.raw.Control(func(from uintptr) {
		_ = c.raw.Control(func(fd uintptr) { _ = unix.EpollCtl(int(from), unix.EPOLL_CTL_DEL, int(fd), nil) })
	})
}

// remove forgets a connection that is closed, as the kernel does by itself.
func (h *hangups) remove(c *clientConn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns[c.number] == c { // the number may be another one's now, or 0: it was not added
		delete(h.conns, c.number)
	}
}

// run notifies connections until close.
func (h *hangups) run() {
	var events [64]unix.EpollEvent
	for {
		n := 0
		var err error
		closed := h.raw.Read(func(fd uintptr) bool {
			n, err = unix.EpollWait(int(fd), events[:], 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		if closed != nil || err != nil {
			return
		}
		for _, event := range events[:n] {
			if c := h.conn(event.Fd); c != nil {
				c.hungUp()
			}
		}
	}
}

func (h *hangups) conn(number int32) *clientConn {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.conns[number]
}
