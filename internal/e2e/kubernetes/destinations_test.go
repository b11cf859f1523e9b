package kubernetes

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// With destinations from a ConfigMap in the environment, a new pod has the new
// destinations.
func TestDestinationsFromEnvironment(t *testing.T) {
	guard(t)
	text := manifest(t, "destination-env.yaml")
	config, router, _ := strings.Cut(text, "\n---\n")
	apply(t, config)
	apply(t, router)
	ready(t, "pod/egress-1")
	wantExample(t, "egress-1")
	changed := manifest(t, "destination-env.yaml", "80   tcp 203.0.113.25\n", "80   tcp 203.0.113.26\n")
	if err := tryApply(strings.SplitN(changed, "\n---\n", 2)[0]); err != nil {
		t.Fatal(err)
	}
	want(t, "client", "tcp", pod(t, "egress-1").Status.PodIP+":80", "203.0.113.25:80")
	kubectl(t, "delete", "pod", "egress-1")
	if err := tryApply(router); err != nil {
		t.Fatal(err)
	}
	ready(t, "pod/egress-1")
	want(t, "client", "tcp", pod(t, "egress-1").Status.PodIP+":80", "203.0.113.26:80")
}

// With destinations from a mounted ConfigMap, the router follows its changes, and
// connections of an unchanged line continue.
func TestDestinationsFromFile(t *testing.T) {
	guard(t)
	// The documentation's other manifest, for an init container.
	t.Run("init", func(t *testing.T) {
		apply(t, manifest(t, "destination-file.yaml"))
		ready(t, "pod/egress-1")
		wantExample(t, "egress-1")
	})

	text := manifest(t, "probes-pod.yaml")
	config, _, _ := strings.Cut(text, "\n---\n")
	apply(t, text)
	ready(t, "pod/egress-1")
	address := pod(t, "egress-1").Status.PodIP
	apply(t, peerPod("holder", "hold", address+":8080"))
	ready(t, "pod/holder")
	want(t, "client", "tcp", address+":80", "203.0.113.25:80")

	// set changes the ConfigMap, and annotates the pod, so that the kubelet updates the
	// volume now; otherwise it does so within about a minute.
	set := func(old, new string) {
		t.Helper()
		if !strings.Contains(config, old) {
			t.Fatalf("the ConfigMap does not contain %q", old)
		}
		if err := tryApply(strings.Replace(config, old, new, 1)); err != nil {
			t.Fatal(err)
		}
		kubectl(t, "annotate", "--overwrite", "pod", "egress-1", fmt.Sprintf("changed=%d", time.Now().UnixNano()))
	}
	set("80   tcp 203.0.113.25\n", "80   tcp 203.0.113.27\n")
	await(t, "the new destination", func() error {
		a, err := ask("client", "tcp", address+":80")
		if err == nil && a.Server.String() != "203.0.113.27:80" {
			err = fmt.Errorf("answer %s", a)
		}
		return err
	})
	// An invalid line changes no destination, and the health report names it.
	set("80   tcp 203.0.113.25\n", "80   tcp 203.0.113.256\n")
	await(t, "the invalid line in the health report", func() error {
		out, err := run("kubectl", "-n", namespace, "exec", "egress-1", "--", "/usr/bin/egress-router", "health")
		if err == nil && !strings.Contains(out, "203.0.113.256") {
			err = fmt.Errorf("health: %s", out)
		}
		return err
	})
	want(t, "client", "tcp", address+":80", "203.0.113.27:80")

	// The open connection still gets its answers.
	changed := time.Now()
	await(t, "an answer on the open connection", func() error {
		lines := strings.Split(strings.TrimSpace(kubectl(t, "logs", "holder")), "\n")
		at, answer, _ := strings.Cut(lines[len(lines)-1], " ")
		if nanoseconds, err := strconv.ParseInt(at, 10, 64); err != nil || answer != "203.0.113.26:80 192.168.12.99" || time.Unix(0, nanoseconds).Before(changed) {
			return fmt.Errorf("last line %q", lines[len(lines)-1])
		}
		return nil
	})
	if n := pod(t, "holder").Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("the open connection broke %d times", n)
	}
}
