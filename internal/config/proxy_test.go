package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// proxies are the variables of both proxies.
var proxies = [][]Variable{HTTPProxyVariables(), DNSProxyVariables()}

// No name looks like one that Kubernetes sets for a service.
func TestNamesOfProxiesAreNotOfServices(t *testing.T) {
	for _, list := range proxies {
		for _, v := range list {
			if strings.Contains(v.Name, "_SERVICE_") || strings.Contains(v.Name, "_PORT") {
				t.Errorf("%s could be set by Kubernetes for a service", v.Name)
			}
		}
	}
}

// A stray variable with the bare name is ignored, and every variable is read
// unchanged.
func TestReadProxies(t *testing.T) {
	for _, list := range proxies {
		for _, v := range list {
			t.Setenv(v.Name, "")
			t.Setenv(strings.TrimPrefix(v.Name, "EGRESS_"), "stray")
		}
	}
	t.Setenv("EGRESS_DNS_PROXY_DESTINATION", " 80 a.example\n")
	t.Setenv("EGRESS_HTTP_PROXY_DESTINATION", " a.example\n")
	t.Setenv("EGRESS_DNS_PROXY_DEBUG", "no")
	t.Setenv("EGRESS_ACCESS_LOG", "true")
	both := ProxyEnvironment{AccessLog: "true"}
	dns, err := ReadDNSProxy()
	dns.Names = nil
	if diff := cmp.Diff(DNSProxyEnvironment{Destination: " 80 a.example\n", Debug: "no", ProxyEnvironment: both}, dns); err != nil || diff != "" {
		t.Errorf("error %v, - want, + got:\n%s", err, diff)
	}
	http, err := ReadHTTPProxy()
	http.Names = nil
	if diff := cmp.Diff(HTTPProxyEnvironment{Destination: " a.example\n", ProxyEnvironment: both}, http); err != nil || diff != "" {
		t.Errorf("error %v, - want, + got:\n%s", err, diff)
	}
}

// The documented default may be written.
func TestServeIsNoMistake(t *testing.T) {
	accept := func(string) error { return nil }
	http := HTTPProxyEnvironment{Mode: "serve", Destination: "*"}
	if c, err := ParseHTTPProxy(http, nil, accept); err != nil || c.UnitTest || len(c.Warnings) > 0 {
		t.Errorf("HTTP proxy: %+v, %v", c, err)
	}
	dns := DNSProxyEnvironment{Mode: "serve", Destination: "80 192.0.2.1 80"}
	if c, err := ParseDNSProxy(dns, nil, accept); err != nil || c.UnitTest || len(c.Warnings) > 0 {
		t.Errorf("DNS proxy: %+v, %v", c, err)
	}
}
