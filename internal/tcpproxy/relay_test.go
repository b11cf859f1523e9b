package tcpproxy

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// patience is how long a test waits for an event, which a busy machine may delay.
const patience = 10 * time.Minute

// await polls a condition until it returns no error.
func await(t *testing.T, condition func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s: %v", patience, err)
		}
	}
}

// pair returns both ends of a TCP connection.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = dialled.Close()
		_ = accepted.Close()
	})
	for _, c := range []net.Conn{dialled, accepted} {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

// A joined is a relay with the connections of the two programs at its ends.
type joined struct {
	client, server *net.TCPConn
	relay          *relay
	stop           func()
	done           chan struct{}
	outcome        string // after done
	silent         uint32 // ticks since the relay was last active, after done
}

// descriptor returns a duplicate of a connection's descriptor and closes the connection.
func descriptor(t *testing.T, conn *net.TCPConn) int32 {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var dup int
	if err := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || dup < 0 {
		t.Fatal(err)
	}
	_ = conn.Close()
	return int32(dup)
}

func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}

// join starts a relay in a loop of its own.
func join(t *testing.T, idle time.Duration) *joined {
	t.Helper()
	return joinIn(t, startLoop(t, idle))
}

// A testLoop is a loop for the relays of joineds.
type testLoop struct {
	*loop
	open    sync.WaitGroup
	joineds sync.Map // by relay
}

// startLoop starts a loop for joinIn.
func startLoop(t *testing.T, idle time.Duration) *testLoop {
	t.Helper()
	inner, err := newLoop()
	if err != nil {
		t.Fatal(err)
	}
	l := &testLoop{loop: inner}
	l.idle, l.dialTimeout = idle, patience
	l.ended = func(r *relay) {
		found, _ := l.joineds.Load(r)
		j := found.(*joined)
		j.outcome, j.silent = r.outcome, l.ticks-r.active
		close(j.done)
		l.open.Done()
	}
	l.failed = func(_ *relay, err error) { t.Errorf("not connected: %v", err) }
	var running sync.WaitGroup
	running.Go(l.run)
	t.Cleanup(func() {
		l.stop()
		l.open.Wait()
		l.close()
		running.Wait()
	})
	return l
}

// joinIn starts a relay in a loop. The client sends the data before the relay begins.
func joinIn(t *testing.T, l *testLoop, before ...byte) *joined {
	t.Helper()
	client, near := pair(t)
	send(t, client, before)
	awaitAcked(t, client)
	return joinPair(t, l, client, near)
}

// awaitAcked waits until the peer's kernel has everything that was sent, also the
// end of the stream.
func awaitAcked(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() error {
		var info *unix.TCPInfo
		if err := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil {
			return err
		}
		if err != nil {
			return err
		}
		if pending(info) {
			return fmt.Errorf("%d segments are not acknowledged, %d bytes not sent", info.Unacked, info.Notsent_bytes)
		}
		return nil
	})
}

// joinPair starts a relay for a client that is connected already.
func joinPair(t *testing.T, l *testLoop, client, near *net.TCPConn) *joined {
	t.Helper()
	j := &joined{done: make(chan struct{}), stop: l.stop}
	far, server := pair(t)
	j.client, j.server, j.relay = client, server, newRelay(descriptor(t, near))
	p := &pool{destination: Destination{80, "127.0.0.1", 80}}
	p.start(t.Context())
	j.relay.attempt = attempt{pool: p}
	l.joineds.Store(j.relay, j)
	l.open.Add(1)
	if err := l.take(j.relay, descriptor(t, far)); err != nil {
		t.Fatal(err)
	}
	return j
}

func (j *joined) wantOutcome(t *testing.T, want string) {
	t.Helper()
	select {
	case <-j.done:
		if j.outcome != want {
			t.Errorf("outcome %q, want %q", j.outcome, want)
		}
	case <-time.After(patience):
		t.Fatalf("the relay has not ended, want %q", want)
	}
}

func send(t *testing.T, conn *net.TCPConn, data []byte) {
	t.Helper()
	if _, err := conn.Write(data); err != nil {
		t.Error(err)
	}
}

// wantRead reads as many bytes as expected and compares them.
func wantRead(t *testing.T, conn *net.TCPConn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Errorf("read %q, %v; want %q", got, err, want)
	}
}

// wantEnd reads the end of a stream: io.EOF, or ECONNRESET.
func wantEnd(t *testing.T, conn *net.TCPConn, want error) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
		t.Errorf("read %d bytes, %v; want %v", n, err, want)
	}
}

