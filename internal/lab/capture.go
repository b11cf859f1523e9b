package lab

import (
	"context"
	"encoding/binary"
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

// Capture collects the frames of one link, in both directions (packet(7)). Outgoing frames
// are captured after all netfilter rules: a capture shows what a neighbour receives.
type Capture struct {
	link   string
	socket *os.File
	raw    syscall.RawConn
	done   chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	frames  []Frame
	changed chan struct{} // closed when frames are added
	buf     []byte
	oob     [64]byte // control messages: one time stamp
	lost    uint32
	stopped bool
}

// maxFrame is larger than any frame: the last link does the segmentation, so a captured
// TCP frame can be as large as an IPv4 packet.
const maxFrame = 64<<10 + 64

// Capture starts to collect the frames of a link in ns. The link may be down at first. No
// frame after the return is missed. The capture ends with the lab or with Stop.
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
		// A socket with protocol 0 receives no frames. Bind sets protocol and link in one
		// step, so no frame of another link is received.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		// A benchmark fills the default 208 KiB. Only root of the machine may exceed
		// net.core.rmem_max; for other users that is the size, and Stop returns an error
		// if it was too small.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		if errors.Is(err, unix.EPERM) {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20)
		}
		if err != nil {
			return err
		}
		// The kernel notes when a frame passed, on one clock for all links (socket(7)).
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
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

// drain reads all frames that the kernel has queued. The caller holds the lock.
func (c *Capture) drain(fd int) {
	for had := len(c.frames); ; {
		n, oobn, _, from, err := unix.Recvmsg(fd, c.buf, c.oob[:], unix.MSG_DONTWAIT)
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
			At:       passed(c.oob[:oobn]),
			Outgoing: ll != nil && ll.Pkttype == unix.PACKET_OUTGOING,
			Data:     slices.Clone(c.buf[:n]),
		})
	}
}

// passed returns the time in the control messages of a frame.
func passed(oob []byte) time.Time {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err == nil && len(messages) > 0 && len(messages[0].Data) >= 16 {
		b := messages[0].Data                                                                            // a struct timespec
		return time.Unix(int64(binary.NativeEndian.Uint64(b)), int64(binary.NativeEndian.Uint64(b[8:]))) //nolint:gosec // the kernel's own
	}
	return time.Now()
}

// Take returns the frames since the last Take, like Frames, and forgets them, for a test
// that runs for hours. It is not for a capture with Wait.
func (c *Capture) Take() []Frame {
	frames := c.Frames()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frames = slices.Delete(c.frames, 0, len(frames))
	return frames
}

// Frames returns the frames so far, in order, including those that are still queued in the
// kernel: a frame that was sent before the call is in the result.
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

// Stop ends the capture; Frames still returns its frames. The error says that the kernel
// dropped frames: the absence of a frame then proves nothing.
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
