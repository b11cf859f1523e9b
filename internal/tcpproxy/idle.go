package tcpproxy

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A watch ends a relay on which nothing happens.
//
// It asks the kernel now and then: what goes through splice(2) is not seen by
// the process, and deadlines would have to be set again for each piece of data.
type watch struct {
	relay *relay
	idle  time.Duration

	mu     sync.Mutex
	timer  *time.Timer // nil when ended
	active time.Time   // when something happened last, as far as is known
	acked  uint64      // bytes that both peers had acknowledged at the last look
}

// looks is how often a watch looks in the time after which a relay is idle. More
// would tell more exactly when a slow reader took its last piece, which is all
// that a look can miss.
const looks = 8

// leastWait keeps rounding, of the kernel's times to milliseconds, from becoming
// a busy loop.
const leastWait = 10 * time.Millisecond

func (w *watch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.active = time.Now()
	w.timer = time.AfterFunc(w.idle/looks, w.look)
}

func (w *watch) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer.Stop()
	w.timer = nil
}

func (w *watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil {
		return
	}
	client, err := tcpInfo(w.relay.client)
	if err != nil {
		return // closed: the relay ends by itself
	}
	server, err := tcpInfo(w.relay.server)
	if err != nil {
		return
	}
	// struct tcp_info (include/uapi/linux/tcp.h). Keepalive probes and
	// repetitions are in neither count.
	now := time.Now()
	received := now.Add(-time.Duration(min(client.Last_data_recv, server.Last_data_recv)) * time.Millisecond)
	if received.After(w.active) {
		w.active = received
	}
	acked := client.Bytes_acked + server.Bytes_acked
	if (pending(client) || pending(server)) && acked != w.acked {
		w.active = now // nothing need come in while a slow reader takes what there is
	}
	w.acked = acked
	if left := w.idle - now.Sub(w.active); left > 0 {
		w.timer.Reset(max(min(left, w.idle/looks), leastWait))
		return
	}
	// The peers did nothing wrong, and nothing is under way: they are told of
	// the end in order.
	w.relay.say(outcomeIdle)
	w.relay.close()
}

// pending reports whether a peer has yet to take something.
func pending(info *unix.TCPInfo) bool { return info.Unacked > 0 || info.Notsent_bytes > 0 }
