package logqueue

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// note writes the note of dropped lines in the tests.
func note(out io.Writer, lines uint64) { fmt.Fprintf(out, "dropped %d\n", lines) }

// A gate is a log. Its reader stops while its channel is empty. Writes fail with err, if
// that is set.
type gate struct {
	reads chan struct{} // of capacity 1; synctest does not see who waits for a mutex
	text  bytes.Buffer
	err   error
	part  int // bytes that are written before the error
}

func newGate() *gate {
	g := &gate{reads: make(chan struct{}, 1)}
	g.reads <- struct{}{}
	return g
}

func (g *gate) Write(b []byte) (int, error) {
	<-g.reads
	defer func() { g.reads <- struct{}{} }()
	if g.err != nil {
		b = b[:min(g.part, len(b))]
	}
	g.text.Write(b)
	return len(b), g.err
}

// end ends the goroutine of a Writer that nobody uses any more.
func (w *Writer) end() { close(w.wake) }

// While nothing reads, no write waits, the memory is bounded and further lines are
// dropped. A reader that comes back gets the lines before, then their number, then the
// lines after.
func TestReaderStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newGate()
		w := New(log)
		w.Start(note)
		defer w.end()
		<-log.reads // the reader stops
		text := strings.Repeat("x", 99)
		const lines = 3 * limit / 100
		for i := range lines {
			if n, err := fmt.Fprintf(w, "%06d %s\n", i, text); n != 107 || err != nil {
				t.Fatal(n, err)
			}
			if i == 0 {
				synctest.Wait() // it is being written
			}
		}
		if n := cap(w.pending); n > 2*limit {
			t.Errorf("the queue has %d bytes, want at most %d", n, 2*limit)
		}
		dropped, losing, since := w.Dropped()
		if dropped < lines/2 || dropped >= lines || !losing || !since.Equal(time.Now()) {
			t.Errorf("%d of %d lines dropped, %v since %v", dropped, lines, losing, since)
		}
		time.Sleep(time.Minute)
		log.reads <- struct{}{}
		w.Flush()
		if again, losing, since := w.Dropped(); again != dropped || losing || !since.Equal(time.Now()) {
			t.Errorf("later %d lines dropped, %v since %v", again, losing, since)
		}
		fmt.Fprintln(w, "after")
		w.Flush()
		got := strings.Split(strings.TrimSuffix(log.text.String(), "\n"), "\n")
		for i, line := range got[:len(got)-2] {
			if line != fmt.Sprintf("%06d %s", i, text) {
				t.Fatalf("line %d: %q", i, line)
			}
		}
		if n := len(got) - 2; n != lines-int(dropped) || got[n] != fmt.Sprintf("dropped %d", dropped) || got[n+1] != "after" {
			t.Errorf("%d lines, then %q; %d were dropped", n, got[n:], dropped)
		}
		if cap(w.pending) > kept {
			t.Errorf("an empty queue keeps %d bytes", cap(w.pending))
		}
	})
}

// Lines whose write fails are dropped; the next that succeeds comes behind their
// number, and on a line of its own.
func TestWriteFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newGate()
		w := New(log)
		w.Start(note)
		defer w.end()
		for _, step := range []struct {
			err  error
			part int
			line string
		}{
			{nil, 0, "1\n"}, {syscall.EPIPE, 0, "2\n"}, {syscall.ENOSPC, 0, "3\n4\n"}, {nil, 0, "5\n"},
			{syscall.ENOSPC, 3, "6\n7\n"}, {syscall.ENOSPC, 0, "8\n"}, {nil, 0, "9\n"},
		} {
			log.err, log.part = step.err, step.part
			if _, err := io.WriteString(w, step.line); err != nil {
				t.Error(err)
			}
			w.Flush()
		}
		if got, want := log.text.String(), "1\ndropped 3\n5\n6\n7\ndropped 2\n9\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if n, losing, _ := w.Dropped(); n != 5 || losing {
			t.Errorf("%d lines dropped, %v", n, losing)
		}
	})
}

