package httpproxy

import (
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// An idleWatch calls a function when a connection has been without data in both
// directions for a time. The kernel records the times of the last data (struct
// tcp_info, linux/tcp.h), since io.Copy splices and reports nothing until its end. All
// data of a server pass the client's connection, so watching that one is enough.
type idleWatch struct {
	conn  *net.TCPConn
	limit time.Duration
	end   func()
	timer *time.Timer

	mu      sync.Mutex
	stopped bool
}

func watchIdle(conn *net.TCPConn, limit time.Duration, end func()) *idleWatch {
	w := &idleWatch{conn: conn, limit: limit, end: end}
	w.mu.Lock() // until timer is set
	defer w.mu.Unlock()
	// The connection cannot be idle before the limit.
	w.timer = time.AfterFunc(limit, w.check)
	return w
}

// stop ends the watch. The function is not called after it returns.
func (w *idleWatch) stop() {
	w.timer.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
}

func (w *idleWatch) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	quiet, err := quietFor(w.conn)
	switch {
	case err != nil: // closed
	case quiet >= w.limit:
		w.end()
	default:
		w.timer.Reset(w.limit - quiet)
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
