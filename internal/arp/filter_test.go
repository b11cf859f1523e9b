package arp

import (
	"net/netip"
	"testing"

	"golang.org/x/net/bpf"
)

// framesBy returns frames of neighbours, and whether the filter accepts each.
func framesBy(t testing.TB) (accepted, dropped map[string][]byte) {
	t.Helper()
	from := func(op Operation, sender, target netip.Addr) []byte {
		return Packet{op, otherMAC, sender, unknown(), target}.frame()
	}
	accepted = map[string][]byte{
		"claim, request":            from(Request, address, address),
		"claim, reply":              from(Reply, address, address),
		"claim by asking a third":   from(Request, address, neighbour),
		"gateway asks for us":       from(Request, gateway, address),
		"gateway answers":           from(Reply, gateway, address),
		"gateway asks for a third":  from(Request, gateway, neighbour),
		"probe for the address":     from(Request, zeroIP, address),
		"gateway answers, unpadded": unhex(t, gatewayReply),
	}
	dropped = malformed(t)
	dropped["a third asks for us"] = from(Request, neighbour, address)
	dropped["a third asks for the gateway"] = from(Request, neighbour, gateway)
	dropped["a third announces"] = from(Request, neighbour, neighbour)
	dropped["a third answers"] = from(Reply, neighbour, address)
	dropped["probe for the gateway"] = from(Request, zeroIP, gateway)
	dropped["probe for a third"] = from(Request, zeroIP, neighbour)
	// Parse rejects these: the filter checks neither the operation nor, for
	// holders of an address, the target.
	for _, name := range []string{"operation 0", "RARP request", "operation in little endian", "one byte short"} {
		accepted[name] = dropped[name]
		delete(dropped, name)
	}
	return accepted, dropped
}

func TestFilter(t *testing.T) {
	p, err := program([]netip.Addr{address}, gateway)
	if err != nil {
		t.Fatal(err)
	}
	// The module's virtual machine has no packet types, which come first.
	vm, err := bpf.NewVM(p[2:])
	if err != nil {
		t.Fatal(err)
	}
	accepted, dropped := framesBy(t)
	for want, frames := range map[bool]map[string][]byte{true: accepted, false: dropped} {
		for name, frame := range frames {
			n, err := vm.Run(frame)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := n == packetEnd; got != want || !got && n != 0 {
				t.Errorf("%s: accepted = %t (%d bytes), want %t", name, got, n, want)
			}
		}
	}
}

// Without a gateway only the address matters.
func TestFilterWithoutGateway(t *testing.T) {
	p, err := program([]netip.Addr{address}, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(p[2:])
	if err != nil {
		t.Fatal(err)
	}
	for sender, want := range map[netip.Addr]int{address: packetEnd, gateway: 0, zeroIP: packetEnd} {
		if n, err := vm.Run(Packet{Request, otherMAC, sender, unknown(), address}.frame()); err != nil || n != want {
			t.Errorf("sender %s: %d, %v, want %d", sender, n, err, want)
		}
	}
}

func TestFilterRefuses(t *testing.T) {
	for _, addresses := range [][2]netip.Addr{
		{{}, gateway}, {netip.MustParseAddr("2001:db8::1"), gateway}, {address, netip.MustParseAddr("2001:db8::1")},
	} {
		if _, err := program(addresses[:1], addresses[1]); err == nil {
			t.Errorf("%v: want an error", addresses)
		}
	}
}

// A second address counts as the first one does.
func TestFilterOfTwoAddresses(t *testing.T) {
	p, err := program([]netip.Addr{address, neighbour}, gateway)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(p[2:])
	if err != nil {
		t.Fatal(err)
	}
	third := netip.MustParseAddr("192.168.12.81")
	for _, test := range []struct {
		sender, target netip.Addr
		want           int
	}{
		{address, third, packetEnd}, {neighbour, third, packetEnd}, {gateway, third, packetEnd}, {zeroIP, neighbour, packetEnd}, {zeroIP, address, packetEnd},
		{third, neighbour, 0}, {zeroIP, gateway, 0}, {zeroIP, third, 0},
	} {
		if n, err := vm.Run(Packet{Request, otherMAC, test.sender, unknown(), test.target}.frame()); err != nil || n != test.want {
			t.Errorf("from %s to %s: %d, %v, want %d", test.sender, test.target, n, err, test.want)
		}
	}
}
