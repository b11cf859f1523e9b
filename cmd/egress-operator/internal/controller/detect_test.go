package controller

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// The kinds of a cluster decide on its platform.
func TestDetect(t *testing.T) {
	router, attachment := api.GroupVersion.WithKind("EgressRouter").GroupKind(), render.AttachmentKind.GroupKind()
	for _, test := range []struct {
		name     string
		kinds    []schema.GroupKind
		choice   Choice
		platform bool
		want     render.Options
		err      string
	}{
		{"Kubernetes", []schema.GroupKind{router, attachment}, Auto, false, render.Options{}, ""},
		{"OpenShift", []schema.GroupKind{router, attachment, openShiftNetwork, openShiftSCC, ovnKubernetes}, Auto, true, render.Options{AnyUser: true, DefaultRoute: true}, ""},
		{"OVN-Kubernetes", []schema.GroupKind{router, attachment, ovnKubernetes}, Auto, false, render.Options{DefaultRoute: true}, ""},
		{"OVN-Kubernetes, never", []schema.GroupKind{router, attachment, ovnKubernetes}, Never, false, render.Options{}, ""},
		{"Kubernetes, always", []schema.GroupKind{router, attachment}, Always, false, render.Options{DefaultRoute: true}, ""},
		{"no resource", []schema.GroupKind{attachment}, Auto, false, render.Options{}, "EgressRouter.network.operator.openshift.io: the cluster does not have it"},
		{"no Multus", []schema.GroupKind{router}, Auto, false, render.Options{}, "install Multus"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var versions []schema.GroupVersion
			for _, kind := range test.kinds {
				versions = append(versions, kind.WithVersion("v1").GroupVersion())
			}
			mapper := meta.NewDefaultRESTMapper(versions)
			for _, kind := range test.kinds {
				mapper.Add(kind.WithVersion("v1"), meta.RESTScopeNamespace)
			}
			r := &reconciler{options: Options{DefaultRoute: test.choice}}
			err := r.detect(mapper)
			switch {
			case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
				t.Errorf("want an error with %q, found %v", test.err, err)
			case test.err == "" && (err != nil || r.platform != test.platform || r.render != test.want):
				t.Errorf("want platform %v and %+v, found %v and %+v, %v", test.platform, test.want, r.platform, r.render, err)
			}
		})
	}
}
