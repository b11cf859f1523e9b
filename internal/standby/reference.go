package standby

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/election"
)

// The interval of connections to the reference, and the time for one: the machine gives up
// after half a second without a peer and without it.
const (
	referInterval = 150 * time.Millisecond
	referTimeout  = 150 * time.Millisecond
)

// refer tells the machine whether the cluster side works, by a TCP connection to the
// reference while no peer is heard. Without a reference the cluster side counts as working.
func (r *Runner) refer(ctx context.Context) {
	if r.o.Reference == "" {
		return
	}
	ticker := time.NewTicker(referInterval)
	defer ticker.Stop()
	before := true
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		reachable := time.Since(r.peers.last()) < r.o.Settings.Detection()
		if !reachable {
			reachable = r.connects(ctx)
		}
		if reachable != before && ctx.Err() == nil {
			before = reachable
			r.post(election.Event{Kind: election.Reference, OK: reachable})
		}
	}
}

// referAttempts is the number of connections of which one has to succeed within referTimeout, one
// after the other as long as none has. The address of an API server can lead to several, and for a
// while still to one of a lost node.
const referAttempts = 3

// connects reports whether the reference takes a connection from the cluster side's address.
// One that refuses it is there, too.
func (r *Runner) connects(ctx context.Context) bool {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: r.o.Listen.Addr().AsSlice()}}
	return anyConnects(ctx, func(ctx context.Context) bool {
		c, err := d.DialContext(ctx, "tcp", r.o.Reference)
		if err == nil {
			_ = c.Close()
			return true
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// anyConnects reports whether one of several connections succeeds. The next one begins while those
// before have not.
func anyConnects(ctx context.Context, connect func(context.Context) bool) bool {
	ctx, cancel := context.WithTimeout(ctx, referTimeout)
	defer cancel()
	ticker := time.NewTicker(referTimeout / referAttempts)
	defer ticker.Stop()
	results := make(chan bool, referAttempts)
	begin := func() { go func() { results <- connect(ctx) }() }
	begin()
	for begun, failed := 1, 0; failed < referAttempts; {
		select {
		case ok := <-results:
			if ok {
				return true
			}
			failed++
		case <-ticker.C:
			if begun < referAttempts {
				begun++
				begin()
			}
		case <-ctx.Done():
			return false
		}
	}
	return false
}
