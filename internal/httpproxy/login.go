package httpproxy

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// connectionSchemes are the authentication schemes after which a server may treat every
// further request on the connection as authenticated (NTLM: MS-NTHT section 3; Negotiate:
// RFC 4559 section 6; Kerberos is what older servers call it). RFC 9110 section 11.1 does
// not allow such schemes, and RFC 9112 section 9.3 lets intermediaries share connections:
// a proxy must therefore recognise them.
var connectionSchemes = []string{"NTLM", "Negotiate", "Kerberos"}

// connectionScheme reports whether a field that names authentication schemes names one of
// connectionSchemes. Words in parameters count too: that only costs a connection.
func (f fields) connectionScheme(name string) bool {
	for i := range f {
		if f[i].name != name {
			continue
		}
		for word := range strings.FieldsFuncSeq(f[i].value, func(r rune) bool { return r == ' ' || r == '\t' || r == ',' }) {
			for _, scheme := range connectionSchemes {
				if equalFold(word, scheme) {
					return true
				}
			}
		}
	}
	return false
}

// mostLogins is the limit of the server connections that belong to one client. Browsers
// and curl have one at a time for each of their connections.
const mostLogins = 8

// logins are the idle server connections that belong to a client. If the server closes
// one that the client has authenticated, the client's connection ends too, before its
// next request: to the client both are one.
type logins struct {
	mu     sync.Mutex
	conns  map[serverKey]*serverConn
	closed bool

	between atomic.Bool // the client has no request
	lost    atomic.Bool // a server has closed
}

// park keeps a connection for the client's next request to its server.
func (c *clientConn) park(s *serverConn) {
	l := &c.logins
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = s.Close()
		return
	}
	if l.conns == nil {
		l.conns = map[serverKey]*serverConn{}
	}
	if len(l.conns) == mostLogins {
		for key, other := range l.conns {
			delete(l.conns, key)
			_ = other.Close()
			break
		}
	}
	l.conns[s.key] = s
	s.watch = make(chan struct{})
	go func() {
		defer close(s.watch)
		defer func() { c.proxy.panicked(recover(), c) }()
		// It waits without reading.
		if err := s.tcp.raw.Read(func(fd uintptr) bool { return !silent(fd) }); err == nil {
			c.lose(s)
		}
	}()
}

// unpark returns the client's connection to a server, or nil.
func (c *clientConn) unpark(key serverKey) *serverConn {
	l := &c.logins
	l.mu.Lock()
	s := l.conns[key]
	delete(l.conns, key)
	l.mu.Unlock()
	if s != nil {
		_ = s.tcp.SetReadDeadline(time.Unix(1, 0))
		<-s.watch
		_ = s.tcp.SetReadDeadline(time.Time{})
	}
	return s
}

// lose handles a parked connection that the server has closed.
func (c *clientConn) lose(s *serverConn) {
	l := &c.logins
	l.mu.Lock()
	mine := l.conns[s.key] == s
	if mine {
		delete(l.conns, s.key)
		_ = s.Close()
	}
	l.mu.Unlock()
	if mine && s.login {
		l.lost.Store(true)
		if l.between.Load() {
			_ = c.SetReadDeadline(time.Unix(1, 0)) // wakes up its wait
		}
	}
}

// over reports whether the client's connection ends instead of taking another request.
func (l *logins) over() bool { return l.lost.Load() && l.between.Load() }

// close closes all connections.
func (l *logins) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for key, s := range l.conns {
		delete(l.conns, key)
		_ = s.Close()
	}
}
