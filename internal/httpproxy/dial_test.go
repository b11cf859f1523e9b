package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeConn is a connection that counts itself while it is open.
type fakeConn struct {
	addr netip.Addr
	open *atomic.Int32
}

func (c *fakeConn) Close() error {
	c.open.Add(-1)
	return nil
}

func TestRace(t *testing.T) {
	refused := errors.New("refused")
	type server struct {
		takes time.Duration
		err   error
	}
	never := server{takes: time.Hour}
	for name, test := range map[string]struct {
		servers []server // servers at 192.0.2.1, .2, ...
		winner  string   // empty: none
		after   time.Duration
		tried   int
	}{
		"the first answers":         {[]server{{}, {}}, "192.0.2.1", 0, 1},
		"the first answers in time": {[]server{{takes: 200 * time.Millisecond}, {}}, "192.0.2.1", 200 * time.Millisecond, 1},
		"the first does not answer": {[]server{never, {}}, "192.0.2.2", attemptDelay, 2},
		"the first refuses":         {[]server{{err: refused}, {}}, "192.0.2.2", 0, 2},
		"the first refuses late":    {[]server{{takes: 200 * time.Millisecond, err: refused}, {}}, "192.0.2.2", 200 * time.Millisecond, 2},
		"the second is late, too":   {[]server{never, never, {}}, "192.0.2.3", 2 * attemptDelay, 3},
		"the first answers late":    {[]server{{takes: 300 * time.Millisecond}, never}, "192.0.2.1", 300 * time.Millisecond, 2},
		"all refuse":                {[]server{{err: refused}, {err: refused}}, "", 0, 2},
		"none answers":              {[]server{never, never}, "", 10 * time.Second, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var addrs []netip.Addr
				for i := range test.servers {
					addrs = append(addrs, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}))
				}
				var open atomic.Int32
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				begin := time.Now()
				conn, attempts := race(ctx, addrs, func(ctx context.Context, a netip.Addr) (*fakeConn, error) {
					s := test.servers[slices.Index(addrs, a)]
					select {
					case <-time.After(s.takes):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if s.err == nil {
						open.Add(1)
					}
					return &fakeConn{a, &open}, s.err
				})
				if took := time.Since(begin); took != test.after || len(attempts) != test.tried {
					t.Errorf("%d tried in %s, want %d in %s", len(attempts), took, test.tried, test.after)
				}
				synctest.Wait()
				if test.winner == "" {
					e := newDialError(target{Host{Name: "a.example"}, 80}, attempts)
					if conn != nil || open.Load() != 0 || e.timeout != (test.after > 0) || strings.Count(e.Error(), "192.0.2.") != test.tried {
						t.Errorf("%v is open, %v", conn, e)
					}
					return
				}
				if conn == nil || conn.addr != ip(test.winner) || open.Load() != 1 {
					t.Errorf("%v won, %d are open; want %s alone", conn, open.Load(), test.winner)
				}
			})
		})
	}
}

// A connection that is made at the same moment as another is closed.
func TestRaceLeavesNoneOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var open atomic.Int32
		conn, _ := race(t.Context(), []netip.Addr{ip("192.0.2.1"), ip("192.0.2.2")}, func(context.Context, netip.Addr) (*fakeConn, error) {
			time.Sleep(time.Second) // regardless of the context
			open.Add(1)
			return &fakeConn{open: &open}, nil
		})
		time.Sleep(time.Minute)
		if conn == nil || open.Load() != 1 {
			t.Errorf("%v; %d are open, want one", conn, open.Load())
		}
	})
}

// Connections to different servers share local ports.
func TestPortsAreShared(t *testing.T) {
	const ports = 10
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	before, err := os.ReadFile(file)
	check(t, err)
	check(t, os.WriteFile(file, fmt.Appendf(nil, "40000 %d", 40000+ports-1), 0))
	t.Cleanup(func() { check(t, os.WriteFile(file, before, 0)) })
	p := &Proxy{config: Config{ConnectTimeout: patience}}
	for i := range 3 {
		l, err := net.Listen("tcp", fmt.Sprintf("203.0.113.%d:8085", 1+i))
		check(t, err)
		defer l.Close()
		to := netip.MustParseAddrPort(l.Addr().String())
		for range ports / 2 {
			conn, err := p.dial(t.Context(), target{Host{Addr: to.Addr()}, to.Port()}, []netip.Addr{to.Addr()})
			check(t, err)
			defer conn.Close()
		}
	}
}
