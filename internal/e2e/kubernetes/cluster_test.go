package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/egress-router/egress-router/internal/e2e/who"
)

// manifests is the directory of the example manifests.
const manifests = "../../../testdata/manifests"

// run runs a program and returns its stdout. The limit of ten minutes is enough for
// the first build of the images.
func run(args ...string) (string, error) { return runWith("", args...) }

func runWith(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.WaitDelay = time.Second // a child process may keep the streams open
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("run %q: %w\n%s%s", strings.Join(args, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// kubectl runs kubectl in the tests' namespace. A failure ends the test.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := run(append([]string{"kubectl", "-n", namespace}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var (
	imageName = regexp.MustCompile(`(image: localhost/egress-[a-z-]+)`)
	// assign is the annotation for OpenShift's legacy cluster network, networks the
	// annotation for Multus.
	assign   = `pod.network.openshift.io/assign-macvlan: "true"`
	networks = "k8s.v1.cni.cncf.io/networks: egress@macvlan0"
)

// Security contexts of the router's container: the one of the manifests, and the
// smallest one that is sufficient.
const (
	privileged = "    securityContext:\n      privileged: true\n"
	netAdmin   = "    securityContext:\n      capabilities:\n        add: [NET_ADMIN, NET_RAW]\n"
)

// read reads a manifest. It changes only the tag of the images, the annotation if it
// is OpenShift's, and the NIC if the node's has another name.
func read(file string) (string, error) {
	text, err := os.ReadFile(filepath.Join(manifests, file))
	if err != nil {
		return "", err
	}
	changed := imageName.ReplaceAllString(string(text), "$1:"+tag)
	changed = strings.ReplaceAll(changed, assign, networks)
	if nic != "eth1" {
		changed = strings.NewReplacer(`"master": "eth1"`, `"master": "`+nic+`"`, "value: eth1 ", "value: "+nic+" ").Replace(changed)
	}
	return changed, nil
}

// manifest reads a manifest. changes are pairs of old and new text; the test fails if
// the manifest does not contain an old text.
func manifest(t *testing.T, file string, changes ...string) string {
	t.Helper()
	text, err := read(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(text, changes[i]) {
			t.Fatalf("%s does not contain %q", file, changes[i])
		}
		text = strings.ReplaceAll(text, changes[i], changes[i+1])
	}
	return text
}

// withoutNetwork returns multus.yaml without the network, which exists for all tests.
func withoutNetwork(text string) string {
	_, rest, _ := strings.Cut(text, "\n---\n")
	return rest
}

// peerPod returns the manifest of a pod that runs the program peer.
func peerPod(name string, args ...string) string {
	list, _ := json.Marshal(args) // never fails with strings
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: %s
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: peer
    image: %s
    args: %s
`, name, peerImage, list)
}

func tryApply(text string) error {
	_, err := runWith(text, "kubectl", "-n", namespace, "apply", "-f", "-")
	return err
}

// apply applies a manifest, and deletes its objects when the test ends.
func apply(t *testing.T, text string) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			logState(t)
		}
		begin := time.Now()
		if _, err := runWith(text, "kubectl", "-n", namespace, "delete", "--ignore-not-found", "-f", "-"); err != nil {
			t.Error(err)
		}
		// The kubelet kills a pod after a grace period of 30 s.
		if took := time.Since(begin); took > 20*time.Second {
			t.Errorf("kubectl delete took %s: a container ignores SIGTERM", took)
		}
	})
	if err := tryApply(text); err != nil {
		t.Fatal(err)
	}
}

// logState logs the state and the logs of the pods, for a test that failed.
func logState(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"},
		{"describe", "pods"},
		{"logs", "--selector=name", "--all-containers", "--prefix", "--ignore-errors"},
	} {
		out, err := run(append([]string{"kubectl", "-n", namespace}, args...)...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// ready waits until pods, given by names or a selector, are ready.
func ready(t *testing.T, pods ...string) {
	t.Helper()
	kubectl(t, append([]string{"wait", "--for=condition=Ready", "--timeout=600s"}, pods...)...)
}

// pod returns the pod from the API server.
func pod(t *testing.T, name string) corev1.Pod {
	t.Helper()
	var p corev1.Pod
	if err := json.Unmarshal([]byte(kubectl(t, "get", "pod", name, "-o", "json")), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// ask sends a request from a pod of peerPod to a server, and returns the answer.
func ask(from, protocol, address string) (who.Answer, error) {
	out, err := run(append([]string{"kubectl", "-n", namespace, "exec"}, strings.Fields(from+" -- /peer ask "+protocol+" "+address)...)...)
	if err != nil {
		return who.Answer{}, err
	}
	return who.Parse(out)
}

// peer runs the program peer in the client pod.
func peer(args ...string) (string, error) {
	return run(append([]string{"kubectl", "-n", namespace, "exec", "client", "--", "/peer"}, args...)...)
}

// want checks that a server answers at an address, and that the server sees the
// reserved address as the source. from is a pod, optionally followed by the option
// for one of its containers.
func want(t *testing.T, from, protocol, address, server string) {
	t.Helper()
	wantSource(t, from, protocol, address, server, reserved)
}

// wantSource is want with another reserved address.
func wantSource(t *testing.T, from, protocol, address, server string, source netip.Addr) {
	t.Helper()
	right := who.Answer{Server: netip.MustParseAddrPort(server), Peer: source}
	a, err := ask(from, protocol, address)
	// A Service gets its endpoint a moment after the pod is ready.
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); {
		a, err = ask(from, protocol, address)
	}
	if err != nil {
		t.Errorf("%s %s from %s: %v", protocol, address, from, err)
	} else if a != right {
		t.Errorf("%s %s from %s: %q, want %q", protocol, address, from, a, right)
	}
}

// wantExample checks every destination of the documentation's example at the address
// of a pod.
func wantExample(t *testing.T, router string) {
	t.Helper()
	address := pod(t, router).Status.PodIP
	for _, w := range []struct{ protocol, port, server string }{
		{"tcp", "80", "203.0.113.25:80"},
		{"tcp", "8080", "203.0.113.26:80"},
		{"tcp", "8443", "203.0.113.26:443"},
		{"tcp", "9000", "203.0.113.27:9000"}, // the fallback
		{"udp", "53", "203.0.113.27:53"},
	} {
		want(t, "client", w.protocol, address+":"+w.port, w.server)
	}
}

// patience is the limit of a wait, which only ends a test that hangs.
const patience = 10 * time.Minute

// await waits until a condition holds.
func await(t *testing.T, what string, is func() error) {
	t.Helper()
	err := errors.New("not tried")
	for end := time.Now().Add(patience); err != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timeout after %s waiting for %s: %v", patience, what, err)
		}
		err = is()
	}
}
