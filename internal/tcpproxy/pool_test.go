package tcpproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A world is the resolver and the servers of a pool in tests. Its clock is
// synctest's.
type world struct {
	mu      sync.Mutex
	addrs   []netip.Addr
	ttl     time.Duration
	err     error
	lookups int
	broken  map[string]error // the error of dialling an address; errSilence: no answer
	dialled []string
	probed  []string
	log     strings.Builder
}

var errSilence = errors.New("silence")

type notFoundError struct{ error }

func (notFoundError) NotFound() bool { return true }

func (w *world) set(addrs ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addrs, w.err = nil, nil
	for _, a := range addrs {
		w.addrs = append(w.addrs, netip.MustParseAddr(a))
	}
}

func (w *world) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

func (w *world) breaks(addr string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken[addr] = err
}

func (w *world) Lookup(context.Context, string) ([]netip.Addr, time.Time, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lookups++
	if w.err != nil {
		return nil, time.Time{}, w.err
	}
	return w.addrs, time.Now().Add(w.ttl), nil
}

// connect searches for a server for one client, as the proxy does.
func (w *world) connect(ctx context.Context, p *pool) (netip.AddrPort, error) {
	a := attempt{pool: p}
	for {
		if err := a.next(ctx); err != nil {
			return a.to, err
		}
		try, cancel := context.WithTimeout(ctx, connectTimeout)
		err := w.reach(try, a.to, &w.dialled)
		cancel()
		if err == nil {
			a.succeeds()
			return a.to, nil
		}
		a.fails(ctx, err)
	}
}

func (w *world) probe(ctx context.Context, to netip.AddrPort) error {
	return w.reach(ctx, to, &w.probed)
}

func (w *world) reach(ctx context.Context, to netip.AddrPort, list *[]string) error {
	w.mu.Lock()
	*list = append(*list, to.Addr().String())
	err := w.broken[to.Addr().String()]
	w.mu.Unlock()
	if err == errSilence {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (w *world) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

func (w *world) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(b)
}

// inWorld runs a test with a pool, on synctest's clock.
func inWorld(t *testing.T, test func(t *testing.T, w *world, p *pool)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{ttl: time.Minute, broken: map[string]error{}}
		p := &pool{destination: Destination{80, "a.example", 443}, resolver: w, log: slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))}
		p.probe = w.probe
		p.local, p.listens = func(a netip.Addr) bool { return a.IsLoopback() }, func(rules.Port) bool { return false }
		test(t, w, p)
		p.stop()
		synctest.Wait()
	})
}

// counts returns the numbers of look-ups and probes.
func (w *world) counts() (lookups, probes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lookups, len(w.probed)
}

// connects makes connections and returns how often each address was dialled.
func (w *world) connects(t *testing.T, p *pool, n int) map[string]int {
	t.Helper()
	w.mu.Lock()
	w.dialled = nil
	w.mu.Unlock()
	for range n {
		if to, err := w.connect(t.Context(), p); err != nil || to.Port() != 443 {
			t.Errorf("connecting to %s: %v", to, err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	count := map[string]int{}
	for _, a := range w.dialled {
		count[a]++
	}
	return count
}

func wantCount(t *testing.T, got map[string]int, want string) {
	t.Helper()
	if s := strings.TrimPrefix(fmt.Sprint(got), "map"); s != want {
		t.Errorf("dialled %s, want %s", s, want)
	}
}

// The addresses of a name take turns; IPv4 is preferred.
func TestTurns(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.3")
		p.start(t.Context())
		wantCount(t, w.connects(t, p, 9), "[192.0.2.1:3 192.0.2.2:3 192.0.2.3:3]")
		w.set("2001:db8::1", "2001:db8::2")
		time.Sleep(time.Minute)
		synctest.Wait()
		wantCount(t, w.connects(t, p, 4), "[2001:db8::1:2 2001:db8::2:2]")
	})
}

// The addresses change when the answer has expired.
func TestFollow(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1")
		w.ttl = 30 * time.Second
		p.start(t.Context())
		wantCount(t, w.connects(t, p, 2), "[192.0.2.1:2]")
		w.set("192.0.2.2", "192.0.2.3")
		time.Sleep(29 * time.Second)
		wantCount(t, w.connects(t, p, 2), "[192.0.2.1:2]")
		time.Sleep(time.Second)
		synctest.Wait()
		wantCount(t, w.connects(t, p, 2), "[192.0.2.2:1 192.0.2.3:1]")
		if n := strings.Count(w.text(), "addresses changed"); n != 1 {
			t.Errorf("%d changes in the log:\n%s", n, w.text())
		}
	})
}

