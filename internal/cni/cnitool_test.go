package cni_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// cnitoolVariable has the path of cnitool, for the second process of the tests.
const cnitoolVariable = "CNI_TEST_CNITOOL"

// buildCnitool builds cnitool, the runtime of the specification's authors, before the tests
// are in a namespace without a network.
func buildCnitool() error {
	isTest := len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "-test.")
	if !isTest || os.Getenv(cnitoolVariable) != "" {
		return nil
	}
	cmd := exec.Command("go", "tool", "-modfile=../../.ci/tools/go.mod", "-n", "cnitool")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	path, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("build cnitool: %w", err)
	}
	return os.Setenv(cnitoolVariable, strings.TrimSpace(string(path)))
}

// The runtime of the specification's authors makes, checks and removes a router, alone and
// in a list.
func TestCnitool(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	// The cache of the runtime, in the mount namespace of the tests.
	if err := unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	before, dir := p.before(), t.TempDir()
	delete(p.Conf, "cniVersion")
	delete(p.Conf, "name")
	list, err := json.Marshal(map[string]any{"cniVersion": "1.1.0", "name": "egress", "plugins": []any{p.Conf}})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "egress.conflist"), list, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	tool := func(verb string) string {
		t.Helper()
		cmd := p.Command(os.Getenv(cnitoolVariable), verb, "egress", p.Vars["CNI_NETNS"])
		cmd.Env = append(cmd.Env, "NETCONFPATH="+dir, "CNI_PATH="+filepath.Dir(p.command("ADD", "").Path), "CNI_IFNAME=macvlan0", "TMPDIR="+os.TempDir())
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := p.Lab.Run(p.Lab.Node, cmd); err != nil {
			t.Fatalf("cnitool %s: %v\n%s%s", verb, err, &stdout, &stderr)
		}
		return stdout.String()
	}
	tool("status")
	for _, end := range []string{"del", "gc"} { // cnitool's gc ends all attachments
		if result := tool("add"); !strings.Contains(result, `"address": "192.168.12.99/24"`) {
			t.Errorf("result:\n%s", result)
		}
		p.WantExample()
		tool("check")
		tool(end)
		p.wantBefore("after "+end, before)
	}
	tool("del")
}
