package e2e

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// router returns the options of podman run for the documentation's example, in
// legacy mode, which stays.
func router(more ...string) []string {
	return append([]string{
		"--network", cluster, "--network", bare + ":interface_name=macvlan0",
		"--env", "EGRESS_SOURCE=192.168.12.99/24", "--env", "EGRESS_GATEWAY=192.168.12.1",
		"--env", "EGRESS_DESTINATION=80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n",
	}, more...)
}

// podman run with all privileges, and with the smallest set.
func TestRun(t *testing.T) {
	// A container starts with the machine's setting: it is set explicitly.
	const off, on = "net.ipv4.ip_forward=0", "net.ipv4.ip_forward=1"
	few := []string{"--cap-drop", "all", "--cap-add", "net_admin,net_raw", "--security-opt", "no-new-privileges", "--read-only", "--sysctl", on}
	for name, options := range map[string][]string{
		"privileged":                 {"--privileged", "--sysctl", off},
		"privileged, legacy flavour": {"--privileged", "--sysctl", off, "--env", "PATH=/usr/lib/iptables-legacy:/usr/sbin:/usr/bin"},
		"two capabilities":           few,
		"no writable file at all":    append([]string{"--read-only-tmpfs=false"}, few...),
		"two capabilities, nftables": append([]string{"--env", "EGRESS_ROUTER_BACKEND=nftables"}, few...),
		alone:                        few,
		alone + ", privileged":       {"--privileged", "--sysctl", off},
		alone + ", no writable file": append([]string{"--read-only-tmpfs=false"}, few...),
		"two capabilities, legacy flavour": append([]string{
			"--env", "PATH=/usr/lib/iptables-legacy:/usr/sbin:/usr/bin"}, few...),
	} {
		t.Run(name, func(t *testing.T) {
			image, backend := image, "(nf_tables)"
			switch {
			case strings.HasPrefix(name, alone):
				image, backend = "localhost/"+alone, "backend=nftables"
			case strings.Contains(name, "nftables"):
				backend = "backend=nftables"
			case strings.Contains(name, "legacy flavour"):
				backend = "(legacy)"
			}
			id := startImage(t, image, router(options...)...)
			await(t, "a ready router", func() bool { return strings.Contains(logs(id), "msg=ready") })
			if log := logs(id); !strings.Contains(log, backend) {
				t.Errorf("the backend is not %s:\n%s", backend, log)
			}
			run(t, "podman", "exec", id, "/usr/bin/egress-router", "health")
			pid := pidOf(t, id)
			if backend == "backend=nftables" {
				in(t, pid, "nft", "list", "table", "ip", "egress-router")
			}
			c := newClient(t)
			c.wantExample(t, clusterAddress(t, pid))
		})
	}
}

// If forwarding is off and read-only, nothing changes and a hint names the sysctl.
func TestNoForwarding(t *testing.T) {
	options := router("--cap-drop", "all", "--cap-add", "net_admin,net_raw", "--read-only", "--sysctl", "net.ipv4.ip_forward=0")
	p := command(append(append([]string{"podman", "run", "--rm"}, options...), image)...)
	err := p.run()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Fatalf("error %v, want exit code 1", err)
	}
	lines := strings.Split(strings.TrimSpace(p.stderr.String()), "\n")
	if last := lines[len(lines)-1]; !strings.Contains(last, "set sysctl net.ipv4.ip_forward = 1: ") {
		t.Errorf("last line %q", last)
	}
	if !strings.Contains(p.stderr.String(), "hint: ") || !strings.Contains(p.stderr.String(), "--sysctl net.ipv4.ip_forward=1") {
		t.Errorf("no hint that names the sysctl:\n%s", &p.stderr)
	}
	if strings.Contains(p.stderr.String(), "network changed") {
		t.Errorf("something was changed:\n%s", &p.stderr)
	}
}

// The second container of a pod needs no privilege and ends on SIGTERM.
func TestWait(t *testing.T) {
	for _, user := range []string{"nonroot", "65532", "1000650000", "0"} {
		id := start(t, "--network", "none", "--user", user, "--cap-drop", "all", "--security-opt", "no-new-privileges",
			"--read-only", "--read-only-tmpfs=false", "--", "wait")
		pidOf(t, id)
		run(t, "podman", "stop", "--time", "60", id) // then SIGKILL, and exit code 137
		if code := strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.ExitCode}}", id)); code != "0" {
			t.Errorf("as user %s: exit code %s, want 0", user, code)
		}
	}
}

// A router in mode legacy ends on SIGTERM with exit code 0.
func TestStop(t *testing.T) {
	id := start(t, router("--privileged")...)
	await(t, "a ready router", func() bool { return strings.Contains(logs(id), "msg=ready") })
	run(t, "podman", "stop", "--time", "60", id) // then SIGKILL, and exit code 137
	if code := strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.ExitCode}}", id)); code != "0" {
		t.Errorf("exit code %s, want 0", code)
	}
}
