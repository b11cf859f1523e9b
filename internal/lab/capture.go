package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
)

// Capture collects the frames that pass one link, both ways (packet(7)). Frames
// that leave are seen after all rules of netfilter, so a capture shows what a
// neighbour would get.
type Capture struct {
	link   string
	socket *os.File
	raw    syscall.RawConn
	done   chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	frames  []Frame
	changed chan struct{} // closed when frames are added
	buf     []byte
	lost    uint32
	stopped bool
}

// maxFrame is above the largest frame a link hands over: segmentation is left to
// the last link, so a TCP frame here can be as large as an IPv4 packet.
const maxFrame = 64<<10 + 64

// Capture starts to collect the frames of a link in ns. The link may be down;
// frames come when it is up. Once Capture has returned none is missed. It ends
// with the lab, or before with Stop.
func (l *Lab) Capture(ns *netns.Namespace, link string) (*Capture, error) {
	c, err := capture(ns, link)
	if err != nil {
		return nil, fmt.Errorf("capturing on %q: %w", link, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.captures = append(l.captures, c)
	return c, nil
}

func capture(ns *netns.Namespace, link string) (*Capture, error) {
	fd := -1
	err := ns.Do(func() error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		// Protocol 0 receives nothing. Bind sets the real one together with the
		// link, so no frame of another link gets in.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		// A benchmark fills the usual 208 KiB in no time. Only root of the machine
		// may go beyond net.core.rmem_max; others get that much, and Stop says if
		// it was too little.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		if errors.Is(err, unix.EPERM) {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20)
		}
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network order
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index})
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	c := &Capture{
		link:    link,
		socket:  os.NewFile(uintptr(fd), "packet:"+link),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		buf:     make([]byte, maxFrame),
	}
	if c.raw, err = c.socket.SyscallConn(); err != nil {
		_ = c.socket.Close()
		return nil, err
	}
	go func() {
		defer close(c.done)
		// Returning false waits for the next frame; it ends when Stop closes.
		_ = c.raw.Read(func(fd uintptr) bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.drain(int(fd))
			return false
		})
	}()
	return c, nil
}

// drain takes what the kernel holds. The caller has the lock.
func (c *Capture) drain(fd int) {
	for had := len(c.frames); ; {
		n, from, err := unix.Recvfrom(fd, c.buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.EINTR) {
			continue // the link went down or was so; it may come up
		}
		if err != nil {
			if len(c.frames) > had {
				close(c.changed)
				c.changed = make(chan struct{})
			}
			return
		}
		ll, _ := from.(*unix.SockaddrLinklayer)
		c.frames = append(c.frames, Frame{
			At:       time.Now(),
			Outgoing: ll != nil && ll.Pkttype == unix.PACKET_OUTGOING,
			Data:     slices.Clone(c.buf[:n]),
		})
	}
}

// Frames returns the frames so far, in order, those included that the kernel has
// seen but the reader has not: a frame that was sent before the call is there.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.raw.Control(func(fd uintptr) { c.drain(int(fd)) }) // fails once stopped
	return slices.Clone(c.frames)
}

// Wait returns the first frame, past or future, for which match is true. It waits
// until the context's deadline, or [Patience] without one.
func (c *Capture) Wait(ctx context.Context, match func(Frame) bool) (Frame, error) {
	ctx, cancel := patient(ctx)
	defer cancel()
	for seen := 0; ; {
		c.mu.Lock()
		frames, changed := c.frames, c.changed
		c.mu.Unlock()
		for ; seen < len(frames); seen++ {
			if match(frames[seen]) {
				return frames[seen], nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Frame{}, fmt.Errorf("waiting for a frame on %q: %w", c.link, ctx.Err())
		}
	}
}

// Stop ends the capture; its frames can still be read. It is an error if the
// kernel had to drop frames, because then their absence proves nothing.
func (c *Capture) Stop() error {
	c.mu.Lock()
	if !c.stopped {
		c.stopped = true
		_ = c.raw.Control(func(fd uintptr) {
			c.drain(int(fd))
			if stats, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
				c.lost = stats.Drops
			}
		})
	}
	lost := c.lost
	c.mu.Unlock()
	_ = c.socket.Close()
	<-c.done
	if lost > 0 {
		return fmt.Errorf("capturing on %q: the kernel dropped %d frames", c.link, lost)
	}
	return nil
}
