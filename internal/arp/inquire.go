package arp

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"time"
)

// An Inquiry is the result of requests for the hardware address of a gateway.
type Inquiry struct {
	Requests int              // number of requests that were sent
	MAC      net.HardwareAddr // sender of an answer to one of them; nil: there was none
	Took     time.Duration    // from the first request to the answer
	// Heard is the sender of other packets of the gateway meanwhile, such as its own
	// requests for other hosts; nil: there were none.
	Heard net.HardwareAddr
}

// Inquire sends up to three requests for the hardware address of gateway, and returns with
// the first answer, or when the time after the last one has passed without any. The sender
// is source; without one the requests are probes, which claim no address (RFC 5227, section
// 1.1). Index, namespace and state of the interface are as for [Ask].
func Inquire(ctx context.Context, index int, mac net.HardwareAddr, source, gateway netip.Addr, pause time.Duration) (Inquiry, error) {
	frame, err := Probe(mac, gateway)
	if source.IsValid() {
		frame, err = RequestFor(gateway, mac, source)
	}
	if err != nil {
		return Inquiry{}, err
	}
	c, err := listen(index, []netip.Addr{gateway}, netip.Addr{})
	if err != nil {
		return Inquiry{}, err
	}
	defer c.close()
	found, err := inquire(ctx, c, frame, mac, gateway, pause)
	if err != nil {
		return found, failure(ctx, gateway, err)
	}
	return found, nil
}

func inquire(ctx context.Context, p port, frame []byte, mac net.HardwareAddr, gateway netip.Addr, pause time.Duration) (found Inquiry, err error) {
	defer context.AfterFunc(ctx, p.close)()
	begin := time.Now()
	answers := func(p Packet) bool {
		if !claims(p, mac, gateway) {
			return false
		}
		if p.Operation == Reply && (p.TargetMAC == nil || bytes.Equal(p.TargetMAC, mac)) {
			return true
		}
		found.Heard = p.SenderMAC
		return false
	}
	for found.Requests < probeNum {
		if err := p.send(frame); err != nil {
			return found, err
		}
		found.Requests++
		if found.MAC, err = await(p, time.Now().Add(pause), answers); found.MAC != nil || err != nil {
			found.Took = time.Since(begin)
			return found, err
		}
	}
	return found, nil
}
