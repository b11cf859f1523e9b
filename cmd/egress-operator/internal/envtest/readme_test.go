package envtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/manual"
)

// section returns the code blocks of a section of cmd/egress-operator/README.md.
func section(t *testing.T, heading string) []manual.Block {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, part, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("no section %q in the README", heading)
	}
	part, _, _ = strings.Cut(part, "\n## ")
	return manual.Page{Text: part}.Blocks()
}

// A reader runs the commands of the README in a namespace of a test.
type reader struct {
	*testing.T
	namespace, router, kubeconfig string // router is the file router.yaml
}

// arguments are the words of a command, of which one is in quotes.
var arguments = regexp.MustCompile(`'[^']*'|\S+`)

// run runs a command with further arguments, and returns what it prints.
func (r *reader) run(command string, more ...string) string {
	r.Helper()
	args := []string{"--kubeconfig", r.kubeconfig}
	for _, a := range arguments.FindAllString(command, -1)[1:] {
		switch a = strings.Trim(a, "'"); a {
		case "egress":
			a = r.namespace
		case "router.yaml":
			a = r.router
		case "cmd/egress-operator":
			a = root
		}
		args = append(args, a)
	}
	out, err := exec.Command(filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kubectl"), append(args, more...)...).CombinedOutput()
	if err != nil {
		r.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// The commands of the walk-through, with what they print. The test writes what the
// controllers of Kubernetes and a kubelet would. A client's connection is not among them.
func TestReadmeWalkThrough(t *testing.T) {
	r := &reader{T: t, namespace: newNamespace(t), router: filepath.Join(t.TempDir(), "router.yaml"), kubeconfig: kubeconfig(t, admin)}
	startOperator(t, r.namespace)
	const name = "egress-router-redirect"
	mistake := ""
	begin := map[string]func(){ // of a command: what has to be there before
		"kubectl wait": func() { exists(t, r.namespace, deployment); writeStatus(t, r.namespace, 1) },
		"kubectl rollout status": func() {
			eventually(t, "wait for another pod", func() (bool, any) {
				generation := getDeployment(t, r.namespace, deployment).GetGeneration()
				return generation > 1, generation
			})
			writeStatus(t, r.namespace, 1)
		},
		"kubectl patch": func() {
			if strings.Contains(mistake, "2001:db8::28") {
				// The API server compiles a policy some time after it was created.
				eventually(t, "wait for the policy", func() (bool, any) {
					out := r.run(mistake, "--dry-run=server")
					return strings.Contains(out, "Warning"), out
				})
			}
		},
	}
	end := map[string]func(){ // what its effect is
		"kubectl patch": func() {
			if strings.Contains(mistake, "2001:db8::28") {
				status(t, r.namespace, name, "TFT", "2001:db8::28")
				eventually(t, "wait for the event", func() (bool, any) {
					all := events(t, r.namespace, name)
					return strings.Contains(strings.Join(all, "\n"), "Warning InvalidSpec: spec.redirect.fallbackIP"), all
				})
			}
		},
		"kubectl rollout status": func() { status(t, r.namespace, name, "TFF", "") },
	}
	printed, ran := "", 0
	for _, b := range section(t, "Walk-through") {
		switch b.Language {
		case "yaml":
			if err := os.WriteFile(r.router, []byte(b.Text), 0o600); err != nil {
				t.Fatal(err)
			}
			documented, _, _ := strings.Cut(b.Text, "\n---\n")
			if diff := cmp.Diff(parse(t, example), parse(t, documented)); diff != "" {
				t.Errorf("not the example of the platform's manual:\n%s", diff)
			}
		case "sh":
			printed = ""
			for _, c := range b.Commands() {
				if strings.HasPrefix(c, "kubectl exec ") || strings.HasPrefix(c, "kubectl create namespace ") {
					continue
				}
				verb := regexp.MustCompile(`^kubectl \w+( status)?`).FindString(c)
				mistake = c
				if f := begin[verb]; f != nil {
					f()
				}
				printed += r.run(c)
				ran++
				if f := end[verb]; f != nil {
					f()
				}
			}
		case "text":
			for line := range strings.Lines(b.Text) {
				var parts []string // between what is left out
				for part := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), "…") {
					parts = append(parts, regexp.QuoteMeta(strings.TrimSpace(part)))
				}
				if indent := regexp.MustCompile(`^ +`).FindString(line); !regexp.MustCompile(`(?m)^` + indent + strings.Join(parts, ".*")).MatchString(printed) {
					t.Errorf("not printed: %sprinted:\n%s", line, printed)
				}
			}
		}
	}
	if get(t, "network.operator.openshift.io/v1", "EgressRouter", r.namespace, name) != nil || ran != 10 {
		t.Errorf("the router is still there, or %d commands ran", ran)
	}
}

// The commands that uninstall everything delete all that those of the installation make. They
// are not carried out, since other tests use the same API server.
func TestReadmeUninstall(t *testing.T) {
	r := &reader{T: t, namespace: newNamespace(t), kubeconfig: kubeconfig(t, admin)}
	create(t, r.namespace)
	var printed []string
	for _, b := range section(t, "Uninstall") {
		for _, c := range b.Commands() {
			switch {
			case strings.HasPrefix(c, "kubectl wait "):
				r.run(strings.Replace(c, "--all-namespaces", "-n "+r.namespace, 1))
			case strings.HasPrefix(c, "kubectl delete "):
				printed = append(printed, r.run(c, "--dry-run=server", "--wait=false"))
			}
		}
	}
	objects, err := kustomize()
	if err != nil {
		t.Fatal(err)
	}
	if len(printed) != 4 || !strings.Contains(printed[0], `"egress-router-redirect" deleted from `+r.namespace) || strings.Count(printed[1], " deleted") != len(objects) {
		t.Errorf("%d objects, printed %q", len(objects), printed)
	}
}
