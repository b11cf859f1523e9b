package httpproxy

import (
	"context"
	"sync"
)

// A life is that of an exchange. It ends with the client, with the idle timeout, with the
// proxy, and at last with the exchange.
//
// Its context is made when a look-up or a new connection needs it: most exchanges have
// neither.
type life struct {
	x      *exchange
	parent context.Context // ends with the client or the proxy

	mu     sync.Mutex
	ctx    context.Context // nil: not needed so far
	cancel context.CancelCauseFunc
	ended  error       // cause of another end; nil: none
	server *serverConn // to close at the end
	stop   func() bool // of closing it at the end of parent
}

// context returns a context that ends with the life.
func (l *life) context() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx == nil {
		l.ctx, l.cancel = context.WithCancelCause(context.WithValue(l.parent, exchangeKey{}, l.x))
		if l.ended != nil {
			l.cancel(l.ended)
		}
	}
	return l.ctx
}

// end ends the life. Only the first cause counts.
func (l *life) end(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended == nil {
		l.ended = cause
	}
	if l.cancel != nil {
		l.cancel(l.ended)
	}
	if l.server != nil {
		_ = l.server.Close()
	}
}

// cause returns why the life has ended, or nil.
func (l *life) cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != nil {
		return l.ended
	}
	return context.Cause(l.parent)
}

// hold makes the end of the life close a connection to a server.
func (l *life) hold(c *serverConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != nil {
		_ = c.Close()
	}
	l.server = c
	l.stop = context.AfterFunc(l.parent, func() { _ = c.Close() })
}

// release reverts hold. It returns false if the connection is closed.
func (l *life) release() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.server = nil
	return l.stop() && l.ended == nil
}
