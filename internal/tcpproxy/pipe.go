package tcpproxy

import "golang.org/x/sys/unix"

// A pipe is the buffer between two sockets for splice(2), which does not copy the
// data. It belongs to one direction of a relay while it contains data, and otherwise to
// the loop.
type pipe struct {
	out, in int32
	size    int // bytes in it
}

const (
	// pipeSize is the requested capacity of a pipe in bytes, the limit of an
	// unprivileged process (pipe-max-size in proc(5)). If the request is refused
	// (pipe-user-pages-soft), the pipe works with less.
	pipeSize = 1 << 20
	// mostPipes is the maximum number of idle pipes of a loop.
	mostPipes = 16
)

// newPipe returns a pipe, or nil if descriptors or memory are exhausted.
func newPipe() *pipe {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{out: int32(fds[0]), in: int32(fds[1])}
}

func (p *pipe) close() {
	rawClose(p.out)
	rawClose(p.in)
}

// A pipeList holds the idle pipes of a loop.
type pipeList struct {
	idle  []*pipe
	least int // the smallest number of idle pipes since the last trim
}

func (p *pipeList) get() *pipe {
	n := len(p.idle)
	if n == 0 {
		p.least = 0
		return newPipe()
	}
	taken := p.idle[n-1]
	p.idle = p.idle[:n-1]
	p.least = min(p.least, n-1)
	return taken
}

// put returns a pipe to the list. A pipe that still contains data is closed.
func (p *pipeList) put(used *pipe) {
	if used.size > 0 || len(p.idle) == mostPipes {
		used.close()
		return
	}
	p.idle = append(p.idle, used)
}

// trim closes the pipes that were idle since the last trim.
func (p *pipeList) trim() {
	for _, spare := range p.idle[:p.least] {
		spare.close()
	}
	p.idle = append(p.idle[:0], p.idle[p.least:]...)
	p.least = len(p.idle)
}

// close closes all idle pipes.
func (p *pipeList) close() {
	p.least = len(p.idle)
	p.trim()
}
