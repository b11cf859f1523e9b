package kubernetes

import (
	"strings"
	"testing"
)

// TestRedirect checks that the redirect pods reach the documented destinations, for a
// client that uses the name of the Service.
func TestRedirect(t *testing.T) {
	for _, test := range []struct{ name, pod, text string }{
		// The documentation's pod, except for the annotation, and a Service for its name.
		{"privileged", "egress-multi", manifest(t, "redirect-pod.yaml") + "---\n" + manifest(t, "service.yaml", "    name: egress-1\n", "    name: egress-multi\n")},
		// A new pod inherits forwarding from the node.
		{"two capabilities", "egress-multi", manifest(t, "redirect-pod.yaml", privileged, netAdmin) + "---\n" + manifest(t, "service.yaml", "    name: egress-1\n", "    name: egress-multi\n")},
		{"Multus", "egress-1", withoutNetwork(manifest(t, "multus.yaml"))},
		{"no Multus", "egress-1", manifest(t, "macvlan-parent-pod.yaml", "value: 203.0.113.27", "value: \"80 tcp 203.0.113.25\\n8080 tcp 203.0.113.26 80\\n8443 tcp 203.0.113.26 443\\n203.0.113.27\"") + "---\n" + manifest(t, "service.yaml")},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantRefused(t)
			guard(t)
			apply(t, test.text)
			ready(t, "pod/"+test.pod)
			want(t, "client", "tcp", "egress-1:80", "203.0.113.25:80")
			if test.name == "Multus" { // its Service has all ports
				want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
				want(t, "client", "tcp", "egress-1:8443", "203.0.113.26:443")
				if log := kubectl(t, "logs", "egress-1", "-c", "egress-router"); !strings.Contains(log, "msg=ready") {
					t.Errorf("the log has no msg=ready:\n%s", log)
				}
			}
			wantExample(t, test.pod)
			wantClosed(t, "80", "8080", "22")
		})
	}
	// The unchanged manifest.
	t.Run("no Multus, fallback only", func(t *testing.T) {
		guard(t)
		apply(t, manifest(t, "macvlan-parent-pod.yaml"))
		ready(t, "pod/egress-1")
		address := pod(t, "egress-1").Status.PodIP
		want(t, "client", "tcp", address+":9000", "203.0.113.27:9000")
		want(t, "client", "udp", address+":53", "203.0.113.27:53")
	})
}

// farClient starts the pod far on the other node, whose pods have a subnet of their own.
func farClient(t *testing.T) {
	t.Helper()
	here := pod(t, "client")
	name := ""
	for node := range strings.FieldsSeq(kubectl(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")) {
		if node != here.Spec.NodeName {
			name = node
		}
	}
	apply(t, strings.Replace(peerPod("far", "wait"), "spec:\n", "spec:\n  nodeName: "+name+"\n", 1))
	ready(t, "pod/far")
	if far := pod(t, "far"); far.Spec.NodeName == here.Spec.NodeName || len(far.Status.PodIPs) != 2 {
		t.Fatalf("node of the far client %q with addresses %v, want another one than %q and two families", far.Spec.NodeName, far.Status.PodIPs, here.Spec.NodeName)
	}
}

// Replies reach clients in another subnet of the cluster network, on the node's own
// network, and in the router's pod itself, whose connections to its own Service return
// through the node (hairpin).
func TestClients(t *testing.T) {
	guard(t)
	service := manifest(t, "service.yaml")
	apply(t, service)
	address := strings.TrimSpace(kubectl(t, "get", "service", "egress-1", "-o", "jsonpath={.spec.clusterIP}"))
	router, _, _ := strings.Cut(manifest(t, "redirect-pod.yaml", "egress-multi", "egress-1",
		// The pod's own connections to a Service have to stay on the cluster side.
		"    - name: EGRESS_GATEWAY\n", "    - name: EGRESS_CLUSTER_CIDRS\n      value: "+address+"/32\n    - name: EGRESS_GATEWAY\n",
		"  - name: egress-router-wait\n    image: localhost/egress-router:"+tag, "  - name: inside\n    image: "+peerImage), "\n---\n")
	apply(t, router)

	farClient(t)
	apply(t, strings.Replace(peerPod("onnode", "wait"), "spec:\n", "spec:\n  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet\n", 1))
	ready(t, "pod/egress-1", "pod/onnode")

	direct := pod(t, "egress-1").Status.PodIP
	for _, from := range []string{"client", "far", "onnode", "egress-1 -c inside"} {
		t.Run(strings.Fields(from)[0], func(t *testing.T) {
			want(t, from, "tcp", address+":80", "203.0.113.25:80")
			if from != "egress-1 -c inside" { // connections to its own address do not leave the pod
				want(t, from, "tcp", direct+":8443", "203.0.113.26:443")
				want(t, from, "udp", direct+":53", "203.0.113.27:53")
			}
			// The pod's short name is in its own /etc/hosts.
			want(t, from, "tcp", "egress-1."+namespace+".svc.cluster.local:80", "203.0.113.25:80")
		})
	}
	// The pod's own connections have the reserved address, too.
	want(t, "egress-1 -c inside", "tcp", "203.0.113.25:80", "203.0.113.25:80")
}
