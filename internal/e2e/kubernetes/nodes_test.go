package kubernetes

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
	"github.com/egress-router/egress-router/internal/netns"
)

// nodes are the names of the cluster's nodes. The first one is that of the client; the others
// are on the physical network in tests that need them there.
func nodes(t *testing.T) []string {
	t.Helper()
	all := []string{pod(t, "client").Spec.NodeName}
	for name := range strings.FieldsSeq(kubectl(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")) {
		if name != all[0] {
			all = append(all, name)
		}
	}
	return all
}

// A field is the cluster with all of its nodes on the physical network, and a judge of what
// they send with the reserved address.
type field struct {
	t     *testing.T
	ports map[string]string // of lan0, by the name of the node

	mu       sync.Mutex
	judge    faults.Judge
	captures []*lab.Capture // one for each cable that was laid
	found    []faults.Violation
}

// newField plugs the other nodes in, and lets pods run on them. The end of the test undoes
// both, after the judge has judged.
func newField(t *testing.T) *field {
	t.Helper()
	f := &field{t: t, ports: map[string]string{}, judge: faults.Judge{Source: reserved}}
	for i, node := range nodes(t) {
		if i == 0 {
			f.ports[node] = firstPort
			f.capture(node)
			continue
		}
		f.ports[node] = fmt.Sprint("port-", i+1)
		f.plug(node)
		kubectl(t, "uncordon", node)
		t.Cleanup(func() {
			kubectl(t, "cordon", node)
			if err := theNetwork.run(theNetwork.gateway, "", "ip", "link", "delete", f.ports[node]); err != nil {
				t.Error(err)
			}
		})
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Second):
				f.look()
			}
		}
	}()
	t.Cleanup(func() {
		close(done)
		<-ended
		for _, c := range f.captures {
			if err := c.Stop(); err != nil {
				t.Error(err)
			}
		}
		f.look()
		for _, v := range f.found {
			t.Errorf("two routers sent with the reserved address: %s", v)
		}
	})
	return f
}

// look judges the frames so far, and forgets them.
func (f *field) look() {
	f.mu.Lock()
	defer f.mu.Unlock()
	until := time.Now()
	for _, c := range f.captures {
		f.judge.Add(c.Take())
	}
	f.found = append(f.found, f.judge.Until(until)...)
}

// holder returns the hardware address of the host that has sent last.
func (f *field) holder() string {
	f.look()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.judge.Holder()
}

// capture adds the frames that the switch receives from a node, before it may drop them.
func (f *field) capture(node string) {
	f.t.Helper()
	c, err := theNetwork.lab.Capture(theNetwork.gateway, f.ports[node])
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.captures = append(f.captures, c)
}

// plug lays a cable from the physical network to a node.
func (f *field) plug(node string) {
	f.t.Helper()
	pid, err := run("sh", "-c", command(f.t, "E2E_NODE_INIT", "prints the number of a process in a node's namespaces")+` "$0"`, node)
	if err != nil {
		f.t.Fatal(err)
	}
	ns, err := netns.Open("/proc/" + strings.TrimSpace(pid) + "/ns/net")
	if err != nil {
		f.t.Fatal(err)
	}
	defer ns.Close()
	port := f.ports[node]
	for _, part := range []struct {
		in       *netns.Namespace
		commands string
	}{
		{theNetwork.gateway, "ip link add " + port + " type veth peer name " + nic + " netns " + fileOf(ns)},
		{ns, "ip link set " + nic + " up"},
	} {
		if err := theNetwork.run(part.in, "", strings.Fields(part.commands)...); err != nil {
			f.t.Fatal(err)
		}
	}
	f.capture(node) // before the first frame
	if err := theNetwork.run(theNetwork.gateway, "", "ip", "link", "set", port, "master", "lan0", "up"); err != nil {
		f.t.Fatal(err)
	}
}

// command returns the command in a variable of doc.go.
func command(t *testing.T, variable, use string) string {
	t.Helper()
	if os.Getenv(variable) == "" {
		t.Fatalf("%s not set: command that %s", variable, use)
	}
	return os.Getenv(variable)
}

// cause calls the command for a node's faults.
func (f *field) cause(what, node string) {
	f.t.Helper()
	if _, err := run("sh", "-c", command(f.t, "E2E_NODE", "kills, starts, partitions and heals a node")+` "$0" "$1"`, what, node); err != nil {
		f.t.Fatal(err)
	}
}

