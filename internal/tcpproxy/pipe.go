package tcpproxy

import "golang.org/x/sys/unix"

// A pipe is what data passes on its way from one socket to another without being
// copied (splice(2)). It belongs to one direction of a relay for as long as there
// is something in it, and else to the loop.
type pipe struct {
	out, in int32
	size    int // bytes that are in it
}

const (
	// pipeSize is how much a pipe is asked to hold, which is what a process may
	// ask for without privilege (pipe-max-size in proc(5)). One that may not have
	// it holds less (pipe-user-pages-soft), and works.
	pipeSize = 1 << 20
	// mostPipes is how many a loop keeps for the next use.
	mostPipes = 16
)

// newPipe makes a pipe, or returns nil if there is nothing to make it of:
// descriptors or memory.
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

// A pipeList is the pipes of a loop that nobody uses.
type pipeList struct {
	idle  []*pipe
	least int // that were idle at once since the last trim
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

// put takes a pipe back. One in which something is left is of no more use.
func (p *pipeList) put(used *pipe) {
	if used.size > 0 || len(p.idle) == mostPipes {
		used.close()
		return
	}
	p.idle = append(p.idle, used)
}

// trim closes those that were not needed since the last time.
func (p *pipeList) trim() {
	for _, spare := range p.idle[:p.least] {
		spare.close()
	}
	p.idle = append(p.idle[:0], p.idle[p.least:]...)
	p.least = len(p.idle)
}

// close closes all.
func (p *pipeList) close() {
	p.least = len(p.idle)
	p.trim()
}
