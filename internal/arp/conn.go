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
)

// ErrGone says that the interface was deleted, or moved to another network
// namespace. One made anew under its name is another.
var ErrGone = errors.New("interface is gone")

// A port sends and receives on one interface. The kernel's is a conn; tests with
// timers have another.
type port interface {
	// send sends a frame to everybody on the link.
	send(frame []byte) error

	// receive waits for a packet until the given time, without a limit if that is
	// zero; then the error is an os.ErrDeadlineExceeded. What came until then is
	// returned also if it is asked for later. One caller at a time.
	receive(until time.Time) (Packet, error)

	// close ends a receive, whose error is then an os.ErrClosed. Closing again is
	// harmless.
	close()
}

// A conn is a packet socket of one interface (packet(7)), with a filter. It needs
// CAP_NET_RAW.
type conn struct {
	index  int
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool

	// Of the receiver.
	buf  [packetEnd]byte
	down bool // so was the interface when it was last looked at
}

// listen opens a conn that hears of address and gateway only; gateway may be the
// zero Addr. The interface is that of the calling thread's network namespace; it
// may be down.
func listen(index int, address, gateway netip.Addr) (*conn, error) {
	if index <= 0 {
		return nil, fmt.Errorf("listen for ARP: invalid interface index %d", index) // bind(2) takes 0 for all
	}
	p, err := program(address, gateway)
	if err != nil {
		return nil, err
	}
	// Protocol 0 receives nothing, and bind sets the real one together with the
	// interface: no frame gets in before the filter is there.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", os.NewSyscallError("socket", err))
	}
	c := &conn{index: index, file: os.NewFile(uintptr(fd), "packet")} // for the runtime's poller
	if err := attach(fd, p); err != nil {
		c.close()
		return nil, err
	}
	const protocol = etherTypeARP&0xff<<8 | etherTypeARP>>8 // in network order
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

// close does not wait for the kernel, as [Socket.Close] does not.
func (c *conn) close() {
	if !c.closed.Swap(true) {
		go func() { _ = c.file.Close() }()
	}
}

func (c *conn) send(frame []byte) error {
	return c.control(func(fd int) error {
		err := send(fd, c.index, frame)
		if errors.Is(err, unix.ENETDOWN) {
			// This may tell of a time when the interface was down, once: the kernel
			// hands that to whichever call comes next (packet_notifier in
			// net/packet/af_packet.c; sock_error in include/net/sock.h).
			err = send(fd, c.index, frame)
		}
		return err
	})
}

// downInterval is how often the kernel is asked whether an interface that is down
// is gone. It tells a packet socket of either, but not of the second after the
// first (packet_notifier in net/packet/af_packet.c).
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
			// What passes the filter and is no packet is nobody's claim.
			if p, err := Parse(c.buf[:n]); err == nil {
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

// read waits for a frame until the given time, and looks once more then: the
// runtime does not try at all when the time is past.
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

// isDown says whether the interface is down. It is an ErrGone if there is none any
// more.
func (c *conn) isDown() (down bool, err error) {
	err = c.control(func(fd int) error {
		// An interface that went away and came back, to the namespace, keeps its
		// index, but the socket is bound to nothing.
		bound, err := unix.Getsockname(fd)
		if err != nil {
			return os.NewSyscallError("getsockname", err)
		}
		if ll, ok := bound.(*unix.SockaddrLinklayer); !ok || ll.Ifindex != c.index {
			return ErrGone
		}
		// Flags are asked for by name (netdevice(7)).
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

// control calls fn with the descriptor, which stays open meanwhile.
func (c *conn) control(fn func(fd int) error) error {
	var err error
	if gone := c.raw.Control(func(fd uintptr) { err = fn(int(fd)) }); gone != nil {
		return c.ended(gone)
	}
	return err
}

// ended returns err, or os.ErrClosed if that is why: the error of a RawConn is
// another.
func (c *conn) ended(err error) error {
	if c.closed.Load() {
		return os.ErrClosed
	}
	return err
}
