package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/manual"
)

// A host is a machine for the commands of the READMEs: network, mount and PID
// namespaces whose eth1 is on the physical network of the documentation. It has its
// own names of network namespaces.
type host struct {
	pid string // its process 1
}

func newHost(t *testing.T) host {
	t.Helper()
	// Process 1 ignores every signal but SIGKILL, which ends all others with it.
	cmd := exec.Command("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", "mount -t tmpfs tmpfs /run/netns && exec sleep infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // killed
	})
	h := host{}
	await(t, "the host's process 1", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		h.pid = strings.TrimSpace(string(children))
		if err != nil || h.pid == "" {
			return false
		}
		name, err := os.ReadFile("/proc/" + h.pid + "/comm")
		return err == nil && string(name) == "sleep\n"
	})
	run(t, "ip", "link", "add", "port"+h.pid, "netns", "outside", "type", "veth", "peer", "name", "eth1", "netns", h.pid)
	run(t, "ip", "-n", "outside", "link", "set", "port"+h.pid, "master", "lan0", "up")
	h.do(t, "/", "sysctl -q -w "+namespaceSysctls)
	h.do(t, "/", "ip link set lo up; ip address add 192.168.12.11/24 dev eth1; ip link set eth1 up")
	return h
}

// enter returns the command line that runs a shell command on the host, with the
// distribution's programs first in PATH.
func (h host) enter(command string) []string {
	return []string{"nsenter", "-t", h.pid, "-n", "-m", "-p", "env", "PATH=/usr/bin:/usr/sbin:/bin:/sbin", "sh", "-ec", command}
}

// do runs a shell command on the host and returns its stdout.
func (h host) do(t *testing.T, dir, command string) string {
	t.Helper()
	return run(t, h.enter("cd "+dir+"; "+command)...)
}

// inNetwork runs a shell command in the host's network namespace, with the node's files
// and processes, which include podman's images and containers.
func (h host) inNetwork(t *testing.T, command string) string {
	t.Helper()
	return run(t, "nsenter", "-t", h.pid, "-n", "sh", "-ec", "cd ../..; "+command)
}

// readme returns the commands of the block that contains a text.
func readme(t *testing.T, page, text string) []string {
	t.Helper()
	block, err := manual.Find("../..", page, text)
	if err != nil {
		t.Fatal(err)
	}
	return block.Commands()
}

// The README's commands for podman, and the commands for a pod, as written.
func TestQuickStartPodman(t *testing.T) {
	h := newHost(t)
	if got := h.inNetwork(t, `podman info --format '{{.Host.NetworkBackend}}'`); got != "netavark\n" {
		t.Fatalf("network backend %q, want netavark", got)
	}
	lines := readme(t, "README.md", "podman network create")
	if len(lines) != 3 {
		t.Fatalf("%d commands, want 3", len(lines))
	}
	t.Cleanup(func() { h.inNetwork(t, "podman network rm egress") })
	h.inNetwork(t, lines[0])
	client := func(t *testing.T) client {
		id := strings.TrimSpace(h.inNetwork(t, "podman run --detach --network podman "+image+" wait"))
		t.Cleanup(func() { h.inNetwork(t, "podman rm --force --time 2 "+id) })
		return client("/proc/" + pidOf(t, id) + "/ns/net")
	}

	t.Run("container", func(t *testing.T) {
		t.Cleanup(func() { h.inNetwork(t, "podman rm --force --time 2 egress-1") })
		h.inNetwork(t, lines[1])
		await(t, "a ready router", func() bool { return strings.Contains(logs("egress-1"), "msg=ready") })
		if out := h.inNetwork(t, lines[2]); !strings.Contains(out, ": ready") {
			t.Errorf("%s: %s", lines[2], out)
		}
		c, router := client(t), clusterAddress(t, pidOf(t, "egress-1")).String()
		c.want(t, "tcp", router+":9000", "203.0.113.27:9000", reserved)
		c.want(t, "udp", router+":53", "203.0.113.27:53", reserved)
	})
	t.Run("pod", func(t *testing.T) {
		t.Cleanup(func() { h.inNetwork(t, "podman pod rm --force --time 2 egress-multi") })
		for _, line := range readme(t, "testdata/manifests/README.md", "podman play kube") {
			h.inNetwork(t, line)
		}
		router := clusterAddress(t, pidOf(t, "egress-multi-egress-router-wait"))
		client(t).wantExample(t, router)
	})
}

