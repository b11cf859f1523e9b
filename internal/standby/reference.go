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

// connects reports whether the reference takes a connection from the cluster side's address.
// One that refuses it is there, too.
func (r *Runner) connects(ctx context.Context) bool {
	d := net.Dialer{Timeout: referTimeout, LocalAddr: &net.TCPAddr{IP: r.o.Listen.Addr().AsSlice()}}
	c, err := d.DialContext(ctx, "tcp", r.o.Reference)
	if err == nil {
		_ = c.Close()
		return true
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}