// All data of both directions arrive, and each direction ends when its sender ends it.
func TestRelay(t *testing.T) {
	j := join(t, time.Minute)
	up, down := make([]byte, 5<<20+1), make([]byte, 7<<20+3)
	_, _ = rand.Read(up)
	_, _ = rand.Read(down)
	var all sync.WaitGroup
	all.Go(func() {
		send(t, j.client, up)
		_ = j.client.CloseWrite()
	})
	all.Go(func() {
		got, err := io.ReadAll(j.server)
		if err != nil || !bytes.Equal(got, up) {
			t.Errorf("the server has %d bytes, %v", len(got), err)
		}
		send(t, j.server, down) // after the half-close the response still arrives
		_ = j.server.Close()
	})
	got, err := io.ReadAll(j.client)
	if err != nil || !bytes.Equal(got, down) {
		t.Errorf("the client has %d bytes, %v", len(got), err)
	}
	all.Wait()
	j.wantOutcome(t, outcomeDone)
	if j.relay.up.bytes != int64(len(up)) || j.relay.down.bytes != int64(len(down)) {
		t.Errorf("counted %d and %d bytes", j.relay.up.bytes, j.relay.down.bytes)
	}
}

// After the server has ended its stream, the client can still send.
func TestServerEndsFirst(t *testing.T) {
	j := join(t, time.Minute)
	send(t, j.server, []byte("hello"))
	_ = j.server.CloseWrite()
	wantRead(t, j.client, "hello")
	wantEnd(t, j.client, io.EOF)
	send(t, j.client, []byte("thanks"))
	_ = j.client.Close()
	wantRead(t, j.server, "thanks")
	wantEnd(t, j.server, io.EOF)
	j.wantOutcome(t, outcomeDone)
}

// A reset of one side is forwarded to the other.
func TestResets(t *testing.T) {
	for _, test := range []struct {
		name, outcome string
		ends          func(*joined) (resets, sees *net.TCPConn)
	}{
		{"of the client", outcomeClientReset, func(j *joined) (a, b *net.TCPConn) { return j.client, j.server }},
		{"of the server", outcomeServerReset, func(j *joined) (a, b *net.TCPConn) { return j.server, j.client }},
	} {
		t.Run(test.name, func(t *testing.T) {
			j := join(t, time.Minute)
			resets, sees := test.ends(j)
			send(t, resets, []byte("x"))
			wantRead(t, sees, "x")
			reset(resets)
			wantEnd(t, sees, syscall.ECONNRESET)
			j.wantOutcome(t, test.outcome)
		})
		t.Run(test.name+" after its half has ended", func(t *testing.T) {
			j := join(t, time.Minute)
			resets, sees := test.ends(j)
			// The reset is noticed only when data are forwarded to it.
			_ = resets.CloseWrite()
			wantEnd(t, sees, io.EOF)
			reset(resets)
			await(t, func() error {
				if _, err := sees.Write([]byte("x")); err == nil {
					return errors.New("a write succeeds")
				}
				return nil
			})
			j.wantOutcome(t, test.outcome)
		})
	}
}

// A response before the server closes the connection of a client that continues to
// send reaches the client, as without a proxy.
func TestAnswerBeforeReset(t *testing.T) {
	j := join(t, time.Minute)
	send(t, j.client, []byte("too much"))
	wantRead(t, j.server, "too ")
	answer := strings.Repeat("no ", 10000)
	send(t, j.server, []byte(answer))
	_ = j.server.CloseWrite()
	wantRead(t, j.client, answer)
	_ = j.server.Close() // with unread data, which makes it a reset
	wantEnd(t, j.client, io.EOF)
	for {
		if _, err := j.client.Write([]byte("x")); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	j.wantOutcome(t, outcomeServerReset)
}

// pass makes ticks happen without waiting for the clock, and ends early if the
// relay does.
func (j *joined) pass(n int) {
	for range n {
		select {
		case <-j.done:
			return
		default:
			j.relay.loop.pass()
		}
	}
}

// pass makes one tick happen.
func (l *loop) pass() {
	ticks := func() uint32 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.ticks
	}
	for before := ticks(); ticks() == before; runtime.Gosched() {
		_ = l.file.SetReadDeadline(time.Unix(1, 0))
	}
}

// perIdle is how many ticks after its last activity a relay ends that may be idle
// for a minute. The clock adds a tick a second.
const perIdle = int(time.Minute/mostWait) + 1

