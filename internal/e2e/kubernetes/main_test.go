package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/egress-router/egress-router/internal/netns"
)

// tag is the tag of the images in the cluster. It is not latest, so that no kubelet
// pulls them from a registry.
const tag = "e2e"

var images = []string{"egress-router", "egress-router-cni", "egress-http-proxy", "egress-dns-proxy", "egress-operator"}

// peerImage contains the program peer, for the pods of the tests.
const peerImage = "localhost/egress-peer:" + tag

// namespace is the namespace in namespace.yaml.
const namespace = "egress"

// nic is the node's link to the physical network.
var nic = "eth1"

// theNetwork is the physical network, which the tests share.
var theNetwork *physical

func TestMain(m *testing.M) {
	code, err := prepared(m.Run)
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

// prepared runs the tests with the images, the physical network and the namespace of
// the cluster, and removes the latter two.
func prepared(tests func() int) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("not root: the tests create a NIC of the node")
	}
	for name, use := range map[string]string{
		"KUBECONFIG": "configuration file of the cluster; .ci/kubernetes starts one",
		"E2E_LOAD":   "command that loads an image into the cluster, such as kind load docker-image",
		nodePID:      "number of a process in the first node's namespaces",
	} {
		if os.Getenv(name) == "" {
			return 1, fmt.Errorf("%s not set: %s", name, use)
		}
	}
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return 1, err
	}
	if _, err := exec.LookPath("kubectl"); err != nil {
		return 1, err
	}
	for program, pkg := range map[string]string{"podman": "podman", "ip": "iproute2", "nft": "nftables:nft", "sysctl": "procps:sysctl"} {
		if _, err := exec.LookPath(program); err != nil {
			if _, err := run("../../../.ci/install", pkg); err != nil {
				return 1, err
			}
		}
	}
	if set := os.Getenv("E2E_NIC"); set != "" {
		nic = set
	}
	node, err := openNode()
	if err != nil {
		return 1, err
	}
	if err := loadImages(); err != nil {
		return 1, err
	}
	if theNetwork, err = newPhysical(node, nic); err != nil {
		return 1, fmt.Errorf("create physical network: %w", err)
	}
	defer theNetwork.close()

	remove, err := prepareCluster()
	remove = sync.OnceValue(remove)
	defer func() { err = errors.Join(err, remove()) }()
	if err != nil {
		return 1, fmt.Errorf("prepare cluster: %w", err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		<-signals
		fmt.Fprintf(os.Stderr, "e2e: signal received: %v\n", remove())
		theNetwork.close()
		os.Exit(1)
	}()
	code = tests()
	// The absence of a frame proves something only if the capture lost none.
	return code, theNetwork.frames.Stop()
}

// nodePID is the variable with the number of a process on the node.
const nodePID = "E2E_NODE_PID"

// openNode opens the network namespace of the node. The machine's own is refused: the test's
// routes, addresses and rules would be the machine's, which would reach servers of the lab in
// place of those at the same addresses.
func openNode() (*netns.Namespace, error) {
	node, err := netns.Open("/proc/" + os.Getenv(nodePID) + "/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open network namespace of the node (%s): %w", nodePID, err)
	}
	machine, err := netns.Current()
	if err != nil {
		return nil, errors.Join(err, node.Close())
	}
	defer func() { _ = machine.Close() }()
	if node.Equal(machine) {
		return nil, errors.Join(fmt.Errorf("%s %s: expected a node with a network namespace of its own, found this machine's, whose routes the test would change; .ci/kubernetes starts nodes that have one",
			nodePID, os.Getenv(nodePID)), node.Close())
	}
	return node, nil
}

// loadImages builds the images and loads them into the cluster.
func loadImages() error {
	if _, err := run("../../../.ci/image"); err != nil {
		return err
	}
	for _, name := range images {
		if _, err := run("podman", "tag", "localhost/"+name+":latest", "localhost/"+name+":"+tag); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "egress-peer")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, "peer"), "./peer")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build peer: %w\n%s", err, out)
	}
	containerfile := filepath.Join(dir, "Containerfile")
	if err := os.WriteFile(containerfile, []byte("FROM scratch\nCOPY peer /\nENTRYPOINT [\"/peer\"]\n"), 0o644); err != nil {
		return err
	}
	if _, err := run("podman", "build", "--quiet", "--isolation", "chroot", "--tag", peerImage, dir); err != nil {
		return err
	}
	for _, name := range append([]string{peerImage}, images...) {
		if name != peerImage {
			name = "localhost/" + name + ":" + tag
		}
		defer func() { _, _ = run("podman", "untag", name) }()
		// E2E_LOAD may contain arguments and quotes.
		if _, err := run("sh", "-c", os.Getenv("E2E_LOAD")+` "$0"`, name); err != nil {
			return err
		}
	}
	return nil
}

