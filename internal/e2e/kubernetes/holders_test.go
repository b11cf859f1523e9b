package kubernetes

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// routerPods returns the UIDs of the pods with a label, also of those that end.
func routerPods(t *testing.T, label string) []string {
	t.Helper()
	return strings.Fields(kubectl(t, "get", "pods", "-l", label, "-o", "jsonpath={.items[*].metadata.uid}"))
}

// At no time two hosts on the physical network have the reserved address, although a successor
// may start before a pod has ended, and the gateway knows the one that has it.
func testOneHolder(t *testing.T) {
	guard(t)
	text := strings.Replace(documented, "metadata:\n", "metadata:\n  annotations: {"+watchKey+": never}\n", 1)
	applyRouters(t, text+service)
	available(t, first)
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	const deployment = "deployment/egress-router-cni-deployment"
	// A pod that ends slowly overlaps with a successor that starts at once.
	former := routerPods(t, frozenApp)
	kubectl(t, "patch", deployment, "--patch", `{"spec":{"template":{"spec":{"containers":[{"name":"egress-router-cni-pod","lifecycle":{"preStop":{"sleep":{"seconds":3}}}}]}}}}`)
	await(t, "the pod with that patch", func() error {
		podAddress(t, frozenApp)
		if after := routerPods(t, frozenApp); slices.Equal(after, former) {
			return errors.New("the former pod")
		}
		return nil
	})
	askWhoHas(t)
	for _, event := range []struct {
		name  string
		cause func()
		moves bool // to another pod
	}{
		{"pod deleted", func() { kubectl(t, "delete", "pods", "-l", frozenApp, "--wait=false") }, true},
		{"router deleted and created", func() {
			kubectl(t, "delete", "egressrouter", first)
			if err := tryApply(text); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"specification changed", func() {
			kubectl(t, "patch", "egressrouter", first, "--type=merge", "--patch", `{"spec":{"redirect":{"fallbackIP":"203.0.113.27"}}}`)
		}, true},
		{"scaled to 2", func() {
			kubectl(t, "scale", deployment, "--replicas=2")
			await(t, "the operator's scale", func() error {
				if out := kubectl(t, "get", deployment, "-o", "jsonpath={.spec.replicas}"); out != "1" {
					return errors.New("replicas " + out)
				}
				return nil
			})
		}, false},
	} {
		t.Run(event.name, func(t *testing.T) {
			before, since := routerPods(t, frozenApp), time.Now()
			event.cause()
			await(t, "one ready pod", func() error {
				podAddress(t, frozenApp)
				if after := routerPods(t, frozenApp); len(after) != 1 || (after[0] != before[0]) != event.moves {
					return fmt.Errorf("pods %q, before %q", after, before)
				}
				return nil
			})
			available(t, first)
			found, n := holders(t, since, false), 1
			if event.moves {
				n = 2
			}
			if len(found) != n {
				t.Fatalf("hosts with the reserved address: %v, want %d", found, n)
			}
			last := found[len(found)-1]
			if mac := macOf(t); mac != last.mac {
				t.Errorf("the gateway has %s for the reserved address, want %s", mac, last.mac)
			}
			want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
			if event.moves {
				t.Logf("silent for %s", last.from.Sub(found[0].to).Round(time.Millisecond))
			}
		})
	}
}
