package e2e

import (
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// withoutMacvlan returns the options of podman run for a router that creates
// macvlan0 itself.
func withoutMacvlan(network string, more ...string) []string {
	return append([]string{
		"--privileged", "--network", network,
		"--env", "EGRESS_SOURCE=192.168.12.99/24", "--env", "EGRESS_GATEWAY=192.168.12.1",
		"--env", "EGRESS_DESTINATION=80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n",
	}, more...)
}

// links describes the links, addresses and routes of the node, without podman's, which
// come and go with each container.
func (n *node) links(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, args := range [][]string{{"link"}, {"-4", "address"}, {"-4", "route", "show", "table", "all"}} {
		for line := range strings.Lines(run(t, append([]string{"ip", "-oneline"}, args...)...)) {
			if !strings.Contains(line, "podman0") {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

// macvlanOf returns the mode of macvlan0, the index of its parent and its MTU.
func macvlanOf(t *testing.T, pid string) (mode string, parent, mtu int) {
	t.Helper()
	var links []struct {
		Parent int `json:"link_index"`
		MTU    int `json:"mtu"`
		Info   struct {
			Kind string `json:"info_kind"`
			Data struct {
				Mode string `json:"mode"`
			} `json:"info_data"`
		} `json:"linkinfo"`
	}
	text := in(t, pid, "ip", "-json", "-details", "link", "show", "dev", "macvlan0")
	if err := json.Unmarshal([]byte(text), &links); err != nil || len(links) != 1 || links[0].Info.Kind != "macvlan" {
		t.Fatalf("%v: %s", err, text)
	}
	return links[0].Info.Data.Mode, links[0].Parent, links[0].MTU
}

// indexOf returns the index of a link of the node.
func indexOf(t *testing.T, name string) int {
	t.Helper()
	var links []struct {
		Index int `json:"ifindex"`
	}
	text := run(t, "ip", "-json", "link", "show", "dev", name)
	if err := json.Unmarshal([]byte(text), &links); err != nil || len(links) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	return links[0].Index
}

// The router creates macvlan0 on a NIC of the node and leaves the node unchanged. The
// tests have a PID namespace of their own, whose process 1 is in the node's network:
// with --pid host a container reaches that network, not the machine's.
func TestMacvlanParent(t *testing.T) {
	// From here on the cluster network has its bridge.
	c := newClient(t)
	run(t, "mkdir", "-p", "/run/e2e")
	run(t, "touch", "/run/e2e/host-netns")
	run(t, "mount", "--bind", "/proc/1/ns/net", "/run/e2e/host-netns")
	t.Cleanup(func() {
		if err := command("umount", "/run/e2e/host-netns").run(); err != nil {
			t.Error(err)
		}
	})
	// An unusual MTU, which macvlan0 inherits.
	run(t, "ip", "link", "set", "eth0", "mtu", "1480")
	t.Cleanup(func() { _ = command("ip", "link", "set", "eth0", "mtu", "1500").run() })

	for _, test := range []struct {
		name, mode string
		options    []string
	}{
		{"the NIC of the default route", "private", []string{"--pid", "host", "--env", "EGRESS_MACVLAN_PARENT=true"}},
		{"by name", "private", []string{"--pid", "host", "--env", "EGRESS_MACVLAN_PARENT=eth0"}},
		{"in mode bridge", "bridge", []string{"--pid", "host", "--env", "EGRESS_MACVLAN_PARENT=eth0", "--env", "EGRESS_MACVLAN_MODE=bridge"}},
		{"by a mounted namespace file", "private", []string{
			"--volume", "/run/e2e/host-netns:/host/netns",
			"--env", "EGRESS_HOST_NETNS=/host/netns", "--env", "EGRESS_MACVLAN_PARENT=true",
		}},
		{"by a mounted /proc", "private", []string{
			"--volume", "/proc:/host/proc",
			"--env", "EGRESS_HOST_NETNS=/host/proc/1/ns/net", "--env", "EGRESS_MACVLAN_PARENT=true",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			id := start(t, withoutMacvlan(cluster, test.options...)...)
			await(t, "a ready router", func() bool { return strings.Contains(logs(id), "msg=ready") })
			// The node's links with this container, to compare after a second run.
			before := theNode.links(t)
			pid := pidOf(t, id)
			if mode, parent, mtu := macvlanOf(t, pid); mode != test.mode || parent != indexOf(t, "eth0") || mtu != 1480 {
				t.Errorf("macvlan0 is of link %d in mode %s with MTU %d; want %d, %s, 1480", parent, mode, mtu, indexOf(t, "eth0"), test.mode)
			}
			if strings.Contains(before, "macvlan") {
				t.Errorf("the node has a macvlan:\n%s", before)
			}
			c.wantExample(t, clusterAddress(t, pid))

			// A second run changes nothing.
			was := state(t, pid)
			again := append([]string{"podman", "run", "--rm", "--env", "EGRESS_ROUTER_MODE=init"}, withoutMacvlan("container:"+id, test.options...)...)
			run(t, append(again, image)...)
			if is := state(t, pid); is != was {
				t.Errorf("a second run changed the namespace.\n--- was\n%s--- is\n%s", was, is)
			}
			if after := theNode.links(t); after != before {
				t.Errorf("the second run changed the node.\n--- was\n%s--- is\n%s", before, after)
			}
			c.wantExample(t, clusterAddress(t, pid))
		})
	}

	// podman 4.3 ignores hostPID. The rest of the manifest runs as written, on
	// another NIC.
	t.Run("macvlan-parent-pod", func(t *testing.T) {
		all := decode(t)
		at := slices.IndexFunc(all, func(m manifest) bool { return m.file == "macvlan-parent-pod.yaml" })
		pod := all[at].pods()[0].Spec
		if !pod.HostPID {
			t.Error("the pod does not share the node's processes")
		}
		id := start(t, "--network", cluster, "--", pod.Containers[0].Args[0])
		args := []string{"podman", "run", "--rm", "--privileged", "--pid", "host", "--network", "container:" + id}
		for _, e := range pod.InitContainers[0].Env {
			if e.Name == "EGRESS_MACVLAN_PARENT" && e.Value == "eth1" {
				e.Value = "eth0" // the NIC on that network here
			}
			args = append(args, "--env", e.Name+"="+e.Value)
		}
		run(t, append(args, pod.InitContainers[0].Image)...)
		address := clusterAddress(t, pidOf(t, id)).String()
		c.want(t, "tcp", address+":9000", "203.0.113.27:9000", reserved)
		c.want(t, "udp", address+":53", "203.0.113.27:53", reserved)
	})
}

// A macvlan cannot reach its own NIC: the pod reaches the node's addresses on it by
// the cluster network.
func TestNodeAddress(t *testing.T) {
	id := start(t, withoutMacvlan(cluster, "--pid", "host", "--env", "EGRESS_MACVLAN_PARENT=true")...)
	await(t, "a ready router", func() bool { return strings.Contains(logs(id), "msg=ready") })
	pid := pidOf(t, id)
	if out := in(t, pid, "ip", "route", "get", "192.168.12.10"); !strings.Contains(out, " dev eth0 ") {
		t.Errorf("the route to the node's address is not on eth0: %s", out)
	}
	in(t, pid, "ping", "-c", "1", "-W", "30", "192.168.12.10")

	// The route covers this address only.
	client("/proc/"+pid+"/ns/net").want(t, "tcp", "203.0.113.25:80", "203.0.113.25:80", reserved)
	if out := in(t, pid, "ip", "route", "get", "192.168.12.11"); !strings.Contains(out, " dev macvlan0 ") {
		t.Errorf("the route to a neighbour of the node is not on macvlan0: %s", out)
	}
	newClient(t).wantExample(t, clusterAddress(t, pid))
}

// If the host's namespace is out of reach or the NIC does not exist, the router
// changes nothing, and the error states the cause.
func TestMacvlanParentRefused(t *testing.T) {
	for name, test := range map[string]struct {
		options []string
		want    string
	}{
		"without the host's processes": {[]string{"--env", "EGRESS_MACVLAN_PARENT=true"}, "is the pod's own"},
		"no such NIC":                  {[]string{"--pid", "host", "--env", "EGRESS_MACVLAN_PARENT=eth9"}, `"eth9"`},
		"no such file":                 {[]string{"--env", "EGRESS_MACVLAN_PARENT=true", "--env", "EGRESS_HOST_NETNS=/host/netns"}, "/host/netns"},
	} {
		t.Run(name, func(t *testing.T) {
			p := command(append(append([]string{"podman", "run", "--rm"}, withoutMacvlan(cluster, test.options...)...), image)...)
			err := p.run()
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.ExitCode() != 1 {
				t.Fatalf("error %v, want exit code 1", err)
			}
			lines := strings.Split(strings.TrimSpace(p.stderr.String()), "\n")
			if last := lines[len(lines)-1]; !strings.Contains(last, test.want) || !strings.Contains(p.stderr.String(), "hint: ") {
				t.Errorf("want %q on the last line, and a hint:\n%s", test.want, &p.stderr)
			}
			if strings.Contains(p.stderr.String(), "network changed") {
				t.Errorf("something was changed:\n%s", &p.stderr)
			}
		})
	}
}
