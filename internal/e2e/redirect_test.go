package e2e

import (
	"bufio"
	"fmt"
	"net/netip"
	"strings"
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
