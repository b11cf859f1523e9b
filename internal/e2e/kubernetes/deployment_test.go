package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"github.com/egress-router/egress-router/internal/lab"
)

// TestDeployment restarts and deletes the pod of a Deployment, kills its processes and
// restarts the kubelet. It logs how long the connections are interrupted and when the
// gateway learns the new hardware address, and checks that no two hosts have the
// reserved address at a time.
func TestDeployment(t *testing.T) {
	guard(t)
	apply(t, manifest(t, "deployment.yaml"))
	kubectl(t, "rollout", "status", "deployment/egress-demo-controller", "--timeout=600s")
	w := startWatcher(t, "watcher", "egress-demo-controller")
	askWhoHas(t)

	var table strings.Builder
	for _, event := range []struct {
		name  string
		cause func(t *testing.T, p corev1.Pod)
		moves bool // the router moves to another pod or network namespace
		// The new pod may begin before the old one ends: a ReplicaSet replaces a deleted
		// pod at once, whatever the Deployment's strategy.
		overlaps bool
	}{
		{"rollout restarted", func(t *testing.T, _ corev1.Pod) {
			kubectl(t, "rollout", "restart", "deployment/egress-demo-controller")
		}, true, false},
		{"pod deleted", func(t *testing.T, p corev1.Pod) { kubectl(t, "delete", "pod", p.Name, "--wait=false") }, true, true},
		{"processes of the pod killed", func(t *testing.T, p corev1.Pod) { onNode(t, "kill", string(p.UID)) }, true, false},
		{"kubelet restarted", restartKubelet, false, false},
	} {
		t.Run(event.name, func(t *testing.T) {
			before := router(t)
			since := time.Now()
			neighbour := watchNeighbour(t)
			event.cause(t, before)
			caused := time.Now()
			if event.moves {
				await(t, "a new ready pod", func() error {
					p := router(t)
					if started(p) == started(before) || !isReady(p) {
						return errors.New("old pod or not ready: " + p.Name)
					}
					return nil
				})
			} else {
				await(t, "the node's kubelet", func() error {
					_, err := peer("ask", "tcp", w.service)
					return err
				})
				// A kubelet may restart pods after its own start.
				time.Sleep(15 * time.Second)
				if after := router(t); started(after) != started(before) || !isReady(after) {
					t.Errorf("pod restarted or not ready: container %s before, %s after", started(before), started(after))
				}
			}
			gap := w.gap(t, since)
			if !event.moves && gap > late {
				t.Errorf("connections interrupted for %s, want at most %s", gap, late)
			}
			holders := holders(t, since, event.overlaps)
			line := fmt.Sprintf("%-28s connections interrupted for %6s", event.name, gap.Round(10*time.Millisecond))
			switch {
			case event.moves && len(holders) != 2:
				t.Errorf("hosts with the reserved address: %v, want the old pod and the new pod", holders)
			case !event.moves && len(holders) != 1:
				t.Errorf("hosts with the reserved address: %v, want the old pod only", holders)
			case event.moves:
				// Goroutines take both times, and the scheduler may run them late.
				learned := neighbour(t, holders[1].mac)
				after := max(learned.Sub(holders[1].from), 0)
				line += fmt.Sprintf("; first frame of the new pod after %6s, neighbour entry of the gateway %s later", holders[1].from.Sub(caused).Round(10*time.Millisecond), after.Round(10*time.Microsecond))
				if after > 500*time.Millisecond {
					t.Errorf("the gateway learned the new hardware address %s after its first frame", after)
				}
			}
			table.WriteString(line + "\n")
		})
	}
	t.Logf("times:\n%s", table.String())
}

