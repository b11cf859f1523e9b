package lab

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func frame(t testing.TB, text string) Frame {
	t.Helper()
	data, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return Frame{Data: data}
}

const (
	ethIP  = "020000000001 020000000002 0800"
	ethARP = "ffffffffffff 020000000002 0806"
	addrs  = "c0a80c63 cb007119" // 192.168.12.99, 203.0.113.25
	tcp    = ethIP + "45000028 00004000 40060000" + addrs + "8000 0050 00000000 00000000 50020000 00000000"
)

var compareAddrs = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

func TestIPv4(t *testing.T) {
	with := func(src, dst uint16, proto uint8) Packet {
		return Packet{
			Protocol: proto,
			Src:      netip.AddrPortFrom(netip.MustParseAddr("192.168.12.99"), src),
			Dst:      netip.AddrPortFrom(netip.MustParseAddr("203.0.113.25"), dst),
		}
	}
	for _, test := range []struct {
		name, frame string
		want        Packet
		ok          bool
	}{
		{"tcp", tcp, with(32768, 80, 6), true},
		{"udp", ethIP + "4500001c 00000000 40110000" + addrs + "0035 d431 00080000", with(53, 54321, 17), true},
		{"with options", ethIP + "4600001c 00000000 40110000" + addrs + "94040000 0035 d431 00080000", with(53, 54321, 17), true},
		{"icmp", ethIP + "4500001c 00000000 40010000" + addrs + "0800 f7ff 00000000", with(0, 0, 1), true},
		{"first fragment", ethIP + "4500001c 00002000 40110000" + addrs + "0035 d431 00080000", with(53, 54321, 17), true},
		{"later fragment", ethIP + "4500001c 00000001 40110000" + addrs + "0035 d431 00080000", with(0, 0, 17), true},
		{"ports cut off", ethIP + "45000016 00000000 40110000" + addrs + "0035", with(0, 0, 17), true},
		{"header cut off", ethIP + "4500001c 00000000 40110000 c0a80c63", Packet{}, false},
		{"options cut off", ethIP + "4f00001c 00000000 40110000" + addrs, Packet{}, false},
		{"header length too small", ethIP + "4400001c 00000000 40110000" + addrs, Packet{}, false},
		{"version 6", ethIP + "6500001c 00000000 40110000" + addrs, Packet{}, false},
		{"arp", ethARP + "0001 0800 06 04 0001", Packet{}, false},
		{"empty", "", Packet{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := frame(t, test.frame).IPv4()
			if diff := cmp.Diff(test.want, got, compareAddrs); diff != "" || ok != test.ok {
				t.Errorf("IPv4 = %v, want %v; want -, got +:\n%s", ok, test.ok, diff)
			}
		})
	}
}

func TestIPv6(t *testing.T) {
	const header, addresses = "020000000001 020000000002 86dd 60000000 0008", "20010db8001200000000000000000099 20010db8000000000000000000000025"
	with := func(src, dst uint16, proto uint8) Packet {
		return Packet{
			Protocol: proto,
			Src:      netip.AddrPortFrom(netip.MustParseAddr("2001:db8:12::99"), src),
			Dst:      netip.AddrPortFrom(netip.MustParseAddr("2001:db8::25"), dst),
		}
	}
	for _, test := range []struct {
		name, frame string
		want        Packet
		ok          bool
	}{
		{"udp", header + "1140" + addresses + "0035 d431 00080000", with(53, 54321, 17), true},
		{"icmp", header + "3aff" + addresses + "8000 0000 00010001", with(0, 0, 58), true},
		{"extension header", header + "0001" + addresses + "3a00050200000000", with(0, 0, 0), true},
		{"ports cut off", header + "1140" + addresses + "0035", with(0, 0, 17), true},
		{"header cut off", header + "1140" + addresses[:32], Packet{}, false},
		{"ip", tcp, Packet{}, false},
		{"empty", "", Packet{}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := frame(t, test.frame).IPv6()
			if diff := cmp.Diff(test.want, got, compareAddrs); diff != "" || ok != test.ok {
				t.Errorf("IPv6 = %v, want %v; want -, got +:\n%s", ok, test.ok, diff)
			}
		})
	}
}

func TestARP(t *testing.T) {
	const body = "0001 020000000002 c0a80c63 000000000000 "
	announcement := ARP{
		Op:        1,
		SenderMAC: []byte{2, 0, 0, 0, 0, 2},
		SenderIP:  netip.MustParseAddr("192.168.12.99"),
		TargetMAC: []byte{0, 0, 0, 0, 0, 0},
		TargetIP:  netip.MustParseAddr("192.168.12.99"),
	}
	question := announcement
	question.TargetIP = netip.MustParseAddr("192.168.12.1")
	for _, test := range []struct {
		name, frame string
		want        ARP
		ok, tells   bool
	}{
		{"announcement", ethARP + "0001 0800 06 04" + body + "c0a80c63", announcement, true, true},
		{"question, padded", ethARP + "0001 0800 06 04" + body + "c0a80c01 00000000", question, true, false},
		{"not ethernet", ethARP + "0006 0800 06 04" + body + "c0a80c63", ARP{}, false, false},
		{"cut off", ethARP + "0001 0800 06 04" + body, ARP{}, false, false},
		{"ip", tcp, ARP{}, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := frame(t, test.frame).ARP()
			if diff := cmp.Diff(test.want, got, compareAddrs); diff != "" || ok != test.ok {
				t.Errorf("ARP = %v, want %v; want -, got +:\n%s", ok, test.ok, diff)
			}
			if ok && got.Announces() != test.tells {
				t.Errorf("Announces = %v, want %v", got.Announces(), test.tells)
			}
		})
	}
}

func TestFrameString(t *testing.T) {
	out := frame(t, tcp)
	out.Outgoing = true
	for _, test := range []struct {
		frame Frame
		want  string
	}{
		{out, "out 02:00:00:00:00:02 > 02:00:00:00:00:01 ip protocol 6 192.168.12.99:32768 > 203.0.113.25:80"},
		{frame(t, ethARP+"0001 0800 06 04 0001 020000000002 c0a80c63 000000000000 c0a80c01"),
			"in  02:00:00:00:00:02 > ff:ff:ff:ff:ff:ff arp op 1 192.168.12.99 is-at 02:00:00:00:00:02 for 192.168.12.1 (00:00:00:00:00:00)"},
		{frame(t, "333300000001 020000000002 86dd 60"), "in  02:00:00:00:00:02 > 33:33:00:00:00:01 ethertype 0x86dd, 15 bytes"},
		{Frame{}, "in   >  ethertype 0x0000, 0 bytes"},
	} {
		if got := test.frame.String(); got != test.want {
			t.Errorf("String = %q, want %q", got, test.want)
		}
	}
}

// Any host on the link can send frames: decoding must not panic on any bytes.
func FuzzFrame(f *testing.F) {
	f.Add(frame(f, tcp).Data)
	f.Add(frame(f, ethARP+"0001 0800 06 04 0001 020000000002 c0a80c63 000000000000 c0a80c01").Data)
	f.Add(frame(f, "020000000001 020000000002 86dd 60000000 0008 1140"+strings.Repeat("20010db8001200000000000000000099", 2)+"0035 d431 00080000").Data)
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = Frame{Data: data}.String()
	})
}
