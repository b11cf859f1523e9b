package arp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"
)

// A Question is a request whose answer has not been read yet.
type Question struct {
	port    port
	mac     net.HardwareAddr // our own
	address netip.Addr       // the requested one
}

// Ask sends one probe for address from the interface with the given index and
// hardware address, in the network namespace of the calling thread. It does not
// wait: holders of the address answer within some 10 ms, and Answer reads the
// answer. The interface must be up (otherwise the error is an ENETDOWN) and needs
// no address.
//
// A single probe can get lost, for example while a switch still learns the port.
// [Acquire] is reliable.
func Ask(index int, mac net.HardwareAddr, address netip.Addr) (*Question, error) {
	frame, err := Probe(mac, address)
	if err != nil {
		return nil, err
	}
	return ask(index, mac, address, frame)
}

// AskGateway sends one request for the hardware address of gateway, from address,
// which the interface must have. It is otherwise like [Ask].
//
// The sender is not zero, as in a probe: a gateway that answers by proxy ARP, or only
// to senders of its subnet, does not answer probes (arp_process in net/ipv4/arp.c).
func AskGateway(index int, mac net.HardwareAddr, address, gateway netip.Addr) (*Question, error) {
	frame, err := RequestFor(gateway, mac, address)
	if err != nil {
		return nil, err
	}
	return ask(index, mac, gateway, frame)
}

func ask(index int, mac net.HardwareAddr, address netip.Addr, frame []byte) (*Question, error) {
	c, err := listen(index, []netip.Addr{address}, netip.Addr{})
	if err != nil {
		return nil, err
	}
	q := &Question{c, mac, address}
	if err := c.send(frame); err != nil {
		q.Close()
		return nil, fmt.Errorf("probe %s: %w", address, err)
	}
	return q, nil
}

// Answer returns the hardware address of another holder as soon as one answers, or
// nil if none does before the given time. It may be called later than that, and
// still finds an answer that arrived in time. It is called once, and closes the
// Question.
//
// Unlike for [Acquire], probes of other hosts do not count: switches that track
// hosts send probes too.
func (q *Question) Answer(ctx context.Context, until time.Time) (holder net.HardwareAddr, err error) {
	defer q.Close()
	defer context.AfterFunc(ctx, q.port.close)()
	holder, err = await(q.port, until, func(p Packet) bool { return claims(p, q.mac, q.address) })
	if err != nil {
		return nil, failure(ctx, q.address, err)
	}
	return holder, nil
}

// Close closes a Question without reading the answer. It may be called again.
func (q *Question) Close() { q.port.close() }

// The times of the full probe (RFC 5227 section 1.1).
const (
	probeWait    = 1 * time.Second // longest wait before the first probe
	probeNum     = 3
	probeMin     = 1 * time.Second // shortest wait between probes
	probeMax     = 2 * time.Second // and longest
	announceWait = 2 * time.Second // wait after the last probe
)

// Acquire makes the full probe for address (RFC 5227 section 2.1.1), which takes
// 4 to 7 s without a conflict: then holder is nil, and the caller may take and
// announce the address. If another host has the address or probes for it at the
// same time, Acquire returns at once, with that host's hardware address.
//
// Index, namespace and state of the interface are as for [Ask]. A caller that
// repeats the probe waits a minute between two of them (section 2.1.1,
// RATE_LIMIT_INTERVAL).
func Acquire(ctx context.Context, index int, mac net.HardwareAddr, address netip.Addr) (holder net.HardwareAddr, err error) {
	frame, err := Probe(mac, address)
	if err != nil {
		return nil, err
	}
	c, err := listen(index, []netip.Addr{address}, netip.Addr{})
	if err != nil {
		return nil, err
	}
	defer c.close()
	holder, err = acquire(ctx, c, frame, conflicting(mac, address))
	if err != nil {
		return nil, failure(ctx, address, err)
	}
	return holder, nil
}

// acquire sends the probes and returns the sender of the first conflicting packet.
// The waits are random, so that hosts that start together, as after a power
// failure, do not probe together.
func acquire(ctx context.Context, p port, probe []byte, conflict func(Packet) bool) (net.HardwareAddr, error) {
	defer context.AfterFunc(ctx, p.close)()
	wait := rand.N(probeWait)
	for sent := 0; ; {
		holder, err := await(p, time.Now().Add(wait), conflict)
		if holder != nil || err != nil || sent == probeNum {
			return holder, err
		}
		if err := p.send(probe); err != nil {
			return nil, err
		}
		sent++
		if wait = probeMin + rand.N(probeMax-probeMin); sent == probeNum {
			wait = announceWait
		}
	}
}

// await waits until the given time for a packet for which counts returns true, and
// returns its sender, or nil.
func await(p port, until time.Time, counts func(Packet) bool) (net.HardwareAddr, error) {
	for {
		packet, err := p.receive(until)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil
		case err != nil:
			return nil, err
		case counts(packet):
			return packet.SenderMAC, nil
		}
	}
}

// claims reports whether p comes from another host that has or takes address
// (RFC 5227 section 2.4). Our own packets, sent back by a switch, do not count.
func claims(p Packet, mac net.HardwareAddr, address netip.Addr) bool {
	return p.SenderIP == address && !bytes.Equal(p.SenderMAC, mac)
}

// conflicting returns a function that reports whether a packet prevents a host at
// mac from taking address: a claim, or a probe of another host (RFC 5227
// section 2.1.1).
func conflicting(mac net.HardwareAddr, address netip.Addr) func(Packet) bool {
	return func(p Packet) bool {
		return claims(p, mac, address) || p.probes(address) && !bytes.Equal(p.SenderMAC, mac)
	}
}

// failure returns err, or the cause of ctx's end if it ended.
func failure(ctx context.Context, address netip.Addr, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("probe %s: %w", address, err)
}
