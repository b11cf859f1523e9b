package config

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

// onlyA is a grammar with one rule.
func onlyA(value string) error {
	if value == "a" {
		return nil
	}
	return &rules.ParseError{Sentence: "Bad destination '" + value + "'", Hint: "write a", Line: rules.Line{Number: 1, Text: value}}
}

func TestParseHTTPProxy(t *testing.T) {
	want := HTTPProxyConfig{
		Listen:         netip.AddrPortFrom(netip.Addr{}, 8080),
		ConnectTimeout: 10 * time.Second, HeaderTimeout: 30 * time.Second, KeepAliveTimeout: 2 * time.Minute,
		IdleTimeout: 15 * time.Minute, MaxHeader: 65536, ProxyConfig: ProxyConfig{Grace: 20 * time.Second},
	}
	for name, test := range map[string]struct {
		env  func(*HTTPProxyEnvironment)
		want func(*HTTPProxyConfig)
	}{
		"defaults": {func(*HTTPProxyEnvironment) {}, func(*HTTPProxyConfig) {}},
		"a file": {
			func(e *HTTPProxyEnvironment) { e.Destination, e.DestinationFile = "", "rules" },
			func(*HTTPProxyConfig) {},
		},
		"a port":        {func(e *HTTPProxyEnvironment) { e.Listen = ":3128" }, func(c *HTTPProxyConfig) { c.Listen = netip.AddrPortFrom(netip.Addr{}, 3128) }},
		"an address":    {func(e *HTTPProxyEnvironment) { e.Listen = "[::1]:80" }, func(c *HTTPProxyConfig) { c.Listen = netip.MustParseAddrPort("[::1]:80") }},
		"an access log": {func(e *HTTPProxyEnvironment) { e.AccessLog = "true" }, func(c *HTTPProxyConfig) { c.AccessLog = true }},
		"no access log": {func(e *HTTPProxyEnvironment) { e.AccessLog = "false" }, func(*HTTPProxyConfig) {}},
		"unit-test":     {func(e *HTTPProxyEnvironment) { e.Mode = "unit-test" }, func(c *HTTPProxyConfig) { c.UnitTest = true }},
		"limits":        {func(e *HTTPProxyEnvironment) { e.MaxHeader, e.MaxConnections = "1024", "7" }, func(c *HTTPProxyConfig) { c.MaxHeader, c.MaxConnections = 1024, 7 }},
		"times":         {func(e *HTTPProxyEnvironment) { e.IdleTimeout, e.ShutdownGrace = "24h", "1m30s" }, func(c *HTTPProxyConfig) { c.IdleTimeout, c.Grace = 24*time.Hour, 90*time.Second }},
		"no grace":      {func(e *HTTPProxyEnvironment) { e.ShutdownGrace = "0" }, func(c *HTTPProxyConfig) { c.Grace = 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			env, want := HTTPProxyEnvironment{Destination: "a"}, want
			test.env(&env)
			test.want(&want)
			got, err := ParseHTTPProxy(env, func(string) ([]byte, error) { return []byte("a"), nil }, onlyA)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

// All faults are reported together, and the original's sentence is the last line.
func TestParseHTTPProxyFindsAll(t *testing.T) {
	_, err := ParseHTTPProxy(HTTPProxyEnvironment{
		Destination: "b", Listen: "8080", ConnectTimeout: "10", HeaderTimeout: "-1s", KeepAliveTimeout: "0s", IdleTimeout: "x",
		MaxHeader: "0", MaxConnections: "many", Mode: "unittest", ProxyEnvironment: ProxyEnvironment{ShutdownGrace: "1 s", AccessLog: "yes"},
	}, noFile, onlyA)
	faults, _ := errors.AsType[Errors](err)
	var variables []string
	for _, e := range faults {
		variables = append(variables, e.Variable)
	}
	want := []string{"EGRESS_HTTP_PROXY_DESTINATION", "EGRESS_HTTP_PROXY_LISTEN", "EGRESS_HTTP_PROXY_CONNECT_TIMEOUT", "EGRESS_HTTP_PROXY_HEADER_TIMEOUT",
		"EGRESS_HTTP_PROXY_KEEPALIVE_TIMEOUT", "EGRESS_HTTP_PROXY_IDLE_TIMEOUT",
		"EGRESS_HTTP_PROXY_MAX_HEADER", "EGRESS_HTTP_PROXY_MAX_CONNECTIONS", "EGRESS_HTTP_PROXY_MODE", "EGRESS_SHUTDOWN_GRACE", "EGRESS_ACCESS_LOG"}
	if diff := cmp.Diff(want, variables); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	if text := err.Error(); !strings.HasSuffix(text, "\nEGRESS_HTTP_PROXY_DESTINATION line 1: \"b\"\nhint: write a\nBad destination 'b'") {
		t.Errorf("the last lines are not the rule's:\n%s", text)
	}
}

// The health endpoint cannot have the address of the proxy.
func TestHTTPProxyHealthPort(t *testing.T) {
	const want = "hint: set another port in EGRESS_HEALTH_LISTEN, such as :9465\nEGRESS_HEALTH_LISTEN has port 8080, as has EGRESS_HTTP_PROXY_LISTEN"
	for _, test := range []struct {
		listen, health string
		bad            bool
	}{
		{"", ":8080", true}, {"", "10.128.0.98:8080", true}, {"10.128.0.98:8080", ":8080", true}, {"10.128.0.98:8080", "0.0.0.0:8080", true},
		{"10.128.0.98:8080", "[::]:8080", true}, {"[::1]:8080", "[::1]:8080", true}, {"0.0.0.0:8080", "[::]:8080", true},
		{"", ":9465", false}, {"127.0.0.1:8080", "10.128.0.98:8080", false}, {"0.0.0.0:8080", "[::1]:8080", false}, {":3128", ":8080", false},
	} {
		_, err := ParseHTTPProxy(HTTPProxyEnvironment{Destination: "a", Listen: test.listen, ProxyEnvironment: ProxyEnvironment{HealthListen: test.health}}, noFile, onlyA)
		if (err != nil) != test.bad || err != nil && err.Error() != want {
			t.Errorf("%q and %q: %v", test.listen, test.health, err)
		}
	}
}

func TestParseHTTPProxyFile(t *testing.T) {
	for name, test := range map[string]struct {
		env     HTTPProxyEnvironment
		content string
		err     string
	}{
		"both":   {HTTPProxyEnvironment{Destination: "a", DestinationFile: "f"}, "a", "are both set"},
		"none":   {HTTPProxyEnvironment{DestinationFile: "f"}, "none", `EGRESS_HTTP_PROXY_DESTINATION_FILE "f" cannot be read: file does not exist`},
		"a line": {HTTPProxyEnvironment{DestinationFile: "f"}, "b", "f:1: \"b\"\nhint: write a\nBad destination 'b'"},
		"empty":  {HTTPProxyEnvironment{DestinationFile: "f"}, "", "hint: the file \"f\" is empty\nNo EGRESS_HTTP_PROXY_DESTINATION specified"},
		"unset":  {HTTPProxyEnvironment{}, "", "hint: set EGRESS_HTTP_PROXY_DESTINATION to one rule on each line, for example \"*.example.com\"; a line \"*\" allows everything\nNo EGRESS_HTTP_PROXY_DESTINATION specified"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseHTTPProxy(test.env, func(name string) ([]byte, error) {
				if test.content == "none" {
					return noFile(name)
				}
				return []byte(test.content), nil
			}, onlyA)
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%v, want %q", err, test.err)
			}
		})
	}
}
