package router

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract socket's (unix(7)): it belongs to the network
// namespace, as what it guards does, and the kernel gives it back when the last
// process that has it ends.
const lockName = "@egress-router"

// lockPatience is how long to wait for another router in the same namespace. A
// run takes well under a second.
const lockPatience = 10 * time.Second

// lock sees to it that routers in one namespace change it one after the other,
// and returns what lets the next one.
//
// The programs that the router starts inherit the socket. One that outlives a
// router that was killed holds the lock until it has ended too, so that it does
// not undo what the next router does.
func lock(ctx context.Context) (release func(), err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return nil, fmt.Errorf("lock network namespace: %w", os.NewSyscallError("socket", err))
	}
	release = func() { _ = unix.Close(fd) }
	defer func() {
		if err != nil {
			release()
		}
	}()
	for begin := time.Now(); ; {
		err := unix.Bind(fd, &unix.SockaddrUnix{Name: lockName})
		if err == nil {
			return release, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock network namespace: %w", os.NewSyscallError("bind", err))
		}
		if time.Since(begin) > lockPatience {
			return nil, fmt.Errorf("lock network namespace: held by another egress-router for more than %s", lockPatience)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
