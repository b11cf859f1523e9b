package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// TestStandby deletes and kills the router that holds the address, and replaces both of them:
// the Service leads to the other one each time, and every connection has the reserved address.
// The two share the only node, whose processors the interval of 100 ms suits.
func TestStandby(t *testing.T) {
	guard(t)
	bridged(t)
	apply(t, manifest(t, "standby.yaml", "CHANGE-ME", strings.Repeat("key of a test ", 3),
		"topologyKey: kubernetes.io/hostname", "topologyKey: example.com/no-node-has-it",
		"        - name: EGRESS_STANDBY_PEERS\n", "        - name: EGRESS_STANDBY_INTERVAL\n          value: 100ms\n        - name: EGRESS_STANDBY_PEERS\n"))
	kubectl(t, "rollout", "status", "deployment/egress-standby", "--timeout=600s")
	for _, event := range []struct {
		name  string
		cause func(holder corev1.Pod)
		moves bool
	}{
		{"started", func(corev1.Pod) {}, false},
		{"pod deleted", func(p corev1.Pod) { kubectl(t, "delete", "pod", p.Name, "--wait=false") }, true},
		{"pod deleted at once", func(p corev1.Pod) { kubectl(t, "delete", "pod", p.Name, "--grace-period=0", "--force", "--wait=false") }, true},
		{"processes killed", func(p corev1.Pod) { onNode(t, "kill", string(p.UID)) }, false},
		{"rollout restarted", func(corev1.Pod) {
			kubectl(t, "rollout", "restart", "deployment/egress-standby")
			kubectl(t, "rollout", "status", "deployment/egress-standby", "--timeout=600s")
		}, true},
	} {
		t.Run(event.name, func(t *testing.T) {
			before := holding(t, "egress-standby")
			event.cause(before)
			caused := time.Now()
			if event.moves {
				await(t, "another router that holds the address", func() error {
					if led(t, "egress-standby") == before.Status.PodIP {
						return fmt.Errorf("the Service leads to %s", before.Name)
					}
					return nil
				})
			}
			want(t, "client", "tcp", "egress-standby:80", "203.0.113.25:80")
			t.Logf("the Service leads to the holder again, seen after %s", time.Since(caused).Round(10*time.Millisecond))
			kubectl(t, "rollout", "status", "deployment/egress-standby", "--timeout=600s")
			want(t, "client", "tcp", "egress-standby:8443", "203.0.113.26:443")
		})
	}
}

// led returns the address to which a Service of routers that stand by leads.
func led(t *testing.T, service string) string {
	t.Helper()
	var list discoveryv1.EndpointSliceList
	if err := json.Unmarshal([]byte(kubectl(t, "get", "endpointslices", "-l", discoveryv1.LabelServiceName+"="+service, "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	for _, s := range list.Items {
		for _, e := range s.Endpoints {
			return e.Addresses[0]
		}
	}
	return ""
}

// holding returns the pod to which the Service leads. Both have the same name.
func holding(t *testing.T, name string) (found corev1.Pod) {
	t.Helper()
	await(t, "a router that holds the address", func() error {
		var list corev1.PodList
		if err := json.Unmarshal([]byte(kubectl(t, "get", "pods", "-l", "name="+name, "-o", "json")), &list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Status.PodIP != "" && p.Status.PodIP == led(t, name) && p.DeletionTimestamp == nil {
				found = p
				return nil
			}
		}
		return errors.New("the Service leads to no pod")
	})
	return found
}
