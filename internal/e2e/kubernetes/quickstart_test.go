package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/manual"
)

// commands returns the commands of a block of a README.
func commands(t *testing.T, page, text string) []string {
	t.Helper()
	block, err := manual.Find("../../..", page, text)
	if err != nil {
		t.Fatal(err)
	}
	return block.Commands()
}

// TestQuickStart runs the commands of the READMEs unchanged, with the manifests as [read]
// changes them. REGISTRY/egress-router:TAG is replaced by the image in the cluster.
func TestQuickStart(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "testdata/manifests"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(file, text string) {
		if err := os.WriteFile(filepath.Join(dir, "testdata/manifests", file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Without the label the next run would refuse the namespace.
	write("namespace.yaml", strings.Replace(manifest(t, "namespace.yaml"), "  labels:\n", "  labels:\n    "+label+": \"true\"\n", 1))
	sh := func(line string) string {
		out, err := run("sh", "-ec", "cd "+dir+"; "+line)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	removed := func(t *testing.T) {
		t.Cleanup(func() {
			if t.Failed() {
				logState(t)
			}
			kubectl(t, "delete", "--ignore-not-found", "pod/egress-1", "service/egress-1")
		})
	}

	t.Run("image on the nodes", func(t *testing.T) {
		guard(t)
		removed(t)
		write("multus.yaml", manifest(t, "multus.yaml"))
		lines := commands(t, "README.md", "kubectl apply")
		for _, line := range lines[:2] {
			sh(line)
		}
		ready(t, "pod/egress-1")
		if log := sh(lines[2]); !strings.Contains(log, "msg=ready") {
			t.Errorf("%s: log has no msg=ready:\n%s", lines[2], log)
		}
		want(t, "client", "tcp", "egress-1."+namespace+":8080", "203.0.113.26:80")
	})
	t.Run("image from a registry", func(t *testing.T) {
		guard(t)
		removed(t)
		write("multus.yaml", strings.ReplaceAll(manifest(t, "multus.yaml"), "localhost/egress-router:"+tag, "localhost/egress-router"))
		lines := commands(t, "testdata/manifests/README.md", "podman push")
		for _, line := range lines[1:3] { // the first one pushes the image, the last one needs curl
			sh(strings.ReplaceAll(line, "REGISTRY/egress-router:TAG", "localhost/egress-router:"+tag))
		}
		want(t, "client", "tcp", "egress-1:8080", "203.0.113.26:80")
		await(t, "the annotation of the pod", func() error {
			_, err := run("sh", "-ec", commands(t, "testdata/manifests/README.md", "kubectl annotate")[0])
			return err
		})
	})
}