// With the strategy RollingUpdate the new pod starts while the old one runs. The
// conflict probe logs a warning then, and EGRESS_CONFLICT=refuse leaves the address to
// the old pod.
func TestRollingUpdate(t *testing.T) {
	guard(t)
	bridged(t)
	text := manifest(t, "deployment.yaml", "    type: Recreate\n", "    type: RollingUpdate\n    rollingUpdate:\n      maxSurge: 1\n      maxUnavailable: 0\n")
	apply(t, text)
	const deployment = "deployment/egress-demo-controller"
	kubectl(t, "rollout", "status", deployment, "--timeout=600s")
	old := router(t)
	want(t, "client", "tcp", "egress-demo-controller:80", "203.0.113.25:80") // the gateway learns the hardware address
	mac := macOf(t)

	t.Run("warn", func(t *testing.T) {
		kubectl(t, "rollout", "restart", deployment)
		kubectl(t, "rollout", "status", deployment, "--timeout=600s")
		await(t, "the old pod's end", func() error {
			if p := router(t); p.Name == old.Name {
				return errors.New(p.Name + " exists")
			}
			return nil
		})
		log := kubectl(t, "logs", router(t).Name, "-c", "egress-router")
		if !strings.Contains(log, "reserved address already in use") || !strings.Contains(log, "mac="+mac) {
			t.Errorf("log of the new pod has no warning of an address conflict with %s:\n%s", mac, log)
		} else {
			t.Logf("log of the new pod:\n%s", log)
		}
	})

	t.Run("refuse", func(t *testing.T) {
		w := startWatcher(t, "watcher", "egress-demo-controller")
		since := time.Now()
		refusing := strings.Replace(text, "        - name: EGRESS_ROUTER_MODE\n", "        - name: EGRESS_CONFLICT\n          value: refuse\n        - name: EGRESS_ROUTER_MODE\n", 1)
		holder := router(t).Name
		if err := tryApply(refusing); err != nil {
			t.Fatal(err)
		}
		// The new pod fails, so the Deployment keeps the old one.
		var message string
		await(t, "the failure of the new pod", func() error {
			for _, p := range routers(t) {
				for _, s := range p.Status.InitContainerStatuses {
					for _, state := range []corev1.ContainerState{s.State, s.LastTerminationState} {
						if state.Terminated != nil && state.Terminated.ExitCode == 1 {
							message = state.Terminated.Message
							return nil
						}
					}
				}
			}
			return errors.New("no init container has exit code 1")
		})
		if !strings.Contains(message, "take reserved address ") || !strings.Contains(message, "already in use") {
			t.Errorf("termination message %q, want an address conflict", message)
		} else {
			t.Logf("termination message of the new pod:\n%s", message)
		}
		if gap := w.gap(t, since); gap > late {
			t.Errorf("connections interrupted for %s, want at most %s", gap, late)
		}
		if !slices.ContainsFunc(routers(t), func(p corev1.Pod) bool { return p.Name == holder && isReady(p) }) {
			t.Errorf("the old pod %s is deleted or not ready", holder)
		}
	})
}

// bridged gives the test's pods macvlans in mode bridge: those of one NIC exchange frames in that
// mode only, as macvlans of two nodes do through the switch.
func bridged(t *testing.T) {
	t.Helper()
	network, _, _ := strings.Cut(manifest(t, "multus.yaml", `"mode": "private"`, `"mode": "bridge"`), "\n---\n")
	private, _, _ := strings.Cut(manifest(t, "multus.yaml"), "\n---\n")
	if err := tryApply(network); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tryApply(private); err != nil {
			t.Error(err)
		}
	})
}

