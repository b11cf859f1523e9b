// Package poll asks whether a descriptor is ready.
package poll

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Ready reports whether one of the events of poll(2), or an error or the other side's end, is
// there now. It does not wait.
//
// A poll ends with EINTR while a signal is pending, also one that would not wait (do_poll in
// fs/select.c): the Go runtime sends signals to interrupt its threads, and on a busy machine
// they come at any time.
func Ready(fd uintptr, events int16) (bool, error) {
	polled := [1]unix.PollFd{{Fd: int32(fd), Events: events}} //nolint:gosec // a descriptor
	return ready(func() (int, error) { return unix.Poll(polled[:], 0) })
}

func ready(poll func() (int, error)) (bool, error) {
	for {
		n, err := poll()
		if !errors.Is(err, unix.EINTR) {
			return n > 0, os.NewSyscallError("poll", err)
		}
	}
}
