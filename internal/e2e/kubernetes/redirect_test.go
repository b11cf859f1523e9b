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

// farBridge is the node's link to farNetwork.
const farBridge = "egress-far0"

// farNetwork is a second network for pods of the cluster, which the node routes. It
// stands for pods on another node of a larger cluster.
const farNetwork = `apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata:
  name: far
spec:
  config: |
    {
      "cniVersion": "0.3.1",
      "name": "far",
      "type": "bridge",
      "bridge": "egress-far0",
      "ipam": {"type": "static", "addresses": [{"address": "10.245.0.2/24", "gateway": "10.245.0.1"}], "routes": [{"dst": "0.0.0.0/0"}]}
    }
---
`

// farClient starts the pod far in farNetwork, and removes both when the test ends.
func farClient(t *testing.T) {
	t.Helper()
	// The test assigns the address of the bridge: the plugin would leave a record of the
	// addresses in use on the node.
	for _, line := range []string{
		"ip link add " + farBridge + " type bridge", "ip address add 10.245.0.1/24 dev " + farBridge, "ip link set " + farBridge + " up",
	} {
		if err := theNetwork.run(theNetwork.node, "", strings.Fields(line)...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := theNetwork.run(theNetwork.node, "", "ip", "link", "delete", farBridge); err != nil {
			t.Error(err)
		}
	})
	const annotation = "metadata:\n  annotations:\n    v1.multus-cni.io/default-network: " + namespace + "/far\n"
	apply(t, farNetwork+strings.Replace(peerPod("far", "wait"), "metadata:\n", annotation, 1))
	ready(t, "pod/far")
	if far := pod(t, "far").Status.PodIP; far != "10.245.0.2" {
		t.Fatalf("address of the far client: %s, want 10.245.0.2", far)
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
			// If a client is outside the cluster's subnet, kube-proxy replaces its
			// source: through a Service the router sees the node, directly the client.
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
