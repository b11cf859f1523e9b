package sysctl_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/sysctl"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func TestPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":              "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/conf/eth1.10/forwarding": "/proc/sys/net/ipv4/conf/eth1.10/forwarding",
	} {
		if got := sysctl.Path(name); got != want {
			t.Errorf("Path(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestReadAndWrite(t *testing.T) {
	const number, text, missing = "net.ipv4.ip_default_ttl", "net.ipv4.ip_local_port_range", "net.ipv4.none"
	if err := sysctl.Write(number, "63"); err != nil {
		t.Fatal(err)
	}
	if n, err := sysctl.ReadInt(number); n != 63 || err != nil {
		t.Errorf("%d, %v; want 63", n, err)
	}
	if err := sysctl.Write(text, "40000 50000"); err != nil {
		t.Fatal(err)
	}
	if s, err := sysctl.Read(text); s != "40000\t50000" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if _, err := sysctl.ReadInt(text); err == nil || !strings.HasPrefix(err.Error(), "read sysctl "+text+": ") {
		t.Errorf("a pair read as a number: %v", err)
	}
	if err := sysctl.Write(number, "ttl"); err == nil {
		t.Error("a word is written as a number")
	}
	_, err := sysctl.Read(missing)
	for _, err := range []error{err, sysctl.Write(missing, "1")} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want %v", err, fs.ErrNotExist)
		}
	}
}
