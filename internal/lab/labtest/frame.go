package labtest

import (
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// SendUnknown sends a frame of a protocol that no kernel has (IEEE Std 802, local experimental
// EtherType 1) to a hardware address of the physical network.
// Its receiver drops it, and counts it as rx_dropped.
func (p *Pod) SendUnknown(to net.HardwareAddr) {
	p.Helper()
	const experimental = 0x88b5
	lan := p.Link(p.Handle(p.Lab.Outside), lab.LANLink).Attrs()
	if err := p.Lab.Outside.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer func() { _ = unix.Close(fd) }()
		frame := slices.Concat(to, lan.HardwareAddr, []byte{experimental >> 8, experimental & 0xff}, make([]byte, 46))
		return os.NewSyscallError("sendto", unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: lan.Index, Halen: 6}))
	}); err != nil {
		p.Fatal(err)
	}
}
