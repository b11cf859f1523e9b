package endpoints

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A take-over does not wait for a kept connection whose path has ended: the patch goes by another
// one, too.
func TestKeptConnectionIsDead(t *testing.T) {
	for _, arrives := range []bool{false, true} {
		s := newServer(t)
		w := s.start("127.0.0.1", func(w *Writer) { w.api.beside = time.Millisecond })
		w.awaitRead(t)
		kept, hang := map[string]bool{}, make(chan struct{})
		t.Cleanup(func() { close(hang) })
		s.change(func() {
			for client := range s.clients {
				kept[client] = true
			}
			s.before = func(answer http.ResponseWriter, r *http.Request) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				if r.Method != http.MethodPatch || !kept[r.RemoteAddr] {
					return false
				}
				if arrives { // and its answer is lost
					s.slices["web-egress-router"] = &slice{Metadata: metadata{Name: "web-egress-router", revision: revision{"uid", "7"}}}
				}
				s.mu.Unlock()
				<-hang
				s.mu.Lock()
				return true
			}
		})
		w.Hold()
		s.awaitHolder("127.0.0.1")
		w.await(t, "written", func(s Status) bool { return s.Err == nil && !s.Written.IsZero() })
		w.stop()
		if strings.Contains(w.log.String(), "failed") {
			t.Errorf("arrives %t: log:\n%s", arrives, w.log)
		}
	}
}

// A take-over that comes while a standby reads takes a single request, too.
func TestTakeOverWhileReading(t *testing.T) {
	s := newServer(t)
	former := s.start("127.0.0.2")
	former.Hold()
	s.awaitHolder("127.0.0.2")
	former.stop()
	w := s.start("127.0.0.1")
	w.awaitRead(t)
	reads := make(chan struct{})
	s.change(func() {
		s.before = func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPatch {
				reads <- struct{}{}
				<-r.Context().Done() // the client has gone
				return true
			}
			return false
		}
	})
	w.wake <- struct{}{}
	<-reads
	w.Hold()
	s.awaitHolder("127.0.0.1")
	<-reads // after the write
}

// A kept connection that the server has closed costs no attempt.
func TestKeptConnectionIsClosed(t *testing.T) {
	s := newServer(t)
	w := s.start("127.0.0.1")
	w.awaitRead(t)
	s.http.CloseClientConnections()
	from := 0
	s.change(func() { from = len(s.requests) })
	w.Hold()
	s.awaitHolder("127.0.0.1")
	w.stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.requests[from] != "PATCH web-egress-router" || strings.Contains(w.log.String(), "failed") {
		t.Errorf("requests after Hold: %q, log:\n%s", s.requests[from:], w.log)
	}
}

// A dead API server, one of several behind one address, does not delay a connection.
func TestServerBehindAddressIsDead(t *testing.T) {
	s := newServer(t)
	dials := make(chan struct{}, 1000)
	w := s.start("127.0.0.1", func(w *Writer) {
		w.api.beside = time.Millisecond
		next := w.api.dialTCP
		w.api.dialTCP = func(d *net.Dialer, ctx context.Context, network, server string) (net.Conn, error) {
			dials <- struct{}{}
			if len(dials) < 4 { // lost, as by a node that has gone
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return next(d, ctx, network, server)
		}
	})
	w.Hold()
	s.awaitHolder("127.0.0.1")
	w.await(t, "written", func(s Status) bool { return s.Err == nil && !s.Written.IsZero() })
}

// pipes is the network of a test with a clock of its own.
type pipes struct {
	accepted chan net.Conn
	closed   chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.accepted:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	select {
	case <-p.closed:
	default:
		close(p.closed)
	}
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443} }

// dial connects, unless what is sent is lost until an instant.
func (p *pipes) dial(ctx context.Context, lost time.Time) (net.Conn, error) {
	if time.Now().Before(lost) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	here, there := net.Pipe()
	select {
	case p.accepted <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// lossy is a connection on which all is lost until an instant.
type lossy struct {
	net.Conn
	lost *time.Time
}

func (l lossy) Write(b []byte) (int, error) {
	if time.Now().Before(*l.lost) {
		return len(b), nil
	}
	return l.Conn.Write(b)
}

// While a take-over finds the API server silent, its attempts are never far apart: soon after its
// path works again the Service leads to the holder, however long that took. A router whose attempts
// were a second long and ever further apart took up to two seconds more.
func TestPathOfServerComesBack(t *testing.T) {
	for _, silent := range []time.Duration{0, 150, 950, 1050, 2150, 3350, 4750, 5300, 9900, 30050} {
		silent *= time.Millisecond
		t.Run(silent.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := &pipes{make(chan net.Conn), make(chan struct{})}
				s := newServerAt(t, network)
				var lost time.Time
				w := s.start("127.0.0.1", func(w *Writer) {
					w.look, w.timeout, w.api.connect, w.api.beside = lookEvery, leastTimeout, connectTimeout, besideAfter
					w.api.dialTCP = func(_ *net.Dialer, ctx context.Context, _, _ string) (net.Conn, error) {
						c, err := network.dial(ctx, lost)
						if err != nil {
							return nil, err
						}
						return lossy{c, &lost}, nil
					}
				})
				synctest.Wait()
				if got := w.Status(); got.Err != nil || got.Since.IsZero() {
					t.Fatalf("the standby has not read everything: %+v", got)
				}
				began := time.Now()
				lost = began.Add(silent)
				w.Hold()
				for w.Status().Written.IsZero() {
					time.Sleep(time.Millisecond)
				}
				const soon = besideAfter + leastDelay + 10*time.Millisecond
				if took := time.Since(began); took > silent+soon {
					t.Errorf("written %s after the path works again, want at most %s", took-silent, soon)
				}
				w.stop()
				w.api.close()
				s.http.Close()
				time.Sleep(time.Minute) // requests on their way end
			})
		})
	}
}

// The results of attempts that end too late are closed.
func TestSideBySide(t *testing.T) {
	broken := errors.New("broken")
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			name  string
			after []time.Duration // of each attempt, until its result; negative: until an error
			want  time.Duration   // zero: an error
			late  int
		}{
			{"first", []time.Duration{9}, 9, 0},
			{"second", []time.Duration{100, 5}, 5, 1},
			{"third, the first fails", []time.Duration{-15, 100, 3}, 3, 1},
			{"all fail", []time.Duration{-30, -30, -30}, 0, 0},
			{"no more than three", []time.Duration{90, 85, 84}, 90, 2},
			{"the first fails alone", []time.Duration{-5}, 0, 0},
		} {
			var n, late atomic.Int32
			got, err := sideBySide(t.Context(), 10, 3, func(error) bool { return false }, func(context.Context) (time.Duration, error) {
				after := c.after[n.Add(1)-1]
				time.Sleep(max(after, -after))
				if after < 0 {
					return 0, broken
				}
				return after, nil
			}, func(time.Duration) { late.Add(1) })
			time.Sleep(time.Second)
			synctest.Wait()
			if got != c.want || (err != nil) != (c.want == 0) || int(n.Load()) != len(c.after) || int(late.Load()) != c.late {
				t.Errorf("%s: %d, %v after %d attempts, %d closed late; want %d after %d, %d closed", c.name, got, err, n.Load(), late.Load(), c.want, len(c.after), c.late)
			}
		}
	})
}
