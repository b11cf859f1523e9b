package tcpproxy

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The interval at which a loop checks its relays: an eighth of the idle timeout, since
// the end of a slow reader's progress need not be known more exactly; and at most a
// second, so that the connect timeout is kept.
const (
	looks     = 8
	leastWait = 10 * time.Millisecond
	mostWait  = time.Second
)

// period is the time between two ticks.
func (l *loop) period() time.Duration {
	if l.idle == 0 {
		return mostWait
	}
	return min(max(l.idle/looks, leastWait), mostWait)
}

// tick checks all relays, and schedules the next tick while there are any. No event
// reads the clock: activity is recorded as the number of the current tick.
func (l *loop) tick() {
	l.mu.Lock()
	l.admit()
	l.ticks++
	stopped := l.stopped
	l.ticking = len(l.relays) > 0 && !stopped
	var next time.Time // never
	if l.ticking {
		next = time.Now().Add(l.period())
	}
	_ = l.file.SetReadDeadline(next)
	l.mu.Unlock()

	for _, r := range l.relays {
		switch {
		case !stopped:
			l.look(r)
		case r.joined:
			r.abort(outcomeStopped)
		default:
			l.fail(r, context.Canceled)
		}
	}
	l.pipes.Trim()
	if len(l.relays) == 0 {
		l.pipes.Trim() // without relays, all
	}
}

// look ends a relay whose timeout is over.
func (l *loop) look(r *relay) {
	silent := l.ticks - r.active
	lasts := func(limit time.Duration) bool {
		// The first of the ticks may have come immediately.
		return time.Duration(silent-1)*l.period() >= limit
	}
	switch {
	case silent == 0:
	case !r.joined:
		if lasts(l.dialTimeout) {
			l.fail(r, os.NewSyscallError("connect", unix.ETIMEDOUT))
		}
	case l.idle == 0:
	case !r.quiet && l.taken(r):
		r.active = l.ticks
	case !lasts(l.idle):
	case r.up.holds() || r.down.holds():
		r.abort(outcomeIdle) // the peer must notice that data are missing
	default:
		// No data are in flight: both connections end in order.
		r.close(outcomeIdle)
	}
}

// taken reports whether a peer has acknowledged data since the last look. There
// is no event for it: a slow reader makes progress without any new data. The numbers
// are the kernel's (struct tcp_info in include/uapi/linux/tcp.h), which include
// neither keepalive probes nor retransmissions.
func (l *loop) taken(r *relay) bool {
	client, err := unix.GetsockoptTCPInfo(int(r.client.fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return false
	}
	server, err := unix.GetsockoptTCPInfo(int(r.server.fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return false
	}
	r.quiet = !pending(client) && !pending(server)
	acked := client.Bytes_acked + server.Bytes_acked
	changed := acked != r.acked
	r.acked = acked
	return changed && !r.quiet
}

// pending reports whether a peer has not acknowledged everything.
func pending(info *unix.TCPInfo) bool { return info.Unacked > 0 || info.Notsent_bytes > 0 }
