package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A drive is a load that a process of its own puts on a proxy.
type drive struct {
	Kind    driveKind
	Clients int            // clients at once
	Rate    int            // requests a second of all clients of driveKept; zero: as many as are answered
	Sent    bool           // with Rate: an answer's time begins when its request is sent, as without one, not when it is due
	For     time.Duration  // measured time, after warmUp
	To      netip.AddrPort // proxy
	Server  netip.AddrPort // server in the requests to an HTTP proxy
}

type driveKind string

// The loads. All but the endless ones request the small answer repeatedly.
const (
	driveKept   driveKind = "http-kept"   // by an HTTP proxy, on one connection for each client
	driveNew    driveKind = "http-new"    // on a new connection each time
	driveTunnel driveKind = "http-tunnel" // through a new tunnel each time
	drivePour   driveKind = "http-pour"   // bytes through a tunnel for each client
	driveIdle   driveKind = "http-idle"   // once for each client, whose connection then stays

	driveDirect     driveKind = "tcp-new" // the same by a proxy without HTTP
	driveDirectPour driveKind = "tcp-pour"
	driveDirectIdle driveKind = "tcp-idle"
)

// A drove is the result of a drive.
type drove struct {
	Rate     float64 // answers a second
	P50, P99 float64 // times of one answer, in ms
	Gbit     float64 // gigabits a second of the endless answers
	Answers  int     // all answers, including those of warmUp

	// Processor is the processor time of the proxy for one answer, in µs. The process
	// that starts the load sets it.
	Processor float64 `json:"-"`
}

// ready is the line that a process of the benchmark prints when it is ready.
const ready = "ready"

// The time before a drive measures, and the limit of its wait for answers, which only ends
// a drive that hangs.
const (
	warmUp   = 100 * time.Millisecond
	lastWait = time.Minute
)

// runDrive is the process of a drive. An idle drive stays until its input ends.
func runDrive(args []string, stdin io.Reader, stdout io.Writer) error {
	var d drive
	if err := json.Unmarshal([]byte(strings.Join(args, " ")), &d); err != nil {
		return fmt.Errorf("reading the arguments of the drive: %w", err)
	}
	g, err := newGenerator(d)
	if err != nil {
		return err
	}
	result, err := g.run()
	if err != nil {
		return fmt.Errorf("%s with %d clients: %w", d.Kind, d.Clients, err)
	}
	if d.idles() {
		fmt.Fprintln(stdout, ready)
		_, err := io.Copy(io.Discard, stdin)
		return err
	}
	return json.NewEncoder(stdout).Encode(result)
}

func (d drive) idles() bool { return d.Kind == driveIdle || d.Kind == driveDirectIdle }
func (d drive) pours() bool { return d.Kind == drivePour || d.Kind == driveDirectPour }

// A generator runs all clients in one thread.
type generator struct {
	drive
	poller poller
	byFD   map[int]*visit
	buf    []byte

	tunnel, request []byte // first and second request
	again           bool   // repeat the request on the same connection

	timer   int       // timerfd_create(2), for the next of those that rest
	due     time.Time // of the next request, with a rate
	resting []*visit  // in the order of their requests

	counting  bool
	begin     time.Time
	stopping  bool
	open      int // clients that wait for an answer or read an endless one
	begun     int // endless answers
	made      int // connections
	bytes     int
	answers   int
	latencies []time.Duration
}

// A visit is the state of one client.
type visit struct {
	socket int
	begin  time.Time
	state  visitState
	answer []byte
}

type visitState uint8

const (
	connecting visitState = iota
	inTunnelAnswer
	inAnswer
	inEndless
)

