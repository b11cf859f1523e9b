package arp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/ndp"
)

// ErrGone reports that the interface was deleted, or moved to another network
// namespace. A new interface with the same name is another one.
var ErrGone = errors.New("interface is gone")

// A port sends and receives on one interface. A conn uses the kernel; tests with
// timers use a fake.
type port interface {
	// send sends a frame to all hosts on the link.
	send(frame []byte) error

	// receive waits for a packet until the given time; zero: without a limit. At
	// that time the error is an os.ErrDeadlineExceeded. It also returns a packet
	// that arrived before the given time if it is called later. One caller at a
	// time.
	receive(until time.Time) (Packet, error)

	// close ends a receive with an os.ErrClosed. It may be called again.
	close()
}

// A conn is a packet socket of one interface (packet(7)), with a filter. It needs
// CAP_NET_RAW.
type conn struct {
	index  int
	file   *os.File
	raw    syscall.RawConn
	ipv6   bool
	closed atomic.Bool

	// Used only by receive.
	buf  [largest]byte
	down bool // the interface was down at the last check
}

// largest is the largest number of bytes of a frame that are received: enough for a
// neighbour advertisement with several options.
const largest = 256

// listen opens a conn that receives packets about addresses and gateway only, of one
// family; gateway may be the zero Addr. The interface belongs to the calling thread's
// network namespace; it may be down.
func listen(index int, addresses []netip.Addr, gateway netip.Addr) (*conn, error) {
	if index <= 0 {
		return nil, fmt.Errorf("listen for ARP: invalid interface index %d", index) // 0 would bind to all interfaces (packet(7))
	}
	p, err := program(addresses, gateway)
	if err != nil {
		return nil, err
	}
	// With protocol 0 the socket receives nothing. bind sets the protocol
	// together with the interface, so no frame arrives before the filter is
	// attached.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", os.NewSyscallError("socket", err))
	}
	c := &conn{index: index, file: os.NewFile(uintptr(fd), "packet"), ipv6: addresses[0].Is6()} // uses the runtime's poller
	if err := attach(fd, p); err != nil {
		c.close()
		return nil, err
	}
	protocol := uint16(etherTypeARP&0xff<<8 | etherTypeARP>>8) // network byte order
	if c.ipv6 {
		protocol = ndp.EtherType&0xff<<8 | ndp.EtherType>>8
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: index}); err != nil {
		c.close()
		return nil, fmt.Errorf("listen for ARP: %w", os.NewSyscallError("bind", err))
	}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		c.close()
		return nil, fmt.Errorf("listen for ARP: %w", err)
	}
	return c, nil
}

// close does not wait for the kernel, see [Socket.Close].
func (c *conn) close() {
	if !c.closed.Swap(true) {
		go func() { _ = c.file.Close() }()
	}
}

func (c *conn) send(frame []byte) error {
	return c.control(func(fd int) error {
		err := send(fd, c.index, frame)
		if errors.Is(err, unix.ENETDOWN) {
			// The error may be about an earlier time when the interface was down: the
			// kernel returns it once, with the next call (packet_notifier in
			// net/packet/af_packet.c; sock_error in include/net/sock.h).
			err = send(fd, c.index, frame)
		}
		return err
	})
}

// downInterval is the interval of checks whether an interface that is down has
// been deleted. The kernel notifies a packet socket of either event, but not of the
// second one after the first (packet_notifier in net/packet/af_packet.c).
const downInterval = time.Second

func (c *conn) receive(until time.Time) (Packet, error) {
	for {
		end := until
		if check := time.Now().Add(downInterval); c.down && (until.IsZero() || check.Before(until)) {
			end = check
		}
		n, err := c.read(end)
		switch {
		case err == nil:
			// A frame that passes the filter but does not parse is ignored.
			if p, err := parse(c.buf[:n], c.ipv6); err == nil {
				return p, nil
			}
		case errors.Is(err, unix.ENETDOWN), errors.Is(err, os.ErrDeadlineExceeded) && !end.Equal(until):
			if c.down, err = c.isDown(); err != nil {
				return Packet{}, err
			}
		default:
			return Packet{}, err
		}
	}
}

// read waits for a frame until the given time, and then tries once more, since the
// runtime does not try at all after the deadline.
func (c *conn) read(until time.Time) (n int, err error) {
	if err := c.file.SetReadDeadline(until); err != nil {
		return 0, c.ended(err)
	}
	take := func(fd int) error {
		n, _, err = unix.Recvfrom(fd, c.buf[:], unix.MSG_DONTWAIT)
		return os.NewSyscallError("recvfrom", err)
	}
	waited := c.raw.Read(func(fd uintptr) bool {
		err = take(int(fd))
		return !errors.Is(err, unix.EAGAIN)
	})
	if errors.Is(waited, os.ErrDeadlineExceeded) {
		if err = c.control(take); errors.Is(err, unix.EAGAIN) {
			err = waited
		}
	} else if waited != nil {
		err = c.ended(waited)
	}
	return n, err
}

// isDown reports whether the interface is down. It returns ErrGone if the interface
// does not exist.
func (c *conn) isDown() (down bool, err error) {
	err = c.control(func(fd int) error {
		// An interface that left the namespace and came back keeps its index, but
		// the socket is not bound to it any more.
		bound, err := unix.Getsockname(fd)
		if err != nil {
			return os.NewSyscallError("getsockname", err)
		}
		if ll, ok := bound.(*unix.SockaddrLinklayer); !ok || ll.Ifindex != c.index {
			return ErrGone
		}
		// The ioctl for flags takes a name (netdevice(7)).
		request, err := unix.NewIfreq("")
		if err != nil {
			return err
		}
		request.SetUint32(uint32(c.index))
		for _, call := range []uint{unix.SIOCGIFNAME, unix.SIOCGIFFLAGS} {
			if err := unix.IoctlIfreq(fd, call, request); errors.Is(err, unix.ENODEV) {
				return ErrGone
			} else if err != nil {
				return fmt.Errorf("get interface flags: %w", os.NewSyscallError("ioctl", err))
			}
		}
		down = request.Uint16()&unix.IFF_UP == 0
		return nil
	})
	return down, err
}

// control calls fn with the descriptor, which stays open during the call.
func (c *conn) control(fn func(fd int) error) error {
	var err error
	if gone := c.raw.Control(func(fd uintptr) { err = fn(int(fd)) }); gone != nil {
		return c.ended(gone)
	}
	return err
}

// ended returns err, or os.ErrClosed if the conn is closed: a RawConn returns
// another error then.
func (c *conn) ended(err error) error {
	if c.closed.Load() {
		return os.ErrClosed
	}
	return err
}
