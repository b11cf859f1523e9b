package router

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is the name of an abstract socket (unix(7)). Like the state that it
// guards, it belongs to the network namespace, and the kernel removes it with the
// last process that has it open.
const lockName = "@egress-router"

// lockPatience is the longest wait for another router in the same namespace. A
// run takes well under a second on an idle machine, and several on a busy one.
const lockPatience = time.Minute

// ErrBusy is the error of a lock that another router does not release.
var ErrBusy = errors.New("held by another egress-router")

// queueName is the name of the socket of the router that gets the lock next. The others
// wait for this one: a router that stays and compares all the time would otherwise take the
// lock again before one that waits has looked.
const queueName = lockName + "-next"

// lock serializes the changes of routers in one namespace, and returns the
// function that unlocks it.
//
// Programs that the router starts inherit the socket. A program that outlives a
// killed router keeps the lock until it ends, so that it does not undo the next
// router's changes.
func lock(ctx context.Context) (release func(), err error) {
	until := time.Now().Add(lockPatience)
	next, err := take(ctx, queueName, unix.SOCK_CLOEXEC, until)
	if err != nil {
		return nil, err
	}
	defer next()
	return take(ctx, lockName, 0, until)
}

// take binds a socket to an abstract name, after it has waited until no other has it.
func take(ctx context.Context, name string, flags int, until time.Time) (release func(), err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|flags, 0)
	if err != nil {
		return nil, fmt.Errorf("lock network namespace: %w", os.NewSyscallError("socket", err))
	}
	unlock := func() { _ = unix.Close(fd) }
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	for {
		err := unix.Bind(fd, &unix.SockaddrUnix{Name: name})
		if err == nil {
			return unlock, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock network namespace: %w", os.NewSyscallError("bind", err))
		}
		if time.Now().After(until) {
			return nil, fmt.Errorf("lock network namespace: %w for more than %s", ErrBusy, lockPatience)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
