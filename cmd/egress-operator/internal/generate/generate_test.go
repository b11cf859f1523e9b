package generate

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/controller-tools/pkg/crd"
	crdmarkers "sigs.k8s.io/controller-tools/pkg/crd/markers"
	"sigs.k8s.io/controller-tools/pkg/deepcopy"
	"sigs.k8s.io/controller-tools/pkg/genall"
	"sigs.k8s.io/controller-tools/pkg/loader"
	"sigs.k8s.io/controller-tools/pkg/markers"
)

const module = "github.com/egress-router/egress-router"

var update = flag.Bool("update", false, "write the generated files")

// anyIP is the marker egress-router:ip: a string that is an IPv4 or an IPv6 address by
// the formats of OpenAPI. controller-gen has no marker for a choice of formats.
type anyIP struct{}

func (anyIP) ApplyToSchema(_ *crdmarkers.SchemaContext, s *apiextensionsv1.JSONSchemaProps) error {
	s.AnyOf = []apiextensionsv1.JSONSchemaProps{{Format: "ipv4"}, {Format: "ipv6"}}
	return nil
}

// generator is that of controller-gen, with the marker above.
type generator struct{ crd.Generator }

func (g generator) RegisterMarkers(into *markers.Registry) error {
	if err := g.Generator.RegisterMarkers(into); err != nil {
		return err
	}
	return into.Register(markers.Must(markers.MakeDefinition("egress-router:ip", markers.DescribesField, anyIP{})))
}

func (g generator) CheckFilter() loader.NodeFilter { return g.Generator.CheckFilter() }

// files collects the generated files: those of a package by its directory.
type files map[string]*bytes.Buffer

func (f files) Open(pkg *loader.Package, path string) (io.WriteCloser, error) {
	if pkg != nil {
		path = filepath.Join(filepath.Dir(pkg.GoFiles[0]), path)
	} else {
		path = filepath.Join("..", "..", "chart", "crds", path)
	}
	f[path] = new(bytes.Buffer)
	return nopCloser{f[path]}, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// The generated files, the definition of the resource and the deep copies of its types,
// are those that controller-gen makes of the types.
func TestGenerated(t *testing.T) {
	var (
		resource genall.Generator = generator{crd.Generator{}}
		copies   genall.Generator = deepcopy.Generator{}
	)
	made := files{}
	for _, gen := range []struct {
		genall.Generator
		packages []string
	}{
		{resource, []string{module + "/cmd/egress-operator/api"}},
		{copies, []string{module + "/cmd/egress-operator/api", module + "/internal/object"}},
	} {
		generators := genall.Generators{&gen.Generator}
		run, err := generators.ForRoots(gen.packages...)
		if err != nil {
			t.Fatal(err)
		}
		var messages strings.Builder
		run.OutputRules = genall.OutputRules{Default: made}
		run.ErrorWriter = &messages
		if run.Run() {
			t.Fatalf("controller-gen %v:\n%s", gen.packages, &messages)
		}
	}
	if len(made) != 3 {
		t.Errorf("%d files made, want the resource and two of deep copies", len(made))
	}
	// The version of the generator is that of the test's program.
	version := regexp.MustCompile(`  annotations:\n    controller-gen\.kubebuilder\.io/version: .*\n`)
	for path, buffer := range made {
		want := version.ReplaceAll(buffer.Bytes(), nil)
		found, err := os.ReadFile(path)
		if err == nil && bytes.Equal(found, want) {
			continue
		}
		if !*update {
			t.Errorf("%s: differs from the types; run make golden (%v)\n%s", path, err, cmp.Diff(string(want), string(found)))
			continue
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Error(err)
		}
	}
}