// A name with a TTL of 0 is looked up at most once a second.
func TestNoTTL(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1")
		w.ttl = 0
		p.start(t.Context())
		time.Sleep(9500 * time.Millisecond)
		if n, _ := w.counts(); n != 10 {
			t.Errorf("%d look-ups in 10 s", n)
		}
	})
}

// A name keeps its addresses while look-ups fail, and has none when it does not exist.
func TestNameFails(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1")
		w.ttl = time.Second
		p.start(t.Context())
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1]")
		w.fail(errors.New("no answer"))
		time.Sleep(time.Hour)
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1]")
		if n := strings.Count(w.text(), "level=WARN"); n != 1 {
			t.Errorf("%d warnings of the same failure:\n%s", n, w.text())
		}
		w.fail(notFoundError{errors.New("no such name")})
		time.Sleep(2 * time.Second)
		begin := time.Now()
		if _, err := w.connect(t.Context(), p); err == nil || err.Error() != "no such name" || time.Since(begin) > 0 {
			t.Errorf("%v after %s; want an error at once", err, time.Since(begin))
		}
		w.set("192.0.2.2")
		time.Sleep(2 * time.Second)
		wantCount(t, w.connects(t, p, 1), "[192.0.2.2:1]")
	})
}

// A client waits for the first answer for a name, up to the connect timeout.
func TestNameFailsAtStart(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.fail(errors.New("no answer"))
		p.start(t.Context())
		begin := time.Now()
		if _, err := w.connect(t.Context(), p); err == nil || err.Error() != "no answer" || time.Since(begin) != connectTimeout {
			t.Errorf("%v after %s", err, time.Since(begin))
		}
		time.AfterFunc(4500*time.Millisecond, func() { w.set("192.0.2.1") })
		begin = time.Now()
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1]")
		if d := time.Since(begin); d > 6*time.Second {
			t.Errorf("it took %s", d)
		}
	})
}

// An unreachable address is set aside, probed, and used again when it is reachable.
func TestSetAside(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1", "192.0.2.2", "192.0.2.3")
		w.ttl = 5 * time.Minute
		w.breaks("192.0.2.1", errSilence)
		w.breaks("192.0.2.2", syscall.ECONNREFUSED)
		p.start(t.Context())
		begin := time.Now()
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1 192.0.2.3:1]")
		if d := time.Since(begin); d != connectTimeout {
			t.Errorf("a silent address is waited for %s", d)
		}
		wantCount(t, w.connects(t, p, 2), "[192.0.2.2:1 192.0.2.3:2]")
		wantCount(t, w.connects(t, p, 20), "[192.0.2.3:20]")

		w.breaks("192.0.2.2", nil)
		time.Sleep(probeMost)
		wantCount(t, w.connects(t, p, 4), "[192.0.2.2:2 192.0.2.3:2]")
		w.breaks("192.0.2.1", nil)
		time.Sleep(probeMost + connectTimeout)
		wantCount(t, w.connects(t, p, 3), "[192.0.2.1:1 192.0.2.2:1 192.0.2.3:1]")
		for _, line := range []string{"address unreachable", "address reachable again"} {
			if n := strings.Count(w.text(), line); n != 2 {
				t.Errorf("%d times %q in the log:\n%s", n, line, w.text())
			}
		}

		// An address that the name no longer has is not probed any more.
		w.breaks("192.0.2.1", syscall.ECONNREFUSED)
		w.connects(t, p, 3)
		w.set("192.0.2.2")
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		wantCount(t, w.connects(t, p, 1), "[192.0.2.2:1]")
		_, before := w.counts()
		time.Sleep(time.Minute)
		synctest.Wait()
		if _, after := w.counts(); after > before {
			t.Errorf("%d probes", after-before)
		}
	})
}

