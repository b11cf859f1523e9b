package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/e2e/who"
	"github.com/egress-router/egress-router/internal/netns"
)

// farAddr is the address of a client in another subnet.
var farAddr = netip.MustParseAddr("10.130.0.71")

// newFarClient creates a client behind a router of the cluster network, as on another
// node:
//
//	podman0 10.128.0.1/23 - hop 10.128.1.250, 10.130.0.1/24 - far 10.130.0.71
//
// Pods reach it by their default gateway, the node, which has a route by the hop. The
// bridge podman0 exists while a container is attached to it.
func newFarClient(t *testing.T) client {
	t.Helper()
	t.Cleanup(func() {
		for _, ns := range []string{"hop", "far"} {
			if err := command("ip", "netns", "delete", ns).run(); err != nil {
				t.Error(err)
			}
		}
		// The kernel removes the port shortly after its peer.
		_ = command("ip", "link", "delete", "port-hop").run()
		_ = command("ip", "route", "delete", "10.130.0.0/24").run()
	})
	for line := range strings.Lines(`
		ip netns add hop
		ip netns add far
		ip netns exec hop sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
		ip link add port-hop type veth peer name eth0 netns hop
		ip link set port-hop master podman0 up
		ip -n hop address add 10.128.1.250/23 dev eth0
		ip -n hop link set eth0 up
		ip -n hop route add default via 10.128.0.1
		ip -n hop link add eth1 type veth peer name eth0 netns far
		ip -n hop address add 10.130.0.1/24 dev eth1
		ip -n hop link set eth1 up
		ip -n far address add 10.130.0.71/24 dev eth0
		ip -n far link set eth0 up
		ip -n far route add default via 10.130.0.1
		ip route add 10.130.0.0/24 via 10.128.1.250
	`) {
		if words := strings.Fields(line); len(words) > 0 {
			run(t, words...)
		}
	}
	return "/run/netns/far"
}

// networkOfPod starts a container that waits, with both interfaces and the given
// reverse-path filter. It returns its process and the options for containers that share
// its network.
func networkOfPod(t *testing.T, rpFilter string) (pid, id string) {
	t.Helper()
	id = start(t, "--network", cluster, "--network", bare+":interface_name=macvlan0", "--", "wait")
	pid = pidOf(t, id)
	for _, scope := range []string{"all", "eth0", "macvlan0"} {
		in(t, pid, "sysctl", "-q", "-w", "net.ipv4.conf."+scope+".rp_filter="+rpFilter)
	}
	return pid, id
}

// configure runs the router to its end in the network of a container.
func configure(t *testing.T, id string, env ...string) {
	t.Helper()
	args := []string{"podman", "run", "--rm", "--privileged", "--network", "container:" + id,
		"--env", "EGRESS_SOURCE=192.168.12.99/24", "--env", "EGRESS_GATEWAY=192.168.12.1"}
	for _, e := range env {
		args = append(args, "--env", e)
	}
	run(t, append(args, image)...)
}

// A client behind a router of the cluster network gets its replies, with a strict and
// with a loose reverse-path filter.
func TestFarClient(t *testing.T) {
	t.Run("redirect-pod", func(t *testing.T) {
		p := play(t, "redirect-pod.yaml", bare)
		near, far := newClient(t), newFarClient(t)
		near.wantExample(t, p.address)
		far.wantExample(t, p.address)
	})
	for name, filter := range map[string]string{"loose": "0", "strict": "1"} {
		t.Run("redirect, "+name, func(t *testing.T) {
			pid, id := networkOfPod(t, filter)
			address := clusterAddress(t, pid)
			near, far := newClient(t), newFarClient(t)
			env := []string{"EGRESS_ROUTER_MODE=init", "EGRESS_DESTINATION=80 tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n"}
			var before string
			for range 2 { // the second run finds no default route of the CNI
				configure(t, id, env...)
				near.wantExample(t, address)
				far.wantExample(t, address)
				if before == "" {
					before = state(t, pid)
				} else if after := state(t, pid); after != before {
					t.Errorf("after a second run the namespace is another.\n--- was\n%s--- is\n%s", before, after)
				}
			}
		})
		// A listener in the pod itself, as of a proxy.
		t.Run("listener, "+name, func(t *testing.T) {
			pid, id := networkOfPod(t, filter)
			address := clusterAddress(t, pid)
			near, far := newClient(t), newFarClient(t)
			configure(t, id, "EGRESS_ROUTER_MODE=http-proxy")

			path := "/proc/" + pid + "/ns/net"
			const port = ":8080"
			ns, err := netns.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			if err := who.ServeHTTP(ns, address.String()+port); err != nil {
				t.Fatal(err)
			}
			for _, c := range []client{near, far} {
				a, err := c.ask("tcp", address.String()+port)
				if err != nil {
					t.Errorf("from %s: %v", c, err)
				} else if c == far && a.Peer != farAddr {
					t.Errorf("the listener sees %s, want %s", a.Peer, farAddr)
				}
			}
			// Connections of the pod itself have the reserved address.
			client(path).want(t, "tcp", "203.0.113.25:80", "203.0.113.25:80", reserved)
		})
	}
}
