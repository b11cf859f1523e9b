package arp

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// A Socket sends frames on one interface (packet(7)). It needs CAP_NET_RAW.
type Socket struct {
	fd    int
	index int
}

// Open returns a Socket for the interface with the given index, in the network
// namespace of the calling thread. The interface may be down.
func Open(index int) (*Socket, error) {
	// With protocol 0 the socket receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", os.NewSyscallError("socket", err))
	}
	return &Socket{fd, index}, nil
}

// Close closes the socket in the background; it is called once. The kernel waits
// for an RCU grace period, some 10 ms (packet_release in net/packet/af_packet.c),
// and nothing here depends on its end.
func (s *Socket) Close() {
	if s.fd < 0 {
		return
	}
	go func(fd int) { _ = unix.Close(fd) }(s.fd)
	s.fd = -1
}

// Announce sends both forms of announcement, since some neighbours ignore one of
// them: first the reply, then the request, as the original did. For an IPv6 address it
// sends an unsolicited advertisement.
func (s *Socket) Announce(mac net.HardwareAddr, address netip.Addr) error {
	return announce(func(frame []byte) error { return send(s.fd, s.index, frame) }, mac, address)
}

func announce(send func(frame []byte) error, mac net.HardwareAddr, address netip.Addr) error {
	frames, err := announcements(mac, address)
	if err != nil {
		return err
	}
	for _, frame := range frames {
		if err := send(frame); err != nil {
			return fmt.Errorf("announce %s at %s: %w", address, mac, err)
		}
	}
	return nil
}

// send sends a frame, whose destination is in it.
func send(fd, index int, frame []byte) error {
	to := &unix.SockaddrLinklayer{Ifindex: index, Halen: macLength}
	copy(to.Addr[:], broadcast)
	return os.NewSyscallError("sendto", unix.Sendto(fd, frame, 0, to))
}
