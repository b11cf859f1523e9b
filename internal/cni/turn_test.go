package cni_test

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// Pods of a node that get the same address at the same time take it one after the other, each
// after DEL of the one before, in every mode of the macvlan. At no time two hosts have it.
func TestSameAddressInTurn(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"bridge", "private"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, lab.Options{IPv6: true})
			p.Conf["interfaceArgs"] = map[string]any{"mode": mode}
			dir := p.Vars["CNI_TEST_NAMESPACES"]
			var pods []*pod
			var inside []*netlink.Handle
			for i := range 3 {
				q, ns := *p, p.newNamespace(i)
				q.Vars = map[string]string{"CNI_CONTAINERID": fmt.Sprintf("c%d", i), "CNI_NETNS": labtest.File(ns), "CNI_IFNAME": "net1", "CNI_TEST_NAMESPACES": dir}
				if err := os.Symlink(labtest.File(ns), filepath.Join(dir, fmt.Sprintf("cni-%d", i))); err != nil {
					t.Fatal(err)
				}
				pods, inside = append(pods, &q), append(inside, p.Handle(ns))
			}
			ended, output := make(chan int, len(pods)), make([]bytes.Buffer, len(pods))
			for i, q := range pods {
				cmd := q.command("ADD", q.stdin())
				cmd.Stdout = &output[i]
				if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
					t.Fatal(err)
				}
				go func() { _ = cmd.Wait(); ended <- i }()
			}
			for range pods {
				i := <-ended
				for j, h := range inside {
					_, err := h.LinkByName("net1")
					if has := err == nil; has != (i == j) {
						t.Errorf("after ADD of pod %d: pod %d has the address: %t; output\n%s", i, j, has, &output[i])
					}
				}
				a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(podAddress(i), 8080))
				if err != nil || a.Peer.Addr() != lab.Source {
					t.Errorf("pod %d: answer %v, error %v; want one that saw %s", i, a, err, lab.Source)
				}
				pods[i].del()
			}
			if log := p.logged(); !strings.Contains(log, `[warning] msg="waiting for another pod" address=192.168.12.99 holder="net1 of `+dir) {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

// A pod on another NIC of the node, which may be in another network, may have the same address.
func TestSameAddressOnAnotherNIC(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Vars["CNI_TEST_NAMESPACES"] = p.namespaces() // with p's
	p.add()
	h, a := p.Handle(p.Lab.Node), netlink.NewLinkAttrs()
	a.Name = "other"
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "far"}); err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(p.Link(h, "other")); err != nil {
		t.Fatal(err)
	}
	q, ns := *p, p.newNamespace(0)
	q.Vars = map[string]string{"CNI_CONTAINERID": "c2", "CNI_NETNS": labtest.File(ns), "CNI_IFNAME": "net1", "CNI_TEST_NAMESPACES": p.Vars["CNI_TEST_NAMESPACES"]}
	q.Conf = maps.Clone(p.Conf)
	q.Conf["interfaceArgs"] = map[string]any{"master": "other"}
	delete(q.Conf, "prevResult")
	q.add()
	if log := p.logged(); strings.Contains(log, "waiting for another pod") {
		t.Errorf("ADD waited; log:\n%s", log)
	}
	q.del()
	p.WantExample()
	p.del()
}

// A call that waits ends if its runtime has ended, and changes nothing: the runtime may have
// called DEL already.
func TestWaitingAddWithoutRuntime(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	dir := p.namespaces() // with p's
	p.Vars["CNI_TEST_NAMESPACES"] = dir
	p.add()
	q, ns := *p, p.newNamespace(0)
	q.Vars = map[string]string{"CNI_CONTAINERID": "c2", "CNI_NETNS": labtest.File(ns), "CNI_IFNAME": "net1", "CNI_TEST_NAMESPACES": dir}
	plugin := q.command("ADD", q.stdin())
	runtime := p.Command("sh", "-c", plugin.Path+" <&3 & wait")
	runtime.Env = plugin.Env
	stdin := filepath.Join(t.TempDir(), "stdin")
	if err := os.WriteFile(stdin, []byte(q.stdin()), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(stdin)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	runtime.ExtraFiles = []*os.File{file}
	var stdout bytes.Buffer
	runtime.Stdout = &stdout // Wait returns when the plugin has closed it, too
	if err := p.Lab.Start(p.Lab.Node, runtime); err != nil {
		t.Fatal(err)
	}
	p.Until("the call waits", func() bool { return strings.Contains(p.logged(), "waiting for another pod") })
	if err := runtime.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = runtime.Wait()
	if !strings.Contains(stdout.String(), "the runtime has ended while this call waited") {
		t.Errorf("output %q", &stdout)
	}
	if _, err := p.Handle(ns).LinkByName("net1"); err == nil {
		t.Error("the call makes a router")
	}
	p.WantExample()
	p.del()
}
