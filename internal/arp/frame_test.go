package arp

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// The frames byte by byte, written from RFC 826.
var golden = map[Operation]string{
	Reply: `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 02
		02 00 5e 10 00 63  c0 a8 0c 63
		02 00 5e 10 00 63  c0 a8 0c 63
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`,
	Request: `
		ff ff ff ff ff ff  02 00 5e 10 00 63  08 06
		00 01  08 00  06 04  00 01
		02 00 5e 10 00 63  c0 a8 0c 63
		00 00 00 00 00 00  c0 a8 0c 63
		00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`,
}

func TestAnnouncement(t *testing.T) {
	mac := net.HardwareAddr{0x02, 0x00, 0x5e, 0x10, 0x00, 0x63}
	for form, text := range golden {
		want, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
		if err != nil {
			t.Fatal(err)
		}
		got, err := Announcement(form, mac, netip.MustParseAddr("192.168.12.99"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("operation %d:\n got %x\nwant %x", form, got, want)
		}
	}
}

func TestAnnouncementRefuses(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	for name, try := range map[string]struct {
		mac     net.HardwareAddr
		address string
	}{
		"no hardware address": {nil, "192.168.12.99"},
		"infiniband":          {make([]byte, 20), "192.168.12.99"},
		"IPv6":                {mac, "2001:db8::1"},
	} {
		if frame, err := Announcement(Reply, try.mac, netip.MustParseAddr(try.address)); err == nil {
			t.Errorf("%s: got %x, want an error", name, frame)
		}
	}
}
