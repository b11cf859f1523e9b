package envtest

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	diff "github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/operator"
)

const root = "../.."

// kustomize returns what kubectl apply -k applies, in order.
func kustomize() ([]*unstructured.Unstructured, error) {
	made, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), root)
	if err != nil {
		return nil, fmt.Errorf("kustomize: %w", err)
	}
	text, err := made.AsYaml()
	if err != nil {
		return nil, fmt.Errorf("kustomize: %w", err)
	}
	return objectsOf(string(text))
}

// objectsOf parses a stream of objects.
func objectsOf(text string) (all []*unstructured.Unstructured, err error) {
	decoder := utilyaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		o := &unstructured.Unstructured{}
		switch err := decoder.Decode(&o.Object); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, fmt.Errorf("parse manifest: %w", err)
		case o.Object != nil:
			all = append(all, o)
		}
	}
}

// helm returns what helm template --include-crds prints for a release egress-operator in
// the namespace egress-operator.
func helm(t *testing.T, values map[string]any) []*unstructured.Unstructured {
	t.Helper()
	chart, err := loader.Load(filepath.Join(root, "chart"))
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := util.ToRenderValues(chart, values, common.ReleaseOptions{Name: "egress-operator", Namespace: "egress-operator"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := engine.Render(chart, rendered)
	if err != nil {
		t.Fatal(err)
	}
	for _, crd := range chart.CRDObjects() {
		files[crd.Filename] = string(crd.File.Data)
	}
	var all []*unstructured.Unstructured
	for name, text := range files {
		objects, err := objectsOf(text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all = append(all, objects...)
	}
	return all
}

func sorted(objects []*unstructured.Unstructured) []*unstructured.Unstructured {
	slices.SortFunc(objects, func(a, b *unstructured.Unstructured) int {
		return cmp.Or(cmp.Compare(a.GetKind(), b.GetKind()), cmp.Compare(a.GetName(), b.GetName()))
	})
	return objects
}

// The chart makes the objects of kubectl apply -k, but for the namespace, which is that of
// the release.
func TestHelm(t *testing.T) {
	want, err := kustomize()
	if err != nil {
		t.Fatal(err)
	}
	want = slices.DeleteFunc(want, func(o *unstructured.Unstructured) bool { return o.GetKind() == "Namespace" })
	if d := diff.Diff(sorted(want), sorted(helm(t, nil))); d != "" {
		t.Errorf("chart (-kustomize +helm):\n%s", d)
	}
	if len(want) < 9 {
		t.Errorf("only %d objects", len(want))
	}
	for _, o := range helm(t, map[string]any{"image": "a", "routerImage": "b", "pluginImage": "", "flags": []any{"-take-over"}}) {
		if o.GetKind() == "DaemonSet" {
			t.Error("there is a DaemonSet without an image of the plugin")
		}
		if o.GetKind() != "Deployment" {
			continue
		}
		var d appsv1.Deployment
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d); err != nil {
			t.Fatal(err)
		}
		c := d.Spec.Template.Spec.Containers[0]
		if c.Image != "a" || !slices.Equal(c.Args, []string{"-image=b", "-take-over"}) {
			t.Errorf("image %q with arguments %q", c.Image, c.Args)
		}
	}
}

// The operator's pod satisfies the Pod Security Standard "restricted", which its namespace
// enforces, and its arguments are flags of the operator.
func TestInstall(t *testing.T) {
	var d appsv1.Deployment
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: "egress-operator", Name: "egress-operator"}, &d); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-", Namespace: d.Namespace, Labels: d.Spec.Template.Labels}, Spec: d.Spec.Template.Spec}
	if err := cluster.Create(t.Context(), pod, client.DryRunAll); err != nil {
		t.Errorf("pod of the operator: %v", err)
	}
	flags, _ := operator.Flags()
	if err := flags.Parse(d.Spec.Template.Spec.Containers[0].Args); err != nil {
		t.Error(err)
	}
}
