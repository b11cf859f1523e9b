package kubernetes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/e2e/who"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// What the schema accepts and the plugin refuses: the sentence is in Degraded and in
// kubectl describe pod.
func testFaults(t *testing.T) {
	guard(t)
	const redirect = ", redirect: {redirectRules: [{port: 80, protocol: TCP, destinationIP: 203.0.113.25}]}"
	faults := []struct{ name, spec, condition, event string }{
		{"no-gateway", "addresses: [{ip: 192.168.12.91/24}]" + redirect, "ip.gateway is missing for 192.168.12.91/24", "ip.gateway is missing for 192.168.12.91/24"},
		{"bad-gateway", "addresses: [{ip: 192.168.12.92/24, gateway: 01.2.3.1}]" + redirect, `spec.addresses[0].gateway is "01.2.3.1"`, `ip.gateway is "01.2.3.1"`},
		{"no-address", "addresses: [{ip: foo, gateway: 192.168.12.1}]" + redirect, `spec.addresses[0].ip is "foo"`, `ip.addresses[0] is "foo"`},
		{"other-family", `addresses: [{ip: 192.168.12.94/24, gateway: 192.168.12.1}], redirect: {fallbackIP: "2001:db8::1"}`, "spec.redirect.fallbackIP", "ip.fallbackIP"},
		{"no-nic", "networkInterface: {macvlan: {master: eth77}}, addresses: [{ip: 192.168.12.95/24, gateway: 192.168.12.1}]" + redirect, `the host has no interface "eth77"`, `the host has no interface "eth77"`},
	}
	var all []string
	for _, f := range faults {
		all = append(all, routerManifest(f.name, f.spec))
	}
	applyRouters(t, strings.Join(all, "---\n"))
	for _, f := range faults {
		t.Log(degraded(t, namespace, f.name, f.condition))
		await(t, "the event of "+f.name, func() error {
			out, err := run("kubectl", "-n", namespace, "get", "events", "--field-selector", "reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
			if err == nil && !strings.Contains(strings.ReplaceAll(out, `\"`, `"`), f.event) {
				err = errors.New(out)
			}
			return err
		})
	}
}

// Two routers of a namespace have names and a label each. A third one with the address of
// another is Degraded. A user's nodeName survives a change of the resource.
func testSeveralRouters(t *testing.T) {
	guard(t, second)
	applyRouters(t, documented+"---\n"+routerManifest("second", "addresses: [{ip: 192.168.12.98/24, gateway: 192.168.12.1}], redirect: {fallbackIP: 203.0.113.27}"))
	available(t, first)
	available(t, "second")
	const app, deployment = "app=egress-router-cni-second", "egress-router-cni-deployment-second"
	want(t, "client", "tcp", podAddress(t, frozenApp)+":8080", "203.0.113.26:80")
	wantSource(t, "client", "tcp", podAddress(t, app)+":9000", "203.0.113.27:9000", second)
	kubectl(t, "get", "network-attachment-definition", "egress-router-cni-nad-second")

	apply(t, routerManifest("copy", "addresses: [{ip: 192.168.12.98/24, gateway: 192.168.12.1}], redirect: {fallbackIP: 203.0.113.27}"))
	degraded(t, namespace, "copy", "reserved address 192.168.12.98 belongs to EgressRouter "+namespace+"/second")
	if out := kubectl(t, "get", "pods,deployments", "-l", "app=egress-router-cni-copy", "-o", "name"); out != "" {
		t.Errorf("the router with the address of another one has\n%s", out)
	}

	node := strings.TrimSpace(kubectl(t, "get", "pod", "client", "-o", "jsonpath={.spec.nodeName}"))
	kubectl(t, "patch", "deployment", deployment, "--patch", `{"spec":{"template":{"spec":{"nodeName":"`+node+`"}}}}`)
	kubectl(t, "patch", "egressrouter", "second", "--type=merge", "--patch", `{"spec":{"redirect":{"fallbackIP":"203.0.113.26"}}}`)
	await(t, "the new destination of the second router", func() error {
		a, err := ask("client", "tcp", podAddress(t, app)+":80")
		if err == nil && a.Server.Addr().String() != "203.0.113.26" {
			err = fmt.Errorf("answer %s", a)
		}
		return err
	})
	if out := kubectl(t, "get", "deployment", deployment, "-o", "jsonpath={.spec.template.spec.nodeName}"); out != node {
		t.Errorf("nodeName is %q after a change of the resource, want %q", out, node)
	}
	want(t, "client", "tcp", podAddress(t, frozenApp)+":8080", "203.0.113.26:80")
}

// kept returns the number of answers that each connection of the pod keeper has got, or of its
// lives with renew.
func kept(t *testing.T) int {
	t.Helper()
	if p := pod(t, "keeper"); p.Status.ContainerStatuses[0].RestartCount > 0 {
		t.Fatalf("a connection has broken:\n%s", kubectl(t, "logs", "keeper", "--previous"))
	}
	line := lastOf(t, "keeper")
	if line == noLine {
		return 0
	}
	number, _, _ := strings.Cut(line, " ")
	n, err := strconv.Atoi(number)
	if err != nil {
		t.Fatalf("the keeper logs %q", line)
	}
	return n
}

// awaitKept waits until each connection of the pod keeper has got n answers.
func awaitKept(t *testing.T, n int) {
	t.Helper()
	await(t, fmt.Sprintf("answer %d on each connection", n), func() error {
		if found := kept(t); found < n {
			return fmt.Errorf("%d answers", found)
		}
		return nil
	})
}

// operator runs kubectl in the operator's namespace.
func operator(t *testing.T, args ...string) string {
	t.Helper()
	out, err := run(append([]string{"kubectl", "-n", "egress-operator"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// For a minute there is no operator. Open connections go on, new ones work, and a deleted
// router comes back. The successor of the operator, which was killed, changes nothing of what
// runs.
func testOperatorKilled(t *testing.T) {
	guard(t, second)
	applyRouters(t, documented+service+"---\n"+routerManifest("second", "addresses: [{ip: 192.168.12.98/24, gateway: 192.168.12.1}], redirect: {fallbackIP: 203.0.113.27}"))
	available(t, first)
	available(t, "second")
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	before := routerPods(t, frozenApp)
	apply(t, peerPod("keeper", "keep", "50", "egress-1:8080"))
	ready(t, "pod/keeper")
	awaitKept(t, 1)
	askWhoHas(t)
	since := time.Now()

	t.Cleanup(func() {
		operator(t, "scale", "deployment/egress-operator", "--replicas=1")
		operator(t, "rollout", "status", "deployment/egress-operator", "--timeout=600s")
	})
	onNode(t, "kill", operator(t, "get", "pods", "-l", "app=egress-operator", "-o", "jsonpath={.items[0].metadata.uid}"))
	operator(t, "scale", "deployment/egress-operator", "--replicas=0")
	operator(t, "wait", "--for=delete", "pods", "-l", "app=egress-operator", "--timeout=600s")
	const lease = "jsonpath={.spec.renewTime}"
	gone, renewed, answers := time.Now(), operator(t, "get", "lease", "egress-operator", "-o", lease), kept(t)
	withoutOperator(t)
	// Each connection sends two requests in a second, so that these are 6,000 in a minute.
	awaitKept(t, answers+121)
	if lasts := time.Since(gone); lasts < time.Minute || operator(t, "get", "lease", "egress-operator", "-o", lease) != renewed {
		t.Errorf("%s without an operator, want a minute or more", lasts)
	}

	operator(t, "scale", "deployment/egress-operator", "--replicas=1")
	operator(t, "rollout", "status", "deployment/egress-operator", "--timeout=600s")
	// The successor works: it reports a change.
	kubectl(t, "annotate", "egressrouter", first, watchKey+"=yes")
	degraded(t, namespace, first, `is "yes": expected auto, always or never`)
	awaitKept(t, kept(t)+2)
	if after := routerPods(t, frozenApp); !slices.Equal(after, before) {
		t.Errorf("pods %s after the operator's restart, want %s", after, before)
	}
	if found := holders(t, since, false); len(found) != 1 {
		t.Errorf("hosts with the reserved address: %v, want one", found)
	}
}

// withoutOperator checks what works without an operator: new connections, the successor of a
// deleted pod, and that a second pod of a router, which nobody undoes, does not get the
// address of the first one.
func withoutOperator(t *testing.T) {
	t.Helper()
	const deployment = "deployment/egress-router-cni-deployment"
	kubectl(t, "scale", deployment, "--replicas=2")
	const app = "app=egress-router-cni-second"
	deleted := routerPods(t, app)
	kubectl(t, "delete", "pods", "-l", app, "--wait=false")
	farClient(t)
	want(t, "far", "tcp", "egress-1:8080", "203.0.113.26:80")
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	await(t, "the successor of the deleted pod", func() error {
		if address := podAddress(t, app); slices.Equal(routerPods(t, app), deleted) {
			return errors.New("old pod with " + address)
		}
		return nil
	})
	wantSource(t, "client", "tcp", podAddress(t, app)+":9000", "203.0.113.27:9000", second)
	await(t, "the event of the second pod", func() error {
		out, err := run("kubectl", "-n", namespace, "get", "events", "--field-selector", "reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "take reserved address 192.168.12.99: another pod of the node has it: net1 of /run/netns/") {
			err = errors.New(out)
		}
		return err
	})
	kubectl(t, "scale", deployment, "--replicas=1")
	podAddress(t, frozenApp) // of the only one
}

// A namespace that enforces the Pod Security Standard "restricted" has routers without
// privilege. It refuses a container that monitors, and says why.
func testRestricted(t *testing.T) {
	guard(t)
	const restrictedNamespace = "egress-restricted"
	text := "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + restrictedNamespace + ", labels: {pod-security.kubernetes.io/enforce: restricted}}\n---\n" +
		strings.Replace(documented, "metadata:\n", "metadata:\n  namespace: "+restrictedNamespace+"\n  annotations: {"+watchKey+": auto}\n", 1)
	t.Cleanup(func() {
		if _, err := run("kubectl", "delete", "namespace", restrictedNamespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	if _, err := runWith(text, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	in := func(args ...string) string {
		t.Helper()
		out, err := run(append([]string{"kubectl", "-n", restrictedNamespace}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	works := func() {
		t.Helper()
		in("wait", "--for=condition=Available", "egressrouter/"+first, "--timeout=600s")
		await(t, "the router's pod", func() error {
			address := strings.TrimSpace(in("get", "pods", "-l", frozenApp, "-o", "jsonpath={.items[0].status.podIP}"))
			a, err := ask("client", "tcp", address+":8080")
			if err == nil && a.Peer != reserved {
				t.Fatalf("answer %s, want one that saw %s", a, reserved)
			}
			return err
		})
	}
	works()
	in("annotate", "egressrouter", first, watchKey+"=always", "--overwrite")
	t.Log(degraded(t, restrictedNamespace, first, `violates PodSecurity "restricted`))
	in("annotate", "egressrouter", first, watchKey+"=never", "--overwrite")
	works()
}

// dualStack sets up IPv6 on the physical network, with a server outside.
func dualStack(t *testing.T) (reserved6 netip.Addr, server string) {
	t.Helper()
	p := theNetwork
	for _, part := range []struct {
		in       *netns.Namespace
		commands string
	}{
		{p.gateway, `sysctl -q -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.all.forwarding=1
			ip address replace 2001:db8:12::1/64 dev lan0 nodad
			ip address replace 2001:db8:198::1/64 dev wan0 nodad
			ip -6 route replace 2001:db8:203::/64 via 2001:db8:198::2`},
		{p.outside, `sysctl -q -w net.ipv6.conf.all.disable_ipv6=0
			ip address replace 2001:db8:198::2/64 dev wan0 nodad
			ip address replace 2001:db8:203::26/128 dev lo nodad
			ip -6 route replace default via 2001:db8:198::1`},
	} {
		for line := range strings.Lines(part.commands) {
			if err := p.run(part.in, "", strings.Fields(line)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		if err := p.run(p.gateway, "", "sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"); err != nil {
			t.Error(err)
		}
	})
	server = "[2001:db8:203::26]:80"
	if err := who.ServeHTTP(p.outside, server); err != nil {
		t.Fatal(err)
	}
	return netip.MustParseAddr("2001:db8:12::99"), server
}

// A router with addresses of both families, TCP and UDP on one port, and SCTP, for clients on
// both nodes. The kernel need not have sockets of SCTP: a packet is enough to show where it
// goes.
func testProtocols(t *testing.T) {
	guard(t)
	reserved6, server := dualStack(t)
	applyRouters(t, routerManifest(first, `addresses: [{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: "2001:db8:12::99/64", gateway: "2001:db8:12::1"}],
  redirect: {redirectRules: [{port: 53, protocol: TCP, destinationIP: 203.0.113.26, targetPort: 80}, {port: 53, protocol: UDP, destinationIP: 203.0.113.27},
    {port: 132, protocol: SCTP, destinationIP: 203.0.113.26, targetPort: 133}, {port: 53, protocol: TCP, destinationIP: "2001:db8:203::26", targetPort: 80}]}`)+`---
apiVersion: v1
kind: Service
metadata: {name: egress-dual}
spec: {selector: {app: egress-router-cni}, ipFamilyPolicy: RequireDualStack, ports: [{name: tcp, port: 53, protocol: TCP}, {name: udp, port: 53, protocol: UDP}]}
`)
	available(t, first)
	address := podAddress(t, frozenApp)
	farClient(t)
	families := func(resource, path string) [2]string {
		t.Helper()
		all := strings.Fields(kubectl(t, "get", resource, "-o", "jsonpath={"+path+"}"))
		if len(all) != 2 || !netip.MustParseAddr(all[1]).Is6() {
			t.Fatalf("addresses %q of %s, want IPv4 and IPv6", all, resource)
		}
		return [2]string(all)
	}
	router := strings.TrimSpace(kubectl(t, "get", "pods", "-l", frozenApp, "-o", "name"))
	direct := families(router, ".status.podIPs[*].ip")
	for _, at := range [][2]string{families("service/egress-dual", ".spec.clusterIPs[*]"), direct} {
		for _, client := range []string{"client", "far"} {
			want(t, client, "tcp", at[0]+":53", "203.0.113.26:80")
			want(t, client, "udp", at[0]+":53", "203.0.113.27:53")
			wantSource(t, client, "tcp", "["+at[1]+"]:53", server, reserved6)
		}
	}
	wantClosedPort(t, direct[0]+":80")
	wantClosedPort(t, "["+direct[1]+"]:80")

	begin := len(theNetwork.frames.Frames())
	await(t, "a packet of SCTP from the reserved address", func() error {
		if err := theNetwork.node.Do(func() error { return sendSCTP(address, 132) }); err != nil {
			return err
		}
		if !slices.ContainsFunc(theNetwork.frames.Frames()[begin:], func(f lab.Frame) bool {
			p, is := f.IPv4()
			return is && p.Protocol == unix.IPPROTO_SCTP && p.Src.Addr() == reserved && p.Dst.String() == "203.0.113.26:133"
		}) {
			return errors.New("none yet")
		}
		return nil
	})
}

// sendSCTP sends the first packet of an association, with one chunk INIT (RFC 9260).
func sendSCTP(address string, port uint16) error {
	conn, err := net.Dial("ip4:132", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	packet := make([]byte, 32)
	binary.BigEndian.PutUint16(packet, 40000)
	binary.BigEndian.PutUint16(packet[2:], port)
	packet[12] = 1                                   // INIT
	binary.BigEndian.PutUint16(packet[14:], 20)      // its length
	binary.BigEndian.PutUint32(packet[16:], 1)       // initiate tag
	binary.BigEndian.PutUint32(packet[20:], 65536)   // receiver window
	binary.BigEndian.PutUint32(packet[24:], 1<<16|1) // streams
	binary.BigEndian.PutUint32(packet[28:], 1)       // sequence number
	binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))
	_, err = conn.Write(packet)
	return err
}

// With the annotation watch, other destinations take effect in the running pod, and an open
// connection goes on.
func testWatch(t *testing.T) {
	guard(t)
	applyRouters(t, strings.Replace(documented, "metadata:\n", "metadata:\n  annotations: {"+watchKey+": always}\n", 1)+service)
	available(t, first)
	address := podAddress(t, frozenApp)
	want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
	apply(t, peerPod("keeper", "keep", "1", address+":8080"))
	ready(t, "pod/keeper")
	awaitKept(t, 1)
	state := func() string {
		return kubectl(t, "get", "pods", "-l", frozenApp, "-o", "jsonpath={.items[*].metadata.uid} restarts {.items[*].status.containerStatuses[*].restartCount}") +
			kubectl(t, "get", "deployment", "egress-router-cni-deployment", "-o", "jsonpath= generation {.metadata.generation}")
	}
	before := state()
	for path, answer := range map[string]string{"/healthz": "200 ", "/readyz": "200 ", "/metrics": "200 "} {
		if out, err := peer("get", "http://"+address+":9465"+path); err != nil || !strings.HasPrefix(out, answer) {
			t.Errorf("%s: %q, %v", path, out, err)
		}
	}
	log := func() string { return kubectl(t, "logs", "-l", frozenApp, "--tail=-1") }
	if text := log(); strings.Contains(text, `"msg":"repaired"`) || strings.Contains(text, `"msg":"rules loaded"`) {
		t.Errorf("the container changes what the plugin has made:\n%s", text)
	}

	kubectl(t, "patch", "egressrouter", first, "--type=merge", "--patch", `{"spec":{"redirect":{"redirectRules":[{"port":8080,"targetPort":80,"protocol":"TCP","destinationIP":"203.0.113.26"},{"port":8081,"targetPort":80,"protocol":"TCP","destinationIP":"203.0.113.27"}]}}}`)
	begin := time.Now()
	await(t, "the new destination", func() error {
		// A kubelet updates a volume at once when the pod changes, otherwise within a minute or two.
		kubectl(t, "annotate", "pods", "-l", frozenApp, "--overwrite", fmt.Sprintf("example.com/touched=%d", time.Now().UnixNano()))
		_, err := ask("client", "tcp", address+":8081")
		return err
	})
	t.Logf("live after %s", time.Since(begin).Round(time.Millisecond))
	want(t, "client", "tcp", address+":8081", "203.0.113.27:80")
	await(t, "the refusal of the former destination", func() error {
		if a, err := ask("client", "tcp", address+":8443"); err == nil {
			return fmt.Errorf("answer %s", a)
		}
		return nil
	})
	awaitKept(t, kept(t)+2)
	if after := state(); after != before {
		t.Errorf("after the change: %s, before %s", after, before)
	}
	if text := log(); !strings.Contains(text, `"msg":"connection begins"`) {
		t.Errorf("no audit log:\n%s", text)
	}
}
