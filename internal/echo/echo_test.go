package echo

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"slices"
	"testing"
)

var (
	own = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	via = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

func request(source, target string) Request {
	return Request{own, via, netip.MustParseAddr(source), netip.MustParseAddr(target), 0x12345678}
}

// TestFrame compares whole frames, whose checksums another program has computed.
func TestFrame(t *testing.T) {
	for _, c := range []struct{ source, target, want string }{
		{"192.168.12.99", "192.168.12.1", "020000000002" + "020000000001" + "0800" +
			"4500001c000040004001a12cc0a80c63c0a80c01" + "08008f5312345678" + "000000000000000000000000000000000000"},
		{"2001:db8::99", "2001:db8::1", "020000000002" + "020000000001" + "86dd" +
			"6000000000083a40" + "20010db8000000000000000000000099" + "20010db8000000000000000000000001" + "8000" + "bb04" + "12345678"},
	} {
		frame, err := request(c.source, c.target).Frame()
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(frame); got != c.want {
			t.Errorf("from %s: expected\n%s\nfound\n%s", c.source, c.want, got)
		}
	}
}

// reply makes the reply of a request's frame, with IP options if there are any.
func reply(frame, options []byte) []byte {
	frame = slices.Clone(frame)
	if binary.BigEndian.Uint16(frame[12:]) == EtherTypeIPv4 {
		a := slices.Clone(frame[26:30])
		copy(frame[26:30], frame[30:34])
		copy(frame[30:34], a)
		frame[34] = reply4
		frame[14] += byte(len(options) / 4)
		return slices.Insert(frame, 34, options...)
	}
	a := slices.Clone(frame[22:38])
	copy(frame[22:38], frame[38:54])
	copy(frame[38:54], a)
	frame[54] = reply6
	return frame
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		source, target string
		options        []byte
	}{{"192.168.12.99", "192.168.12.1", nil}, {"192.168.12.99", "192.168.12.1", []byte{1, 1, 1, 0}}, {"2001:db8::99", "fe80::1", nil}} {
		r := request(c.source, c.target)
		frame, err := r.Frame()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(reply(frame, c.options))
		if want := (Reply{r.Target, r.Source, r.Number}); err != nil || got != want {
			t.Errorf("reply of %s: expected %v, found %v, %v", c.target, want, got, err)
		}
		if got, err := Parse(frame); err == nil {
			t.Errorf("a request was taken for the reply %v", got)
		}
	}
	frame, err := request("192.168.12.99", "192.168.12.1").Frame()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(b []byte){
		"fragment":       func(b []byte) { b[20] = 0x20 },
		"other protocol": func(b []byte) { b[23] = 17 },
		"other version":  func(b []byte) { b[14] = 0x55 },
		"short header":   func(b []byte) { b[14] = 0x44 },
		"long header":    func(b []byte) { b[14] = 0x4f },
		"other type":     func(b []byte) { b[12] = 0x86 },
	} {
		b := reply(frame, nil)
		change(b)
		if got, err := Parse(b[:42]); err == nil {
			t.Errorf("%s: expected an error, found %v", name, got)
		}
	}
}

func TestFrameRefuses(t *testing.T) {
	for name, r := range map[string]Request{
		"two families":      request("192.168.12.99", "2001:db8::1"),
		"no source":         {From: own, Via: via, Target: netip.MustParseAddr("192.168.12.1")},
		"no next hop":       {From: own, Source: netip.MustParseAddr("192.168.12.99"), Target: netip.MustParseAddr("192.168.12.1")},
		"long own hardware": {From: append(slices.Clone(own), 1), Via: via, Source: netip.MustParseAddr("192.168.12.99"), Target: netip.MustParseAddr("192.168.12.1")},
	} {
		if _, err := r.Frame(); err == nil {
			t.Errorf("%s: expected an error", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"192.168.12.99", "2001:db8::99"} {
		a := netip.MustParseAddr(s)
		frame, err := Request{own, via, a, a, 1}.Frame()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(reply(frame, nil))
	}
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = Parse(b) })
}
