package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// manifests is the directory of the manifests.
const manifests = "../../testdata/manifests"

// A pod is one that podman plays from a manifest.
type pod struct {
	name    string
	pid     string     // a process that stays as long as the pod: its infra container's
	address netip.Addr // on the cluster network
}

// play runs the manifest with the given macvlan network, or none. It returns the pod
// once its init containers have succeeded.
func play(t *testing.T, manifest, macvlan string) pod {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(manifests, manifest))
	if err != nil {
		t.Fatal(err)
	}
	// podman 4.3 gives an init container the restart policy of its pod, and would
	// restart it for ever. This line is the only change.
	changed := strings.Replace(string(text), "\nspec:\n", "\nspec:\n  restartPolicy: OnFailure\n", 1)
	file := filepath.Join(t.TempDir(), manifest)
	if err := os.WriteFile(file, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(changed, "net.ipv4.ip_forward") {
		forwardFromTheStart(t)
	}
	args := []string{"podman", "play", "kube", "--network", cluster}
	if macvlan != "" {
		args = append(args, "--network", macvlan+":interface_name=macvlan0")
	}
	t.Cleanup(func() {
		if t.Failed() {
			p := command("podman", "ps", "--all", "--format", "{{.Names}}")
			_ = p.run()
			for name := range strings.FieldsSeq(p.stdout.String()) {
				t.Logf("log of %s:\n%s", name, logs(name))
			}
		}
		// All processes of these pods end on SIGTERM. SIGKILL, a minute later, leaves
		// the exit code 137.
		if err := command("podman", "pod", "stop", "--all", "--time", "60").run(); err != nil {
			t.Error(err)
		}
		stopped := command("podman", "ps", "--all", "--format", "{{.Names}} {{.ExitCode}}")
		if err := stopped.run(); err != nil || strings.Contains(stopped.stdout.String(), " 137\n") {
			t.Errorf("a container ignores SIGTERM: %v\n%s", err, &stopped.stdout)
		}
		if err := command("podman", "play", "kube", "--down", file).run(); err != nil {
			t.Error(err)
		}
	})
	run(t, append(args, file)...)

	p := pod{name: strings.TrimSpace(run(t, "podman", "pod", "ps", "--format", "{{.Name}}"))}
	infra := strings.TrimSpace(run(t, "podman", "pod", "inspect", "--format", "{{.InfraContainerID}}", p.name))
	p.pid = pidOf(t, infra)
	p.address = clusterAddress(t, p.pid)
	return p
}

// forwardFromTheStart turns forwarding on for every container: podman 4.3 ignores a
// pod's sysctls, and its containers start with the machine's setting.
func forwardFromTheStart(t *testing.T) {
	t.Helper()
	const variable, section = "CONTAINERS_CONF", "[containers]\n"
	text, err := os.ReadFile(os.Getenv(variable))
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(text), section, section+`default_sysctls = ["net.ipv4.ip_forward=1"]`+"\n", 1)
	file := filepath.Join(t.TempDir(), "containers.conf")
	if err := os.WriteFile(file, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(variable, file)
}

// awaitReady waits for msg=ready in the log of a container that stays.
func (p pod) awaitReady(t *testing.T, container string) {
	t.Helper()
	await(t, "a ready router in "+container, func() bool { return strings.Contains(logs(container), "msg=ready") })
}

// state describes everything in a namespace that a router changes, for comparison:
// addresses, routes and routing rules of all tables, and packet rules without their
// counters, all in the kernel's order.
func state(t *testing.T, pid string) string {
	t.Helper()
	var b strings.Builder
	b.WriteString(in(t, pid, "ip", "-4", "-oneline", "address"))
	b.WriteString(in(t, pid, "ip", "-4", "route", "show", "table", "all"))
	b.WriteString(in(t, pid, "ip", "-4", "rule"))
	for line := range strings.Lines(in(t, pid, "iptables-save")) {
		if strings.HasPrefix(line, "#") {
			continue // has the time
		}
		chain, _, _ := strings.Cut(line, " [")
		b.WriteString(strings.TrimSpace(chain) + "\n")
	}
	return b.String()
}
