package cni_test

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/manual"
)

// readme returns the page of the plugin.
func readme(t *testing.T) manual.Page {
	t.Helper()
	const file = "../../cmd/egress-router-cni/README.md"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return manual.Page{Path: file, Text: string(text)}
}

// The attachment of the README makes a router with the routes of the README.
func TestReadmeExample(t *testing.T) {
	t.Parallel()
	var config, routes string
	for _, b := range readme(t).Blocks() {
		switch b.Language {
		case "yaml":
			first, _, _ := strings.Cut(b.Text, "\n---\n")
			var nad struct {
				Spec struct{ Config string }
			}
			if err := yaml.Unmarshal([]byte(first), &nad); err != nil {
				t.Fatal(err)
			}
			config = nad.Spec.Config
		case "text":
			routes = b.Text
		}
	}
	p := newPod(t, lab.Options{MacvlanName: "net1"})
	p.Vars["CNI_IFNAME"], p.Conf = "net1", nil
	if err := json.Unmarshal([]byte(config), &p.Conf); err != nil {
		t.Fatalf("%v in\n%s", err, config)
	}
	p.Conf["log_file"] = p.log
	p.Serve(p.Lab.Outside, "udp", "203.0.113.25:80")
	p.add()
	p.WantAnswer("udp", 80, "203.0.113.25:80")
	p.WantAnswer("tcp", 8080, "203.0.113.26:80")
	p.WantAnswer("tcp", 9000, "203.0.113.27:9000")
	for line := range strings.Lines(routes) {
		if want := "route " + strings.Replace(strings.TrimSpace(line), " proto kernel", "", 1) + "\n"; !strings.Contains(p.State(), want) {
			t.Errorf("route %q is missing:\n%s", want, p.State())
		}
	}
}

// The README lists each code of the plugin's own.
func TestReadmeListsCodes(t *testing.T) {
	for code := cni.CodeRouter; code <= cni.CodeDrift; code++ {
		if !regexp.MustCompile(fmt.Sprintf(`(?m)^\| %d \| `, code)).MatchString(readme(t).Text) {
			t.Errorf("code %d is missing", code)
		}
	}
}
