package kubernetes

import (
	"fmt"
	"strings"
	"testing"
)

// counted returns a counter of a destination in the text of /metrics, zero if it is
// missing.
func counted(text, metric, port, destination string) (n int) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, metric+"{") && strings.Contains(line, `port="`+port+`"`) && strings.Contains(line, `destination="`+destination+`"`) {
			_, _ = fmt.Sscan(line[strings.LastIndex(line, " "):], &n)
		}
	}
	return n
}

// The legacy pod with probes is ready and alive, and /metrics counts every connection.
func TestProbes(t *testing.T) {
	guard(t)
	apply(t, manifest(t, "probes-pod.yaml")+"---\n"+manifest(t, "service.yaml"))
	ready(t, "pod/egress-1")
	want(t, "client", "tcp", "egress-1:80", "203.0.113.25:80")
	wantExample(t, "egress-1")
	wantClosed(t, "80", "9465")

	address := pod(t, "egress-1").Status.PodIP
	metrics := func() string {
		t.Helper()
		out, err := peer("get", "http://"+address+":9465/metrics")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	const connections, destination = "egress_router_connections_total", "203.0.113.26:80"
	before := counted(metrics(), connections, "8080", destination)
	if before == 0 {
		t.Error("connections of port 8080: 0, want at least 1")
	}
	for range 3 {
		if _, err := ask("client", "tcp", address+":8080"); err != nil {
			t.Fatal(err)
		}
	}
	text := metrics()
	if got := counted(text, connections, "8080", destination); got != before+3 {
		t.Errorf("connections of port 8080 after three more: %d, want %d", got, before+3)
	}
	if !strings.Contains(text, "\negress_router_ready 1\n") || counted(text, "egress_router_sent_bytes_total", "8080", destination) == 0 {
		t.Errorf("not ready, or no sent bytes of port 8080:\n%s", text)
	}
	for path, answer := range map[string]string{"/healthz": "200 ", "/readyz": "200 "} {
		if out, err := peer("get", "http://"+address+":9465"+path); err != nil || !strings.HasPrefix(out, answer) {
			t.Errorf("%s: %q, %v", path, out, err)
		}
	}
	out := kubectl(t, "exec", "egress-1", "--", "/usr/bin/egress-router", "health")
	if !strings.Contains(out, "ready") {
		t.Errorf("health: %s", out)
	}
	if n := pod(t, "egress-1").Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("the router was restarted %d times", n)
	}
}

// A router whose gateway does not answer is not ready, so that the Service sends it no
// connections. The kubelet does not restart it.
func TestGatewayGone(t *testing.T) {
	guard(t)
	apply(t, manifest(t, "probes-pod.yaml", "    - name: EGRESS_HEALTH_LISTEN\n", "    - name: EGRESS_HEALTH_INTERVAL\n      value: 1s\n    - name: EGRESS_HEALTH_LISTEN\n")+"---\n"+manifest(t, "service.yaml"))
	ready(t, "pod/egress-1")
	want(t, "client", "tcp", "egress-1:80", "203.0.113.25:80")

	answers := func(arpIgnore string) {
		t.Helper()
		if err := theNetwork.run(theNetwork.gateway, "", "sysctl", "-q", "-w", "net.ipv4.conf.lan0.arp_ignore="+arpIgnore); err != nil {
			t.Fatal(err)
		}
	}
	answers("8") // no reply for any local address (ip-sysctl)
	t.Cleanup(func() { answers("0") })
	kubectl(t, "wait", "--for=condition=Ready=false", "--timeout=600s", "pod/egress-1")
	await(t, "the Service's refusal", func() error {
		if a, err := ask("client", "tcp", "egress-1:80"); err == nil {
			return fmt.Errorf("answer %s", a)
		}
		return nil
	})
	answers("0")
	ready(t, "pod/egress-1")
	want(t, "client", "tcp", "egress-1:80", "203.0.113.25:80")
	if n := pod(t, "egress-1").Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("the router was restarted %d times", n)
	}
}
