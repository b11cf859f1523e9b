package httpproxy

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// silentAfter is the number of look-ups in a row without an answer after which the name
// servers count as silent. Fewer may be those of one zone.
const silentAfter = 5

// A silence records whether the name servers answer.
type silence struct {
	log *slog.Logger

	mu    sync.Mutex
	n     int // look-ups without an answer, in a row
	err   error
	since time.Time // the first of them
}

// saw records the result of a look-up. Any answer counts, also that there is no address.
// A look-up that ended in favour of others shows nothing.
func (s *silence) saw(err error) {
	if overloaded(err) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !isTimeout(err) {
		if s.n >= silentAfter {
			s.log.Info("name servers answer again")
		}
		s.n, s.err = 0, nil
		return
	}
	if s.n == 0 {
		s.since = time.Now()
	}
	s.err = err
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		s.err = errors.New(dns.Err) // without the name, which a client wrote: the status page shows it
	}
	if s.n++; s.n == silentAfter {
		s.log.Warn("name servers do not answer", "lookups", s.n, "error", s.err)
	}
}

// state returns the start of a silence and its last error, or nil.
func (s *silence) state() (since time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n < silentAfter {
		return time.Time{}, nil
	}
	return s.since, s.err
}

// unnamed remembers addresses whose names nobody returned in time, so that not every
// request to one waits.
type unnamed struct {
	mu    sync.Mutex
	until map[netip.Addr]time.Time
}

const (
	unnamedFor  = time.Minute
	mostUnnamed = 4096
)

func (u *unnamed) has(a netip.Addr) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return time.Now().Before(u.until[a])
}

func (u *unnamed) add(a netip.Addr) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.until == nil || len(u.until) >= mostUnnamed {
		u.until = map[netip.Addr]time.Time{}
	}
	u.until[a] = time.Now().Add(unnamedFor)
}
