package e2e

import (
	"bytes"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

// walkSource is the reserved address of the walk-through.
var walkSource = netip.MustParseAddr("192.168.123.99")

// The walk-through of the documentation, command by command, with the legacy pod
// and then with the pod that has an init container. The troubleshooting of
// cmd/egress-router/README.md has the same commands.
func TestWalkThrough(t *testing.T) {
	for manifest, container := range map[string]string{
		"legacy-pod.yaml": "egress-router",
		"init-pod.yaml":   "egress-router-wait",
	} {
		t.Run(strings.TrimSuffix(manifest, ".yaml"), func(t *testing.T) {
			p := play(t, manifest, walk)
			if manifest == "legacy-pod.yaml" {
				p.awaitReady(t, p.name+"-"+container)
			}
			c := newClient(t)
			service := expose(t, p.address, "80")
			// The documentation gets it from docker inspect.
			pid := pidOf(t, p.name+"-"+container)

			// The interfaces.
			links := in(t, pid, "ip", "a")
			for _, want := range []string{
				`(?m)^\d+: lo: <LOOPBACK,UP,LOWER_UP>`,
				`(?m)^\d+: eth0@if\d+: <BROADCAST,MULTICAST,UP,LOWER_UP> .* state UP`,
				`(?m)^    inet ` + regexp.QuoteMeta(p.address.String()) + `/23 .*scope global eth0$`,
				`(?m)^\d+: macvlan0@if\d+: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 `,
				`(?m)^    inet 192\.168\.123\.99/32 scope global macvlan0$`,
			} {
				if !regexp.MustCompile(want).MatchString(links) {
					t.Errorf("ip a: no line matches %s:\n%s", want, links)
				}
			}
			if n := strings.Count(links, "    inet "); n != 3 {
				t.Errorf("ip a: %d IPv4 addresses, want 3:\n%s", n, links)
			}

			// The routes: none to the subnet, since EGRESS_SOURCE has no length, and
			// one to the gateway.
			routes := in(t, pid, "ip", "route")
			for _, want := range []string{
				`(?m)^default via 192\.168\.123\.1 dev macvlan0 `,
				`(?m)^192\.168\.123\.1 dev macvlan0 `,
				`(?m)^10\.128\.0\.0/23 dev eth0 proto kernel scope link src ` + regexp.QuoteMeta(p.address.String()),
			} {
				if !regexp.MustCompile(want).MatchString(routes) {
					t.Errorf("ip route: no line matches %s:\n%s", want, routes)
				}
			}
			if strings.Count(routes, "default") != 1 || strings.Contains(routes, "192.168.123.0/24") {
				t.Errorf("ip route: more than one default route, or one to the subnet:\n%s", routes)
			}

			// The rules.
			if out := in(t, pid, "iptables-save"); !regexp.MustCompile(`(?m)^-A PREROUTING .*-j EGRESS-`).MatchString(out) {
				t.Errorf("iptables-save: no jump to a chain EGRESS-...:\n%s", out)
			}

			// ARP requests to the server and the gateway.
			mac := macOf(t, pid, "macvlan0")
			for _, neighbour := range []struct{ addr, mac string }{
				{web, strings.TrimSpace(run(t, "ip", "netns", "exec", "web", "cat", "/sys/class/net/eth0/address"))},
				{"192.168.123.1", strings.TrimSpace(run(t, "ip", "netns", "exec", "outside", "cat", "/sys/class/net/lan1/address"))},
			} {
				out := in(t, pid, "arping", "-I", "macvlan0", "-c", "2", neighbour.addr)
				if !strings.Contains(out, "ARPING "+neighbour.addr+" from 192.168.123.99 macvlan0") ||
					!strings.Contains(out, "Unicast reply from "+neighbour.addr+" ["+strings.ToUpper(neighbour.mac)+"]") {
					t.Errorf("arping %s:\n%s", neighbour.addr, out)
				}
			}

			// The node's ARP table: the node reaches the server, but not the router,
			// since macvlan0 shares the NIC.
			run(t, "ping", "-c", "1", "-W", "30", web)
			if err := command("ping", "-c", "1", "-W", "1", "192.168.123.99").run(); err == nil {
				t.Error("the node reaches the router by the NIC that macvlan0 is cut from")
			}
			if out := run(t, "ip", "neigh", "show", "dev", "eth1"); !regexp.MustCompile(`(?m)^192\.168\.123\.91 lladdr `).MatchString(out) ||
				!regexp.MustCompile(`(?m)^192\.168\.123\.99 +(INCOMPLETE|FAILED)`).MatchString(out) {
				t.Errorf("ip neigh show dev eth1:\n%s", out)
			}

			// The gateway answers the router.
			in(t, pid, "ping", "-c", "3", "-i", "0.2", "-W", "30", "192.168.123.1")

			// From the pod itself, from another pod by the Service, and as frames on
			// the node's NIC.
			want := web + ":80 192.168.123.99\n"
			if out := in(t, pid, "curl", "-sS", "--max-time", "30", "http://"+web); out != want {
				t.Errorf("curl from the pod: %q, want %q", out, want)
			}
			dump := command("tcpdump", "-i", "eth1", "-e", "-n", "-c", "4", "tcp", "port", "80")
			listening := make(chan struct{})
			dump.cmd.Stderr = &watch{text: "listening on", seen: listening}
			ended := make(chan error, 1)
			go func() { ended <- dump.run() }()
			select {
			case <-listening:
			case err := <-ended:
				t.Fatalf("tcpdump ended before it listened: %v", err)
			}
			// The client's container has no curl of its own.
			clientPID := strings.Split(string(c), "/")[2]
			if out := in(t, clientPID, "curl", "-sS", "--max-time", "30", "http://"+service); out != want {
				t.Errorf("curl by the service's address: %q, want %q", out, want)
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			gateway := strings.TrimSpace(run(t, "ip", "netns", "exec", "outside", "cat", "/sys/class/net/lan1/address"))
			frame := mac + " > " + gateway + `, ethertype IPv4 \(0x0800\), length \d+: 192\.168\.123\.99\.\d+ > 192\.168\.123\.91\.80: Flags \[S\]`
			if out := dump.stdout.String(); !regexp.MustCompile(frame).MatchString(out) {
				t.Errorf("tcpdump: no line matches %s:\n%s", frame, out)
			}
			// A client that bypasses the router has another source.
			c.want(t, "tcp", web+":80", web+":80", netip.MustParseAddr("192.168.123.10"))
		})
	}
}

// expose adds the rules of a Service with one port, as kube-proxy does, including
// masquerading for bridged packets that bypass iptables. It returns the address.
func expose(t *testing.T, to netip.Addr, port string) string {
	t.Helper()
	const service = "172.30.137.86"
	for _, rule := range [][]string{
		{"PREROUTING", "-d", service, "-p", "tcp", "--dport", port, "-j", "DNAT", "--to-destination", to.String()},
		{"POSTROUTING", "-m", "conntrack", "--ctorigdst", service, "-j", "MASQUERADE"},
	} {
		run(t, append([]string{"iptables", "-t", "nat", "-I"}, rule...)...)
		t.Cleanup(func() {
			if err := command(append([]string{"iptables", "-t", "nat", "-D"}, rule...)...).run(); err != nil {
				t.Error(err)
			}
		})
	}
	return service
}

// macOf returns the hardware address of a link in the namespace of a process.
func macOf(t *testing.T, pid, link string) string {
	t.Helper()
	// 3: macvlan0@if2: <...> ... link/ether 36:24:9a:a6:89:a4 brd ...
	words := strings.Fields(in(t, pid, "ip", "-oneline", "link", "show", "dev", link))
	for i, w := range words {
		if w == "link/ether" {
			return words[i+1]
		}
	}
	t.Fatalf("link %s has no hardware address", link)
	return ""
}

// A watch is a writer that waits for a text.
type watch struct {
	text    string
	written bytes.Buffer
	seen    chan struct{} // closed then
}

func (w *watch) Write(b []byte) (int, error) {
	before := strings.Contains(w.written.String(), w.text)
	w.written.Write(b)
	if !before && strings.Contains(w.written.String(), w.text) {
		close(w.seen)
	}
	return len(b), nil
}
