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
	mu     sync.Mutex
	ctx    context.Context // nil: not needed so far
	cancel context.CancelCauseFunc
	ended  error       // cause of the end; nil: none
	server *serverConn // to close at the end
}

// context returns a context that ends with the life.
func (l *life) context() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx == nil {
		l.ctx, l.cancel = context.WithCancelCause(context.Background())
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
	return l.ended
}

// hold makes the end of the life close a connection to a server.
func (l *life) hold(c *serverConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended != nil {
		_ = c.Close()
	}
	l.server = c
}

// release reverts hold. It returns false if the connection is closed.
func (l *life) release() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.server = nil
	return l.ended == nil
}
