package envtest

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
)

// listeners returns the addresses on which a process listens (proc_net_tcp in the
// kernel's documentation).
func listeners(t *testing.T, pid int) (all []string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	sockets := map[string]bool{}
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		sockets[target] = true
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	const listen = "0A"
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 9 && f[3] == listen && sockets["socket:["+f[9]+"]"] {
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, fmt.Sprint("127.0.0.1:", port))
		}
	}
	return all
}

// The program as it is shipped: 200 routers with a pod each, half of them with a container
// that monitors, need at most 64 MB. It serves
// metrics and health, and ends with code 0 on SIGTERM.
func TestProcess(t *testing.T) {
	const routers, most = 200, 64_000_000 // bytes
	program := filepath.Join(t.TempDir(), "egress-operator")
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, "../..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	namespace := newNamespace(t)
	for i := range routers {
		create(t, namespace, named(fmt.Sprintf("router-%03d", i), fmt.Sprintf("192.168.%d.%d/16", 100+i/100, 1+i%100)), watched([]string{"never", "always"}[i%2]))
	}
	cmd := exec.Command(program, "-namespace", namespace, "-leader-elect=false", "-metrics-listen", "127.0.0.1:0", "-health-listen", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig(t, operatorConfig()))
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	count := func(status func(api.EgressRouter) bool) (n int) {
		var list api.EgressRouterList
		if err := cluster.List(t.Context(), &list, client.InNamespace(namespace)); err != nil {
			t.Fatal(err)
		}
		for _, r := range list.Items {
			if status(r) {
				n++
			}
		}
		return n
	}
	eventually(t, "wait for the conditions of all routers", func() (bool, any) {
		if len(ended) > 0 {
			t.Fatalf("the operator ended: %v\n%s", <-ended, &log)
		}
		n := count(func(r api.EgressRouter) bool { return len(r.Status.Conditions) == 3 })
		return n == routers, n
	})
	first := getDeployment(t, namespace, deployment)
	for range routers {
		createPod(t, namespace)
	}
	writeStatus(t, namespace, 1)
	status(t, namespace, first.GetOwnerReferences()[0].Name, "TFF", "")

	if peak := memoryOf(t, cmd.Process.Pid); peak > most {
		t.Errorf("%d routers: at most %d bytes of memory, want at most %d", routers, peak, most)
	}
	found := ""
	for _, server := range listeners(t, cmd.Process.Pid) {
		for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
			found += served(t, "http://"+server+path)
		}
	}
	if !strings.Contains(found, `controller_runtime_reconcile_total{controller="egressrouter",result="success"}`) || strings.Count(found, "\nok\n") != 2 {
		t.Errorf("served:\n%s", found)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil || strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("after SIGTERM: %v\n%s", err, &log)
	}
}

// served returns what a server answers, empty if it does not know the path.
func served(t *testing.T, url string) string {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(r.Body); err != nil {
		t.Fatal(err)
	}
	if r.StatusCode != http.StatusOK {
		return ""
	}
	return "\n" + body.String() + "\n"
}

// memoryOf returns the largest resident memory of a process in bytes (VmHWM, proc(5)).
func memoryOf(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("no VmHWM in %s", text)
	}
	kilobytes, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("VmHWM %d kB", kilobytes)
	return kilobytes * 1024
}
