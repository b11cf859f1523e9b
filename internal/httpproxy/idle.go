package httpproxy

import (
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// An idleWatch calls a function when a client's connection has been without data in both
// directions for a time during a request. The kernel records the times of the last data
// (struct tcp_info, linux/tcp.h), since io.Copy splices and reports nothing until its end.
// All data of a server pass the client's connection, so watching that one is enough.
//
// The timer continues between two requests: most are over long before it ends.
type idleWatch struct {
	mu    sync.Mutex
	conn  *net.TCPConn
	limit time.Duration
	end   func()      // nil: no request
	timer *time.Timer // nil: the limit is not running
}

// start begins the watch for a request.
func (w *idleWatch) start(conn *net.TCPConn, limit time.Duration, end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conn, w.limit, w.end = conn, limit, end
	if w.timer == nil {
		// The connection cannot be idle before the limit.
		w.timer = time.AfterFunc(limit, w.check)
	}
}

// stop ends the watch for a request. The function is not called after it returns.
func (w *idleWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.end = nil
}

// close stops the timer, which would keep the connection in memory.
func (w *idleWatch) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
	}
}

func (w *idleWatch) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.end == nil {
		w.timer = nil
		return
	}
	quiet, err := quietFor(w.conn)
	if err == nil && quiet < w.limit {
		w.timer.Reset(w.limit - quiet)
		return
	}
	w.timer = nil
	if err == nil { // not closed
		w.end()
	}
}

// quietFor returns the time since the last data on a connection, in either direction.
func quietFor(conn *net.TCPConn) (time.Duration, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	var infoErr error
	if err := raw.Control(func(fd uintptr) { info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil {
		return 0, err
	}
	if infoErr != nil {
		return 0, infoErr
	}
	return time.Duration(min(info.Last_data_recv, info.Last_data_sent)) * time.Millisecond, nil
}
