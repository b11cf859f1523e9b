package spec

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParsePrefix(t *testing.T) {
	for text, want := range map[string]string{
		"192.168.12.99": "192.168.12.99/32", "192.168.12.99/24": "192.168.12.99/24", "0.0.0.0/0": "0.0.0.0/0",
		"2001:db8:12::99": "2001:db8:12::99/128", "2001:DB8:12::99/64": "2001:db8:12::99/64",
	} {
		if p, why := ParsePrefix(text); why != "" || p != netip.MustParsePrefix(want) {
			t.Errorf("%q: %s %q, want %s", text, p, why, want)
		}
	}
	for text, want := range map[string]string{
		"":                   "expected an IPv4 or IPv6 address",
		"foo/24":             "expected an IPv4 or IPv6 address",
		"192.168.12.256/24":  "an IPv4 address is four numbers from 0 to 255, without leading zeros",
		"01.2.3.4":           "without leading zeros",
		"192.168.12.99/":     "the length after the slash is a number from 0 to 32",
		"192.168.12.99/33":   "from 0 to 32",
		"192.168.12.99/024":  "from 0 to 32",
		"192.168.12.99/+24":  "from 0 to 32",
		"192.168.12.99/-1":   "from 0 to 32",
		"192.168.12.99/24/8": "from 0 to 32",
		"2001:db8::1/129":    "from 0 to 128",
		"fe80::1%eth0/64":    "an address has no zone: the interface is known, write fe80::1",
		"::ffff:1.2.3.4/24":  "an IPv4 address within IPv6: write 1.2.3.4",
	} {
		if p, why := ParsePrefix(text); p.IsValid() || !strings.Contains(why, want) {
			t.Errorf("%q: %s %q, want %q", text, p, why, want)
		}
	}
	if _, why := ParseAddress("192.168.12.1/24"); why != "expected one address, without a length" {
		t.Error(why)
	}
}
