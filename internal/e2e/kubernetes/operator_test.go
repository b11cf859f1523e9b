package kubernetes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
)

// documented is the example of OpenShift's manual, unchanged.
const documented = `apiVersion: network.operator.openshift.io/v1
kind: EgressRouter
metadata:
  name: egress-router-redirect
spec:
  networkInterface: {
    macvlan: {
      mode: "Bridge"
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
        destinationIP: "10.0.0.99",
        port: 80,
        protocol: UDP
      },
      {
        destinationIP: "203.0.113.26",
        port: 8080,
        targetPort: 80,
        protocol: TCP
      },
      {
        destinationIP: "203.0.113.27",
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

// routerManifest returns the manifest of a router with a specification in YAML.
func routerManifest(name, spec string) string {
	return fmt.Sprintf("apiVersion: network.operator.openshift.io/v1\nkind: EgressRouter\nmetadata: {name: %s}\nspec: {%s}\n", name, spec)
}

const (
	first     = "egress-router-redirect" // name of the documented router
	frozenApp = "app=egress-router-cni"  // label of its pods
	watchKey  = "egress-router.io/watch"
)

// operatorManifests returns what kubectl apply -k applies, with the images of the tests.
func operatorManifests(t *testing.T) string {
	t.Helper()
	text, err := run("kubectl", "kustomize", "../../../cmd/egress-operator")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(imageName.ReplaceAllString(text, "$1:"+tag), "-image=localhost/egress-router\n", "-image=localhost/egress-router:"+tag+"\n", 1)
}

// The operator is installed by one command. Each test has its routers.
func TestOperator(t *testing.T) {
	wantRefused(t)
	install(t, operatorManifests(t))
	if _, err := run("kubectl", "-n", "egress-operator", "rollout", "status", "deployment/egress-operator", "--timeout=600s"); err != nil {
		t.Fatal(err)
	}
	t.Run("documentation", testDocumentation)
	t.Run("faults", testFaults)
	t.Run("several routers", testSeveralRouters)
	t.Run("operator killed", testOperatorKilled)
	t.Run("one holder", testOneHolder)
	t.Run("restricted namespace", testRestricted)
	t.Run("families and protocols", testProtocols)
	t.Run("watch", testWatch)
}

// applyRouters applies routers, and waits until nothing of them is left when the test ends.
func applyRouters(t *testing.T, text string) {
	t.Helper()
	t.Cleanup(func() { noRouters(t) }) // after their deletion
	apply(t, text)
}

// noRouters waits until the pods of routers have ended, and their objects are deleted.
func noRouters(t *testing.T) {
	t.Helper()
	await(t, "nothing of a router", func() error {
		out := kubectl(t, "get", "pods,deployments,replicasets,configmaps,network-attachment-definitions", "-l", "app.kubernetes.io/managed-by=egress-operator", "-o", "name")
		if out != "" {
			return errors.New("still there:\n" + out)
		}
		return nil
	})
}

// available waits until a router is available.
func available(t *testing.T, name string) {
	t.Helper()
	kubectl(t, "wait", "--for=condition=Available", "egressrouter/"+name, "--timeout=600s")
}

// degraded waits until a router is Degraded with a sentence, and returns the message.
func degraded(t *testing.T, in, name, sentence string) (message string) {
	t.Helper()
	await(t, "Degraded with "+sentence, func() error {
		var err error
		message, err = run("kubectl", "-n", in, "get", "egressrouter", name, "-o", `jsonpath={.status.conditions[?(@.status=="True")].type}: {.status.conditions[?(@.type=="Degraded")].message}`)
		if err == nil && (!strings.Contains(message, "Degraded: ") || !strings.Contains(message, sentence)) {
			err = errors.New("conditions " + message)
		}
		return err
	})
	_, message, _ = strings.Cut(message, "Degraded: ")
	return message
}

// podAddress returns the address of the pod with a label that is ready.
func podAddress(t *testing.T, label string) (address string) {
	t.Helper()
	await(t, "one ready pod of "+label, func() error {
		out := strings.Fields(kubectl(t, "get", "pods", "-l", label, "-o", `jsonpath={range .items[*]}{.status.podIP},{.metadata.deletionTimestamp},{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`))
		if len(out) != 1 || !strings.HasSuffix(out[0], ",,True") {
			return fmt.Errorf("pods %q", out)
		}
		address, _, _ = strings.Cut(out[0], ",")
		return nil
	})
	return address
}

// podNamespace returns the network namespace of the pod with an address.
func podNamespace(t *testing.T, address string) (found *netns.Namespace) {
	t.Helper()
	files, err := filepath.Glob("/proc/" + os.Getenv(nodePID) + "/root/run/netns/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		ns, err := netns.Open(file)
		if err != nil {
			continue // of a pod that ends
		}
		is := false
		err = ns.Do(func() error {
			all, err := net.InterfaceAddrs()
			for _, a := range all {
				is = is || strings.HasPrefix(a.String(), address+"/")
			}
			return err
		})
		if err == nil && is {
			t.Cleanup(func() { _ = ns.Close() })
			return ns
		}
		_ = ns.Close() // nothing was written
	}
	t.Fatalf("no namespace in /run/netns of the node has %s", address)
	return nil
}

// output returns the output of a program in a namespace.
func output(t *testing.T, ns *netns.Namespace, args ...string) string {
	t.Helper()
	out, err := theNetwork.output(ns, "", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wantClosedPort checks that a port of a pod refuses the client.
func wantClosedPort(t *testing.T, address string) {
	t.Helper()
	if a, err := ask("client", "tcp", address); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%s: answer %v, error %v; want a refusal", address, a, err)
	}
}

// The walk-through of the manual with its file: names, labels, outputs, the log on the node,
// the routes of the pod, a Service, and nothing left after the deletion.
func testDocumentation(t *testing.T) {
	guard(t)
	_ = os.Remove(nodeLog) // of other tests; without a call there is none
	applyRouters(t, documented+service)
	available(t, first)
	for _, test := range []struct{ args, want string }{
		{"get egressrouter", "CONDITION   STATUS\negress-router-redirect   Available   True"},
		{"get network-attachment-definition egress-router-cni-nad", "egress-router-cni-nad"},
		{"get network-attachment-definition egress-router-cni-nad -o jsonpath={.spec.config}", `{"cniVersion":"0.4.0","type":"egress-router","name":"egress-router-cni-nad","ip":{"addresses":["192.168.12.99/24"],` +
			`"destinations":["80 UDP 10.0.0.99","8080 TCP 203.0.113.26 80","8443 TCP 203.0.113.27 443"],"gateway":"192.168.12.1"},"log_file":"/tmp/egress-router-log","log_level":"debug"}`},
		{"get deployment egress-router-cni-deployment", "1/1"},
		{"get pods -l " + frozenApp, "1/1     Running   0"},
		{"get pods -l " + frozenApp + " -o jsonpath={.items[0].spec.containers[*].name}", "egress-router-cni-pod"},
	} {
		if out := kubectl(t, strings.Fields(test.args)...); !strings.Contains(out, test.want) {
			t.Errorf("kubectl %s: want %q, found\n%s", test.args, test.want, out)
		}
	}
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	address := podAddress(t, frozenApp)
	want(t, "client", "tcp", address+":8443", "203.0.113.27:443")
	want(t, "client", "udp", address+":80", "10.0.0.99:80")
	wantClosedPort(t, address+":9000")
	wantClosed(t, "80", "8080", "22")
	farClient(t)
	want(t, "far", "tcp", "egress-1:8080", "203.0.113.26:80")
	want(t, "far", "tcp", address+":8443", "203.0.113.27:443")
	wantDocumentedLog(t, address)
	routes := output(t, podNamespace(t, address), "ip", "-4", "route")
	subnet := netip.PrefixFrom(netip.MustParseAddr(address), 24).Masked()
	for _, route := range []string{"default via 192.168.12.1 dev net1", subnet.String() + " dev eth0 proto kernel scope link src " + address, "192.168.12.0/24 dev net1 proto kernel scope link src 192.168.12.99", "192.168.12.1 dev net1"} {
		if !strings.Contains("\n"+routes, "\n"+route) || strings.Count(routes, "\n") != 4 {
			t.Errorf("the routes of the pod are not the four of the manual, such as %q:\n%s", route, routes)
		}
	}

	// A NIC that the node does not have: the pod is replaced, and the condition has the
	// sentence that kubectl describe pod shows.
	kubectl(t, "patch", "egressrouter", first, "--type=merge", "--patch", `{"spec":{"networkInterface":{"macvlan":{"master":"eth77"}}}}`)
	sentence := degraded(t, namespace, first, "eth77")
	t.Log(sentence)
	if strings.Contains(sentence, "sandbox") || !strings.Contains(strings.ReplaceAll(kubectl(t, "describe", "pods", "-l", frozenApp), `\"`, `"`), sentence) {
		t.Errorf("no event of the pod has the sentence %q", sentence)
	}
	kubectl(t, "patch", "egressrouter", first, "--type=json", "--patch", `[{"op":"remove","path":"/spec/networkInterface/macvlan/master"}]`)
	available(t, first)
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")

	begin := time.Now()
	kubectl(t, "delete", "egressrouter", first)
	noRouters(t)
	wantSilent(t)
	t.Logf("nothing left, and silent, %s after the deletion", time.Since(begin).Round(time.Millisecond))
}

// wantDocumentedLog checks the lines of the plugin's log in the manual, in their order, for a
// pod with an address.
func wantDocumentedLog(t *testing.T, address string) {
	t.Helper()
	log, err := os.ReadFile(nodeLog)
	if err != nil {
		t.Fatal(err)
	}
	values := strings.NewReplacer("NUMBER", "[0-9]+", "NODE", regexp.QuoteMeta(netip.PrefixFrom(netip.MustParseAddr(address), 24).Masked().Addr().Next().String()))
	var lines []string
	for line := range strings.Lines(`Called CNI ADD
Gateway: 192.168.12.1
IP Source Addresses: [192.168.12.99/24]
IP Destinations: [80 UDP 10.0.0.99 8080 TCP 203.0.113.26 80 8443 TCP 203.0.113.27 443]
Created macvlan interface
Renamed macvlan to "net1"
Adding route to gateway 192.168.12.1 on macvlan interface
deleted default route {Ifindex: NUMBER Dst: <nil> Src: <nil> Gw: NODE Flags: [] Table: 254}
Added new default route with gateway 192.168.12.1
Added iptables rule: iptables -t nat PREROUTING -i eth0 -p UDP --dport 80 -j DNAT --to-destination 10.0.0.99
Added iptables rule: iptables -t nat PREROUTING -i eth0 -p TCP --dport 8080 -j DNAT --to-destination 203.0.113.26:80
Added iptables rule: iptables -t nat PREROUTING -i eth0 -p TCP --dport 8443 -j DNAT --to-destination 203.0.113.27:443
Added iptables rule: iptables -t nat -o net1 -j SNAT --to-source 192.168.12.99
`) {
		lines = append(lines, `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \[debug\] `+values.Replace(regexp.QuoteMeta(line)))
	}
	if !regexp.MustCompile(strings.Join(lines, `(?:.*\[warning\].*\n)*`)).Match(log) {
		t.Errorf("the log on the node has not the lines of the manual in their order:\n%s", log)
	}
}

// wantSilent waits until nobody answers for the reserved address.
func wantSilent(t *testing.T) {
	t.Helper()
	askWhoHas(t)
	begin := len(theNetwork.frames.Frames())
	await(t, "no answer for the reserved address", func() error {
		asked := 0
		for _, f := range theNetwork.frames.Frames()[begin:] {
			arp, is := f.ARP()
			switch {
			case !f.Outgoing && sentBy(f):
				asked = 0
			case is && f.Outgoing && arp.TargetIP == reserved:
				asked++
			}
		}
		if asked < 10 {
			return fmt.Errorf("%d requests without an answer", asked)
		}
		return nil
	})
}
