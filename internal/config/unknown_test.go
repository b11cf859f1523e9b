package config

import (
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A name with a mistake resembles the variable that was meant.
func TestUnknownVariables(t *testing.T) {
	for name, want := range map[string]string{
		"EGRES_SOURCE": "EGRESS_SOURCE", "EGRESSS_SOURCE": "EGRESS_SOURCE", "EGRESS_GAETWAY": "EGRESS_GATEWAY", "EGERSS_SOURCE": "EGRESS_SOURCE",
		"egress_source": "EGRESS_SOURCE", "EGRESS-SOURCE": "EGRESS_SOURCE", "EGRESSSOURCE": "EGRESS_SOURCE", "EGRESS__SOURCE": "EGRESS_SOURCE",
		"EGRESS_SOURCE_IP": "EGRESS_SOURCE", "EGRESS_ROUTER_SOURCE": "EGRESS_SOURCE",
		"EGRESS_GATWAY": "EGRESS_GATEWAY", "EGRESS_GATEWAYS": "EGRESS_GATEWAY",
		"EGRESS_MODE": "EGRESS_ROUTER_MODE", "EGRESS_DEBUG": "EGRESS_ROUTER_DEBUG", "EGRESS_ROUTER_MOD": "EGRESS_ROUTER_MODE",
		"EGRESS_DESTINATIONS": "EGRESS_DESTINATION", "EGRESS_DESTINATION_1": "EGRESS_DESTINATION", "EGRESS_ROUTER_DESTINATION": "EGRESS_DESTINATION",
		"EGRESS_DESTINATIONS_FILE": "EGRESS_DESTINATION_FILE", "EGRESS_BACKEND": "EGRESS_ROUTER_BACKEND", "EGRESS_CLUSTER_CIDR": "EGRESS_CLUSTER_CIDRS",
		"EGRESS_HTTP_DESTINATION": "EGRESS_HTTP_PROXY_DESTINATION", "EGRESS_DNS_PROXY_DESTINATIONS": "EGRESS_DNS_PROXY_DESTINATION",
		// Not variables of this program, nor near to one.
		"INGRESS_SOURCE": "", "INGRESS_GATEWAY": "", "SOURCE": "", "EGRESS": "", "EGRESS_": "", "EGRESS_POD_NAME": "", "EGRESS_HOST": "", "EGRESS_IMAGE": "",
		"EGRESS_VERSION": "", "EGRESS_HTTP_PROXY": "", "HTTP_PROXY": "", "EGRESS_LIST_OF_SOMETHING_ELSE": "", "ACCESS_LOG": "", "": "", "=": "", "E": "",
		// Services called egress, egress-1, egress-router, egress-source, egress-gateway and so on.
		"EGRESS_SERVICE_HOST": "", "EGRESS_SERVICE_PORT": "", "EGRESS_PORT": "", "EGRESS_PORT_80_TCP": "",
		"EGRESS_1_SERVICE_HOST": "", "EGRESS_1_SERVICE_PORT": "", "EGRESS_1_SERVICE_PORT_HTTP": "", "EGRESS_1_SERVICE_PORT_WEB_2": "", "EGRESS_1_PORT": "",
		"EGRESS_1_PORT_80_TCP": "", "EGRESS_1_PORT_80_TCP_PROTO": "", "EGRESS_1_PORT_80_TCP_PORT": "", "EGRESS_1_PORT_80_TCP_ADDR": "",
		"EGRESS_1_PORT_53_UDP": "", "EGRESS_1_PORT_53_UDP_ADDR": "", "EGRESS_1_PORT_9_SCTP": "", "EGRESS_ROUTER_SERVICE_HOST": "", "EGRESS_ROUTER_PORT": "",
		"EGRESS_SOURCE_SERVICE_HOST": "", "EGRESS_SOURCE_PORT": "", "EGRESS_SOURCE_PORT_80_TCP": "", "EGRESS_GATEWAY_PORT_80_TCP_PROTO": "",
		"EGRESS_ROUTER_MODE_SERVICE_PORT": "", "EGRES_PORT": "", "EGRESS_PROBE_SERVICE_PORT_HTTPS": "",
	} {
		got := unknownVariables([]string{"PATH", name, "HOME"}, Variables())
		var expected []string
		if want != "" {
			expected = []string{"unknown variable " + quoteName(name) + " has no effect: the nearest one is " + want}
		}
		if diff := cmp.Diff(expected, got); diff != "" {
			t.Errorf("%q: - want, + got:\n%s", name, diff)
		}
	}
}

// The variables of all programs are known to each: containers of a pod may have the
// same. Of equally near ones, the program's own is named.
func TestKnownVariables(t *testing.T) {
	for _, own := range [][]Variable{Variables(), HTTPProxyVariables(), DNSProxyVariables()} {
		for _, list := range [][]Variable{Variables(), HTTPProxyVariables(), DNSProxyVariables()} {
			for _, v := range list {
				if got := unknownVariables([]string{v.Name}, own); got != nil {
					t.Errorf("%s: %q", v.Name, got)
				}
			}
		}
	}
	for want, own := range map[string][]Variable{"EGRESS_HTTP_PROXY_MODE": HTTPProxyVariables(), "EGRESS_DNS_PROXY_MODE": DNSProxyVariables()} {
		if got := unknownVariables([]string{"EGRESS_PROXY_MODE"}, own); len(got) != 1 || !strings.HasSuffix(got[0], want) {
			t.Errorf("%q, want %s", got, want)
		}
	}
}

// Each parser returns the warnings, with its errors as hints in front of them.
func TestUnknownVariableIsReported(t *testing.T) {
	const want = "unknown variable EGRES_SOURCE has no effect: the nearest one is EGRESS_SOURCE"
	log := LogEnvironment{Names: []string{"EGRES_SOURCE", "EGRESS_1_PORT"}}
	bad := log
	bad.LogLevel = "all"
	proxy := func(l LogEnvironment) ProxyEnvironment { return ProxyEnvironment{LogEnvironment: l} }
	accept := func(string) error { return nil }
	for name, parse := range map[string]func(LogEnvironment) ([]string, error){
		"router": func(l LogEnvironment) ([]string, error) {
			env := good()
			env.LogEnvironment = l
			c, err := Parse(env, noFile)
			return c.Warnings, err
		},
		"http-proxy": func(l LogEnvironment) ([]string, error) {
			c, err := ParseHTTPProxy(HTTPProxyEnvironment{Destination: "*", ProxyEnvironment: proxy(l)}, noFile, accept)
			return c.Warnings, err
		},
		"dns-proxy": func(l LogEnvironment) ([]string, error) {
			c, err := ParseDNSProxy(DNSProxyEnvironment{Destination: "80 a.example", ProxyEnvironment: proxy(l)}, noFile, accept)
			return c.Warnings, err
		},
	} {
		if warnings, err := parse(log); err != nil || !cmp.Equal(warnings, []string{want}) {
			t.Errorf("%s: %q, %v", name, warnings, err)
		}
		_, err := parse(bad)
		if err == nil || !strings.HasPrefix(err.Error(), "hint: "+want+"\n") || !strings.Contains(err.Error(), "EGRESS_LOG_LEVEL") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A misspelt variable leaves the last line as it is.
	_, err := Parse(Environment{LogEnvironment: log}, func(string) ([]byte, error) { return nil, fs.ErrNotExist })
	if !strings.HasSuffix(err.Error(), "\nEGRESS_SOURCE unspecified or invalid") {
		t.Errorf("%v", err)
	}
}
