package arp

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	ourMAC    = net.HardwareAddr{0x02, 0x00, 0x5e, 0x10, 0x00, 0x63}
	otherMAC  = net.HardwareAddr{0x02, 0x00, 0x5e, 0x10, 0x00, 0x50}
	address   = netip.MustParseAddr("192.168.12.99")
	gateway   = netip.MustParseAddr("192.168.12.1")
	neighbour = netip.MustParseAddr("192.168.12.80")
	zeroIP    = netip.IPv4Unspecified()
)

// The frames byte by byte, written from RFC 826 and RFC 5227 section 1.1.
const (
	announcementReply = `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 02
		02 00 5e 10 00 63  c0 a8 0c 63
		02 00 5e 10 00 63  c0 a8 0c 63
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`
	announcementRequest = `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 01
		02 00 5e 10 00 63  c0 a8 0c 63
		00 00 00 00 00 00  c0 a8 0c 63
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`
	probe = `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 01
		02 00 5e 10 00 63  00 00 00 00
		00 00 00 00 00 00  c0 a8 0c 63
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`
	gatewayRequest = `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 01
		02 00 5e 10 00 63  c0 a8 0c 63
		00 00 00 00 00 00  c0 a8 0c 01
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`
	gatewayReply = `
		02 00 5e 10 00 63  02 00 5e 10 00 50  08 06
		00 01  08 00  06 04  00 02
		02 00 5e 10 00 50  c0 a8 0c 01
		02 00 5e 10 00 63  c0 a8 0c 63`
)

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFrames(t *testing.T) {
	for name, test := range map[string]struct {
		make func() ([]byte, error)
		want string
	}{
		"announcement, reply":     {func() ([]byte, error) { return Announcement(Reply, ourMAC, address) }, announcementReply},
		"announcement, request":   {func() ([]byte, error) { return Announcement(Request, ourMAC, address) }, announcementRequest},
		"probe":                   {func() ([]byte, error) { return Probe(ourMAC, address) }, probe},
		"request for the gateway": {func() ([]byte, error) { return RequestFor(gateway, ourMAC, address) }, gatewayRequest},
	} {
		got, err := test.make()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if want := unhex(t, test.want); !bytes.Equal(got, want) {
			t.Errorf("%s:\n got %x\nwant %x", name, got, want)
		}
	}
}

func TestFramesRefuse(t *testing.T) {
	for name, try := range map[string]struct {
		mac     net.HardwareAddr
		address string
	}{
		"no hardware address": {nil, "192.168.12.99"},
		"infiniband":          {make([]byte, 20), "192.168.12.99"},
		"IPv6":                {ourMAC, "2001:db8::1"},
		"IPv4 in IPv6":        {ourMAC, "::ffff:192.168.12.99"},
	} {
		address := netip.MustParseAddr(try.address)
		for kind, make := range map[string]func() ([]byte, error){
			"announcement": func() ([]byte, error) { return Announcement(Reply, try.mac, address) },
			"probe":        func() ([]byte, error) { return Probe(try.mac, address) },
			"request":      func() ([]byte, error) { return RequestFor(gateway, try.mac, address) },
			"request for":  func() ([]byte, error) { return RequestFor(address, try.mac, gateway) },
		} {
			if kind == "probe" && name == "IPv6" {
				continue // a solicitation
			}
			if frame, err := make(); err == nil {
				t.Errorf("%s, %s: got %x, want an error", kind, name, frame)
			}
		}
	}
}

func TestParse(t *testing.T) {
	zero := net.HardwareAddr{0, 0, 0, 0, 0, 0}
	for text, want := range map[string]Packet{
		announcementReply:   {Reply, ourMAC, address, ourMAC, address},
		announcementRequest: {Request, ourMAC, address, zero, address},
		probe:               {Request, ourMAC, zeroIP, zero, address},
		gatewayRequest:      {Request, ourMAC, address, zero, gateway},
		gatewayReply:        {Reply, otherMAC, gateway, ourMAC, address},
	} {
		got, err := Parse(unhex(t, text))
		if err != nil {
			t.Errorf("%v:%s", err, text)
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if p := text == probe; got.probes(address) != p || got.probes(gateway) {
			t.Errorf("probes = %t, want %t:%s", got.probes(address), p, text)
		}
	}
}

// Frames other than ARP for IPv4 over Ethernet, by name.
func malformed(t testing.TB) map[string][]byte {
	t.Helper()
	with := func(offset int, b ...byte) []byte {
		frame := unhex(t, gatewayReply)
		copy(frame[offset:], b)
		return frame
	}
	return map[string][]byte{
		"empty":                      nil,
		"one byte short":             with(0)[:packetEnd-1],
		"header only":                with(0)[:fixedOffset],
		"IPv4, no ARP":               with(etherTypeOffset, 0x08, 0x00),
		"RARP":                       with(etherTypeOffset, 0x80, 0x35),
		"VLAN tag":                   with(etherTypeOffset, 0x81, 0x00),
		"token ring":                 with(fixedOffset, 0, 6),
		"protocol type IPv6":         with(fixedOffset+2, 0x86, 0xdd),
		"hardware address of 20":     with(lengthsOffset, 20),
		"hardware address of 0":      with(lengthsOffset, 0),
		"protocol address of 16":     with(lengthsOffset+1, 16),
		"operation 0":                with(operationOffset, 0, 0),
		"RARP request":               with(operationOffset, 0, 3),
		"operation in little endian": with(operationOffset, 2, 0),
	}
}

func TestParseRefuses(t *testing.T) {
	for name, frame := range malformed(t) {
		if p, err := Parse(frame); err == nil {
			t.Errorf("%s: got %v, want an error", name, p)
		}
	}
}

// Parse keeps every field: a parsed packet makes the same packet again.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{announcementReply, announcementRequest, probe, gatewayRequest, gatewayReply} {
		f.Add(unhex(f, seed))
	}
	for _, seed := range malformed(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		p, err := Parse(frame)
		if err != nil {
			return
		}
		if err := check(p.SenderMAC, p.SenderIP, p.TargetIP); err != nil {
			t.Fatal(err)
		}
		if again := p.frame(); !bytes.Equal(again[fixedOffset:packetEnd], frame[fixedOffset:packetEnd]) {
			t.Fatalf("%x became %x", frame, again)
		}
	})
}
