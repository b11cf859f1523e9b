package httpproxy

import (
	"net/netip"
	"testing"
)

// Only requests with the same name and the same allowed addresses share connections.
func TestPoolKey(t *testing.T) {
	key := func(host string, addrs ...string) string {
		h, _ := parseHost(host)
		r := route{target: target{host: h}}
		for _, a := range addrs {
			r.addrs = append(r.addrs, netip.MustParseAddr(a))
		}
		return r.poolKey()
	}
	if a, b := key("a", "192.0.2.1", "192.0.2.2"), key("a", "192.0.2.2", "192.0.2.1"); a != b {
		t.Errorf("the order counts: %q, %q", a, b)
	}
	seen := map[string]bool{}
	for _, k := range []string{
		key("a", "192.0.2.1"), key("a", "192.0.2.1", "192.0.2.2"), key("b", "192.0.2.1"),
		key("a", "2001:db8::1"), key("192.0.2.1", "192.0.2.1"), key("[2001:db8::1]", "2001:db8::1"),
	} {
		if seen[k] {
			t.Errorf("two destinations have the key %q", k)
		}
		seen[k] = true
	}
}
