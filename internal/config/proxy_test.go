package config

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// proxies are the variables of both proxies, and the README's sections of them.
var proxies = map[string][]Variable{"HTTP proxy": HTTPProxyVariables(), "DNS proxy": DNSProxyVariables()}

// The structs, the command's comment and the README describe the same variables in
// the same words, and no name looks like one that Kubernetes sets for a service.
func TestProxyDocumentation(t *testing.T) {
	comment, err := os.ReadFile("../../cmd/egress-router/main.go")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, list := range proxies {
		_, section, _ := strings.Cut(string(readme), "\n## "+name+"\n")
		section, _, _ = strings.Cut(section, "\n## ")
		for _, v := range list {
			if v.Unset == "" || v.Doc == "" || strings.Contains(v.Name, "_SERVICE_") || strings.Contains(v.Name, "_PORT") {
				t.Errorf("%s is not described, or could be set by Kubernetes", v.Name)
			}
			if line := fmt.Sprintf("//\t%-35s (%s) %s\n", v.Name, v.Unset, v.Doc); !strings.Contains(string(comment), line) {
				t.Errorf("cmd/egress-router/main.go lacks\n%s", line)
			}
			if row := fmt.Sprintf("| `%s` | %s | %s |\n", v.Name, v.Unset, v.Doc); !strings.Contains(section, row) {
				t.Errorf("the README's section %q lacks\n%s", name, row)
			}
		}
		if n := strings.Count(section, "\n| `EGRESS_"); n != len(list) {
			t.Errorf("the README's section %q has %d variables, want %d", name, n, len(list))
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