// Flush waits as long as the reader reads, and not for one that does not.
func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := io.Pipe()
		w := New(to)
		w.Start(note)
		begin := time.Now()
		w.Flush() // nothing to write
		line := strings.Repeat("x", atomicSize-1) + "\n"
		for range 8 {
			_, _ = io.WriteString(w, line)
		}
		go func() {
			b := make([]byte, atomicSize)
			for range 8 {
				time.Sleep(stalled / 2)
				_, _ = io.ReadFull(from, b)
			}
		}()
		w.Flush()
		if took := time.Since(begin); !w.empty() || took != 4*stalled {
			t.Errorf("after %s: empty %v", took, w.empty())
		}
		_, _ = io.WriteString(w, line)
		begin = time.Now()
		w.Flush()
		if took := time.Since(begin); took != stalled {
			t.Errorf("without a reader it took %s, want %s", took, stalled)
		}
		_ = from.Close() // ends the write
		w.end()
	})
}

// A starvedPipe is a pipe whose writes begin late, as if the machine did not let their thread run.
type starvedPipe struct {
	*os.File
	runs chan struct{}
}

func (s starvedPipe) Write(b []byte) (int, error) {
	<-s.runs
	return s.File.Write(b)
}

// Flush waits for a goroutine that does not get to write while the log has room, and not for one whose
// log is full.
func TestFlushOfBusyMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		defer to.Close()
		p := starvedPipe{to, make(chan struct{})}
		w := New(p)
		w.Start(note)
		flush := func(late time.Duration, before func()) time.Duration {
			_, _ = io.WriteString(w, "the reason\n")
			begin := time.Now()
			go func() {
				time.Sleep(late)
				before()
				p.runs <- struct{}{}
			}()
			w.Flush()
			took := time.Since(begin)
			time.Sleep(late) // the write has begun
			synctest.Wait()
			return took
		}
		if took := flush(10*stalled, func() {}); took != 10*stalled {
			t.Errorf("with a late write it took %s, want %s", took, 10*stalled)
		}
		if took := flush(2*starved, func() {}); took != starved {
			t.Errorf("with a write that is later it took %s, want %s", took, starved)
		}
		fill(t, to)
		if took := flush(10*stalled, func() { _ = from.Close() }); took != stalled {
			t.Errorf("with a full log it took %s, want %s", took, stalled)
		}
		w.end()
	})
}

