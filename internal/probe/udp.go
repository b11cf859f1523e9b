package probe

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// UDP sends one empty datagram to a server, and waits for a datagram or an ICMP error. Most
// servers ignore it.
func UDP(ctx context.Context, from From, to netip.AddrPort, patience time.Duration) Result {
	r := Result{At: time.Now(), Sent: 1}
	s, err := from.open(unix.SOCK_DGRAM, 0)
	if err == nil {
		defer s.close()
		defer context.AfterFunc(ctx, func() { _ = s.file.SetDeadline(time.Unix(1, 0)) })()
		err = s.control(func(fd int) error {
			if err := unix.Connect(fd, sockaddr(to)); err != nil {
				return err
			}
			return unix.Send(fd, nil, 0)
		})
	}
	if err != nil {
		r.Err, r.Unsent = err, true
		return r
	}
	r.Local = s.local()
	var b [1]byte
	_, r.Err = s.read(b[:], r.At.Add(patience))
	r.Took = time.Since(r.At)
	if r.Timeout = errors.Is(r.Err, os.ErrDeadlineExceeded); r.Err != nil && !r.Timeout {
		if icmp, ok := s.failure(); ok {
			r.By = icmp.By
		}
	}
	return r
}
