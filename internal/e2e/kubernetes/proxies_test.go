package kubernetes

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// wantUnprivileged checks that the proxy of a pod has neither root nor a capability, and
// cannot gain one.
func wantUnprivileged(t *testing.T, name string) {
	t.Helper()
	for line := range strings.Lines(onNode(t, "status", string(pod(t, name).UID))) {
		if strings.HasPrefix(line, "Name=egress-router ") {
			const none = "0000000000000000"
			if want := "Name=egress-router Uid=65532 CapPrm=" + none + " CapEff=" + none + " CapBnd=" + none + " NoNewPrivs=1\n"; line != want {
				t.Errorf("status of the proxy: %s, want %s", line, want)
			}
			return
		}
	}
	t.Error("no process egress-router in the pod")
}

// TestHTTPProxy tests the HTTP proxy in the pod of the documentation and in the pod
// without privilege. Names resolve through the cluster's name server at that of the site.
func TestHTTPProxy(t *testing.T) {
	for _, file := range []string{"http-proxy-pod.yaml", "http-proxy-restricted.yaml"} {
		t.Run(strings.TrimSuffix(file, ".yaml"), func(t *testing.T) {
			guard(t)
			apply(t, manifest(t, file)+"---\n"+clientOfProxy+"---\n"+partner(t))
			ready(t, "pod/egress-1", "pod/behind")
			if file == "http-proxy-restricted.yaml" {
				wantUnprivileged(t, "egress-1")
			}
			for url, answer := range map[string]string{
				"http://203.0.113.25/":       `^200 203\.0\.113\.25:80 192\.168\.12\.99\n$`,
				"http://www.example.org/":    `^200 203\.0\.113\.25:80 192\.168\.12\.99\n$`,
				"https://www.example.org/":   `^200 203\.0\.113\.25:443 192\.168\.12\.99\n$`,
				"http://foobar.example.com/": `^403 .*denied by rule 1: !\*\.example\.com\n$`,
				"http://192.168.1.7/":        `^403 .*denied by rule 2: !192\.168\.1\.0/24\n$`,
				// A name of the cluster, for a server outside.
				"http://partner.egress.svc.cluster.local/": `^200 203\.0\.113\.25:80 192\.168\.12\.99\n$`,
				"http://gone.example.org/":                 `^502 .*looking up gone\.example\.org: no such name\n$`,
				"https://foobar.example.com/":              `Forbidden`,
			} {
				get := func() (string, error) {
					return run("kubectl", "-n", namespace, "exec", "behind", "--", "/peer", "get", url)
				}
				// A Service gets its endpoint a moment after the pod is ready, and until
				// then may lead to that of an earlier Service of this name.
				var out string
				for end := time.Now().Add(patience); ; {
					var err error
					if out, err = get(); err != nil {
						out = err.Error()
					}
					if regexp.MustCompile(answer).MatchString(out) {
						break
					}
					if time.Now().After(end) {
						t.Errorf("%s: %q, want %s", url, out, answer)
						break
					}
				}
			}
			wantClosed(t, "8080")
		})
	}
}

// partner returns the Service for a host outside from a manifest.
func partner(t *testing.T) string {
	t.Helper()
	text := manifest(t, "dns-proxy-restricted.yaml")
	return text[strings.LastIndex(text, "---\n")+len("---\n"):]
}

// clientOfProxy is a pod that uses the proxy through http_proxy and https_proxy.
const clientOfProxy = `apiVersion: v1
kind: Pod
metadata:
  name: behind
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: peer
    image: ` + peerImage + `
    args: [wait]
    env:
    - name: http_proxy
      value: http://egress-1:8080/
    - name: https_proxy
      value: http://egress-1:8080/
`

// TestDNSProxy tests the DNS proxy in the pod of the documentation and in the pod
// without privilege.
func TestDNSProxy(t *testing.T) {
	for _, test := range []struct {
		file string
		want map[string]string
	}{
		{"dns-proxy-pod.yaml", nil},
		// A name of the cluster, for a server outside.
		{"dns-proxy-restricted.yaml", map[string]string{"egress-1:9000": "203.0.113.25:80"}},
	} {
		t.Run(strings.TrimSuffix(test.file, ".yaml"), func(t *testing.T) {
			guard(t)
			apply(t, manifest(t, test.file))
			ready(t, "pod/egress-1")
			service := "egress-dns-svc"
			if test.want != nil {
				service = "egress-1"
				wantUnprivileged(t, "egress-1")
			}
			address := pod(t, "egress-1").Status.PodIP
			for at, server := range map[string]string{
				service + ":80":   "203.0.113.25:80",
				service + ":100":  "203.0.113.27:100",
				address + ":8080": "203.0.113.26:80",
				address + ":8443": "203.0.113.26:443",
			} {
				want(t, "client", "tcp", at, server)
			}
			for at, server := range test.want {
				want(t, "client", "tcp", at, server)
			}
			wantClosed(t, "80", "100", "9465")
		})
	}
}
