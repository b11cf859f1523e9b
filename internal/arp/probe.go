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

// A Question is a probe for an address that was sent and whose answer is still to
// be collected.
type Question struct {
	port    port
	mac     net.HardwareAddr
	address netip.Addr
}

// Ask sends one probe for address from the interface with the given index and
// hardware address, in the network namespace of the calling thread. It does not
// wait: hosts that have the address answer within some 10 ms, which Answer
// collects. The interface has to be up (else the error is an ENETDOWN) and needs
// no address.
//
// One probe can get lost, and one that is sent while a switch still learns that
// the port is there does. Where that must not go unnoticed, use [Acquire].
func Ask(index int, mac net.HardwareAddr, address netip.Addr) (*Question, error) {
	frame, err := Probe(mac, address)
	if err != nil {
		return nil, err
	}
	c, err := listen(index, address, netip.Addr{})
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

// Answer returns the hardware address of another holder as soon as one has
// answered, or nil if none has until the given time. An answer that came in time
// is found whenever it is asked for. Answer is called once and closes the
// Question.
//
// Others that probe for the address do not count here, as they do for [Acquire]:
// switches that keep track of hosts send probes too.
func (q *Question) Answer(ctx context.Context, until time.Time) (holder net.HardwareAddr, err error) {
	defer q.Close()
	defer context.AfterFunc(ctx, q.port.close)()
	holder, err = await(q.port, until, func(p Packet) bool { return claims(p, q.mac, q.address) })
	if err != nil {
		return nil, failure(ctx, q.address, err)
	}
	return holder, nil
}

// Close gives up a Question that is not to be answered. Closing again is harmless.
func (q *Question) Close() { q.port.close() }

// The times of the full probe (RFC 5227 section 1.1).
const (
	probeWait    = 1 * time.Second // at most, before the first probe
	probeNum     = 3
	probeMin     = 1 * time.Second // between probes, at least
	probeMax     = 2 * time.Second // and at most
	announceWait = 2 * time.Second // after the last probe
)

// Acquire makes the full probe for address (RFC 5227 section 2.1.1), which takes
// 4 to 7 s if nobody else has it: then holder is nil, and the caller may take and
// announce it. It returns sooner, with the hardware address of the other, if
// another host has it or probes for it at the same time.
//
// Index, namespace and state of the interface are as for [Ask]. Whoever repeats
// this until the address is free leaves a minute between two times (section
// 2.1.1, RATE_LIMIT_INTERVAL).
func Acquire(ctx context.Context, index int, mac net.HardwareAddr, address netip.Addr) (holder net.HardwareAddr, err error) {
	frame, err := Probe(mac, address)
	if err != nil {
		return nil, err
	}
	c, err := listen(index, address, netip.Addr{})
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

// acquire sends the probes and returns the sender of the first packet that is a
// conflict. The waits are random so that hosts that start together, after a power
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

// await waits until the given time for a packet that counts and returns who sent
// it, or nil.
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

// claims says whether p comes from another host that has, or takes, address
// (RFC 5227 section 2.4). What a switch sends back of our own is no claim.
func claims(p Packet, mac net.HardwareAddr, address netip.Addr) bool {
	return p.SenderIP == address && !bytes.Equal(p.SenderMAC, mac)
}

// conflicting says of a packet whether it means, for a host at mac that probes for
// address, that it must not take it: a claim, or a probe of another host (RFC 5227
// section 2.1.1).
func conflicting(mac net.HardwareAddr, address netip.Addr) func(Packet) bool {
	return func(p Packet) bool {
		return claims(p, mac, address) || p.probes(address) && !bytes.Equal(p.SenderMAC, mac)
	}
}

// failure is err, or the end of ctx if that is why.
func failure(ctx context.Context, address netip.Addr, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("probe %s: %w", address, err)
}