// If all addresses fail a client gets three tries, with a pause before a second try of
// the same address.
func TestTries(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1")
		w.breaks("192.0.2.1", syscall.ECONNREFUSED)
		p.start(t.Context())
		begin := time.Now()
		if _, err := w.connect(t.Context(), p); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		if d := time.Since(begin); d != 2*retryPause || len(w.dialled) != tries {
			t.Errorf("dialled %v in %s", w.dialled, d)
		}
		// It is reachable again after a pause: the client is connected.
		time.AfterFunc(1500*time.Millisecond, func() { w.breaks("192.0.2.1", nil) })
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:3]")

		w.set("192.0.2.1", "192.0.2.2", "2001:db8::1")
		for _, a := range []string{"192.0.2.1", "192.0.2.2"} {
			w.breaks(a, syscall.ECONNREFUSED)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1 192.0.2.2:1 2001:db8::1:1]")
	})
}

// A lack of resources of the proxy itself does not set an address aside.
func TestOwnResources(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("192.0.2.1")
		w.breaks("192.0.2.1", os.NewSyscallError("connect", syscall.EADDRNOTAVAIL))
		p.start(t.Context())
		if _, err := w.connect(t.Context(), p); !errors.Is(err, syscall.EADDRNOTAVAIL) || len(p.aside) > 0 {
			t.Errorf("%v, aside %v", err, p.aside)
		}
		ctx, cancel := context.WithCancel(t.Context())
		w.breaks("192.0.2.1", errSilence)
		time.AfterFunc(time.Second, cancel)
		if _, err := w.connect(ctx, p); !errors.Is(err, context.Canceled) || len(p.aside) > 0 {
			t.Errorf("%v, aside %v", err, p.aside)
		}
	})
}

// Local addresses of a name are ignored, and a name that has no other has none.
func TestLocalAddressesOfName(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		w.set("127.0.0.1", "192.0.2.1")
		p.start(t.Context())
		wantCount(t, w.connects(t, p, 2), "[192.0.2.1:2]")
		time.Sleep(time.Hour)
		if n := strings.Count(w.text(), "local addresses ignored"); n != 1 {
			t.Errorf("%d times in the log:\n%s", n, w.text())
		}
		w.set("127.0.0.1", "::1")
		time.Sleep(time.Hour)
		if to, err := w.connect(t.Context(), p); err == nil || err.Error() !=
			`"a.example" resolves to local addresses only, which a destination has to write as an address: [127.0.0.1 ::1]` {
			t.Errorf("%s, %v", to, err)
		}
		if n := strings.Count(w.text(), "destination has no address"); n != 1 {
			t.Errorf("%d times in the log:\n%s", n, w.text())
		}
		w.set("192.0.2.1")
		time.Sleep(time.Hour)
		wantCount(t, w.connects(t, p, 1), "[192.0.2.1:1]")
	})
}

// A destination by address is not looked up.
func TestAddressDestination(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		p.destination.Host = "192.0.2.7"
		w.fail(errors.New("no answer"))
		p.start(t.Context())
		wantCount(t, w.connects(t, p, 2), "[192.0.2.7:2]")
		if n, _ := w.counts(); n > 0 {
			t.Error("the address was looked up")
		}
	})
}