// An idle relay ends in order on both sides, neither earlier nor later.
func TestIdle(t *testing.T) {
	t.Parallel()
	for name, talk := range map[string]func(*testing.T, *joined){
		"no data": func(*testing.T, *joined) {},
		"data of the client": func(t *testing.T, j *joined) {
			send(t, j.client, []byte("a"))
			wantRead(t, j.server, "a")
		},
		"data of the server after a pause": func(t *testing.T, j *joined) {
			j.pass(perIdle / 4)
			send(t, j.server, make([]byte, 1<<20))
			if _, err := io.ReadFull(j.client, make([]byte, 1<<20)); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			j := join(t, time.Minute)
			talk(t, j)
			j.pass(2 * perIdle)
			j.wantOutcome(t, outcomeIdle)
			if j.silent != uint32(perIdle) {
				t.Errorf("the relay ended %d ticks after its last activity, want %d", j.silent, perIdle)
			}
			wantEnd(t, j.client, io.EOF)
			wantEnd(t, j.server, io.EOF)
		})
	}
	t.Run("by the clock", func(t *testing.T) {
		t.Parallel()
		const idle = 160 * time.Millisecond
		begin := time.Now()
		j := join(t, idle)
		j.wantOutcome(t, outcomeIdle)
		if d := time.Since(begin); d < idle {
			t.Errorf("the relay ended after %s, want at least %s", d, idle)
		}
	})
}

// Data in one direction, or a slow reader of data in flight, keep a relay from being
// idle.
func TestNotIdle(t *testing.T) {
	t.Parallel()
	for name, server := range map[string]bool{"data of the client": false, "data of the server": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			j := join(t, time.Minute)
			from, to := j.client, j.server
			if server {
				from, to = to, from
			}
			for range 8 {
				send(t, from, []byte("a"))
				wantRead(t, to, "a")
				j.pass(perIdle / 4)
			}
			_ = from.Close()
			_ = to.Close()
			j.wantOutcome(t, outcomeDone)
		})
	}
	t.Run("a slow reader", func(t *testing.T) {
		t.Parallel()
		j := join(t, time.Minute)
		// The server has sent everything, and the relay's kernel holds most of it,
		// long before the reader has read all.
		_ = j.client.SetReadBuffer(512 << 10)
		raw, err := j.client.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		const size, piece = 8 << 20, 128 << 10
		go func() {
			send(t, j.server, make([]byte, size))
			_ = j.server.CloseWrite()
		}()
		for left := size; left > 0; left -= piece {
			if _, err := io.ReadFull(j.client, make([]byte, piece)); err != nil {
				t.Fatalf("%d bytes before the end: %v", left, err)
			}
			// More comes in, which is the progress that counts.
			queued := 0
			await(t, func() (err error) {
				if err := raw.Control(func(fd uintptr) { queued, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }); err != nil {
					return err
				}
				if err == nil && queued < min(left-piece, 16<<10) {
					err = fmt.Errorf("%d bytes before the end: %d bytes to read", left-piece, queued)
				}
				return err
			})
			if queued < left-piece { // otherwise the relay has nothing left to do
				j.pass(8)
			}
		}
		wantEnd(t, j.client, io.EOF)
		_ = j.client.Close()
		_ = j.server.Close()
		j.wantOutcome(t, outcomeDone)
	})
	t.Run("without a limit", func(t *testing.T) {
		t.Parallel()
		j := join(t, 0)
		j.pass(10 * perIdle)
		send(t, j.client, []byte("a"))
		wantRead(t, j.server, "a")
		j.stop()
		j.wantOutcome(t, outcomeStopped)
		wantEnd(t, j.client, syscall.ECONNRESET)
		wantEnd(t, j.server, syscall.ECONNRESET)
	})
}

// Relays without data hold no pipes. (Standard output and error may be pipes.)
func TestIdleHoldsNoPipes(t *testing.T) {
	var all []*joined
	l := startLoop(t, 0)
	for range 50 {
		j := joinIn(t, l)
		for range 2 {
			send(t, j.client, []byte("a"))
			wantRead(t, j.server, "a")
			send(t, j.server, []byte("b"))
			wantRead(t, j.client, "b")
		}
		all = append(all, j)
	}
	// Pipes of other tests' io.Copy remain until the second garbage collection.
	await(t, func() error {
		runtime.GC()
		if n := pipes(t); n >= len(all) {
			return fmt.Errorf("%d descriptors of pipes for %d connections", n, len(all))
		}
		return nil
	})
	for _, j := range all {
		j.stop()
		j.wantOutcome(t, outcomeStopped)
	}
}

// pipes returns the number of descriptors of pipes.
func pipes(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}
