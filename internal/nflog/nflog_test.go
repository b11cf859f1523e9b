package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	vishvananda "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// message returns the attributes of a logged packet.
func message(t testing.TB, payload []byte) []byte {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.String(attributePrefix, "invalid")
	e.Uint32(attributeIn, 2)
	e.Bytes(attributePayload, payload)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// header4 returns an IPv4 header with four bytes behind it.
func header4(protocol byte, fragment uint16, options int) []byte {
	b := make([]byte, 20+options, 24+options)
	b[0], b[9] = 0x45+byte(options/4), protocol
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2})
	return append(b, 0, 80, 1, 0)
}

func addrPorts(from, to string) (a, b netip.AddrPort) {
	return netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
}

func TestDecode(t *testing.T) {
	header6 := make([]byte, 40)
	header6[0], header6[6], header6[23], header6[39] = 0x60, unix.IPPROTO_TCP, 1, 2
	for name, test := range map[string]struct {
		payload            []byte
		protocol, from, to string
	}{
		"TCP":                   {header4(6, 0, 0), "tcp", "192.0.2.1:80", "192.0.2.2:256"},
		"options":               {header4(17, 0, 40), "udp", "192.0.2.1:80", "192.0.2.2:256"},
		"a later fragment":      {header4(17, 185, 0), "udp", "192.0.2.1:0", "192.0.2.2:0"},
		"ICMP":                  {header4(1, 0, 0), "icmp", "192.0.2.1:0", "192.0.2.2:0"},
		"protocol without name": {header4(47, 0, 0), "47", "192.0.2.1:0", "192.0.2.2:0"},
		"ports missing":         {header4(6, 0, 0)[:20], "tcp", "192.0.2.1:0", "192.0.2.2:0"},
		"IPv6":                  {append(header6, 0, 80, 1, 0), "tcp", "[::1]:80", "[::2]:256"},
	} {
		t.Run(name, func(t *testing.T) {
			want := Packet{Prefix: "invalid", In: "2", Protocol: test.protocol}
			want.Source, want.Destination = addrPorts(test.from, test.to)
			got, err := decode(message(t, test.payload), func(index uint32) string { return strconv.Itoa(int(index)) })
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); err != nil || diff != "" {
				t.Errorf("error %v, - want, + got:\n%s", err, diff)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(message(f, header4(6, 0, 0)))
	f.Add(message(f, header4(6, 0, 40)[:59]))
	f.Add(message(f, []byte{0x4f}))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = decode(b, func(uint32) string { return "" }) })
}

// The kernel passes a packet that a rule logs to the only reader of the group.
func TestRun(t *testing.T) {
	const group = 4711
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var l *Log
	var from netip.AddrPort
	inside := func(fn func() error) {
		t.Helper()
		if err := ns.Do(fn); err != nil {
			t.Fatal(err)
		}
	}
	inside(func() error {
		lo, err := vishvananda.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := vishvananda.LinkSetUp(lo); err != nil {
			return err
		}
		if l, err = Open(group); err != nil {
			return err
		}
		if _, err := Open(group); !errors.Is(err, unix.EPERM) {
			t.Errorf("a second reader: error %v, want EPERM", err)
		}
		out, err := exec.Command("nft", `table ip t { chain c { type filter hook output priority 0; udp dport 9 log prefix "a-prefix" group 4711; }; }`).CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		conn, err := net.Dial("udp4", "127.0.0.1:9")
		if err != nil {
			return err
		}
		defer conn.Close()
		from = conn.LocalAddr().(*net.UDPAddr).AddrPort()
		_, err = conn.Write(make([]byte, 1000))
		return err
	})
	packets, ended := make(chan Packet, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- l.Run(ctx, func(p Packet) { packets <- p }) }()
	got := <-packets
	if got.Prefix != "a-prefix" || got.In != "" || got.Out == "" || got.Protocol != "udp" || got.Source != from || got.Destination.String() != "127.0.0.1:9" {
		t.Errorf("packet %+v from %s", got, from)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("after the end of the context: %v", err)
	}
	inside(func() error { // the group is free again, once the kernel has released the socket
		l, err := Open(group)
		for end := time.Now().Add(10 * time.Minute); errors.Is(err, unix.EPERM) && time.Now().Before(end); l, err = Open(group) {
			time.Sleep(time.Millisecond)
		}
		if err == nil {
			err = l.Run(ctx, nil)
		}
		return err
	})
}
