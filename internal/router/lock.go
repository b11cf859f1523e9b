package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// lockName is an abstract socket's (unix(7)): it belongs to the network
// namespace, as what it guards does, and the kernel gives it back when the
// process ends.
const lockName = "@egress-router"

// lockPatience is how long to wait for another router in the same namespace. A
// run takes well under a second.
const lockPatience = 10 * time.Second

// lock sees to it that routers in one namespace change it one after the other,
// and returns what lets the next one.
func lock(ctx context.Context) (release func(), err error) {
	for begin := time.Now(); ; {
		socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: lockName, Net: "unixgram"})
		if err == nil {
			return func() { _ = socket.Close() }, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("locking the network namespace: %w", err)
		}
		if time.Since(begin) > lockPatience {
			return nil, fmt.Errorf("waiting for another egress-router that configures this network namespace: not done after %s", lockPatience)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
