package tcpproxy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

// The proxy does not connect to itself, however a destination names it: each of its
// connections would be the client of the next one, until no descriptor is left.
func TestNoConnectionToItself(t *testing.T) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	add := func(address string) {
		t.Helper()
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = 0x02 // IFA_F_NODAD
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = netlink.AddrDel(lo, addr) })
	}
	add("198.51.100.1/32")
	add("2001:db8::51/128")
	before := descriptors(t)
	p, n, log := newProxy(t, nil)
	p.local = new(ownAddresses).has
	list := "7090 127.0.0.1\n7091 0.0.0.0 7092\n7092 198.51.100.1 7091\n"
	for i, addr := range []string{"127.0.0.1", "127.9.9.9", "0.0.0.0", "198.51.100.1", "::1", "2001:db8::51", "198.51.100.2"} {
		name := fmt.Sprintf("n%d.example", i)
		n.set(name, addr)
		list += fmt.Sprintf("%d %s\n", 7080+i, name)
	}
	apply(t, p, list)
	// An address that the pod gets later.
	wantLater := func() (last Status) {
		for _, s := range p.Status() {
			if s.Destination.Port == 7086 {
				last = s
			}
		}
		return last
	}
	await(t, func() error {
		if s := wantLater(); s.Addresses != 1 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	add("198.51.100.2/32")
	await(t, func() error {
		if !p.local(netip.MustParseAddr("198.51.100.2")) {
			return fmt.Errorf("a new address is not known")
		}
		return nil
	})
	for port := 7080; port <= 7086; port++ {
		wantRefusal(t, port)
	}
	for port := 7090; port <= 7092; port++ {
		wantRefusal(t, port)
	}
	await(t, func() error {
		for _, s := range p.Status() {
			if s.Connections != 1 || s.Open != 0 || s.Failed != 1 {
				return fmt.Errorf("%+v\n%s", s, log)
			}
		}
		return nil
	})
	p.Shutdown(0)
	wantDescriptors(t, before)

	// A server of the pod on another port is one, if the destination is an address.
	serve(t, "198.51.100.1:7099")
	p, n, _ = newProxy(t, nil)
	p.local = new(ownAddresses).has
	n.set("a.example", "198.51.100.1")
	apply(t, p, "7081 198.51.100.1 7099\n7082 a.example 7099")
	connect(t, 7081).ask(t, "198.51.100.1:7099")
	wantRefusal(t, 7082)
}
