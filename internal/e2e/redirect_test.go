package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/e2e/who"
)

// The documentation's redirect pod, and the other manifests with its destinations,
// redirect as documented, with the reserved address.
func TestRedirectPods(t *testing.T) {
	for _, test := range []struct{ manifest, macvlan string }{
		{"redirect-pod.yaml", bare},
		{"redirect-pod.yaml", addressed},
		{"destination-env.yaml", bare},
		{"destination-file.yaml", bare},
		{"capabilities-pod.yaml", bare},
	} {
		t.Run(strings.TrimSuffix(test.manifest, ".yaml")+"/"+test.macvlan, func(t *testing.T) {
			c := newClient(t)
			// Without a router the server sees the node's address, so that the
			// reserved address proves that the router works.
			c.want(t, "tcp", "203.0.113.25:80", "203.0.113.25:80", netip.MustParseAddr("192.168.12.10"))

			p := play(t, test.manifest, test.macvlan)
			c.wantExample(t, p.address)
			if got := strings.TrimSpace(run(t, "podman", "ps", "--format", "{{.Names}}", "--filter", "name="+p.name+"-")); got != p.name+"-egress-router-wait" {
				t.Errorf("containers that run: %q, want only the one that waits", got)
			}
		})
	}
}

// The pod with the extended grammar redirects as its lines say. A client keeps one of the
// reserved addresses, and is refused beyond the limit of a line.
func TestExtendedPod(t *testing.T) {
	p := play(t, "extended-pod.yaml", bare)
	p.awaitReady(t, p.name+"-egress-router")
	c := newClient(t)
	ask := func(proto string, port int) who.Answer {
		t.Helper()
		a, err := c.ask(proto, fmt.Sprintf("%s:%d", p.address, port))
		if err != nil {
			t.Fatalf("%s port %d: %v", proto, port, err)
		}
		return a
	}
	source := ask("tcp", 9000).Peer
	if source != reserved && source != netip.MustParseAddr("192.168.12.100") {
		t.Fatalf("the server sees %s, want one of the reserved addresses", source)
	}
	for _, w := range []struct {
		proto  string
		port   int
		server string
	}{
		{"udp", 53, "203.0.113.27:53"}, {"tcp", 8080, "203.0.113.26:80"}, {"tcp", 9000, "203.0.113.27:9000"},
		{"tcp", 30000, "203.0.113.26:443"}, {"tcp", 30100, "203.0.113.26:443"}, {"tcp", 8443, "203.0.113.26:443"},
	} {
		c.want(t, w.proto, fmt.Sprintf("%s:%d", p.address, w.port), w.server, source)
	}
	seen := map[netip.AddrPort]bool{}
	await(t, "connections to both servers", func() bool {
		seen[ask("tcp", 80).Server] = true
		return len(seen) > 1
	})
	if first, second := netip.MustParseAddrPort("203.0.113.25:80"), netip.MustParseAddrPort("203.0.113.26:80"); !seen[first] || !seen[second] {
		t.Errorf("port 80: %v answered, want %s and %s", seen, first, second)
	}
	if _, err := c.dial("tcp", p.address.String()+":30101"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port beyond the range: %v, want a refusal", err)
	}

	const most = 20
	var open []net.Conn
	await(t, "a refusal beyond the limit", func() bool {
		conn, err := c.dial("tcp", p.address.String()+":8443")
		if err != nil {
			return errors.Is(err, syscall.ECONNREFUSED)
		}
		t.Cleanup(func() { _ = conn.Close() })
		open = append(open, conn)
		return len(open) > most
	})
	// The connection of before may count, or not any more.
	if len(open) > most || len(open) < most-1 {
		t.Errorf("%d connections at a time, want %d", len(open), most)
	}
}

// A container that is killed and restarted in its pod changes nothing: connections
// continue, and nothing is configured twice.
func TestRestart(t *testing.T) {
	p := play(t, "legacy-pod.yaml", walk)
	// podman ends a pod with its last container; a kubelet does not.
	start(t, "--pod", p.name, "--", "wait")
	router := p.name + "-egress-router"
	p.awaitReady(t, router)
	c := newClient(t)
	c.want(t, "tcp", p.address.String()+":80", web+":80", walkSource)

	// A connection that stays open.
	conn, err := c.dial("tcp", p.address.String()+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	kept := bufio.NewReader(conn)
	again := func() error {
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		a, err := who.Ask(conn, kept)
		if err == nil && a.Peer != walkSource {
			err = fmt.Errorf("the server sees %s", a.Peer)
		}
		return err
	}
	if err := again(); err != nil {
		t.Fatal(err)
	}

	before := state(t, p.pid)
	for range 2 {
		old := pidOf(t, router)
		run(t, "podman", "kill", "--signal", "KILL", router)
		await(t, "the end of the container", func() bool {
			return command("test", "-e", "/proc/"+old).run() != nil
		})
		if err := again(); err != nil {
			t.Errorf("a connection, while the router is down: %v", err)
		}
		c.want(t, "tcp", p.address.String()+":80", web+":80", walkSource)

		// Unless podman did, by the pod's restart policy.
		_ = command("podman", "start", router).run()
		await(t, "a router that is ready again", func() bool {
			return strings.Count(logs(router), "msg=ready") > 1 && strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.Pid}}", router)) != "0"
		})
		if err := again(); err != nil {
			t.Errorf("a connection, after the restart: %v", err)
		}
		c.want(t, "tcp", p.address.String()+":80", web+":80", walkSource)
		if after := state(t, p.pid); after != before {
			t.Errorf("the restart changed the namespace.\n--- was\n%s--- is\n%s", before, after)
		}
	}
}
