package probe

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/poll"
)

// A Result is how a probe ended.
type Result struct {
	Local   netip.AddrPort // source of the probe
	At      time.Time
	Took    time.Duration // until the answer, the error, or the end of the wait
	Err     error         // of the connection; nil: it was accepted
	Reset   bool          // after it was accepted, a reset ended it before any data
	Timeout bool          // no answer in time
	Unsent  bool          // the kernel sent nothing
	By      netip.Addr    // sender of an ICMP error; the zero Addr: none, or the pod's own kernel
	Sent    int           // SYN segments, or datagrams
	PathMTU int           // as the kernel knows it, in bytes; 0: unknown
}

// TCP connects to a server, and closes the connection after a moment in which a reset may
// come. No data is sent. patience is the time for the answer, and moment the time for the
// reset.
func TCP(ctx context.Context, from From, to netip.AddrPort, patience, moment time.Duration) Result {
	r := Result{At: time.Now()}
	s, err := from.open(unix.SOCK_STREAM, 0)
	if err != nil {
		r.Err, r.Unsent = err, true
		return r
	}
	defer s.close()
	defer context.AfterFunc(ctx, func() { _ = s.file.SetDeadline(time.Unix(1, 0)) })()
	err = s.connect(to, r.At.Add(patience))
	r.Took, r.Local = time.Since(r.At), s.local()
	r.Sent, r.PathMTU = s.info()
	switch r.Err = err; {
	case err == nil:
		r.Reset = s.resets(time.Now().Add(moment))
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.Timeout = true
	default:
		if icmp, ok := s.failure(); ok {
			r.By = icmp.By
		}
	}
	return r
}

// connect returns when the connection is accepted, at the given time, or on an error.
func (s *socket) connect(to netip.AddrPort, until time.Time) error {
	err := s.control(func(fd int) error { return unix.Connect(fd, sockaddr(to)) })
	if !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	if err := s.file.SetWriteDeadline(until); err != nil {
		return err
	}
	ended := func(fd int) (bool, error) {
		ready, err := poll.Ready(uintptr(fd), unix.POLLOUT)
		if !ready || err != nil {
			return err != nil, err
		}
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code) //nolint:gosec // an error number
		}
		return true, err
	}
	waited := s.raw.Write(func(fd uintptr) (done bool) {
		done, err = ended(int(fd))
		return done
	})
	if waited == nil {
		return err
	}
	// The answer may have come while this process did not run.
	done := false
	if err := s.control(func(fd int) (err error) { done, err = ended(fd); return err }); done || err != nil {
		return err
	}
	return waited
}

// info returns the number of SYN segments that were sent, and the MTU of the path.
func (s *socket) info() (sent, mtu int) {
	_ = s.control(func(fd int) error { // without it, both are unknown
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			sent, mtu = 1+int(info.Total_retrans), int(info.Pmtu)
		}
		return err
	})
	return max(sent, 1), mtu
}

// resets reports whether the server, or a host in between, resets the connection until the
// given time and before any data.
func (s *socket) resets(until time.Time) bool {
	var b [1]byte
	_, err := s.read(b[:], until)
	return errors.Is(err, unix.ECONNRESET)
}
