package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/e2e/who"
)

// nameServerAddr is the node's name server. It is in the resolv.conf of containers.
const nameServerAddr = "192.0.2.53"

// names are its records.
var names = who.Names{
	"example.com.":        "203.0.113.27",
	"db.example.com.":     "203.0.113.26",
	"foobar.example.com.": "203.0.113.26",
	"www.example.org.":    "203.0.113.25",
}

// proxy plays a pod with a proxy and returns it once the proxy is ready. The proxy has
// the default privilege of a container and is closed to the physical network.
func proxy(t *testing.T, manifest, port string) pod {
	t.Helper()
	p := play(t, manifest, bare)
	container := p.name + "-egress-router-pod"
	p.awaitReady(t, container)
	if got := run(t, "podman", "inspect", "--format", "{{.HostConfig.Privileged}} {{.EffectiveCaps}}", container); !strings.HasPrefix(got, "false [") ||
		strings.Contains(got, "_ADMIN") {
		t.Errorf("the proxy has more privilege than the default: %s", got)
	}
	// Its packets are dropped, without an answer.
	if err := command("nsenter", "--net="+outside, "curl", "--silent", "--max-time", "3", "http://"+reserved.String()+":"+port).run(); err == nil {
		t.Error("the proxy serves the physical network")
	}
	return p
}

// The documentation's pod with the HTTP proxy, with curl as its client.
func TestHTTPProxyPod(t *testing.T) {
	p := proxy(t, "http-proxy-pod.yaml", "8080")
	c := newClient(t)
	address := fmt.Sprintf("http://%s:8080/", p.address)
	for _, test := range []struct{ url, answer string }{
		{"http://203.0.113.25/", `^203\.0\.113\.25:80 192\.168\.12\.99\n200$`},
		{"http://www.example.org/", `^203\.0\.113\.25:80 192\.168\.12\.99\n200$`},
		{"https://www.example.org/", `^203\.0\.113\.25:443 192\.168\.12\.99\n200$`},
		{"http://foobar.example.com/", `denied by rule 1: !\*\.example\.com\n403$`},
		{"http://192.168.1.7/", `denied by rule 2: !192\.168\.1\.0/24\n403$`},
		{"http://gone.example.org/", `looking up gone\.example\.org: no such name\n502$`},
	} {
		// The server's certificate is for tests.
		got := run(t, "nsenter", "--net="+string(c), "env", "http_proxy="+address, "https_proxy="+address,
			"curl", "--silent", "--show-error", "--insecure", "--max-time", "60", "--write-out", "%{http_code}", test.url)
		if !regexp.MustCompile(test.answer).MatchString(got) {
			t.Errorf("%s: %q, want %s", test.url, got, test.answer)
		}
	}
	denied := command("nsenter", "--net="+string(c), "env", "https_proxy="+address,
		"curl", "--silent", "--insecure", "--max-time", "60", "--write-out", "%{http_connect}", "https://foobar.example.com/")
	if err := denied.run(); err == nil || denied.stdout.String() != "403" {
		t.Errorf("a tunnel to a denied host: %v, answer %q; want 403", err, &denied.stdout)
	}
}

// The documentation's pod with the DNS proxy.
func TestDNSProxyPod(t *testing.T) {
	p := proxy(t, "dns-proxy-pod.yaml", "8080")
	c := newClient(t)
	for port, server := range map[string]string{
		"80": "203.0.113.25:80", "100": "203.0.113.27:100", "8080": "203.0.113.26:80", "8443": "203.0.113.26:443",
	} {
		c.want(t, "tcp", p.address.String()+":"+port, server, reserved)
	}
	await(t, "the connection's line in the log", func() bool {
		return strings.Contains(logs(p.name+"-egress-router-pod"), "port=100 destination=example.com:100 address=203.0.113.27:100 ")
	})
}
