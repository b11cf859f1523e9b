package poll

import (
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// A signal does not make a descriptor ready, and hides none that is.
func TestSignals(t *testing.T) {
	t.Parallel()
	silent, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = silent.Close(), other.Close() })
	readable, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = readable.Close(), writer.Close() })
	if _, err := writer.Write([]byte("data")); err != nil {
		t.Fatal(err)
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, thread := os.Getpid(), unix.Gettid()
	var done atomic.Bool
	defer done.Store(true)
	ended := make(chan error, 1)
	go func() {
		for !done.Load() {
			if err := unix.Tgkill(pid, thread, unix.SIGURG); err != nil {
				ended <- err
				return
			}
		}
		ended <- nil
	}()

	for range 20_000 {
		if ready, err := Ready(silent.Fd(), unix.POLLIN); ready || err != nil {
			t.Fatalf("ready %v, %v, of a pipe without data", ready, err)
		}
		if ready, err := Ready(readable.Fd(), unix.POLLIN); !ready || err != nil {
			t.Fatalf("ready %v, %v, of a pipe with data", ready, err)
		}
	}
	done.Store(true)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// A poll that a signal ended is asked again; the number of descriptors that it returns then
// is -1, which is not "one is ready".
func TestInterrupted(t *testing.T) {
	t.Parallel()
	for _, want := range []bool{false, true} {
		calls := 0
		got, err := ready(func() (int, error) {
			if calls++; calls < 4 {
				return -1, unix.EINTR
			}
			if want {
				return 1, nil
			}
			return 0, nil
		})
		if got != want || err != nil || calls != 4 {
			t.Errorf("ready %v, %v after %d calls, want %v after 4", got, err, calls, want)
		}
	}
	if got, err := ready(func() (int, error) { return -1, unix.EINVAL }); got || !errors.Is(err, unix.EINVAL) {
		t.Errorf("ready %v, %v, want the error of the call", got, err)
	}
}

// The end of the other side is an event, as poll(2) has it, and a descriptor that is none is
// no error of the call.
func TestEnd(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	_ = w.Close()
	if ready, err := Ready(r.Fd(), 0); !ready || err != nil {
		t.Errorf("ready %v, %v, want the end", ready, err)
	}
}
