package arp

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/egress-router/egress-router/internal/packet"
)

// A Socket sends frames on one interface (packet(7)). It needs CAP_NET_RAW.
type Socket struct{ c *packet.Conn }

// Open returns a Socket for the interface with the given index, in the network
// namespace of the calling thread. The interface may be down.
func Open(index int) (*Socket, error) {
	c, err := packet.Open(index)
	if err != nil {
		return nil, err
	}
	return &Socket{c}, nil
}

// Close closes the socket in the background. It may be called again.
func (s *Socket) Close() { s.c.Close() }

// Announce sends both forms of announcement, since some neighbours ignore one of
// them: first the reply, then the request, as the original did. For an IPv6 address it
// sends an unsolicited advertisement.
func (s *Socket) Announce(mac net.HardwareAddr, address netip.Addr) error {
	return announce(s.c.Send, mac, address)
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
