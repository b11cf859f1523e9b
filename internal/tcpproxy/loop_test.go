package tcpproxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/splice"
)

// The ways in which a program ends its half of a connection.
type ending int

const (
	closes        ending = iota // in order after all data; it reads to the end
	resets                      // by a reset after all data
	resetsHalfway               // by a reset after a part of the data
)

// A part is the behaviour of a program at one end of a connection.
type part struct {
	random *rand.Rand
	data   []byte
	ending ending
	part   int // number of bytes that are sent

	got  []byte
	err  error // error of reading
	lost bool  // a write was reset, which a read need not return again
}

// newPart returns the behaviour of one end of connection n, at random but repeatable.
// Both ends of an even number close in order.
func newPart(n, side uint64) *part {
	p := &part{random: rand.New(rand.NewPCG(n, side))}
	sizes := []int{0, 1, 100, shortPiece - 1, shortPiece, shortPiece + 1, 100_000, 1_000_000}
	p.data = make([]byte, sizes[p.random.IntN(len(sizes))]+p.random.IntN(3))
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], n)
	seed[8] = byte(side)
	_, _ = rand.NewChaCha8(seed).Read(p.data)
	p.part = len(p.data)
	if n%2 == 1 {
		if p.ending = ending(p.random.IntN(3)); p.ending == resetsHalfway {
			p.part = p.random.IntN(len(p.data) + 1)
		}
	}
	return p
}

// play sends and reads in pieces of random length with pauses.
func (p *part) play(conn *net.TCPConn, random *rand.Rand) {
	var both sync.WaitGroup
	both.Go(func() {
		for left := p.data[:p.part]; len(left) > 0; {
			n := min(len(left), 1+random.IntN(200_000))
			if _, err := conn.Write(left[:n]); err != nil {
				p.lost = errors.Is(err, syscall.ECONNRESET)
				return
			}
			left = left[n:]
			if random.IntN(4) == 0 {
				time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond)
			}
		}
		if p.ending == closes {
			_ = conn.CloseWrite()
		} else {
			reset(conn)
		}
	})
	buffer := make([]byte, 50_000)
	for p.err == nil {
		var n int
		n, p.err = conn.Read(buffer[:1+p.random.IntN(len(buffer))])
		p.got = append(p.got, buffer[:n]...)
		if p.random.IntN(20) == 0 {
			time.Sleep(time.Duration(p.random.IntN(2000)) * time.Microsecond)
		}
	}
	both.Wait()
	_ = conn.Close()
}

// check compares the data that a program has read with those that the other sent.
func (p *part) check(other *part) error {
	if !bytes.HasPrefix(other.data, p.got) {
		return fmt.Errorf("%d bytes that are not those that were sent", len(p.got))
	}
	switch {
	case p.ending != closes:
		return nil // it may have read anything
	case other.ending != closes:
		if !errors.Is(p.err, syscall.ECONNRESET) && !p.lost {
			return fmt.Errorf("%v after a reset", p.err)
		}
	case p.err != io.EOF || len(p.got) != len(other.data):
		return fmt.Errorf("%d bytes of %d, %v", len(p.got), len(other.data), p.err)
	}
	return nil
}

// All data between two programs arrive completely and in order, with pieces of any size
// and any kind of end; a reset never looks like the end of a stream. No descriptor is left.
func TestAnyConversation(t *testing.T) {
	const conversations, atOnce = 600, 40
	l, err := net.Listen("tcp", "127.0.1.1:84")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var served sync.Map // by number
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(patience))
				var number [8]byte
				if _, err := io.ReadFull(conn, number[:]); err != nil {
					return // a client may reset the connection before
				}
				n := binary.BigEndian.Uint64(number[:])
				p := newPart(n, 1)
				p.play(conn.(*net.TCPConn), rand.New(rand.NewPCG(n, 3)))
				served.Store(n, p)
			})
		}
	})

	p, _, _ := newProxy(t, nil)
	apply(t, p, "7001 127.0.1.1 84\n7002 127.0.1.1 84")
	before := descriptors(t)
	var all sync.WaitGroup
	asked := make([]*part, conversations)
	turns := make(chan struct{}, atOnce)
	for i := range asked {
		turns <- struct{}{}
		all.Go(func() {
			defer func() { <-turns }()
			n := uint64(i)
			asked[i] = newPart(n, 0)
			// Connections that close in order have a port of their own, whose bytes
			// are counted.
			conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", 7001+i%2))
			if err != nil {
				t.Error(err)
				return
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
				t.Error(err)
			}
			asked[i].play(conn.(*net.TCPConn), rand.New(rand.NewPCG(n, 2)))
		})
	}
	all.Wait()
	_ = l.Close()
	serving.Wait()

	var sent, received int64
	for i, client := range asked {
		found, ok := served.Load(uint64(i))
		if !ok {
			if client.ending == closes {
				t.Errorf("conversation %d never reached the server", i)
			}
			continue
		}
		server := found.(*part)
		if i%2 == 0 {
			sent += 8 + int64(len(client.data))
			received += int64(len(server.data))
		}
		if err := client.check(server); err != nil {
			t.Errorf("conversation %d: the client has %v", i, err)
		}
		if err := server.check(client); err != nil {
			t.Errorf("conversation %d: the server has %v", i, err)
		}
	}
	up := Status{Destination: Destination{7001, "127.0.1.1", 84}, Addresses: 1, Looked: true}
	up.Counts = Counts{Connections: conversations / 2, Sent: sent, Received: received}
	wantDone(t, p)
	if got := p.Status()[0].Counts; got != up.Counts {
		t.Errorf("counted %+v, want %+v", got, up.Counts)
	}
	if got := p.Status()[1].Counts; got.Connections != conversations/2 || got.Failed != 0 {
		t.Errorf("counted %+v", got)
	}
	wantDescriptors(t, before-1) // without the listener
}

