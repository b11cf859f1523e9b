package kubernetes

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// resource is the example of OpenShift's manual, with the node's NIC, a server of the tests
// for the first port, and no Service yet.
const resource = `apiVersion: network.operator.openshift.io/v1
kind: EgressRouter
metadata:
  name: egress-router-redirect
spec:
  networkInterface: {
    macvlan: {
      mode: "Bridge",
      master: "NIC"
    }
  }
  addresses: [
    {
      ip: "192.168.12.99/24",
      gateway: "192.168.12.1"
    }
  ]
  mode: Redirect
  redirect: {
    redirectRules: [
      {
        destinationIP: "203.0.113.26",
        port: 8080,
        targetPort: 80,
        protocol: TCP
      },
      {
        destinationIP: "203.0.113.26",
        port: 8443,
        targetPort: 443,
        protocol: TCP
      }
    ]
  }
`

// service is that of the manual.
const service = `---
apiVersion: v1
kind: Service
metadata:
  name: egress-1
spec:
  ports:
  - name: web-app
    protocol: TCP
    port: 8080
  type: ClusterIP
  selector:
    app: egress-router-cni
`

// operatorManifests returns what kubectl apply -k applies, with the images of the tests.
func operatorManifests(t *testing.T) string {
	t.Helper()
	text, err := run("kubectl", "kustomize", "../../../cmd/egress-operator")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(imageName.ReplaceAllString(text, "$1:"+tag), "-image=localhost/egress-router\n", "-image=localhost/egress-router:"+tag+"\n", 1)
}

// The resource of the manual becomes a router after one command: with the manual's names,
// a Service, the plugin's sentence in the conditions if the network fails, and nothing left
// when it is deleted.
func TestOperator(t *testing.T) {
	wantRefused(t)
	guard(t)
	install(t, operatorManifests(t))
	if _, err := run("kubectl", "-n", "egress-operator", "rollout", "status", "deployment/egress-operator", "--timeout=600s"); err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(resource, "NIC", nic, 1) + service
	apply(t, text)
	kubectl(t, "wait", "--for=condition=Available", "egressrouter/egress-router-redirect", "--timeout=600s")
	for _, test := range []struct{ args, want string }{
		{"get egressrouter", "Available   True"},
		{"get network-attachment-definition egress-router-cni-nad", "egress-router-cni-nad"},
		{"get deployment egress-router-cni-deployment", "1/1"},
		{"get pods -l app=egress-router-cni", "1/1     Running   0"},
	} {
		if out := kubectl(t, strings.Fields(test.args)...); !strings.Contains(out, test.want) {
			t.Errorf("kubectl %s: want %q, found\n%s", test.args, test.want, out)
		}
	}
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	address := kubectl(t, "get", "pods", "-l", "app=egress-router-cni", "-o", "jsonpath={.items[0].status.podIP}")
	want(t, "client", "tcp", address+":8443", "203.0.113.26:443")

	// A NIC that the node does not have: the pod is replaced, and the condition has the
	// sentence that kubectl describe pod shows.
	kubectl(t, "patch", "egressrouter", "egress-router-redirect", "--type=merge", "--patch", `{"spec":{"networkInterface":{"macvlan":{"master":"eth77"}}}}`)
	var sentence string
	await(t, "Degraded", func() error {
		sentence = kubectl(t, "get", "egressrouter", "egress-router-redirect", "-o", `jsonpath={.status.conditions[?(@.type=="Degraded")].message}`)
		if !strings.Contains(sentence, "eth77") {
			return fmt.Errorf("Degraded has the message %q", sentence)
		}
		return nil
	})
	t.Log(sentence)
	if strings.Contains(sentence, "sandbox") || !strings.Contains(strings.ReplaceAll(kubectl(t, "describe", "pods", "-l", "app=egress-router-cni"), `\"`, `"`), sentence) {
		t.Errorf("no event of the pod has the sentence %q", sentence)
	}
	kubectl(t, "patch", "egressrouter", "egress-router-redirect", "--type=merge", "--patch", `{"spec":{"networkInterface":{"macvlan":{"master":"`+nic+`"}}}}`)
	kubectl(t, "wait", "--for=condition=Available", "egressrouter/egress-router-redirect", "--timeout=600s")
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")

	kubectl(t, "delete", "egressrouter", "egress-router-redirect")
	await(t, "nothing of the router", func() error {
		if out := kubectl(t, "get", "pods,deployments,network-attachment-definitions", "-l", "app=egress-router-cni", "-o", "name"); out != "" {
			return fmt.Errorf("still there:\n%s", out)
		}
		return nil
	})
	_ = os.Remove(nodeLog)
}
