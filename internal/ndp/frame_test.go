package ndp

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/bpf"
)

var (
	mac      = net.HardwareAddr{0x02, 0, 0x5e, 0x10, 0, 0x99}
	otherMAC = net.HardwareAddr{0x02, 0, 0x5e, 0x10, 0, 0x50}
	address  = netip.MustParseAddr("2001:db8:12::99")
	second   = netip.MustParseAddr("2001:db8:12::9a")
	gateway  = netip.MustParseAddr("fe80::1")
	third    = netip.MustParseAddr("2001:db8:12::80")
)

// equal compares addresses, which have unexported fields.
var equal = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	ethernetToAll = "333300000001 02005e100099 86dd"
	ethernetToGW  = "3333ff000001 02005e100099 86dd"
)

func TestFrames(t *testing.T) {
	announcement, err := Announce(mac, address)
	if err != nil {
		t.Fatal(err)
	}
	solicitation, err := Solicit(gateway, nil, mac, address)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Solicit(gateway, otherMAC, mac, address)
	if err != nil {
		t.Fatal(err)
	}
	probe, err := Solicit(address, nil, mac, netip.IPv6Unspecified())
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		frame []byte
		want  string // without the checksum
		parse Message
	}{
		"announcement": {announcement, ethernetToAll + `60000000 0020 3a ff 20010db8001200000000000000000099 ff020000000000000000000000000001
			88 00 0000 20000000 20010db8001200000000000000000099 02 01 02005e100099`, Message{Advertisement, mac, address, address}},
		"solicitation": {solicitation, ethernetToGW + `60000000 0020 3a ff 20010db8001200000000000000000099 ff0200000000000000000001ff000001
			87 00 0000 00000000 fe800000000000000000000000000001 01 01 02005e100099`, Message{Solicitation, mac, address, gateway}},
		"unicast solicitation": {again, `02005e100050 02005e100099 86dd 60000000 0020 3a ff 20010db8001200000000000000000099 fe800000000000000000000000000001
			87 00 0000 00000000 fe800000000000000000000000000001 01 01 02005e100099`, Message{Solicitation, mac, address, gateway}},
		"probe": {probe, `3333ff000099 02005e100099 86dd 60000000 0018 3a ff 00000000000000000000000000000000 ff0200000000000000000001ff000099
			87 00 0000 00000000 20010db8001200000000000000000099`, Message{Solicitation, mac, netip.IPv6Unspecified(), address}},
	} {
		got := bytes.Clone(test.frame)
		copy(got[checksumOffset:flagsOffset], []byte{0, 0})
		if want := unhex(t, test.want); !bytes.Equal(got, want) {
			t.Errorf("%s: got %x, want %x", name, got, want)
		}
		parsed, err := Parse(append(test.frame, 0, 0)) // padded
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(test.parse, parsed, equal); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good, err := Announce(mac, address)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"short":           func(b []byte) []byte { return b[:optionsOffset-1] },
		"EtherType":       func(b []byte) []byte { b[etherTypeOffset] = 8; return b },
		"length too long": func(b []byte) []byte { b[lengthOffset+1] = 0x21; return b },
		"length short":    func(b []byte) []byte { b[lengthOffset+1] = 8; return b },
		"next header":     func(b []byte) []byte { b[nextHeaderOffset] = 6; return b },
		"type":            func(b []byte) []byte { b[typeOffset] = 134; return b },
		"hop limit":       func(b []byte) []byte { b[hopLimitOffset] = 64; return b },
		"checksum":        func(b []byte) []byte { b[targetOffset]++; return b },
	} {
		if m, err := Parse(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s: accepted as %+v", name, m)
		}
	}
	if _, err := Announce(mac[:5], address); err == nil {
		t.Error("short hardware address accepted")
	}
	if _, err := Solicit(netip.MustParseAddr("192.168.12.1"), nil, mac, address); err == nil {
		t.Error("IPv4 accepted")
	}
}

func FuzzParse(f *testing.F) {
	good, _ := Announce(mac, address)
	f.Add(good)
	f.Add(good[:optionsOffset])
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := Parse(b); err == nil && (len(m.MAC) != macLength || !m.Target.Is6() || !m.Source.Is6()) {
			t.Errorf("%+v", m)
		}
	})
}

func TestFilter(t *testing.T) {
	p, err := Filter(FrameEnd, address, second, gateway)
	if err != nil {
		t.Fatal(err)
	}
	// The module's virtual machine has no packet types, which come first.
	vm, err := bpf.NewVM(append([]bpf.Instruction{p[2], bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: EtherType, SkipTrue: 2}}, p[4:]...))
	if err != nil {
		t.Fatal(err)
	}
	must := func(b []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	other := must(Announce(otherMAC, third))
	tcp := bytes.Clone(must(Announce(otherMAC, address)))
	tcp[nextHeaderOffset] = 6
	advertised := bytes.Clone(must(Announce(otherMAC, address)))
	advertised[typeOffset] = 134 // a router advertisement
	for name, test := range map[string]struct {
		frame []byte
		want  bool
	}{
		"another host claims":         {must(Announce(otherMAC, address)), true},
		"another host claims second":  {must(Announce(otherMAC, second)), true},
		"gateway answers":             {must(Announce(otherMAC, gateway)), true},
		"gateway asks":                {must(Solicit(third, nil, otherMAC, gateway)), true},
		"another host asks with it":   {must(Solicit(third, nil, otherMAC, second)), true},
		"third asks for the address":  {must(Solicit(address, nil, otherMAC, third)), false},
		"probe for the address":       {must(Solicit(address, nil, otherMAC, netip.IPv6Unspecified())), false},
		"third announces":             {other, false},
		"TCP":                         {tcp, false},
		"router advertisement":        {advertised, false},
		"too short for the addresses": {must(Announce(otherMAC, address))[:targetOffset+4], false},
	} {
		n, err := vm.Run(test.frame)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if (n == FrameEnd) != test.want || n != FrameEnd && n != 0 {
			t.Errorf("%s: accepts %d bytes, want accepted: %t", name, n, test.want)
		}
	}
}
