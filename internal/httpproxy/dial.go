package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// attemptDelay is the delay between connection attempts to two addresses (RFC 8305
// section 5 recommends 250 ms).
const attemptDelay = 250 * time.Millisecond

// A dialError is the error of connecting to all addresses of a target.
type dialError struct {
	target  target
	reasons []string // one per address
	timeout bool     // at least one attempt has timed out
}

func (e *dialError) Error() string {
	return fmt.Sprintf("connecting to %s: %s", e.target, strings.Join(e.reasons, "; "))
}

// race dials the addresses one after the other, at most attemptDelay apart, and returns
// the first connection ("happy eyeballs", RFC 8305, within one family: see choose). It
// cancels the other attempts.
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
			if n > done { // an attempt is in progress
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

// An attempt is one address and the error of dialling it.
type attempt struct {
	addr netip.Addr
	err  error
}

// dial connects to one of the addresses of a target. After the end of the connection
// the caller calls p.leave.
//
// An attempt may still run when it returns, so it gets values: see exchanges.
func (p *Proxy) dial(ctx context.Context, t target, addrs []netip.Addr) (*net.TCPConn, error) {
	if err := p.makeRoom(ctx); err != nil {
		return nil, err
	}
	conn, err := p.dialAddrs(ctx, t, addrs)
	if err != nil {
		p.leave()
	}
	if err != nil && ctx.Err() == nil { // and not cancelled
		p.counters.connectFailures.Add(1)
	}
	return conn, err
}

// errBusy is the error of a request for which there is no file.
var errBusy = errors.New("too many connections: the limit of open files is reached")

// roomPause is the time between two attempts to find a file.
const roomPause = 50 * time.Millisecond

// makeRoom counts a new connection to a server. If all files for connections are in use,
// it closes an idle one to a server, or one of a client without a request, or waits.
func (p *Proxy) makeRoom(ctx context.Context) error {
	end := time.Now().Add(p.config.ConnectTimeout)
	for {
		if l := p.listener.Load(); p.connections == 0 || p.clients()+int(p.servers.open.Load()) < p.connections || p.servers.evict() || l != nil && l.evictAny() {
			p.servers.open.Add(1)
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(roomPause):
		}
		if time.Now().After(end) {
			return errBusy
		}
	}
}

// leave counts the end of a connection to a server.
func (p *Proxy) leave() {
	p.servers.open.Add(-1)
	if l := p.listener.Load(); l != nil && l.waits.Load() {
		l.retry()
	}
}

// clients returns the number of connections of clients.
func (p *Proxy) clients() int {
	if l := p.listener.Load(); l != nil {
		return int(l.places.Load())
	}
	return 0
}

// used returns the number of connections that cannot be closed for others.
func (p *Proxy) used() int { return p.clients() + p.servers.inUse() }

func (p *Proxy) dialAddrs(ctx context.Context, t target, addrs []netip.Addr) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
	defer cancel()
	var dialer net.Dialer
	// DialTCP would bind first, even without a local address, and a bound port must
	// have no connection at all.
	dialOne := func(ctx context.Context, a netip.Addr) (*net.TCPConn, error) {
		conn, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(a, t.port).String())
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}
	if len(addrs) == 1 {
		conn, err := dialOne(ctx, addrs[0])
		if err != nil {
			return nil, newDialError(t, []attempt{{addrs[0], err}})
		}
		return conn, nil
	}
	conn, attempts := race(ctx, slices.Clone(addrs), dialOne)
	if conn == nil {
		return nil, newDialError(t, attempts)
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

// plain returns the text of a network error without its operation and addresses.
func plain(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	return err.Error()
}