// label marks the namespace as created by these tests.
const label = "egress-router-e2e"

// prepareCluster creates the namespace, the macvlan network, the zones of CoreDNS, a
// client and a listener. remove, never nil, deletes all of them, also after an error.
func prepareCluster() (remove func() error, err error) {
	undo := []func() error{}
	remove = func() error {
		var failed []error
		for i := range undo {
			failed = append(failed, undo[len(undo)-1-i]())
		}
		return errors.Join(failed...)
	}
	if was, err := run("kubectl", "get", "namespace", namespace, "--ignore-not-found", "--show-labels"); err != nil {
		return remove, err
	} else if was != "" && !strings.Contains(was, label) {
		return remove, fmt.Errorf("namespace %q exists without the label %s: delete it", namespace, label)
	} else if was != "" { // left by tests that were killed
		if _, err := run("kubectl", "delete", "namespace", namespace); err != nil {
			return remove, err
		}
	}
	undo = append(undo, func() error {
		_, err := run("kubectl", "delete", "namespace", namespace)
		return err
	})
	for _, file := range []string{"namespace.yaml", "multus.yaml"} {
		text, err := read(file)
		if err != nil {
			return remove, err
		}
		if file == "multus.yaml" {
			text, _, _ = strings.Cut(text, "\n---\n") // the network; tests create the pod
		} else {
			text = strings.Replace(text, "  labels:\n", "  labels:\n    "+label+": \"true\"\n", 1)
		}
		if err := tryApply(text); err != nil {
			return remove, err
		}
	}
	restore, err := addZones()
	if restore != nil {
		undo = append(undo, restore)
	}
	if err != nil {
		return remove, err
	}
	// The API server refuses pods until the namespace has its service account.
	if _, err := run("kubectl", "wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=600s"); err != nil {
		return remove, err
	}
	if err := tryApply(peerPod("client", "wait") + "---\n" + peerPod("listener", "receive", ":9999")); err != nil {
		return remove, err
	}
	_, err = run("kubectl", "wait", "-n", namespace, "--for=condition=Ready", "pod/client", "pod/listener", "--timeout=600s")
	return remove, err
}

// addZones configures CoreDNS to forward two zones to the name server on the physical
// network, as a cluster forwards the zones of its site. restore, nil if nothing was
// changed, removes them.
func addZones() (restore func() error, err error) {
	text, err := run("kubectl", "get", "configmap", "coredns", "-n", "kube-system", "-o", "json")
	if err != nil {
		return nil, err
	}
	var config corev1.ConfigMap
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return nil, err
	}
	const begin, end = "# begin egress-router-e2e\n", "# end egress-router-e2e\n"
	was := regexp.MustCompile("(?s)"+begin+".*"+end).ReplaceAllString(config.Data["Corefile"], "") // left by tests that were killed
	set := func(corefile string) error {
		patch, err := json.Marshal(map[string]any{"data": map[string]string{"Corefile": corefile}})
		if err != nil {
			return err
		}
		if _, err := run("kubectl", "patch", "configmap", "coredns", "-n", "kube-system", "--type=merge", "--patch", string(patch)); err != nil {
			return err
		}
		if _, err := run("kubectl", "rollout", "restart", "deployment/coredns", "-n", "kube-system"); err != nil {
			return err
		}
		_, err = run("kubectl", "rollout", "status", "deployment/coredns", "-n", "kube-system", "--timeout=600s")
		return err
	}
	if !strings.HasSuffix(was, "\n") {
		was += "\n"
	}
	zones := "example.com:53 example.org:53 {\n    errors\n    cache 5\n    forward . " + nameServer + "\n}\n"
	return func() error { return set(was) }, set(was + begin + zones + end)
}