// routers returns the pods of the Deployment that are not being deleted.
func routers(t *testing.T) []corev1.Pod {
	t.Helper()
	var list corev1.PodList
	if err := json.Unmarshal([]byte(kubectl(t, "get", "pods", "-l", "name=egress-router", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// router returns the newest pod of routers, or an empty pod if there is none.
func router(t *testing.T) corev1.Pod {
	t.Helper()
	var newest corev1.Pod
	for _, p := range routers(t) {
		if newest.Name == "" || p.CreationTimestamp.After(newest.CreationTimestamp.Time) {
			newest = p
		}
	}
	return newest
}

// started identifies a start of a pod by the ID of its init container, which the
// kubelet creates anew each time.
func started(p corev1.Pod) string {
	if len(p.Status.InitContainerStatuses) == 0 {
		return ""
	}
	return p.Status.InitContainerStatuses[0].ContainerID
}

func isReady(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// onNode runs the program peer in the node's PID namespace, and returns its output.
func onNode(t *testing.T, args ...string) string {
	t.Helper()
	text := strings.Replace(peerPod("onnode", "wait"), "spec:\n", "spec:\n  hostPID: true\n", 1)
	text = strings.Replace(text, "    args:", "    securityContext:\n      privileged: true\n    args:", 1)
	apply(t, text)
	ready(t, "pod/onnode")
	return kubectl(t, append([]string{"exec", "onnode", "--", "/peer"}, args...)...)
}

// kubeletStart returns the start time of the node's kubelet, from the kubelet's metrics.
func kubeletStart(t *testing.T) string {
	t.Helper()
	node := strings.TrimSpace(kubectl(t, "get", "pod", "client", "-o", "jsonpath={.spec.nodeName}"))
	var start string
	await(t, "the kubelet's metrics", func() error {
		text, err := run("kubectl", "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics")
		for line := range strings.Lines(text) {
			if value, is := strings.CutPrefix(line, "process_start_time_seconds "); is {
				start = value
			}
		}
		return err
	})
	return start
}

// restartKubelet runs the command of E2E_RESTART_KUBELET (see doc.go).
func restartKubelet(t *testing.T, _ corev1.Pod) {
	t.Helper()
	const variable = "E2E_RESTART_KUBELET"
	if os.Getenv(variable) == "" {
		t.Fatalf("%s not set: command that kills the node's kubelet and starts it again", variable)
	}
	before := kubeletStart(t)
	if _, err := run("sh", "-c", os.Getenv(variable)); err != nil {
		t.Fatal(err)
	}
	if after := kubeletStart(t); after == before || after == "" {
		t.Fatalf("kubelet not restarted: start time %q, before %q", after, before)
	}
}

// late is the longest delay of an answer that a busy machine alone may cause.
const late = 200 * time.Millisecond

// A watcher is a pod that sends requests through a Service all the time. Its log survives a
// restart of the kubelet.
type watcher struct{ pod, service string }

// startWatcher starts the pod on the first node.
func startWatcher(t *testing.T, name, service string) watcher {
	t.Helper()
	w := watcher{name, clusterIP(t, service) + ":80"}
	apply(t, onNodeOf(t, "client", peerPod(name, "watch", w.service)))
	ready(t, "pod/"+name)
	await(t, "the first answer", func() error {
		if log := kubectl(t, "logs", name); !strings.Contains(log, reserved.String()) {
			return errors.New(log)
		}
		return nil
	})
	return w
}

// clusterIP returns the IPv4 address of a Service.
func clusterIP(t *testing.T, service string) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, "get", "service", service, "-o", "jsonpath={.spec.clusterIP}"))
}

// onNodeOf returns the manifest of a pod for the node of another pod.
func onNodeOf(t *testing.T, other, text string) string {
	t.Helper()
	return strings.Replace(text, "spec:\n", "spec:\n  nodeName: "+pod(t, other).Spec.NodeName+"\n", 1)
}

// gap returns the longest interval after since in which no request was answered, zero
// if all were. An answer of another server, or with another source than the reserved
// address, is an error. gap waits until the latest requests are answered.
func (w watcher) gap(t *testing.T, since time.Time) time.Duration {
	t.Helper()
	type question struct {
		asked time.Time
		fails bool
	}
	var questions []question
	var wrong string
	await(t, "answers to the latest requests", func() error {
		questions, wrong = nil, ""
		for line := range strings.Lines(kubectl(t, "logs", w.pod)) {
			at, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
			nanoseconds, err := strconv.ParseInt(at, 10, 64)
			if err != nil {
				return fmt.Errorf("log of the pod %s has the line %q", w.pod, line)
			}
			asked := time.Unix(0, nanoseconds)
			if asked.Before(since) {
				continue
			}
			fails := strings.HasPrefix(answer, "- ")
			if !fails && answer != "203.0.113.25:80 "+reserved.String() {
				wrong = line
			}
			questions = append(questions, question{asked, fails})
		}
		// The log is in the order of the answers.
		slices.SortFunc(questions, func(a, b question) int { return a.asked.Compare(b.asked) })
		// A request may take most of a second, so the latest may be unanswered yet.
		const enough = 50
		if len(questions) < enough || slices.ContainsFunc(questions[len(questions)-enough:], func(q question) bool { return q.fails }) ||
			time.Since(questions[len(questions)-1].asked) > 2*time.Second {
			return errors.New("latest requests failed")
		}
		return nil
	})
	if wrong != "" {
		t.Errorf("answer of another server, or with another source: %s", wrong)
	}
	if n := pod(t, w.pod).Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("the pod %s was restarted %d times", w.pod, n)
	}
	var longest time.Duration
	last, failed := since, false
	for i, q := range questions {
		// A watcher that was not running cannot measure an interruption.
		if i > 0 && q.asked.Sub(questions[i-1].asked) > time.Second {
			t.Errorf("the pod %s sent no request from %s to %s", w.pod, questions[i-1].asked, q.asked)
		}
		if q.fails {
			failed = true
			continue
		}
		if failed {
			longest = max(longest, q.asked.Sub(last))
		}
		last, failed = q.asked, false
	}
	return longest
}

// A holder is a host that sent frames with the reserved address.
type holder struct {
	mac      string
	from, to time.Time
}

// String returns the hardware address with the times of the first and last frame.
func (h holder) String() string {
	return fmt.Sprintf("%s from %s to %s", h.mac, h.from.Format(time.StampMicro), h.to.Format(time.StampMicro))
}

// holders returns the hosts that sent frames with the reserved address after since, in
// the order of their first frames. Two hosts at a time are an error.
// With overlap the old one may still send then.
func holders(t *testing.T, since time.Time, overlap bool) []holder {
	t.Helper()
	var found []holder
	for _, f := range theNetwork.frames.Frames() {
		if f.At.Before(since) || f.Outgoing || !sentBy(f) {
			continue
		}
		mac := f.Source().String()
		at := slices.IndexFunc(found, func(h holder) bool { return h.mac == mac })
		if at < 0 {
			found = append(found, holder{mac, f.At, f.At})
			continue
		}
		if at < len(found)-1 && !overlap {
			t.Errorf("at %s %s sends with the reserved address after %s took it", f.At, mac, found[len(found)-1])
		}
		found[at].to = f.At
	}
	return found
}

// sentBy reports whether a frame has the reserved address as its sender address. An ARP
// probe does not (RFC 5227 section 1.1: its sender address is all zero).
func sentBy(f lab.Frame) bool {
	if arp, ok := f.ARP(); ok {
		return arp.SenderIP == reserved
	}
	packet, ok := f.IPv4()
	return ok && packet.Src.Addr() == reserved
}

// macOf returns the hardware address of the gateway's neighbour entry for the reserved
// address.
func macOf(t *testing.T) string {
	t.Helper()
	mac, err := theNetwork.lab.Neighbour(theNetwork.gateway, "lan0", reserved)
	if err != nil {
		t.Fatal(err)
	}
	return mac.String()
}

// watchNeighbour records the changes of the gateway's neighbour table. The function that
// it returns returns the time at which the reserved address got a hardware address.
func watchNeighbour(t *testing.T) func(t *testing.T, mac string) time.Time {
	t.Helper()
	updates, done := make(chan netlink.NeighUpdate, 1000), make(chan struct{})
	t.Cleanup(func() { close(done) })
	if err := theNetwork.gateway.Do(func() error { return netlink.NeighSubscribe(updates, done) }); err != nil {
		t.Fatal(err)
	}
	type change struct {
		mac string
		at  time.Time
	}
	changes := make(chan change, 1000)
	go func() {
		for u := range updates {
			if u.IP.String() == reserved.String() && len(u.HardwareAddr) > 0 {
				changes <- change{u.HardwareAddr.String(), time.Now()}
			}
		}
	}()
	return func(t *testing.T, mac string) time.Time {
		t.Helper()
		deadline := time.After(patience)
		for {
			select {
			case c := <-changes:
				if c.mac == mac {
					return c.at
				}
			case <-deadline:
				t.Fatalf("the gateway's neighbour entry of the reserved address never had %s", mac)
			}
		}
	}
}
