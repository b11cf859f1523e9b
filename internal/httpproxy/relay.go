package httpproxy

import (
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/splice"
)

// pipes are the pipes of all tunnels. A direction has one only while it moves long
// pieces: io.Copy would hold one for the whole tunnel, and its pipes stay open until the
// garbage collector runs twice.
type pipes struct {
	most int // limit of pipes that are in use

	mu    sync.Mutex
	list  splice.List
	used  int
	timer *time.Timer // while there are idle pipes
}

const (
	// mostPipes is the limit of pipes whose capacity an unprivileged user may have
	// (pipe-user-pages-soft in proc(5), 64 MiB).
	mostPipes = 64 << 20 / splice.Capacity
	// trimPause is half the time that idle pipes are kept.
	trimPause = time.Second
)

// get returns a pipe, or nil if there are too many.
func (p *pipes) get() *splice.Pipe {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.used >= p.most {
		return nil
	}
	pipe := p.list.Get()
	if pipe != nil {
		p.used++
	}
	return pipe
}

func (p *pipes) put(pipe *splice.Pipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used--
	p.list.Put(pipe)
	if p.timer == nil {
		p.timer = time.AfterFunc(trimPause, p.trim)
	}
}

func (p *pipes) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = nil
	if p.list.Trim() > 0 || p.used > 0 {
		p.timer = time.AfterFunc(trimPause, p.trim)
	}
}

// relay copies both directions until both have ended. The end of one is forwarded and
// the other continues: a client may close its half and still wait for a response.
func (p *Proxy) relay(c *clientConn, server *net.TCPConn) (received, sent int64) {
	var back sync.WaitGroup
	back.Go(func() { sent = p.pass(c, c.TCPConn, server) })
	received = p.pass(c, server, c.TCPConn)
	back.Wait()
	return received, sent
}

// pass copies one direction of a client's tunnel. After an error it closes both
// connections.
func (p *Proxy) pass(c *clientConn, to, from *net.TCPConn) (moved int64) {
	d := direction{proxy: p}
	defer func() {
		if moved = d.moved; p.panicked(recover(), c) {
			_ = to.Close()
			_ = from.Close()
		}
	}()
	var err error
	if d.from, err = from.SyscallConn(); err == nil {
		d.to, err = to.SyscallConn()
	}
	if err == nil {
		err = d.run()
	}
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		_ = to.Close()
		_ = from.Close()
	}
	return d.moved
}

// A direction moves the data of one direction of a tunnel. While it waits for data it
// holds neither a buffer nor a pipe.
type direction struct {
	proxy    *Proxy
	from, to syscall.RawConn
	moved    int64

	// The current piece is in the pipe or the buffer.
	long   bool // the last piece was long
	pipe   *splice.Pipe
	buffer []byte
	piece  []byte // the unwritten part of buffer
	n      int    // length of the piece
	err    error
}

// longPiece is the size in bytes from which a pipe is used for the next piece: shorter
// ones take fewer system calls by reading and writing.
const longPiece = bufferSize

func (d *direction) run() error {
	defer d.release()
	for {
		if err := d.from.Read(d.fill); err != nil {
			return err
		}
		switch {
		case d.err != nil:
			return d.err
		case d.n == 0 && d.pipe != nil: // the end, or urgent data
			d.release()
			d.long = false
			continue
		case d.n == 0:
			return nil
		}
		d.long = d.n >= longPiece
		if err := d.to.Write(d.drain); err != nil {
			return err
		}
		if d.err != nil {
			return d.err
		}
		if d.pipe == nil || !d.long {
			d.release()
		}
	}
}

// fill reads a piece, and reports whether it need not wait.
func (d *direction) fill(fd uintptr) bool {
	if d.long && d.pipe == nil {
		d.pipe = d.proxy.pipes.get()
	}
	if d.pipe != nil {
		var errno syscall.Errno
		if d.n, errno = d.pipe.Fill(int32(fd)); errno == unix.EAGAIN {
			d.release()
			return false
		}
		d.fail("splice", errno)
		return true
	}
	d.buffer = d.proxy.buffers.Get()
	for {
		n, err := unix.Read(int(fd), d.buffer)
		switch err {
		case nil:
			d.n, d.piece = n, d.buffer[:n]
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			d.release()
			return false
		default:
			d.err = os.NewSyscallError("read", err)
		}
		return true
	}
}

// drain writes the piece, and reports whether it need not wait.
func (d *direction) drain(fd uintptr) bool {
	for {
		if d.pipe != nil {
			n, errno := d.pipe.Drain(int32(fd))
			if errno == unix.EAGAIN {
				return false
			}
			d.moved += int64(n)
			d.fail("splice", errno)
			if errno != 0 || d.pipe.Size() == 0 {
				return true
			}
			continue
		}
		n, err := unix.Write(int(fd), d.piece)
		switch err {
		case nil:
			d.moved += int64(n)
			if d.piece = d.piece[n:]; len(d.piece) == 0 {
				return true
			}
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			d.err = os.NewSyscallError("write", err)
			return true
		}
	}
}

func (d *direction) fail(call string, errno syscall.Errno) {
	if errno != 0 {
		d.err = os.NewSyscallError(call, errno)
	}
}

// release returns the pipe and the buffer.
func (d *direction) release() {
	if d.pipe != nil {
		d.proxy.pipes.put(d.pipe)
		d.pipe = nil
	}
	if d.buffer != nil {
		d.proxy.buffers.Put(d.buffer[:bufferSize])
		d.buffer = nil
	}
}
