package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	frames "github.com/egress-router/egress-router/internal/echo"
)

// An Echoed is the result of echo requests that must not be fragmented.
type Echoed struct {
	Largest  int        // size of the largest packet that was answered, in bytes; 0: none
	Reported int        // MTU of an ICMP error about the size, in bytes; 0: none came
	By       netip.Addr // sender of that error
	TTL      int        // of an answer; 0: unknown
}

// SmallEcho is the size of the smallest echo request, in bytes.
const SmallEcho = 84

// steps are the sizes of packets that are tried after the largest one was lost: the MTUs of
// common links (RFC 1191, section 7.1), and of tunnels in an Ethernet.
var steps = []int{576, 1280, 1400, 1450, 1480, 1492}

// The types of messages (RFC 792, RFC 4443).
const (
	echoRequest, echoReply   = 8, 0
	echoRequest6, echoReply6 = 128, 129
)

// icmpHeader is the length of the header of an echo message, in bytes.
const icmpHeader = 8

// Echo sends echo requests of two sizes to a host, a small one and one of size bytes with
// the IP header, and, if only the small one is answered, some of sizes between. patience is
// the time for the answers of one round, of which there are at most two. It needs
// CAP_NET_RAW.
//
// The requests must not be fragmented, and the MTU that the kernel knows for the path does
// not matter (IP_PMTUDISC_PROBE, ip(7)).
func Echo(ctx context.Context, from From, to netip.Addr, size int, patience time.Duration) (Echoed, error) {
	protocol, level, option := unix.IPPROTO_ICMP, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if to.Is6() {
		protocol, level, option = unix.IPPROTO_ICMPV6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	s, err := from.open(unix.SOCK_RAW, protocol)
	if err != nil {
		return Echoed{}, err
	}
	defer s.close()
	defer context.AfterFunc(ctx, func() { _ = s.file.SetDeadline(time.Unix(1, 0)) })()
	if err := s.control(func(fd int) error {
		if err := unix.SetsockoptInt(fd, level, option, unix.IP_PMTUDISC_PROBE); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		return unix.Connect(fd, sockaddr(netip.AddrPortFrom(to, 0)))
	}); err != nil {
		return Echoed{}, err
	}
	e := echo{socket: s, id: uint16(rand.Uint32())} //nolint:gosec // any
	if err := e.round(time.Now().Add(patience), SmallEcho, size); err != nil {
		return e.found, err
	}
	if e.found.Largest == SmallEcho && size > SmallEcho && e.found.Reported == 0 {
		between := slices.DeleteFunc(slices.Clone(steps), func(n int) bool { return n >= size })
		err = e.round(time.Now().Add(patience), between...)
	}
	return e.found, err
}

// An echo is a sequence of echo requests, each of which has its size as its sequence number.
type echo struct {
	*socket
	id    uint16
	found Echoed
}

// headers returns the length of the headers in front of the data of a request, in bytes.
func (e *echo) headers() int {
	if e.ipv6 {
		return 40 + icmpHeader
	}
	return 20 + icmpHeader
}

// round sends requests of all sizes, and reads answers until all have come, or until the
// given time.
func (e *echo) round(until time.Time, sizes ...int) error {
	wanted := make(map[int]bool)
	for _, size := range sizes {
		err := e.control(func(fd int) error { return unix.Send(fd, e.request(size), 0) })
		switch {
		case err == nil:
			wanted[size] = true
		case !errors.Is(err, unix.EMSGSIZE) && !e.queued():
			return os.NewSyscallError("send", err)
		}
	}
	b := make([]byte, 64<<10)
	for len(wanted) > 0 {
		n, err := e.read(b, until)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			if !e.queued() {
				return nil // unreachable: not answered
			}
		default:
			delete(wanted, e.answer(b[:n]))
		}
	}
	return nil
}

// queued reads the errors of the socket, and reports whether there were any.
func (e *echo) queued() (any bool) {
	for {
		icmp, ok := e.failure()
		if !ok {
			return any
		}
		any = true
		if icmp.MTU > 0 && icmp.By.IsValid() {
			e.found.Reported, e.found.By = icmp.MTU, icmp.By
		}
	}
}

// request returns an echo request of a size with its headers. The kernel adds the checksum
// of ICMPv6.
func (e *echo) request(size int) []byte {
	b := bytes.Repeat([]byte{0}, size-e.headers()+icmpHeader)
	if b[0] = echoRequest; e.ipv6 {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(b[4:], e.id)
	binary.BigEndian.PutUint16(b[6:], uint16(size)) //nolint:gosec // an MTU below 64 KiB
	if !e.ipv6 {
		binary.BigEndian.PutUint16(b[2:], frames.Checksum(b, 0))
	}
	return b
}

// answer takes an answer, and returns the size of its request; 0: it is another packet.
func (e *echo) answer(b []byte) int {
	reply, ttl := byte(echoReply6), 0
	if !e.ipv6 { // a raw socket of IPv4 receives the IP header, too (raw(7))
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return 0
		}
		reply, ttl = echoReply, int(b[8])
		b = b[int(b[0]&15)*4:]
	}
	if len(b) < icmpHeader || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != e.id {
		return 0
	}
	size := int(binary.BigEndian.Uint16(b[6:]))
	e.found.Largest, e.found.TTL = max(e.found.Largest, size), ttl
	return size
}