// wantDone waits until the proxy has no connections.
func wantDone(t *testing.T, p *Proxy) {
	t.Helper()
	await(t, func() error {
		if n := p.Open(); n > 0 {
			return fmt.Errorf("%d connections are open, want none", n)
		}
		return nil
	})
}

// descriptors returns the number of open descriptors except pipes, which loops keep
// for a while.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries) - pipes(t)
}

func wantDescriptors(t *testing.T, want int) {
	t.Helper()
	await(t, func() error {
		if n := descriptors(t); n > want {
			return fmt.Errorf("%d descriptors, want %d", n, want)
		}
		return nil
	})
}

// Connections with and without a server leave no descriptor and no goroutine; nor does
// a proxy after Shutdown.
func TestNothingIsLeft(t *testing.T) {
	serve(t, "127.0.1.1:80")
	goroutines, before := runtime.NumGoroutine(), descriptors(t)
	p, n, _ := newProxy(t, func(o *Options) { o.AccessLog, o.SendProxy = true, true })
	n.set("a.example", "127.0.1.1", "127.0.1.9")
	n.set("dead.example", "127.0.1.7", "127.0.1.8", "127.0.1.9")
	apply(t, p, "7001 127.0.1.1 80\n7002 a.example 80\n7003 nowhere.example 80\n7004 dead.example 1")
	listening := descriptors(t)
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", 7001+i%4))
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("hi\n"))
			if i%3 == 0 {
				reset(conn.(*net.TCPConn))
				return
			}
			_, _ = conn.Read(make([]byte, 100))
			_ = conn.Close()
		})
	}
	all.Wait()
	wantDone(t, p)
	wantDescriptors(t, listening)
	p.Shutdown(0)
	wantDescriptors(t, before)
	await(t, func() error {
		if n := runtime.NumGoroutine(); n > goroutines {
			stacks := make([]byte, 1<<20)
			return fmt.Errorf("%d goroutines, want %d:\n%s", n, goroutines, stacks[:runtime.Stack(stacks, true)])
		}
		return nil
	})
}

// A relay whose sender never pauses, and one whose receiver reads nothing, do not
// starve another relay of the same loop.
func TestTurnsInLoop(t *testing.T) {
	l := startLoop(t, 0)
	stuck, busy, other := joinIn(t, l), joinIn(t, l), joinIn(t, l)
	for _, c := range []*net.TCPConn{stuck.client, busy.client, busy.server} {
		_ = c.SetDeadline(time.Time{})
	}
	piece := make([]byte, 1<<20)
	_ = stuck.server.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err := error(nil); err == nil; {
		_, err = stuck.server.Write(piece)
	}
	go func() {
		for {
			if _, err := busy.server.Write(piece); err != nil {
				return
			}
		}
	}()
	var moved atomic.Int64
	go func() {
		for {
			n, err := io.CopyN(io.Discard, busy.client, 1<<20)
			moved.Add(n)
			if err != nil {
				return
			}
		}
	}()
	for range 200 { // all within the deadline of the connections
		before := moved.Load()
		send(t, other.client, []byte("a"))
		wantRead(t, other.server, "a")
		await(t, func() error {
			if moved.Load() == before {
				return errors.New("no data of the sender that never stops")
			}
			return nil
		})
	}
}

