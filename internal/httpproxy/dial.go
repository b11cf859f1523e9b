package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// attemptDelay is how long one address has before the next is tried beside it
// (RFC 8305 section 5 recommends 250 ms).
const attemptDelay = 250 * time.Millisecond

// A dialError says why none of the addresses of a target can be reached.
type dialError struct {
	target  target
	reasons []string // one an address
	timeout bool     // at least one might have answered later
}

func (e *dialError) Error() string {
	return fmt.Sprintf("connecting to %s: %s", e.target, strings.Join(e.reasons, "; "))
}

// race dials the addresses one after the other, without waiting for one that
// takes its time, and returns the first connection ("happy eyeballs", RFC 8305,
// within one family: see choose). The others are given up.
func race[C io.Closer](ctx context.Context, addrs []netip.Addr, dial func(context.Context, netip.Addr) (C, error)) (C, []attempt) {
	var none C
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		index int
		conn  C
		err   error
	}
	results := make(chan result)
	attempts := make([]attempt, 0, len(addrs))
	for done := 0; done < len(addrs); {
		var next <-chan time.Time
		if n := len(attempts); n < len(addrs) {
			delay := time.Duration(0)
			if n > done { // one is under way
				delay = attemptDelay
			}
			timer := time.NewTimer(delay)
			defer timer.Stop()
			next = timer.C
		}
		select {
		case <-next:
			n := len(attempts)
			attempts = append(attempts, attempt{addr: addrs[n]})
			go func() {
				conn, err := dial(ctx, addrs[n])
				select {
				case results <- result{n, conn, err}:
				case <-ctx.Done():
					if err == nil {
						_ = conn.Close()
					}
				}
			}()
		case r := <-results:
			if r.err == nil {
				return r.conn, attempts
			}
			attempts[r.index].err = r.err
			done++
		case <-ctx.Done():
			for i := range attempts {
				if attempts[i].err == nil {
					attempts[i].err = context.Cause(ctx)
				}
			}
			return none, attempts
		}
	}
	return none, attempts
}

// An attempt is one address and why it was of no use.
type attempt struct {
	addr netip.Addr
	err  error
}

// dial connects to one of the addresses of a route.
func (p *Proxy) dial(ctx context.Context, r *route) (*net.TCPConn, error) {
	conn, err := p.dialRoute(ctx, r)
	if err != nil && ctx.Err() == nil { // and nobody gave up before
		p.counters.connectFailures.Add(1)
	}
	return conn, err
}

func (p *Proxy) dialRoute(ctx context.Context, r *route) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
	defer cancel()
	var dialer net.Dialer
	// DialTCP would bind first, also where no local address is given, and that
	// takes a port that has no connection to anywhere.
	dialOne := func(ctx context.Context, a netip.Addr) (*net.TCPConn, error) {
		conn, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(a, r.target.port).String())
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}
	if len(r.addrs) == 1 {
		conn, err := dialOne(ctx, r.addrs[0])
		if err != nil {
			return nil, newDialError(r.target, []attempt{{r.addrs[0], err}})
		}
		return conn, nil
	}
	conn, attempts := race(ctx, r.addrs, dialOne)
	if conn == nil {
		return nil, newDialError(r.target, attempts)
	}
	return conn, nil
}

func newDialError(t target, attempts []attempt) *dialError {
	e := &dialError{target: t}
	for _, a := range attempts {
		reason := plain(a.err)
		if isTimeout(a.err) {
			e.timeout, reason = true, "no answer"
		}
		e.reasons = append(e.reasons, fmt.Sprintf("%s: %s", a.addr, reason))
	}
	if len(attempts) == 0 {
		e.reasons = append(e.reasons, "timed out before connecting")
		e.timeout = true
	}
	return e
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// plain returns the part of a network error that is not said already: the
// operation and the addresses are.
func plain(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	return err.Error()
}
