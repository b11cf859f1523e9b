package config

import (
	"strings"
	"testing"
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
	if env, err := ReadDNSProxy(); err != nil || env != (DNSProxyEnvironment{Destination: " 80 a.example\n", Debug: "no", ProxyEnvironment: both}) {
		t.Errorf("%+v, %v", env, err)
	}
	if env, err := ReadHTTPProxy(); err != nil || env != (HTTPProxyEnvironment{Destination: " a.example\n", ProxyEnvironment: both}) {
		t.Errorf("%+v, %v", env, err)
	}
}
