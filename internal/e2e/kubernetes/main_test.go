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

// The images, as the cluster has them: with a tag that is not latest, so that no
// kubelet asks a registry for them.
const tag = "e2e"

var images = []string{"egress-router", "egress-http-proxy", "egress-dns-proxy"}

// peerImage holds the program of the tests' own pods.
const peerImage = "localhost/egress-peer:" + tag

// namespace is that of namespace.yaml.
const namespace = "egress"

// nic is the node's link to the physical network.
var nic = "eth1"

// theNetwork is what the tests share.
var theNetwork *physical

func TestMain(m *testing.M) {
	code, err := prepared(m.Run)
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

// prepared runs the tests with all that they share.
func prepared(tests func() int) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("running as an ordinary user: these tests need root, since they give the node a NIC")
	}
	for name, what := range map[string]string{
		"KUBECONFIG": "it names the cluster; .ci/kubernetes starts one",
		"E2E_LOAD":   "it is the command that loads an image into the cluster, such as kind load docker-image",
	} {
		if os.Getenv(name) == "" {
			return 1, fmt.Errorf("looking for the variable %s: not set; %s", name, what)
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
	if err := loadImages(); err != nil {
		return 1, err
	}

	pid := "1"
	if set := os.Getenv("E2E_NODE_PID"); set != "" {
		pid = set
	}
	if set := os.Getenv("E2E_NIC"); set != "" {
		nic = set
	}
	node, err := netns.Open("/proc/" + pid + "/ns/net")
	if err != nil {
		return 1, fmt.Errorf("opening the node's network namespace (E2E_NODE_PID): %w", err)
	}
	if theNetwork, err = newPhysical(node, nic); err != nil {
		return 1, fmt.Errorf("making the physical network: %w", err)
	}
	defer theNetwork.close()

	remove, err := prepareCluster()
	remove = sync.OnceValue(remove)
	defer func() { err = errors.Join(err, remove()) }()
	if err != nil {
		return 1, fmt.Errorf("preparing the cluster: %w", err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		<-signals
		fmt.Fprintf(os.Stderr, "e2e: told to stop: %v\n", remove())
		theNetwork.close()
		os.Exit(1)
	}()
	code = tests()
	// Frames that are not there prove something only if none was lost.
	return code, theNetwork.frames.Stop()
}

// loadImages builds the images and brings them into the cluster.
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
		return fmt.Errorf("building peer: %w\n%s", err, out)
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
		// E2E_LOAD may have arguments, and quotes.
		if _, err := run("sh", "-c", os.Getenv("E2E_LOAD")+` "$0"`, name); err != nil {
			return err
		}
	}
	return nil
}

// label marks the namespace as one of these tests.
const label = "egress-router-e2e"

// prepareCluster makes the namespace, the macvlan network, names that CoreDNS
// knows, a client and a listener. What it returns removes all of that, also after an error.
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
		return remove, fmt.Errorf("namespace %q is there already, and not of these tests: delete it", namespace)
	} else if was != "" { // of tests that were killed
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
			text, _, _ = strings.Cut(text, "\n---\n") // its network; the pod is a test's
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
	// Pods can be made once the namespace has its service account.
	if _, err := run("kubectl", "wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=60s"); err != nil {
		return remove, err
	}
	if err := tryApply(peerPod("client", "wait") + "---\n" + peerPod("listener", "hear", ":9999")); err != nil {
		return remove, err
	}
	_, err = run("kubectl", "wait", "-n", namespace, "--for=condition=Ready", "pod/client", "pod/listener", "--timeout=60s")
	return remove, err
}

// addZones has CoreDNS ask the name server on the physical network for two zones,
// as a cluster's would ask that of its site.
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
	was := regexp.MustCompile("(?s)"+begin+".*"+end).ReplaceAllString(config.Data["Corefile"], "") // of tests that were killed
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
		_, err = run("kubectl", "rollout", "status", "deployment/coredns", "-n", "kube-system", "--timeout=90s")
		return err
	}
	if !strings.HasSuffix(was, "\n") {
		was += "\n"
	}
	zones := "example.com:53 example.org:53 {\n    errors\n    cache 5\n    forward . " + nameServer + "\n}\n"
	return func() error { return set(was) }, set(was + begin + zones + end)
}
