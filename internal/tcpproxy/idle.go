package tcpproxy

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// How often a loop looks at its relays: a few times in the time after which one is
// idle, since more would tell more exactly when a slow reader took its last piece,
// which is all that a look can miss; and so that a server that does not answer is
// not waited for much too long.
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

// tick looks at all relays, and has the next look be made while there are any. In
// between nobody reads a clock: what happens is noted with the number of the tick.
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
	l.pipes.trim()
	if len(l.relays) == 0 {
		l.pipes.trim() // nobody needs one
	}
}

// look ends a relay for which it is time.
func (l *loop) look(r *relay) {
	silent := l.ticks - r.active
	lasts := func(limit time.Duration) bool {
		// The first of the ticks may have come at once.
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
		r.abort(outcomeIdle) // what a peer does not take must not be missing without a word
	default:
		// The peers did nothing wrong, and nothing is under way: they are told
		// of the end in order.
		r.close(outcomeIdle)
	}
}

// taken reports whether a peer has taken something since the last look, which is
// no event: nothing need come in while a slow reader takes what there is. It asks
// the kernel (struct tcp_info in include/uapi/linux/tcp.h), which counts neither
// keepalive probes nor repetitions.
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

// pending reports whether a peer has yet to take something.
func pending(info *unix.TCPInfo) bool { return info.Unacked > 0 || info.Notsent_bytes > 0 }