// A turn of a relay with more data than its limit ends, and the rest is reported.
func TestTurnEnds(t *testing.T) {
	l, err := newLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	defer l.pipes.Close()
	client, near := pair(t)
	far, server := pair(t)
	for _, c := range []*net.TCPConn{client, near, far, server} {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) {
			const size = 32 << 20
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	go func() { _, _ = io.Copy(io.Discard, server) }()
	const size = 6 * turn
	send(t, client, make([]byte, size))
	r := newRelay(descriptor(t, near))
	r.loop, r.server.fd = l, descriptor(t, far)
	defer rawClose(r.client.fd)
	defer rawClose(r.server.fd)
	await(t, func() error {
		queued, err := unix.IoctlGetInt(int(r.client.fd), unix.SIOCINQ)
		if err == nil && queued != size {
			err = fmt.Errorf("%d bytes have arrived, want %d", queued, size)
		}
		return err
	})
	r.client.readable = true
	if more := r.run(); !more || r.up.bytes > turn+splice.Capacity {
		t.Errorf("moved %d bytes in a turn, more %t", r.up.bytes, more)
	}
}

// Relays that always have more data, so that one turn of all takes longer than a tick,
// do not keep the loop from reading events.
func TestTurnsLongerThanTicks(t *testing.T) {
	l := startLoop(t, looks*leastWait)
	piece := make([]byte, 1<<20)
	for range 24 {
		j := joinIn(t, l)
		for _, c := range []*net.TCPConn{j.client, j.server} {
			go func() {
				for {
					if _, err := c.Write(piece); err != nil {
						return
					}
				}
			}()
			go func() { _, _ = io.Copy(io.Discard, c) }()
		}
	}
	for range 3 {
		j := joinIn(t, l, 'a')
		wantRead(t, j.server, "a")
	}
}

// limit limits the descriptors of the process to a few more than it has.
func limit(t *testing.T, more int) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// The limit is on the number of the next descriptor, and there may be gaps.
	next, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(next)
	lower := before
	lower.Cur = uint64(next + more)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lower); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	})
}

// Without a descriptor for a pipe, data are copied.
func TestNoPipes(t *testing.T) {
	j := join(t, 0)
	limit(t, 0)
	data := make([]byte, 5<<20)
	for i := range data {
		data[i] = byte(i * i / 255)
	}
	go func() {
		_, _ = j.server.Write(data)
		_ = j.server.CloseWrite()
	}()
	got, err := io.ReadAll(j.client)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
	}
	_ = j.client.Close()
	j.wantOutcome(t, outcomeDone)
}

