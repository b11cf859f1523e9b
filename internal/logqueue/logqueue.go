// Package logqueue writes the log of a program that must not wait for its reader.
//
// The log of a container is a pipe of 64 KiB (pipe(7)). If its reader stops reading, a
// write blocks: a program that writes its log where it works stops working. A Writer
// queues the lines of a program that stays, and one goroutine writes them. The queue is
// bounded; lines that it cannot hold are dropped and counted.
//
// The goroutine blocks in write(2). O_NONBLOCK would belong to the open file
// description, which other processes share (open(2)).
package logqueue

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/poll"
)

const (
	// limit is the size of the queue at which lines are dropped, in bytes, and so a
	// bound of their number: some 20,000 lines, those of a second of a busy proxy. One
	// line may exceed it, since a line alone may be larger.
	limit = 4 << 20
	// kept is the capacity of the buffers that an empty queue keeps, in bytes.
	kept = 64 << 10
	// atomic writes to a pipe are not torn by those of other processes: PIPE_BUF, in
	// bytes (pipe(7)).
	atomicSize = 4096
	// stalled is the time without a written line after which Flush gives up, if the log is
	// full: a reader that works empties a pipe within milliseconds.
	stalled = time.Second
	// lingering is the total limit of Flush, for a slow reader.
	lingering = 5 * time.Second
	// starved is the total limit of Flush while the log has room: a busy machine does not
	// let the writing goroutine run, and what waits may be the reason why the program ends.
	starved = 30 * time.Second
	// retry is the pause before a write to a full pipe that another process made
	// non-blocking.
	retry = 10 * time.Millisecond
)

// A Writer writes lines to a log. Each Write has whole lines. Its methods may be called
// from any goroutine.
type Writer struct {
	out    io.Writer
	note   func(io.Writer, uint64)
	queued atomic.Bool // Start was called

	mu      sync.Mutex
	pending []byte
	size    int    // bytes of pending, and of lines taken from it that are not written yet
	writing bool   // something was taken and is being written
	gap     uint64 // lines dropped behind pending
	dropped uint64 // in all
	losing  bool   // lines were dropped, and none was written since
	changed time.Time

	wake, progress chan struct{} // of capacity 1

	// Of the writing goroutine:
	owed uint64 // dropped lines that the log does not mention yet
	torn bool   // the log ends within a line
}

// New returns a Writer that writes directly, for a program that ends by itself: it
// loses no line, however slow the reader is.
func New(out io.Writer) *Writer {
	return &Writer{out: out, wake: make(chan struct{}, 1), progress: make(chan struct{}, 1)}
}

// Start begins to queue lines. note writes a line about a number of dropped lines; it
// is called where they are missing, when the reader is back. Start is called once, and
// the goroutine that it starts ends with the program, since nothing ends its write.
func (w *Writer) Start(note func(out io.Writer, dropped uint64)) {
	w.note = note
	w.queued.Store(true)
	go w.run()
}

// Write writes or queues lines. After Start it returns at once and never fails.
func (w *Writer) Write(lines []byte) (int, error) {
	if !w.queued.Load() {
		return write(w.out, lines)
	}
	w.mu.Lock()
	// Lines behind a gap would be written in front of the note.
	if w.gap > 0 || w.size >= limit {
		w.gap += w.drop(lines)
	} else {
		w.pending = append(w.pending, lines...)
		w.size += len(lines)
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return len(lines), nil
}

// drop counts lines that are lost, and returns their number. The caller has the lock.
func (w *Writer) drop(lines []byte) uint64 {
	n := uint64(bytes.Count(lines, []byte{'\n'})) //nolint:gosec // not negative
	w.dropped += n
	if !w.losing {
		w.losing, w.changed = true, time.Now()
	}
	return n
}

// Dropped returns the number of lines that were dropped, or whose write failed, and
// whether none was written since then. changed is the time when that began or ended.
func (w *Writer) Dropped() (lines uint64, losing bool, changed time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped, w.losing, w.changed
}

// Flush waits until all queued lines are written, as long as a reader reads.
func (w *Writer) Flush() {
	begin := time.Now()
	for !w.empty() {
		waits := false
		select {
		case <-w.progress:
		case <-time.After(stalled):
			waits = true
		}
		took := time.Since(begin)
		if took >= starved || (waits || took >= lingering) && w.full() {
			return
		}
	}
}

// full reports whether the log takes no lines now: poll(2) does not find a pipe writable that
// lacks room for PIPE_BUF bytes. Of a log that is no file it is not known, and assumed.
func (w *Writer) full() bool {
	file, is := w.out.(syscall.Conn)
	if !is {
		return true
	}
	conn, err := file.SyscallConn()
	if err != nil {
		return true
	}
	full := true
	_ = conn.Control(func(fd uintptr) { // fails if it is closed, and nothing can be written
		writable, err := poll.Ready(fd, unix.POLLOUT)
		full = !writable && err == nil
	})
	return full
}

func (w *Writer) empty() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.size == 0 && w.gap == 0 && !w.writing
}

// run writes the queued lines.
func (w *Writer) run() {
	var buffer []byte
	for range w.wake {
		for {
			var gap uint64
			w.mu.Lock()
			buffer, w.pending = w.pending, buffer[:0]
			gap, w.gap = w.gap, 0
			w.writing = len(buffer) > 0 || gap > 0
			idle := !w.writing
			w.mu.Unlock()
			if idle {
				break
			}
			for rest := buffer; len(rest) > 0; {
				n := piece(rest)
				w.put(rest[:n])
				rest = rest[n:]
				w.mu.Lock()
				w.size -= n
				w.mu.Unlock()
				w.step()
			}
			if w.owed += gap; gap > 0 {
				w.settle()
			}
			if cap(buffer) > kept {
				buffer = nil
			}
		}
		w.step()
	}
}

// piece returns the length of the first lines that a pipe takes in one piece, at least
// one line.
func piece(b []byte) int {
	if len(b) <= atomicSize {
		return len(b)
	}
	end := bytes.LastIndexByte(b[:atomicSize], '\n')
	if end < 0 {
		end = bytes.IndexByte(b, '\n')
	}
	if end < 0 {
		return len(b)
	}
	return end + 1
}

// put writes lines, after the note about those that are missing before them.
func (w *Writer) put(lines []byte) {
	n := 0
	if w.settle() {
		var err error
		if n, err = write(w.out, lines); err == nil {
			return
		}
	}
	w.torn = w.torn && n == 0 || n > 0 && lines[n-1] != '\n'
	w.mu.Lock()
	w.owed += w.drop(lines[n:])
	w.mu.Unlock()
}

// settle writes the note about missing lines, if there are any, and reports whether the
// log can be written.
func (w *Writer) settle() bool {
	if w.owed == 0 {
		return true
	}
	var text bytes.Buffer
	if w.torn {
		text.WriteByte('\n')
	}
	w.note(&text, w.owed)
	if _, err := write(w.out, text.Bytes()); err != nil {
		return false
	}
	w.owed, w.torn = 0, false
	w.mu.Lock()
	w.losing, w.changed = w.gap > 0, time.Now()
	w.mu.Unlock()
	return true
}

// step tells Flush of a change.
func (w *Writer) step() {
	select {
	case w.progress <- struct{}{}:
	default:
	}
}

// write writes all of b, also to a pipe that another process made non-blocking.
func write(out io.Writer, b []byte) (n int, err error) {
	for {
		var more int
		more, err = out.Write(b[n:])
		if n += more; !errors.Is(err, syscall.EAGAIN) {
			return n, err
		}
		time.Sleep(retry)
	}
}