// powerOff ends a node: no frame leaves it any more, before its programs can notice.
func (f *field) powerOff(node string) {
	f.t.Helper()
	f.cut(node, true)
	f.cause("kill", node)
}

// powerOn starts a node that powerOff has ended.
func (f *field) powerOn(node string) {
	f.t.Helper()
	f.cause("start", node)
	// The cable may have gone with the node.
	_ = theNetwork.run(theNetwork.gateway, "", "ip", "link", "delete", f.ports[node])
	f.plug(node)
}

// cut cuts a node off from both networks, or ends that. Its links stay up.
func (f *field) cut(node string, off bool) {
	f.t.Helper()
	what, state := "heal", "3" // forwarding
	if off {
		what, state = "partition", "0" // disabled
	}
	f.cause(what, node)
	if err := theNetwork.run(theNetwork.gateway, "", "bridge", "link", "set", "dev", f.ports[node], "state", state); err != nil {
		f.t.Fatal(err)
	}
}

// carriers are the names of the pods of standby-carry.yaml.
var carriers = [...]string{"egress-carry-0", "egress-carry-1", "egress-carry-2"}

// awaitCarriers waits until each router of standby-carry.yaml runs in a pod that stays, and
// could take over or holds the address.
func awaitCarriers(t *testing.T) {
	t.Helper()
	await(t, "routers of which each could take over", func() error {
		for _, name := range carriers {
			text, err := run("kubectl", "-n", namespace, "get", "pod", name, "--ignore-not-found", "-o", "jsonpath={.metadata.name}{.metadata.deletionTimestamp}")
			if err != nil || text != name {
				return errors.Join(err, fmt.Errorf("pod %s ends: %s", name, text))
			}
			// Of a node that was lost or cut off, the state in the API is an old one.
			if text, err = run("kubectl", "-n", namespace, "exec", name, "--", "/usr/bin/egress-router", "health"); err != nil {
				return fmt.Errorf("pod %s is not ready: %s, %w", name, text, err)
			}
		}
		return nil
	})
}

// elsewhere makes a router of another node than the client's hold the address.
func elsewhere(t *testing.T) {
	t.Helper()
	before := holding(t, "egress-carry")
	if before.Spec.NodeName != nodes(t)[0] {
		return
	}
	kubectl(t, "delete", "pod", before.Name)
	awaitOther(t, before.Status.PodIP)
	awaitCarriers(t)
}

// away returns the pod of a router that holds the address on another node than the client's. A
// machine without processor time makes one router after the other hold it.
func away(t *testing.T) (found corev1.Pod) {
	t.Helper()
	here := nodes(t)[0]
	await(t, "a holder on another node than "+here, func() error {
		if found = holding(t, "egress-carry"); found.Spec.NodeName == here {
			return errors.New(found.Name + " holds it")
		}
		return nil
	})
	return found
}

// awaitOther waits until the Service leads to another router.
func awaitOther(t *testing.T, former string) {
	t.Helper()
	await(t, "another router that holds the address", func() error {
		if at := led(t, "egress-carry"); at == former {
			return errors.New("the Service leads to " + at)
		}
		return nil
	})
}

// keep starts the pod keeper with 200 connections on the client's node.
func keep(t *testing.T, args ...string) {
	t.Helper()
	apply(t, onNodeOf(t, "client", peerPod("keeper", args...)))
	ready(t, "pod/keeper")
	awaitKept(t, 1)
}

