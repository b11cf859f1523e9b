package render_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
	"github.com/egress-router/egress-router/internal/object"
)

func watched(value string) func(*api.EgressRouter) {
	return func(r *api.EgressRouter) { metav1.SetMetaDataAnnotation(&r.ObjectMeta, render.WatchAnnotation, value) }
}

// The annotation and, with auto, the namespace select whether a container monitors.
func TestWatch(t *testing.T) {
	noGateway := address("192.168.12.99/24")
	for _, test := range []struct {
		name      string
		router    *api.EgressRouter
		labels    map[string]string
		want      bool
		wantError string
	}{
		{"absent", router(), nil, false, ""},
		{"never", router(watched("never")), nil, false, ""},
		{"always", router(watched("always")), map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}, true, ""},
		{"auto without a label", router(watched("auto")), nil, true, ""},
		{"auto with privileged", router(watched("auto")), map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}, true, ""},
		{"auto with baseline", router(watched("auto")), map[string]string{"pod-security.kubernetes.io/enforce": "baseline"}, false, ""},
		{"auto with restricted", router(watched("auto")), map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}, false, ""},
		{"auto with another label", router(watched("auto")), map[string]string{"pod-security.kubernetes.io/warn": "restricted"}, true, ""},
		{"unknown", router(watched("yes")), nil, false, `metadata.annotations[egress-router.io/watch] is "yes": expected auto, always or never`},
		{"always without a gateway", router(watched("always"), noGateway), nil, false, "spec.addresses[0].gateway is missing"},
		{"auto without a gateway", router(watched("auto"), noGateway), nil, false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			found, err := render.Watch(test.router, render.Allows(test.labels))
			text := ""
			if err != nil {
				text = err.Error()
			}
			if found != test.want || (err != nil) != (test.wantError != "") || !strings.Contains(text, test.wantError) {
				t.Errorf("watch %t, error %q; want %t, %q", found, text, test.want, test.wantError)
			}
		})
	}
}

// Other destinations change the attachment and the ConfigMap, and not the Deployment. Any
// other change replaces the pod, by another file: a pod never reads former addresses.
func TestWatchedObjects(t *testing.T) {
	with := func(change ...func(*api.EgressRouter)) render.Objects {
		t.Helper()
		o, err := render.New(router(change...), render.First(), render.Options{}, true)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	file := func(o render.Objects) (name, text string) {
		t.Helper()
		data, _, _ := unstructured.NestedStringMap(o.ConfigMap.Object, "data")
		if len(data) != 1 {
			t.Fatalf("data %v, want one file", data)
		}
		for name, text = range data {
			break
		}
		return name, text
	}
	before := with()
	name, text := file(before)
	if spec, err := object.Parse([]byte(text)); err != nil || cmp.Diff(router().Spec, spec) != "" {
		t.Errorf("the file is not the resource: %v\n%s", err, text)
	}
	rule := func(port int32) func(*api.EgressRouter) {
		return func(r *api.EgressRouter) {
			r.Spec.Redirect = &object.Redirect{RedirectRules: []object.RedirectRule{{DestinationIP: "203.0.113.26", Port: port, Protocol: object.TCP}}}
		}
	}
	live := with(rule(80))
	if diff := cmp.Diff(before.Deployment, live.Deployment); diff != "" {
		t.Errorf("other destinations change the Deployment:\n%s", diff)
	}
	if cmp.Equal(before.Attachment, live.Attachment) || cmp.Equal(before.ConfigMap, live.ConfigMap) {
		t.Error("other destinations leave the attachment or the ConfigMap")
	}
	for what, change := range map[string]func(*api.EgressRouter){
		"address": address("192.168.12.98/24"),
		"gateway": func(r *api.EgressRouter) { r.Spec.Addresses[0].Gateway = "192.168.12.2" },
		"master":  func(r *api.EgressRouter) { r.Spec.NetworkInterface.Macvlan.Master = "eth1" },
		"rule with the port of the health endpoint": rule(9465),
	} {
		after := with(change)
		if cmp.Equal(before.Deployment, after.Deployment) {
			t.Errorf("another %s leaves the Deployment", what)
		}
		if other, _ := file(after); other == name {
			t.Errorf("another %s is in the same file", what)
		}
	}
	config, _, _ := unstructured.NestedString(with(rule(9465)).Attachment.Object, "spec", "config")
	if !strings.Contains(config, `"monitorPort":9466`) {
		t.Errorf("attachment with the port of a rule: %s", config)
	}
}
