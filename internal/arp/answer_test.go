package arp

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/bpf"

	"github.com/egress-router/egress-router/internal/lab"
)

// The filter accepts requests of any host for one of the addresses, and nothing else.
func TestFilterOfRequests(t *testing.T) {
	// The module's virtual machine has no packet types, which come first.
	vm, err := bpf.NewVM(requestsFor([]netip.Addr{address, gateway})[3:])
	if err != nil {
		t.Fatal(err)
	}
	from := func(op Operation, sender, target netip.Addr) []byte {
		return Packet{op, otherMAC, sender, unknown(), target}.frame()
	}
	frames := malformed(t)
	frames["answer"] = from(Reply, neighbour, address)
	frames["request for a third"] = from(Request, neighbour, neighbour)
	for name, frame := range frames {
		if n, err := vm.Run(frame); n != 0 || err != nil {
			t.Errorf("%s: accepted %d bytes, %v; want none", name, n, err)
		}
	}
	for name, frame := range map[string][]byte{
		"a third asks":       from(Request, neighbour, address),
		"a probe":            from(Request, zeroIP, address),
		"the second address": from(Request, neighbour, gateway),
	} {
		if n, err := vm.Run(frame); n != packetEnd || err != nil {
			t.Errorf("%s: accepted %d bytes, %v; want %d", name, n, err, packetEnd)
		}
	}
}

// An answer goes to the sender of the request alone, and only a request has one.
func TestAnswerFrame(t *testing.T) {
	frame, err := Packet{Request, otherMAC, neighbour, unknown(), address}.Answer(ourMAC)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse(frame)
	if err != nil || p.Operation != Reply || p.SenderIP != address || p.TargetIP != neighbour ||
		!bytes.Equal(p.SenderMAC, ourMAC) || !bytes.Equal(p.TargetMAC, otherMAC) || !bytes.HasPrefix(frame, append(bytes.Clone(otherMAC), ourMAC...)) {
		t.Errorf("%x: %+v, %v", frame, p, err)
	}
	for name, p := range map[string]Packet{
		"answer":       {Reply, otherMAC, neighbour, ourMAC, address},
		"short sender": {Request, otherMAC[:4], neighbour, unknown(), address},
		"of IPv6":      {Request, otherMAC, lab.Source6, unknown(), address},
	} {
		if frame, err := p.Answer(ourMAC); err == nil {
			t.Errorf("%s: %x, want an error", name, frame)
		}
	}
}

// A host gets the hardware address by the answers of a process, if the kernel is silent.
func TestKernelAnswers(t *testing.T) {
	l, router, _ := network(t)
	router.take(lab.Source)
	if err := l.SetSysctl(l.Router, "net/ipv4/conf/"+l.MacvlanName+"/arp_ignore", "8"); err != nil {
		t.Fatal(err)
	}
	asks := func() (answered bool) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = l.Ask(ctx, l.Outside, "tcp", netip.AddrPortFrom(lab.Source, 9)) // which has no server
		_, err := l.Neighbour(l.Outside, lab.LANLink, lab.Source)
		return err == nil
	}
	if asks() {
		t.Fatal("the kernel answers")
	}
	var s *Station
	router.must(router.do(func() (err error) {
		s, err = ListenRequests(router.index, []netip.Addr{lab.Source}, 1)
		return err
	}))
	defer s.Close()
	go func() {
		for {
			p, err := s.Receive()
			if err != nil {
				return
			}
			if frame, err := p.Answer(router.mac); err == nil {
				_ = s.Send(frame)
			}
		}
	}()
	for begin := time.Now(); !asks(); {
		if time.Since(begin) > lab.Patience {
			t.Fatal("no answer")
		}
	}
	if mac, err := l.Neighbour(l.Outside, lab.LANLink, lab.Source); err != nil || !bytes.Equal(mac, router.mac) {
		t.Errorf("%v, %v; want %s", mac, err, router.mac)
	}
}