// TestCarry ends the router that holds the address in the ways of its cluster, on three nodes,
// while clients of the first node connect by both Services of standby-carry.yaml. No open
// connection is lost, except those that enter by a lost node; new ones work again; and no
// two routers send with the address at a time. How long that takes is in the log.
func TestCarry(t *testing.T) {
	guard(t)
	f := newField(t)
	if len(f.ports) < len(carriers) {
		t.Fatalf("the cluster has %d nodes: expected %d", len(f.ports), len(carriers))
	}
	// The pods outlive their StatefulSet until their connections have ended, also those of a
	// client that was killed. The next test has the same address.
	t.Cleanup(func() { kubectl(t, "delete", "pods", "-l", "name=egress-carry", "--grace-period=1") })
	apply(t, manifest(t, "standby-carry.yaml", "CHANGE-ME", strings.Repeat("key of a test ", 3)))
	kubectl(t, "rollout", "status", "statefulset/egress-carry", "--timeout=600s")
	awaitCarriers(t)
	watchers := []watcher{startWatcher(t, "by-service", "egress-carry"), startWatcher(t, "by-node", "egress-carry-local")}
	service, node := clusterIP(t, "egress-carry")+":80", clusterIP(t, "egress-carry-local")+":80"
	const connections = "200"

	var table strings.Builder
	defer func() { t.Logf("new connections:\n%s", table.String()) }()
	note := func(t *testing.T, event string, since time.Time) {
		t.Helper()
		fmt.Fprintf(&table, "%-22s", event)
		for _, w := range watchers {
			fmt.Fprintf(&table, " %s: no answer for %6s;", w.pod, w.gap(t, since).Round(10*time.Millisecond))
		}
		table.WriteString("\n")
	}
	// A part causes an event, and ends with all routers at work. The holder before the event is
	// another one than after it, also by its frames.
	part := func(name string, run func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, func(t *testing.T) {
			before := f.holder()
			run(t)
			awaitCarriers(t)
			await(t, "frames of another holder", func() error {
				if f.holder() == before {
					return errors.New(before + " sends with the reserved address")
				}
				return nil
			})
		}) {
			t.FailNow()
		}
	}

	part("pod deleted", func(t *testing.T) {
		// By the pod's own address: the Service leads elsewhere as soon as another router holds the
		// reserved one, as on a machine without processor time.
		before := holding(t, "egress-carry")
		keep(t, "keep", connections, before.Status.PodIP+":80")
		since := time.Now()
		kubectl(t, "delete", "pod", before.Name, "--wait=false")
		awaitOther(t, before.Status.PodIP)
		awaitKept(t, kept(t)+4)
		if p := pod(t, before.Name); p.UID != before.UID || p.DeletionTimestamp == nil {
			t.Errorf("the pod has ended with %s open connections", connections)
		}
		kubectl(t, "delete", "pod", "keeper")
		closed := time.Now()
		await(t, "the end of the pod", func() error {
			if uid, err := run("kubectl", "-n", namespace, "get", "pod", before.Name, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}"); err != nil || uid == string(before.UID) {
				return errors.Join(err, errors.New("it runs"))
			}
			return nil
		})
		t.Logf("the pod has ended %s after its last connection", time.Since(closed).Round(10*time.Millisecond))
		awaitCarriers(t)
		note(t, "pod deleted", since)
	})
	part("rolling update", func(t *testing.T) {
		keep(t, "renew", connections, "5s", service)
		before := lastOf(t, "keeper")
		since := time.Now()
		kubectl(t, "rollout", "restart", "statefulset/egress-carry")
		kubectl(t, "rollout", "status", "statefulset/egress-carry", "--timeout=600s")
		awaitCarriers(t)
		took := time.Since(since)
		awaitKept(t, kept(t)+2)
		t.Logf("took %s; of %s connections, each 5 s long, none broke; lives of each and attempts that failed: %s, before %s",
			took.Round(time.Second), connections, lastOf(t, "keeper"), before)
		note(t, "rolling update", since)
	})
	elsewhere(t)
	part("node lost", func(t *testing.T) {
		keep(t, "keep", connections, node)
		before, since := away(t), time.Now()
		f.powerOff(before.Spec.NodeName)
		awaitOther(t, before.Status.PodIP)
		awaitKept(t, kept(t)+4)
		note(t, "node lost", since)
		f.powerOn(before.Spec.NodeName)
	})
	elsewhere(t)
	part("node cut off", func(t *testing.T) {
		keep(t, "keep", connections, node)
		before, since := away(t), time.Now()
		f.cut(before.Spec.NodeName, true)
		awaitOther(t, before.Status.PodIP)
		awaitKept(t, kept(t)+4)
		note(t, "node cut off", since)
		f.cut(before.Spec.NodeName, false)
		awaitCarriers(t)
		awaitKept(t, kept(t)+4)
	})
}

// noLine is what lastOf returns for an empty log.
const noLine = "no line"

// lastOf returns the last line of a pod's log.
func lastOf(t *testing.T, name string) string {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(kubectl(t, "logs", name)), "\n")
	return cmp.Or(lines[len(lines)-1], noLine)
}