// A lack of descriptors is logged once, ends no existing connection, and delays new
// ones only until descriptors are free.
func TestDescriptorsExhausted(t *testing.T) {
	serve(t, "127.0.1.1:80")
	p, _, book := newProxy(t, nil)
	apply(t, p, "7001 127.0.1.1 80")
	first := connect(t, 7001)
	first.ask(t, "127.0.1.1:80")
	waiting := connect(t, 7001) // its descriptors are open before the limit
	waiting.ask(t, "127.0.1.1:80")

	var socket int32
	var errno syscall.Errno
	if socket, errno = rawSocket(unix.AF_INET); errno != 0 {
		t.Fatal(errno)
	}
	if err := unix.SetNonblock(int(socket), false); err != nil {
		t.Fatal(err)
	}
	defer rawClose(socket)
	limit(t, 0)
	if err := unix.Connect(int(socket), &unix.SockaddrInet4{Port: 7001, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if n, errno := rawWrite(socket, []byte("hi\n")); n != 3 {
		t.Fatal(errno)
	}
	await(t, func() error {
		if !strings.Contains(book.String(), "accepting connections failed") {
			return errors.New("the log has no failure")
		}
		return nil
	})
	time.Sleep(100 * time.Millisecond) // in which it fails again
	first.wantEcho(t)
	if n := strings.Count(book.String(), "accepting connections failed"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, book)
	}
	_ = first.Close()
	_ = waiting.Close()
	answer := make([]byte, 100)
	if n, errno := rawRead(socket, answer); errno != 0 || !strings.HasPrefix(string(answer[:max(n, 0)]), "127.0.1.1:80") {
		t.Errorf("the connection that waited got %q, %v", answer[:max(n, 0)], errno)
	}
}

// silentServer listens at port 85 of an address and answers no connection.
func silentServer(t *testing.T, addr [4]byte) {
	t.Helper()
	socket := func() int {
		fd, errno := rawSocket(unix.AF_INET)
		if errno != 0 {
			t.Fatal(errno)
		}
		t.Cleanup(func() { rawClose(fd) })
		return int(fd)
	}
	silent, at := socket(), &unix.SockaddrInet4{Port: 85, Addr: addr}
	if err := errors.Join(unix.Bind(silent, at), unix.Listen(silent, 0)); err != nil {
		t.Fatal(err)
	}
	// Its queue holds one connection, and the kernel drops the segments of any
	// other (listen(2)).
	if err := unix.Connect(socket(), at); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	await(t, func() error {
		another := socket()
		_ = unix.Connect(another, at)
		if _, err := unix.Getpeername(another); err == nil {
			return errors.New("the queue has room")
		}
		return nil
	})
}

// A server that does not answer is given up after the connect timeout, and its
// client is connected to another one; new clients are at once.
func TestSilentServer(t *testing.T) {
	t.Parallel()
	silentServer(t, [4]byte{127, 0, 1, 3})
	serve(t, "127.0.1.4:85")
	p, n, book := newProxy(t, func(o *Options) { o.Idle = 0 })
	p.dialTimeout = 2 * time.Second // the other server has as long on a busy machine
	n.set("a.example", "127.0.1.3", "127.0.1.4")
	apply(t, p, "7021 a.example 85")
	begin := time.Now()
	c := connect(t, 7021)
	connect(t, 7021).ask(t, "127.0.1.4:85")
	c.ask(t, "127.0.1.4:85")
	if d := time.Since(begin); d < p.dialTimeout {
		t.Errorf("the silent server was given up after %s, want %s", d, p.dialTimeout)
	}
	if !strings.Contains(book.String(), "127.0.1.3 error=\"connect: connection timed out\"") {
		t.Errorf("the log lacks the connection error:\n%s", book)
	}
}

// Shutdown does not wait for a server that does not answer.
func TestShutdownWhileConnecting(t *testing.T) {
	t.Parallel()
	silentServer(t, [4]byte{127, 0, 1, 5})
	p, _, _ := newProxy(t, nil)
	p.dialTimeout = 10 * patience
	apply(t, p, "7022 127.0.1.5 85")
	_ = connect(t, 7022)
	await(t, func() error {
		if p.Open() == 0 {
			return errors.New("the client is not accepted")
		}
		return nil
	})
	done := make(chan struct{})
	go func() {
		p.Shutdown(0)
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("Shutdown has not returned")
	}
}

// Data behind urgent data arrive.
func TestUrgent(t *testing.T) {
	j := join(t, time.Minute)
	raw, err := j.client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for i := range 40 {
		want = append(want, bytes.Repeat([]byte{byte('a' + i%26)}, 60_000+i)...)
	}
	go func() {
		for left := want; len(left) > 0; {
			n := min(len(left), 70_000)
			if _, err := j.client.Write(left[:n]); err != nil {
				return
			}
			left = left[n:]
			_ = raw.Write(func(fd uintptr) bool { return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) != unix.EAGAIN })
		}
		_ = j.client.CloseWrite()
	}()
	got, err := io.ReadAll(j.server)
	// Urgent data that others follow before the read are ordinary data (tcp(7)).
	if got = bytes.ReplaceAll(got, []byte("!"), nil); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	_ = j.server.Close()
	j.wantOutcome(t, outcomeDone)
}

// The same if all data and the end have arrived before the relay begins.
func TestUrgentBefore(t *testing.T) {
	client, near := pair(t)
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("a"), 45_000)
	send(t, client, want[:35_000])
	if err := raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	send(t, client, want[35_000:])
	_ = client.CloseWrite()
	awaitAcked(t, client)
	j := joinPair(t, startLoop(t, time.Minute), client, near)
	if got, err := io.ReadAll(j.server); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

// Without an idle timeout, or with a long one, both sockets have keepalive; in any case
// both have TCP_NODELAY.
func TestOptions(t *testing.T) {
	serve(t, "127.0.1.1:80")
	for idle, want := range map[time.Duration]int{0: 1, time.Minute: 0, time.Hour: 1} {
		t.Run(idle.String(), func(t *testing.T) {
			p, _, _ := newProxy(t, func(o *Options) { o.Idle = idle })
			apply(t, p, "7001 127.0.1.1 80")
			c := connect(t, 7001)
			c.ask(t, "127.0.1.1:80")
			c.wantEcho(t)
			found := 0
			for fd := range 1000 {
				local, err := unix.Getsockname(fd)
				peer, err2 := unix.Getpeername(fd)
				if err != nil || err2 != nil {
					continue
				}
				_, client := local.(*unix.SockaddrInet6)
				to, server := peer.(*unix.SockaddrInet4)
				if !client && (!server || to.Port != 80) {
					continue
				}
				found++
				on, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
				every, _ := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
				prompt, _ := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY)
				if on != want || want == 1 && every != 15 || prompt != 1 {
					t.Errorf("of %v to %v: keepalive %d every %d s, prompt %d", local, peer, on, every, prompt)
				}
			}
			if found != 2 {
				t.Errorf("%d sockets of the proxy", found)
			}
		})
	}
}