// The README's commands for docker, as written, with a dockerd of its own.
func TestQuickStartDocker(t *testing.T) {
	h := newHost(t)
	h.do(t, "/", "for d in /var/lib/docker /var/lib/containerd /run/docker; do mkdir -p $d; mount -t tmpfs tmpfs $d; done")
	log, err := os.Create(filepath.Join(t.TempDir(), "dockerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	t.Cleanup(func() {
		if text, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("dockerd:\n%s", text)
		}
	})
	daemon := command(h.enter("exec dockerd --storage-driver vfs")...)
	daemon.cmd.Stdout, daemon.cmd.Stderr = log, log
	if err := daemon.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// On SIGTERM it removes links and control groups.
		if err := daemon.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		_ = daemon.cmd.Wait()
	})
	await(t, "dockerd", func() bool { return command(h.enter("docker info")...).run() == nil })
	// podman is on the node, docker on the host.
	run(t, "sh", "-ec", "podman save localhost/egress-router | "+strings.Join(h.enter("'docker load'"), " "))

	t.Cleanup(func() { h.do(t, "/", "docker rm --force $(docker ps --all --quiet)") })
	for _, line := range readme(t, "README.md", "docker network create") {
		h.do(t, "/", line)
	}
	await(t, "a ready router", func() bool {
		p := command(h.enter("docker logs egress-1")...)
		return p.run() == nil && strings.Contains(p.stderr.String(), "msg=ready")
	})
	inspect := func(container, format string) string {
		return strings.TrimSpace(h.do(t, "/", "docker inspect --format '"+format+"' "+container))
	}
	// Process numbers are from the host's PID namespace.
	namespace := func(container string) string {
		return "/proc/" + h.pid + "/root/proc/" + inspect(container, "{{.State.Pid}}") + "/ns/net"
	}
	id := strings.TrimSpace(h.do(t, "/", "docker run --detach "+image+" wait"))
	c, router := client(namespace(id)), inspect("egress-1", "{{.NetworkSettings.IPAddress}}")
	c.want(t, "tcp", router+":9000", "203.0.113.27:9000", reserved)
	c.want(t, "udp", router+":53", "203.0.113.27:53", reserved)
	if out := h.do(t, "/", "docker exec egress-1 /usr/bin/egress-router health"); !strings.Contains(out, ": ready") {
		t.Error(out)
	}

	// docker's address is in the range, and the router does not use it.
	links := run(t, "nsenter", "--net="+namespace("egress-1"), "ip", "-4", "-oneline", "address", "show", "dev", "eth1")
	own := regexp.MustCompile(`inet (192\.168\.12\.\d+)/24`).FindAllStringSubmatch(links, -1)
	between := netip.MustParsePrefix("192.168.12.192/28")
	if len(own) != 2 || !strings.Contains(links, reserved.String()) {
		t.Fatalf("want the reserved address and one of docker's:\n%s", links)
	}
	for _, a := range own {
		if address := netip.MustParseAddr(a[1]); address != reserved && !between.Contains(address) {
			t.Errorf("%s is neither the reserved address nor in %s", address, between)
		}
	}
	client(namespace("egress-1")).want(t, "tcp", "203.0.113.27:9000", "203.0.113.27:9000", reserved)
}

// The README's commands for a bare namespace, as written.
func TestQuickStartNamespace(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/egress-router"), files(t, image)["usr/bin/egress-router"].content, 0o755); err != nil {
		t.Fatal(err)
	}
	lines := readme(t, "README.md", "ip netns add")
	const curl = "curl -sS --max-time 30 http://10.128.0.98:9000/"
	want := "203.0.113.27:9000 " + reserved.String() + "\n"

	t.Run("host", func(t *testing.T) {
		h := newHost(t)
		for _, line := range lines {
			h.do(t, dir, line)
		}
		if out := h.do(t, dir, curl); out != want {
			t.Errorf("%s: %q, want %q", curl, out, want)
		}
		h.do(t, dir, "ip netns delete egress")
		await(t, "the end of the namespace", func() bool { return !strings.Contains(h.do(t, dir, "ip -brief link"), "egress-1") })
	})
	// A host that is a namespace of the node: process 1 is not in it.
	t.Run("lab", func(t *testing.T) {
		h := newHost(t)
		run(t, "ip", "netns", "attach", "HOST", h.pid)
		t.Cleanup(func() { run(t, "ip", "netns", "delete", "HOST"); run(t, "ip", "netns", "delete", "egress") })
		for _, line := range lines {
			h.inNetwork(t, "cd "+dir+"; "+strings.Replace(line, " env ", " env EGRESS_HOST_NETNS=/run/netns/HOST ", 1))
		}
		if out := h.inNetwork(t, curl); out != want {
			t.Errorf("%s: %q, want %q", curl, out, want)
		}
	})
}
