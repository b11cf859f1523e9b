package config

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
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

// The router's mode does not select what a proxy does. The modes that configure the
// network for a proxy are no mistake, and no mode is one beside the proxy's own unit-test.
func TestRouterModeOfProxyIsWarning(t *testing.T) {
	accept := func(string) error { return nil }
	for _, test := range []struct {
		mode, own string
		warns     bool
	}{
		{"", "", false},
		{"http-proxy", "", false},
		{"dns-proxy", "", false},
		{"unit-test", "unit-test", false},
		{"unit-test", "", true},
		{"init", "", true},
		{"x", "serve", true},
	} {
		t.Setenv("EGRESS_ROUTER_MODE", test.mode)
		http, errHTTP := ReadHTTPProxy()
		dns, errDNS := ReadDNSProxy()
		if errHTTP != nil || errDNS != nil {
			t.Fatal(errHTTP, errDNS)
		}
		http.Mode, http.Destination, dns.Mode, dns.Destination = test.own, "*", test.own, "80 192.0.2.1"
		h, errHTTP := ParseHTTPProxy(http, nil, accept)
		d, errDNS := ParseDNSProxy(dns, nil, accept)
		if errHTTP != nil || errDNS != nil {
			t.Fatal(errHTTP, errDNS)
		}
		for variable, found := range map[string][]string{"EGRESS_HTTP_PROXY_MODE": h.Warnings, "EGRESS_DNS_PROXY_MODE": d.Warnings} {
			var want []string
			if test.warns {
				want = []string{fmt.Sprintf("EGRESS_ROUTER_MODE %q has no effect on a proxy: its variable is %s", test.mode, variable)}
			}
			if diff := cmp.Diff(want, found, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("mode %q, own mode %q: - want, + got:\n%s", test.mode, test.own, diff)
			}
		}
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
