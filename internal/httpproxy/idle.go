package httpproxy

import (
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// An idleWatch calls a function when nothing has moved on a connection for a
// time, in either direction. It asks the kernel when the last data came and went
// (struct tcp_info, linux/tcp.h), so that whoever copies the data does not have to
// tell: io.Copy splices, and says nothing until its end. Everything that a server
// sends and takes passes by the client, so one look at its connection does.
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
	// Before the limit nothing can have been idle for so long.
	w.timer = time.AfterFunc(limit, w.check)
	return w
}

// stop ends the watch. The function is not called any more.
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

// quietFor returns how long ago the last data came or went on a connection.
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
