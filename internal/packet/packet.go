// Package packet sends and receives Ethernet frames on one interface (packet(7)).
package packet

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// ErrGone reports that the interface was deleted, or moved to another network
// namespace. A new interface with the same name is another one.
var ErrGone = errors.New("interface is gone")

// A Conn is a packet socket of one interface. It needs CAP_NET_RAW.
type Conn struct {
	index  int
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool

	// Used only by Receive.
	buf  [largest]byte
	down bool // the interface was down at the last check
}

// largest is the largest number of bytes of a frame that are received: enough for a
// neighbour advertisement with several options.
const largest = 256

// Open returns a Conn that only sends, for the interface with the given index in the network
// namespace of the calling thread. The interface may be down.
func Open(index int) (*Conn, error) { return Listen(index, 0, nil) }

// All is the EtherType of all frames, which arrive before nftables' ingress hook sees them
// (__netif_receive_skb_core in net/core/dev.c). Those of one EtherType arrive behind it.
const All = unix.ETH_P_ALL

// Listen returns a Conn that also receives the frames of an EtherType that pass a filter
// (classic BPF, Documentation/networking/filter.rst). The interface belongs to the calling
// thread's network namespace; it may be down.
func Listen(index int, etherType uint16, filter []bpf.Instruction) (*Conn, error) {
	if index <= 0 {
		return nil, fmt.Errorf("open packet socket: invalid interface index %d", index) // 0 would bind to all interfaces (packet(7))
	}
	// With protocol 0 the socket receives nothing. bind sets the protocol
	// together with the interface, so no frame arrives before the filter is
	// attached.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", os.NewSyscallError("socket", err))
	}
	c := &Conn{index: index, file: os.NewFile(uintptr(fd), "packet")} // uses the runtime's poller
	if c.raw, err = c.file.SyscallConn(); err != nil {
		c.Close()
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if etherType == 0 {
		return c, nil
	}
	if err := attach(fd, filter); err != nil {
		c.Close()
		return nil, err
	}
	if etherType == All { // otherwise the kernel copies each frame that leaves
		_ = unix.SetsockoptInt(fd, unix.SOL_PACKET, packetIgnoreOutgoing, 1) // an error: before Linux 4.20
	}
	networkOrder := etherType<<8 | etherType>>8
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder, Ifindex: index}); err != nil {
		c.Close()
		return nil, fmt.Errorf("listen for frames: %w", os.NewSyscallError("bind", err))
	}
	return c, nil
}

// packetIgnoreOutgoing is an option of packet sockets (linux/if_packet.h).
const packetIgnoreOutgoing = 23

// attach sets p as the filter of a socket (SO_ATTACH_FILTER, socket(7)).
func attach(fd int, p []bpf.Instruction) error {
	raw, err := bpf.Assemble(p)
	if err != nil {
		return fmt.Errorf("assemble packet filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return fmt.Errorf("attach packet filter: %w", err)
	}
	return nil
}

// Mark sets the mark of the frames that are sent from now on (SO_MARK, socket(7)), by which
// rules know them. It needs CAP_NET_ADMIN.
func (c *Conn) Mark(mark uint32) error {
	return c.Control(func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		return os.NewSyscallError("setsockopt", err)
	})
}

// Close closes the socket in the background, and ends a Receive with an os.ErrClosed; it may
// be called again. The kernel waits for an RCU grace period, some 10 ms (packet_release in
// net/packet/af_packet.c), and nothing here depends on its end.
func (c *Conn) Close() {
	if !c.closed.Swap(true) {
		go func() { _ = c.file.Close() }()
	}
}

// Send sends a frame, whose destination is in it.
func (c *Conn) Send(frame []byte) error {
	return c.Control(func(fd int) error {
		err := c.send(fd, frame)
		if errors.Is(err, unix.ENETDOWN) {
			// The error may be about an earlier time when the interface was down: the
			// kernel returns it once, with the next call (packet_notifier in
			// net/packet/af_packet.c; sock_error in include/net/sock.h).
			err = c.send(fd, frame)
		}
		return err
	})
}

func (c *Conn) send(fd int, frame []byte) error {
	return os.NewSyscallError("sendto", unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: c.index, Halen: 6}))
}

// downInterval is the interval of checks whether an interface that is down has
// been deleted. The kernel notifies a packet socket of either event, but not of the
// second one after the first (packet_notifier in net/packet/af_packet.c).
const downInterval = time.Second

// Receive waits for a frame until the given time; zero: without a limit. At that time the
// error is an os.ErrDeadlineExceeded. It also returns a frame that arrived before the given
// time if it is called later. While the interface is down it waits on; after it is deleted
// the error is [ErrGone]. The frame is valid until the next call. One caller at a time.
func (c *Conn) Receive(until time.Time) ([]byte, error) {
	for {
		end := until
		if check := time.Now().Add(downInterval); c.down && (until.IsZero() || check.Before(until)) {
			end = check
		}
		n, err := c.read(end)
		switch {
		case err == nil:
			return c.buf[:n], nil
		case errors.Is(err, unix.ENETDOWN), errors.Is(err, os.ErrDeadlineExceeded) && !end.Equal(until):
			if c.down, err = c.isDown(); err != nil {
				return nil, err
			}
		default:
			return nil, err
		}
	}
}

// read waits for a frame until the given time, and then tries once more, since the
// runtime does not try at all after the deadline.
func (c *Conn) read(until time.Time) (n int, err error) {
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
		if err = c.Control(take); errors.Is(err, unix.EAGAIN) {
			err = waited
		}
	} else if waited != nil {
		err = c.ended(waited)
	}
	return n, err
}

// isDown reports whether the interface is down. It returns ErrGone if the interface
// does not exist.
func (c *Conn) isDown() (down bool, err error) {
	err = c.Control(func(fd int) error {
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

// Control calls fn with the descriptor, which stays open during the call.
func (c *Conn) Control(fn func(fd int) error) error {
	var err error
	if gone := c.raw.Control(func(fd uintptr) { err = fn(int(fd)) }); gone != nil {
		return c.ended(gone)
	}
	return err
}

// ended returns err, or os.ErrClosed if the conn is closed: a RawConn returns
// another error then.
func (c *Conn) ended(err error) error {
	if c.closed.Load() {
		return os.ErrClosed
	}
	return err
}
