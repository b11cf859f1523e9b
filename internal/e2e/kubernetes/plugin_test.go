package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/egress-router/egress-router/internal/manual"
)

// pluginDir is the directory of the node's CNI plugins.
func pluginDir() string {
	if set := os.Getenv("E2E_CNI_BIN"); set != "" {
		return set
	}
	return "/opt/cni/bin"
}

// nodeLog is the log of the plugin on the node.
const nodeLog = "/tmp/egress-router-log"

// installPlugin installs the CNI plugin by its DaemonSet, and removes it when the test ends.
func installPlugin(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("../../../cmd/egress-router-cni/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	install(t, imageName.ReplaceAllString(string(text), "$1:"+tag))
}

// install installs manifests with the DaemonSet of the plugin, and removes them when the
// test ends.
func install(t *testing.T, text string) {
	t.Helper()
	t.Cleanup(func() { // after the removal
		if _, err := os.Stat(filepath.Join(pluginDir(), "egress-router")); err == nil {
			t.Error("uninstall leaves the plugin")
		}
	})
	installKeeping(t, onThisNode(text))
}

// onThisNode sets the directory of the node's plugins in the DaemonSet of the plugin.
func onThisNode(text string) string {
	return strings.Replace(text, "path: /opt/cni/bin\n", "path: "+pluginDir()+"\n", 1)
}

// installKeeping is install on a node that has another plugin of that name.
func installKeeping(t *testing.T, set string) {
	t.Helper()
	if _, err := runWith(set, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(pluginDir(), "egress-router")
	t.Cleanup(func() {
		_ = os.Remove(nodeLog) // without a call there is none
		if _, err := runWith(set, "kubectl", "delete", "--wait", "-f", "-"); err != nil {
			t.Error(err)
		}
		if _, err := run(file, "uninstall", "--dir", pluginDir()); err != nil {
			t.Error(err)
		}
	})
	if _, err := run("kubectl", "-n", "kube-system", "rollout", "status", "daemonset/egress-router-cni", "--timeout=600s"); err != nil {
		t.Fatal(err)
	}
	await(t, "the plugin", func() error {
		_, err := run(file, "version")
		return err
	})
}

// attachment returns the example of the plugin's README: the network and the pod.
func attachment(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../../cmd/egress-router-cni/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range (manual.Page{Text: string(text)}).Blocks() {
		if b.Language == "yaml" {
			return imageName.ReplaceAllString(b.Text, "$1:"+tag)
		}
	}
	t.Fatal("no example in the README")
	return ""
}

// The DaemonSet leaves another plugin of that name, unless --replace is set. The former one is
// brought back.
func TestReplacePlugin(t *testing.T) {
	guard(t)
	const foreign = "#!/bin/sh\n# another plugin\nexit 1\n"
	file := filepath.Join(pluginDir(), "egress-router")
	if err := os.WriteFile(file, []byte(foreign), 0o755); err != nil { //nolint:gosec // a runtime executes it
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(file) })
	wantForeign := func() {
		t.Helper()
		if text, err := os.ReadFile(file); err != nil || string(text) != foreign {
			t.Fatalf("%s: %v, and not the other plugin's text", file, err)
		}
	}
	text, err := os.ReadFile("../../../cmd/egress-router-cni/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	set := onThisNode(imageName.ReplaceAllString(string(text), "$1:"+tag))
	system := func(args ...string) (string, error) {
		return run(append([]string{"kubectl", "-n", "kube-system"}, args...)...)
	}
	if _, err := runWith(set, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	await(t, "the refusal of the other plugin", func() error {
		log, err := system("logs", "daemonset/egress-router-cni")
		if err == nil && !strings.Contains(log, "is another plugin: add --replace to replace it") {
			err = errors.New("log: " + log)
		}
		return err
	})
	wantForeign()

	t.Run("replaced", func(t *testing.T) {
		installKeeping(t, strings.Replace(set, "--stay]", "--stay, --replace]", 1))
		apply(t, attachment(t))
		ready(t, "pod/egress-1")
		want(t, "client", "tcp", pod(t, "egress-1").Status.PodIP+":8080", "203.0.113.26:80")
	})
	wantForeign()
	if _, err := os.Stat(file + ".replaced"); err == nil {
		t.Error("a copy of the other plugin is left")
	}
}

// restricted is the security context of a pod that Pod Security admits at its strictest level.
const restricted = `  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    name: wait
`

// The README's attachment makes a router of a pod without any privilege, which the DaemonSet's
// plugin removes with the pod.
func TestPlugin(t *testing.T) {
	wantRefused(t)
	guard(t)
	installPlugin(t)
	text := strings.Replace(attachment(t), "  containers:\n  - name: wait\n", restricted, 1)
	if !strings.Contains(text, "drop: [ALL]") {
		t.Fatalf("the example has another container:\n%s", text)
	}
	t.Run("router", func(t *testing.T) {
		apply(t, text)
		ready(t, "pod/egress-1")
		address := pod(t, "egress-1").Status.PodIP
		want(t, "client", "tcp", address+":8080", "203.0.113.26:80")
		want(t, "client", "tcp", address+":8443", "203.0.113.26:443")
		want(t, "client", "tcp", address+":9000", "203.0.113.27:9000")
		want(t, "client", "udp", address+":53", "203.0.113.27:53")
		wantClosed(t, "80", "8080", "22")
		log, err := os.ReadFile(nodeLog)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"Called CNI ADD", `Renamed macvlan to "net1"`, "Added new default route with gateway 192.168.12.1", "Added iptables rule: iptables -t nat -o net1 -j SNAT --to-source 192.168.12.99"} {
			if !strings.Contains(string(log), " [debug] "+line+"\n") {
				t.Errorf("the log on the node lacks %q:\n%s", line, log)
			}
		}
		// A second pod takes over, as in a rollout that recreates it.
		begin := time.Now()
		kubectl(t, "delete", "pod", "egress-1", "--grace-period=1")
		if err := tryApply(text); err != nil {
			t.Fatal(err)
		}
		ready(t, "pod/egress-1")
		t.Logf("recreated in %s", time.Since(begin).Round(time.Millisecond))
		want(t, "client", "tcp", pod(t, "egress-1").Status.PodIP+":8080", "203.0.113.26:80")
	})
	t.Run("fault", func(t *testing.T) {
		apply(t, strings.Replace(text, "8443 TCP 203.0.113.26 443", "8443 TCP 203.0.113.256 443", 1))
		sentence := `ip.destinations[2]: address is "203.0.113.256": an IPv4 address is four numbers from 0 to 255, without leading zeros`
		await(t, "the event of the fault", func() error {
			events := kubectl(t, "describe", "pod", "egress-1")
			if !strings.Contains(strings.ReplaceAll(events, `\"`, `"`), sentence) {
				return fmt.Errorf("no event has %q:\n%s", sentence, events)
			}
			return nil
		})
		if p := pod(t, "egress-1"); p.Status.Phase != corev1.PodPending {
			t.Errorf("phase %s, want Pending", p.Status.Phase)
		}
	})
}
