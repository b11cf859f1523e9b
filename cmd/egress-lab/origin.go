package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The paths of the server behind the proxies. Clients check every answer.
const (
	smallPath = "/small" // one answer of answerSize bytes
	bulkPath  = "/bulk"  // an endless answer

	answerSize = 1 << 10
	filling    = 'x' // every byte of a body
)

// headEnd is the end of a header (RFC 9112 section 2.1).
var headEnd = []byte("\r\n\r\n")

// An origin is the server behind the measured proxies. Like the load, it is one thread with
// epoll(7), and parses as little of a request as possible: the proxies get the processor
// time that these two do not use.
type origin struct {
	poller   poller
	listener int
	visitors map[int]*visitor

	kept, closing, endless, bulk []byte
}

// A visitor is one connection of the origin.
type visitor struct {
	socket  int
	request []byte // received part
	endless bool   // it gets bytes until it closes
}

// runOrigin serves at an address until the process is killed. It prints a line when it
// listens.
func runOrigin(args []string, _ io.Reader, stdout io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("reading the arguments of the origin: %q", args)
	}
	at, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return fmt.Errorf("reading the arguments of the origin: %w", err)
	}
	o, err := newOrigin(at)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, ready)
	for {
		if err := o.poller.wait(-1, o.handle); err != nil {
			return err
		}
	}
}

func newOrigin(at netip.AddrPort) (*origin, error) {
	o := &origin{visitors: map[int]*visitor{}, bulk: bytes.Repeat([]byte{filling}, bulk)}
	head := "HTTP/1.1 200 OK\r\nDate: " + time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT") + "\r\nContent-Type: text/plain\r\n"
	body := fmt.Sprintf("Content-Length: %d\r\n\r\n%s", answerSize, strings.Repeat(string(filling), answerSize))
	o.kept = []byte(head + body)
	o.closing = []byte(head + "Connection: close\r\n" + body)
	o.endless = []byte(head + "Connection: close\r\n\r\n")
	var err error
	if o.poller, err = newPoller(); err != nil {
		return nil, err
	}
	o.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		err = errors.Join(
			unix.SetsockoptInt(o.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.Bind(o.listener, address(at)),
			unix.Listen(o.listener, unix.SOMAXCONN),
			o.poller.add(o.listener, unix.EPOLLIN),
		)
	}
	if err != nil {
		return nil, fmt.Errorf("listening at %q: %w", at, err)
	}
	return o, nil
}

// handle handles the events of a socket. Only errors of the listener end the origin: a
// client without an answer reports an error itself.
func (o *origin) handle(socket int, events uint32) error {
	if socket == o.listener {
		return o.accept()
	}
	v := o.visitors[socket]
	var err error
	if v.endless {
		err = o.pour(v)
	}
	if err == nil && events&^unix.EPOLLOUT != 0 {
		err = o.read(v)
	}
	if err != nil {
		delete(o.visitors, socket)
		_ = unix.Close(socket)
	}
	return nil
}

func (o *origin) accept() error {
	for {
		socket, _, err := unix.Accept4(o.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil:
			return fmt.Errorf("accepting a connection: %w", err)
		}
		_ = unix.SetsockoptInt(socket, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		o.visitors[socket] = &visitor{socket: socket}
		if err := o.poller.add(socket, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

// errDone ends a visitor's connection.
var errDone = errors.New("the connection has ended")

func (o *origin) read(v *visitor) error {
	var buf [4096]byte
	n, err := read(v.socket, buf[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return err
	case n == 0:
		return errDone
	}
	v.request = append(v.request, buf[:n]...)
	for {
		head, rest, whole := bytes.Cut(v.request, headEnd)
		if !whole {
			return nil
		}
		if err := o.answer(v, head); err != nil {
			return err
		}
		v.request = append(v.request[:0], rest...)
	}
}

func (o *origin) answer(v *visitor, head []byte) error {
	answer, last := o.kept, false
	switch {
	case bytes.HasPrefix(head, []byte("GET "+bulkPath+" ")):
		answer, v.endless = o.endless, true
	case !bytes.HasPrefix(head, []byte("GET "+smallPath+" ")):
		return errDone
	case bytes.Contains(head, []byte("\nConnection: close")):
		answer, last = o.closing, true
	}
	n, err := write(v.socket, answer)
	switch {
	case err != nil:
		return err
	case n < len(answer) || last:
		return errDone
	case v.endless:
		return o.poller.change(v.socket, unix.EPOLLIN|unix.EPOLLOUT)
	}
	return nil
}

// pour writes as much as the connection takes, up to a limit for the other connections.
func (o *origin) pour(v *visitor) error {
	for range 8 {
		if _, err := write(v.socket, o.bulk); errors.Is(err, unix.EAGAIN) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// A poller waits for sockets (epoll(7)).
type poller struct {
	epoll  int
	events []unix.EpollEvent
}

func newPoller() (poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return poller{}, fmt.Errorf("making a poller: %w", err)
	}
	return poller{epoll, make([]unix.EpollEvent, 256)}, nil
}

func (p *poller) add(socket int, events uint32) error {
	return p.set(unix.EPOLL_CTL_ADD, socket, events)
}

func (p *poller) change(socket int, events uint32) error {
	return p.set(unix.EPOLL_CTL_MOD, socket, events)
}

func (p *poller) set(how, socket int, events uint32) error {
	if err := unix.EpollCtl(p.epoll, how, socket, &unix.EpollEvent{Events: events, Fd: int32(socket)}); err != nil {
		return fmt.Errorf("waiting for a socket: %w", err)
	}
	return nil
}

// wait waits for events, for some milliseconds at most or without a limit (-1), and handles
// them.
func (p *poller) wait(milliseconds int, handle func(socket int, events uint32) error) error {
	n, err := interrupted(func() (int, error) { return unix.EpollWait(p.epoll, p.events, milliseconds) })
	if err != nil {
		return fmt.Errorf("waiting for sockets: %w", err)
	}
	for _, e := range p.events[:n] {
		if err := handle(int(e.Fd), e.Events); err != nil {
			return err
		}
	}
	return nil
}