func newGenerator(d drive) (*generator, error) {
	g := &generator{drive: d, byFD: map[int]*visit{}, buf: make([]byte, 256<<10), latencies: make([]time.Duration, 0, 1<<20)}
	path, closing := smallPath, "Connection: close\r\n"
	if d.pours() {
		path, closing = bulkPath, ""
	}
	if d.Kind == driveKept || d.idles() {
		closing, g.again = "", d.Kind == driveKept
	}
	url := path
	switch d.Kind {
	case driveKept, driveNew, driveIdle:
		url = "http://" + d.Server.String() + path
	case driveTunnel, drivePour:
		g.tunnel = fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", d.Server)
	}
	g.request = fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: egress-lab\r\nAccept: */*\r\n%s\r\n", url, d.Server, closing)
	var err error
	if g.poller, err = newPoller(); err != nil || d.Rate == 0 {
		return g, err
	}
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return g, fmt.Errorf("making a timer: %w", err)
	}
	return g, g.poller.add(g.timer, unix.EPOLLIN)
}

// close closes all connections.
func (g *generator) close() {
	for socket := range g.byFD {
		_ = unix.Close(socket)
	}
	_ = unix.Close(g.poller.epoll)
	if g.Rate > 0 {
		_ = unix.Close(g.timer)
	}
}

func (g *generator) run() (drove, error) {
	atOnce := g.Clients
	if g.idles() {
		atOnce = min(atOnce, 16)
	}
	for range atOnce {
		if err := g.connect(&visit{}); err != nil {
			return drove{}, err
		}
	}
	if g.idles() {
		return drove{}, g.until(time.Now().Add(time.Minute), func() bool { return g.open == 0 })
	}
	if g.pours() {
		if err := g.until(time.Now().Add(lastWait), func() bool { return g.begun == g.Clients }); err != nil {
			return drove{}, err
		}
	}
	if err := g.during(warmUp); err != nil {
		return drove{}, err
	}
	g.counting, g.begin = true, time.Now()
	if err := g.during(g.For); err != nil {
		return drove{}, err
	}
	// On a busy machine a short time can pass without an answer: a rate of 0 would not
	// be a measurement.
	if err := g.until(time.Now().Add(lastWait), func() bool { return len(g.latencies) > 0 || g.bytes > 0 }); err != nil {
		return drove{}, err
	}
	took := time.Since(g.begin).Seconds()
	result := drove{Rate: float64(len(g.latencies)) / took, Gbit: float64(g.bytes) * 8 / 1e9 / took}
	if g.pours() {
		return result, nil
	}
	// Requests without an answer count for the latency: they may be the slow ones.
	g.stopping = true
	g.open -= len(g.resting)
	g.resting = nil
	if err := g.until(time.Now().Add(lastWait), func() bool { return g.open == 0 }); err != nil {
		return drove{}, err
	}
	all := make([]float64, len(g.latencies))
	for i, l := range g.latencies {
		all[i] = milliseconds(l)
	}
	slices.Sort(all)
	result.Answers = g.answers
	result.P50, result.P99 = all[len(all)/2], all[len(all)*99/100]
	return result, nil
}

// during handles events for some time.
func (g *generator) during(d time.Duration) error {
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := g.poller.wait(1, g.handle); err != nil {
			return err
		}
	}
	return nil
}

// until handles events until a condition holds. Reaching the time end is an error.
func (g *generator) until(end time.Time, holds func() bool) error {
	for !holds() {
		if time.Now().After(end) {
			return fmt.Errorf("waiting for answers: %d clients without one", g.open)
		}
		if err := g.poller.wait(1, g.handle); err != nil {
			return err
		}
	}
	return nil
}

// connect begins a visit. With edge triggering, a socket is added to the poller once.
func (g *generator) connect(v *visit) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("making a socket: %w", err)
	}
	_ = unix.SetsockoptInt(socket, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	*v = visit{socket: socket, begin: time.Now(), answer: v.answer[:0]}
	g.byFD[socket] = v
	g.open++
	g.made++
	if err := unix.Connect(socket, address(g.To)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connecting: %w", err)
	}
	return g.poller.add(socket, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET)
}

// handle continues a visit.
func (g *generator) handle(socket int, events uint32) error {
	if g.Rate > 0 && socket == g.timer {
		if _, err := read(g.timer, g.buf[:8]); err != nil && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("reading the timer: %w", err)
		}
		return g.wake()
	}
	v := g.byFD[socket]
	if v == nil {
		return nil
	}
	if v.state == connecting {
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			code, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_ERROR)
			return fmt.Errorf("connecting: %w", errors.Join(err, unix.Errno(code)))
		}
		if err := g.ask(v); err != nil {
			return err
		}
	}
	for {
		n, err := read(socket, g.buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("reading: %w", err)
		case v.state == inEndless:
			return g.pour(g.buf[:n])
		}
		if over, err := g.take(v, g.buf[:n]); over || err != nil {
			return err
		}
	}
}

// pour takes a part of an endless answer.
func (g *generator) pour(p []byte) error {
	if n := len(p); n == 0 || p[0] != filling || p[n-1] != filling {
		return errors.New("reading: the bytes ended, or are not the server's")
	}
	if g.counting {
		g.bytes += len(p)
	}
	return nil
}

// ask sends the first request of a new connection.
func (g *generator) ask(v *visit) error {
	if g.tunnel != nil {
		v.state = inTunnelAnswer
		return send(v.socket, g.tunnel)
	}
	v.state = inAnswer
	return send(v.socket, g.request)
}

// take adds a part of an answer, an empty one at the end of the connection, and reports
// whether the visit is over.
func (g *generator) take(v *visit, part []byte) (over bool, err error) {
	v.answer = append(v.answer, part...)
	ended := len(part) == 0
	head, body, whole := bytes.Cut(v.answer, headEnd)
	if !whole {
		if ended {
			return false, fmt.Errorf("the connection ended in %q", v.answer)
		}
		return false, nil
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return false, fmt.Errorf("the answer is %q", v.answer)
	}
	switch {
	case v.state == inTunnelAnswer:
		if len(body) > 0 || ended {
			return false, fmt.Errorf("the tunnel begins with %q", body)
		}
		v.state, v.answer = inAnswer, v.answer[:0]
		return false, send(v.socket, g.request)
	case g.pours():
		v.state = inEndless
		g.begun++
		return true, g.poller.change(v.socket, unix.EPOLLIN) // each in turn
	case len(body) < answerSize && !ended:
		return false, nil
	}
	if !bytes.Contains(head, contentLength) || !bytes.Equal(body, smallBody) {
		return false, fmt.Errorf("the answer is %q", v.answer)
	}
	if !g.again && !g.idles() && !ended {
		return false, nil // the server closes
	}
	return true, g.finish(v)
}

var (
	contentLength = []byte("\r\nContent-Length: " + strconv.Itoa(answerSize))
	smallBody     = bytes.Repeat([]byte{filling}, answerSize)
)

// finish counts an answer and begins the next request.
func (g *generator) finish(v *visit) error {
	now := time.Now()
	g.answers++
	if g.counting {
		g.latencies = append(g.latencies, now.Sub(v.begin))
	}
	switch {
	case g.idles():
		g.open--
		if g.made < g.Clients {
			return g.connect(&visit{})
		}
		return nil
	case g.again && !g.stopping && g.Rate > 0:
		return g.rest(v, now)
	case g.again && !g.stopping:
		v.begin, v.answer = now, v.answer[:0]
		return send(v.socket, g.request)
	}
	g.open--
	delete(g.byFD, v.socket)
	if err := unix.Close(v.socket); err != nil || g.stopping {
		return err
	}
	return g.connect(v)
}

// rest lets a visit wait until its next request is due. Unless Sent, the time of the answer
// begins then, also if all clients were waiting for answers.
func (g *generator) rest(v *visit, now time.Time) error {
	if g.due.IsZero() {
		g.due = now
	}
	g.due = g.due.Add(time.Second / time.Duration(g.Rate))
	v.begin, v.answer = g.due, v.answer[:0]
	g.resting = append(g.resting, v)
	return g.wake()
}

// wake begins the requests that are due, and sets the timer for the next one.
func (g *generator) wake() error {
	for len(g.resting) > 0 {
		v := g.resting[0]
		if wait := time.Until(v.begin); wait > 0 {
			at := unix.ItimerSpec{Value: unix.NsecToTimespec(wait.Nanoseconds())}
			return os.NewSyscallError("timerfd_settime", unix.TimerfdSettime(g.timer, 0, &at, nil))
		}
		g.resting = g.resting[1:]
		if g.Sent {
			v.begin = time.Now()
		}
		if err := send(v.socket, g.request); err != nil {
			return err
		}
	}
	return nil
}

// send sends bytes that fit into the socket's buffer.
func send(socket int, p []byte) error {
	n, err := write(socket, p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	return nil
}
