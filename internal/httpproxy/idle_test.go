package httpproxy

import (
	"net"
	"testing"
	"time"
)

// The limit holds for each request of a connection, also if the timer of the one before
// still runs, or has ended between the two.
func TestIdleWatch(t *testing.T) {
	conn := dialAt(t, serve(t, func(conn *net.TCPConn) { _, _ = conn.Read(make([]byte, 1)) }))
	running := func(w *idleWatch) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.timer != nil
	}
	for _, between := range []bool{false, true} {
		var w idleWatch
		w.start(conn, 50*time.Millisecond, func() {})
		w.stop()
		if between && !await(func() bool { return !running(&w) }) {
			t.Fatal("the timer does not end")
		}
		for range 2 {
			ended := make(chan struct{})
			w.start(conn, 50*time.Millisecond, func() { close(ended) })
			select {
			case <-ended:
			case <-time.After(patience):
				t.Fatalf("the timer ended between: %v; the second request does not end", between)
			}
			w.stop()
		}
	}
}

// A connection that has ended is not kept in memory for its timer.
func TestIdleWatchEnds(t *testing.T) {
	var w idleWatch
	w.start(nil, patience, nil)
	w.stop()
	w.close()
	if w.timer.Stop() {
		t.Error("the timer runs")
	}
}
