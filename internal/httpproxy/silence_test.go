package httpproxy

import (
	"context"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Name servers that do not answer are in the status and the log, until one does.
func TestSilentNameServers(t *testing.T) {
	p := start(t, "*", zone{"late.example": {"timeout"}, "here.example": {"203.0.113.1"}}, nil)
	ask := func(name string, want int) {
		t.Helper()
		if status, text := answer(t, p.get(t, name+":9")); status != want {
			t.Fatalf("%s: %d %q, want %d", name, status, text, want)
		}
	}
	for range silentAfter - 1 {
		ask("late.example", 504)
	}
	if s := p.Status(); s.LookupErr != nil {
		t.Errorf("after %d look-ups: %v", silentAfter-1, s.LookupErr)
	}
	for range 3 {
		ask("late.example", 504)
	}
	if s := p.Status(); s.LookupErr == nil || s.LookupSince.IsZero() || strings.Contains(s.LookupErr.Error(), "late.example") {
		t.Errorf("status %+v", s)
	}
	if strings.Contains(p.log.String(), "late.example") {
		t.Errorf("the log has a name that a client wrote:\n%s", p.log)
	}
	if n := strings.Count(p.log.String(), "name servers do not answer"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, p.log)
	}
	p.silence.saw(overloadError{}) // no sign of life
	if s := p.Status(); s.LookupErr == nil {
		t.Error("a look-up that ended for others counts as an answer")
	}
	ask("none.example", 502) // an answer
	if s := p.Status(); s.LookupErr != nil || !strings.Contains(p.log.String(), "name servers answer again") {
		t.Errorf("%v, log:\n%s", s.LookupErr, p.log)
	}
	for range 2 * silentAfter {
		p.silence.saw(overloadError{})
	}
	if s := p.Status(); s.LookupErr != nil {
		t.Errorf("look-ups that ended for others count: %v", s.LookupErr)
	}
}

// slowNames has no answer for the names of an address.
type slowNames struct {
	zone
	asked atomic.Int32
}

func (s *slowNames) LookupNames(ctx context.Context, _, _ netip.Addr) ([]string, error) {
	s.asked.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

// Only the first request to an address waits for its name servers.
func TestSilentReverseZone(t *testing.T) {
	names := &slowNames{}
	p := start(t, "a.example", nil, func(p *Proxy) { p.resolver, p.config.ConnectTimeout = names, 50*time.Millisecond })
	for range 5 {
		if status, _ := answer(t, p.get(t, "203.0.113.1:80")); status != 403 {
			t.Errorf("status %d", status)
		}
	}
	if n := names.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}
