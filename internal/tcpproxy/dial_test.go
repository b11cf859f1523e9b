package tcpproxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

// setSysctl sets a sysctl of the tests' network namespace until the test ends.
func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	file := "/proc/sys/net/ipv4/" + name
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// Connections that clients close first do not exhaust the proxy's ports.
func TestPortsAreReused(t *testing.T) {
	const ports = 30
	setSysctl(t, "tcp_tw_reuse", "0") // the default, 2, is for this very link
	setSysctl(t, "ip_local_port_range", fmt.Sprintf("40000 %d", 40000+ports-1))
	serve(t, "127.0.1.1:83")
	p, _, book := newProxy(t, nil)
	apply(t, p, "7001 127.0.1.1 83\n40007 127.0.1.1 83")

	for i := range 4 * ports {
		// The client needs ports too: it connects from other addresses.
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, 1, byte(i)}), 0))}
		conn, err := dialer.Dial("tcp", "127.0.0.1:7001")
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(conn, "hi")
		if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
			t.Fatalf("connection %d: %v\n%s", i, err, book)
		}
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.ReadAll(conn)
		_ = conn.Close()
	}

	// With a connection from every port, the next one fails.
	var all []int32
	for range ports {
		fd, err := p.dialer.dial(netip.MustParseAddrPort("127.0.1.1:83"))
		if err != nil {
			break
		}
		all = append(all, fd)
	}
	if _, err := p.dialer.dial(netip.MustParseAddrPort("127.0.1.1:83")); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("a connection from no port: %v", err)
	}
	// A connection to another server does not.
	serve(t, "127.0.1.2:83")
	fd, err := p.dialer.dial(netip.MustParseAddrPort("127.0.1.2:83"))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range append(all, fd) {
		rawClose(fd)
	}
}
