package arp

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/egress-router/egress-router/internal/ndp"
	"github.com/egress-router/egress-router/internal/packet"
)

// ErrGone reports that the interface was deleted, or moved to another network
// namespace. A new interface with the same name is another one.
var ErrGone = packet.ErrGone

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

// A conn is a packet socket of one interface, with a filter.
type conn struct {
	*packet.Conn
	ipv6 bool
}

// largest is the largest number of bytes of a frame that are received.
const largest = 256

// listen opens a conn that receives packets about addresses and gateway only, of one
// family; gateway may be the zero Addr. The interface belongs to the calling thread's
// network namespace; it may be down.
func listen(index int, addresses []netip.Addr, gateway netip.Addr) (*conn, error) {
	p, err := program(addresses, gateway)
	if err != nil {
		return nil, err
	}
	c := &conn{ipv6: addresses[0].Is6()}
	etherType := uint16(etherTypeARP)
	if c.ipv6 {
		etherType = ndp.EtherType
	}
	if c.Conn, err = packet.Listen(index, etherType, p); err != nil {
		return nil, fmt.Errorf("listen for ARP: %w", err)
	}
	return c, nil
}

func (c *conn) close() { c.Close() }

func (c *conn) send(frame []byte) error { return c.Send(frame) }

func (c *conn) receive(until time.Time) (Packet, error) {
	for {
		frame, err := c.Receive(until)
		if err != nil {
			return Packet{}, err
		}
		// A frame that passes the filter but does not parse is ignored.
		if p, err := parse(frame, c.ipv6); err == nil {
			return p, nil
		}
	}
}

// A Station speaks about the addresses of a router that is one of several with the same
// ones. It needs CAP_NET_ADMIN and CAP_NET_RAW.
type Station struct{ c *conn }

// Join returns a Station that receives packets about addresses and gateway, as a Watch does,
// and whose frames have a mark.
func Join(index int, addresses []netip.Addr, gateway netip.Addr, mark uint32) (*Station, error) {
	c, err := listen(index, addresses, gateway)
	if err != nil {
		return nil, err
	}
	if err := c.Mark(mark); err != nil {
		c.close()
		return nil, err
	}
	return &Station{c}, nil
}

// Announce announces an address, as [Socket.Announce] does.
func (s *Station) Announce(mac net.HardwareAddr, address netip.Addr) error {
	return announce(s.c.send, mac, address)
}

// Send sends a frame.
func (s *Station) Send(frame []byte) error { return s.c.send(frame) }

// Receive waits for a packet. After Close the error is an os.ErrClosed.
func (s *Station) Receive() (Packet, error) { return s.c.receive(time.Time{}) }

// Close ends a Receive. It may be called again.
func (s *Station) Close() { s.c.close() }