// fill writes to a pipe until it is full.
func fill(t *testing.T, to *os.File) {
	t.Helper()
	conn, err := to.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Control(func(fd uintptr) {
		for err == nil {
			_, err = unix.Write(int(fd), make([]byte, atomicSize))
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// A program that ends by itself waits for the reader of its log.
func TestDirect(t *testing.T) {
	from, to := io.Pipe()
	w := New(to)
	go func() {
		for i := range 10000 {
			fmt.Fprintf(w, "%d\n", i)
		}
		_ = to.Close()
	}()
	lines := bufio.NewScanner(from)
	for i := range 10000 {
		if !lines.Scan() || lines.Text() != fmt.Sprint(i) {
			t.Fatalf("line %d: %q", i, lines.Text())
		}
	}
	if n, losing, _ := w.Dropped(); n != 0 || losing {
		t.Errorf("%d lines dropped", n)
	}
	w.Flush()
}

// A full pipe that another process made non-blocking loses no line, and stays as it is
// for the others.
func TestNonblockingPipe(t *testing.T) {
	for name, start := range map[string]func(*Writer){"direct": func(*Writer) {}, "queued": func(w *Writer) { w.Start(note) }} {
		t.Run(name, func(t *testing.T) {
			from, to, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer from.Close()
			// A duplicate, made before the flag is set: Go does not wait for it.
			fd, err := unix.Dup(int(to.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			out := os.NewFile(uintptr(fd), "log")
			defer out.Close() // keeps it: the collector closes a file without references
			_ = to.Close()
			if err := unix.SetNonblock(fd, true); err != nil {
				t.Fatal(err)
			}
			w := New(out)
			start(w)
			const lines = 2000 // of 100 bytes, three times what a pipe takes
			go func() {
				for i := range lines {
					fmt.Fprintf(w, "%099d\n", i)
				}
				w.Flush()
			}()
			read := bufio.NewScanner(from)
			for i := range lines {
				if !read.Scan() || read.Text() != fmt.Sprintf("%099d", i) {
					t.Fatalf("line %d: %q", i, read.Text())
				}
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("flags %#x, %v", flags, err)
			}
		})
	}
}

// Lines of concurrent writers stay whole and in order, and each is written or counted
// in a note, while the reader stops and continues.
func TestConcurrentWriters(t *testing.T) {
	from, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	w := New(to)
	w.Start(note)
	const writers, each = 8, 10000
	var writing sync.WaitGroup
	for id := range writers {
		writing.Go(func() {
			for i := range each {
				fmt.Fprintf(w, "%d %d %060d\n", id, i, 0)
			}
		})
	}
	go func() {
		writing.Wait() // without a reader: it fills the pipe and the queue
		fmt.Fprintln(w, "end")
		for !w.empty() {
			time.Sleep(time.Millisecond)
		}
		_ = to.Close()
	}()
	writing.Wait()
	var next [writers]int
	var read, noted, lines int
	for scan := bufio.NewScanner(from); scan.Scan(); lines++ {
		var id, i, zero int
		if n, _ := fmt.Sscanf(scan.Text(), "dropped %d", &i); n == 1 {
			noted += i
		} else if n, err := fmt.Sscanf(scan.Text(), "%d %d %d", &id, &i, &zero); n == 3 && len(scan.Text()) >= 64 {
			if i < next[id] {
				t.Errorf("line %d of writer %d after %d", i, id, next[id])
			}
			next[id] = i + 1
			read++
		} else if scan.Text() != "end" {
			t.Fatalf("%q: %v", scan.Text(), err)
		}
	}
	if dropped, _, _ := w.Dropped(); read+noted < writers*each || read+noted > writers*each+1 || uint64(noted) != dropped {
		t.Errorf("%d of %d lines written, %d noted, %d dropped", read, writers*each, noted, dropped)
	}
	w.end()
}

func TestPiece(t *testing.T) {
	long := strings.Repeat("x", 2*atomicSize)
	for _, test := range []struct {
		text string
		want int
	}{
		{"", 0}, {"a\n", 2}, {"a\nb\n", 4}, {"unfinished", 10},
		{strings.Repeat("x", atomicSize-1) + "\n", atomicSize},
		{strings.Repeat("x", atomicSize-2) + "\nb\n", atomicSize - 1},
		{long + "\nb\n", 2*atomicSize + 1}, {"a\n" + long + "\n", 2}, {long, 2 * atomicSize},
	} {
		if got := piece([]byte(test.text)); got != test.want {
			t.Errorf("%d bytes: %d, want %d", len(test.text), got, test.want)
		}
	}
}

// The cost of an access log line in 16 goroutines, written to a pipe that is read.
func BenchmarkWrite(b *testing.B) {
	for _, name := range []string{"direct", "queued"} {
		b.Run(name, func(b *testing.B) {
			from, to, err := os.Pipe()
			if err != nil {
				b.Fatal(err)
			}
			read := make(chan int64)
			go func() {
				n, _ := io.Copy(io.Discard, from)
				read <- n
			}()
			w := New(to)
			if name == "queued" {
				w.Start(note)
			}
			log := slog.New(slog.NewTextHandler(w, nil))
			b.SetParallelism(8)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					log.Info("access", "client", "10.128.0.5:40000", "method", "GET", "destination", "www.example.com:80", "status", 200, "received", 1024)
				}
			})
			w.Flush()
			_ = to.Close()
			if <-read == 0 {
				b.Error(errors.New("no line arrived"))
			}
			n, _, _ := w.Dropped()
			b.ReportMetric(float64(n)/float64(b.N), "dropped/op")
		})
	}
}
