package httpproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// A target is the host and port of a request.
type target struct {
	host Host
	port uint16
}

func (t target) String() string {
	return net.JoinHostPort(t.host.String(), strconv.Itoa(int(t.port)))
}

// defaultPorts are the default ports of the supported schemes (RFC 9110 section 4.2).
var defaultPorts = map[string]uint16{"http": 80, "https": 443}

// targetOf returns the target of a CONNECT or of a request in absolute form (RFC 9112
// section 3.2).
func targetOf(r *request) (target, error) {
	if r.method == http.MethodConnect {
		t, err := parseAuthority(r.uri, 0)
		if err != nil {
			return t, fmt.Errorf("CONNECT %q: %w", r.uri, err)
		}
		return t, nil
	}
	if r.host == "" {
		return target{}, fmt.Errorf("%q: expected an absolute URL, such as http://example.com/", r.uri)
	}
	port, known := defaultPorts[r.scheme]
	if !known {
		return target{}, fmt.Errorf("%q: the scheme must be http or https", r.uri)
	}
	t, err := parseAuthority(r.host, port)
	if err != nil {
		return t, fmt.Errorf("%q: %w", r.uri, err)
	}
	return t, nil
}

// parseAuthority parses "host:port", or "host" if there is a default port.
func parseAuthority(s string, defaultPort uint16) (target, error) {
	host, port := s, ""
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.Contains(s[i:], "]") {
		host, port = s[:i], s[i+1:]
	}
	t := target{port: defaultPort}
	if port != "" || defaultPort == 0 {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return target{}, fmt.Errorf("the port must be a number from 1 to 65535")
		}
		t.port = uint16(n)
	}
	var ok bool
	t.host, ok = parseHost(host)
	if !ok {
		return target{}, fmt.Errorf("%q is not a host name or an IP address", host)
	}
	return t, nil
}

// parseHost parses a name, an IPv4 address, or an IPv6 address in brackets. The rules
// ignore a final dot.
func parseHost(s string) (Host, bool) {
	if inner, ok := strings.CutPrefix(s, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		a, err := netip.ParseAddr(inner)
		if !ok || err != nil || !a.Is6() || a.Zone() != "" {
			return Host{}, false
		}
		return Host{Addr: a.Unmap()}, true
	}
	if a, err := netip.ParseAddr(strings.TrimSuffix(s, ".")); err == nil && a.Is4() {
		return Host{Addr: a}, true
	}
	name, ok := parseName(s)
	return Host{Name: name, Absolute: ok && strings.HasSuffix(s, ".")}, ok
}
