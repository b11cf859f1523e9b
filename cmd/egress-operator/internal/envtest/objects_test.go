package envtest

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

var update = flag.Bool("update", false, "write the golden files")

const (
	attachment = "egress-router-cni-nad"
	deployment = "egress-router-cni-deployment"
)

// create creates the router of the example, and returns it as the cluster has it.
func create(t *testing.T, namespace string, change ...func(*unstructured.Unstructured)) *unstructured.Unstructured {
	t.Helper()
	router := parse(t, example)
	router.SetNamespace(namespace)
	for _, c := range change {
		c(router)
	}
	if err := cluster.Create(t.Context(), router); err != nil {
		t.Fatal(err)
	}
	return router
}

// named names a router, and gives it an address.
func named(name, ip string) func(*unstructured.Unstructured) {
	return func(o *unstructured.Unstructured) {
		o.SetName(name)
		_ = unstructured.SetNestedSlice(o.Object, []any{map[string]any{"ip": ip, "gateway": "192.168.12.1"}}, "spec", "addresses")
	}
}

// get reads an object of a kind; nil if it does not exist.
func get(t *testing.T, apiVersion, kind, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	o.SetAPIVersion(apiVersion)
	o.SetKind(kind)
	err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, o)
	if client.IgnoreNotFound(err) != nil {
		t.Fatal(err)
	}
	if err != nil {
		return nil
	}
	return o
}

func getDeployment(t *testing.T, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	return get(t, "apps/v1", "Deployment", namespace, name)
}

func getAttachment(t *testing.T, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	return get(t, "k8s.cni.cncf.io/v1", "NetworkAttachmentDefinition", namespace, name)
}

// exists waits for the Deployment with a name, which is applied last.
func exists(t *testing.T, namespace, name string) *unstructured.Unstructured {
	t.Helper()
	eventually(t, "wait for Deployment "+name, func() (bool, any) {
		return getDeployment(t, namespace, name) != nil, nil
	})
	return getDeployment(t, namespace, name)
}

// golden compares objects with a file, without what differs with each run.
func golden(t *testing.T, file string, objects ...*unstructured.Unstructured) {
	t.Helper()
	var text bytes.Buffer
	for _, o := range objects {
		o = o.DeepCopy()
		for _, field := range []string{"uid", "resourceVersion", "creationTimestamp", "managedFields", "namespace"} {
			unstructured.RemoveNestedField(o.Object, "metadata", field)
		}
		unstructured.RemoveNestedField(o.Object, "status")
		owners := o.GetOwnerReferences()
		for i := range owners {
			owners[i].UID = "UID"
		}
		o.SetOwnerReferences(owners)
		y, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString("---\n")
		text.Write(y)
	}
	path := filepath.Join("testdata", "golden", file)
	want, err := os.ReadFile(path)
	if *update {
		err = os.WriteFile(path, text.Bytes(), 0o644)
		want = text.Bytes()
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text.String()); diff != "" {
		t.Errorf("%s (-want +found); run make golden-operator after an intended change:\n%s", path, diff)
	}
}

// Every object that the operator makes, as the API server returns it.
func TestObjects(t *testing.T) {
	for _, test := range []struct {
		file   string
		change func(t *testing.T, o *unstructured.Unstructured)
	}{
		{"example.yaml", func(*testing.T, *unstructured.Unstructured) {}},
		{"fallback.yaml", func(t *testing.T, o *unstructured.Unstructured) {
			set(t, o, "spec.redirect", "{fallbackIP: 203.0.113.27}")
		}},
		{"master.yaml", func(t *testing.T, o *unstructured.Unstructured) {
			set(t, o, "spec.networkInterface.macvlan", "{mode: Private, master: eth1}")
		}},
		{"dual-stack.yaml", func(t *testing.T, o *unstructured.Unstructured) {
			set(t, o, "spec.addresses", "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: '2001:db8::99/64', gateway: '2001:db8::1'}]")
		}},
		{"mac.yaml", func(_ *testing.T, o *unstructured.Unstructured) {
			o.SetAnnotations(map[string]string{render.MACAnnotation: "auto"})
		}},
		{"refused-by-the-plugin.yaml", func(t *testing.T, o *unstructured.Unstructured) {
			set(t, o, "spec.addresses.0.ip", "foo")
		}},
	} {
		t.Run(test.file, func(t *testing.T) {
			namespace := newNamespace(t)
			startOperator(t, namespace)
			create(t, namespace, func(o *unstructured.Unstructured) { test.change(t, o) })
			d := exists(t, namespace, deployment)
			golden(t, test.file, getAttachment(t, namespace, attachment), d)
			satisfiesPodSecurity(t, d)
		})
	}
}

// The objects of a router whose container monitors.
func TestWatchedObjects(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	create(t, namespace, watched("always"))
	d := exists(t, namespace, deployment)
	golden(t, "watch.yaml", getAttachment(t, namespace, attachment), getConfigMap(t, namespace), d)
}

// satisfiesPodSecurity creates a pod from the template of a Deployment, as a dry run. The
// namespace enforces the Pod Security Standard "restricted".
func satisfiesPodSecurity(t *testing.T, o *unstructured.Unstructured) {
	t.Helper()
	var d appsv1.Deployment
	if err := cluster.Get(t.Context(), client.ObjectKeyFromObject(o), &d); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-", Namespace: d.Namespace, Labels: d.Spec.Template.Labels}, Spec: d.Spec.Template.Spec}
	if err := cluster.Create(t.Context(), pod, client.DryRunAll); err != nil {
		t.Errorf("pod of the template: %v", err)
	}
	pod.Spec.HostNetwork, pod.ResourceVersion = true, ""
	if err := cluster.Create(t.Context(), pod, client.DryRunAll); err == nil {
		t.Error("the namespace admits a pod of the host's network: the test proves nothing")
	}
}

// Several routers of a namespace: the first one has the frozen names, a further one its
// own name behind them and a label of its own. Names stay when the first one is deleted.
func TestSeveralInANamespace(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	one := create(t, namespace, named("one", "192.168.12.97/24"))
	exists(t, namespace, deployment)
	create(t, namespace, named("two", "192.168.12.98/24"))
	two := exists(t, namespace, deployment+"-two")
	golden(t, "further.yaml", getAttachment(t, namespace, attachment+"-two"), two)

	deleteAll(t, one)
	collect(t, namespace, one)
	create(t, namespace, named("three", "192.168.12.96/24"))
	eventually(t, "wait until the frozen names belong to the new router", func() (bool, any) {
		collect(t, namespace, one)
		d := getDeployment(t, namespace, deployment)
		return d != nil && d.GetOwnerReferences()[0].Name == "three", d
	})
	if again := getDeployment(t, namespace, deployment+"-two"); again == nil || again.GetUID() != two.GetUID() {
		t.Error("the Deployment of the second router has changed")
	}
}

// collect deletes the objects of a router that is deleted, as the garbage collector of a
// cluster does. The operator may make them once more before it learns of the deletion.
func collect(t *testing.T, namespace string, router *unstructured.Unstructured) {
	t.Helper()
	for _, o := range []*unstructured.Unstructured{getAttachment(t, namespace, attachment), getDeployment(t, namespace, deployment)} {
		if o == nil || !metav1.IsControlledBy(o, router) {
			continue
		}
		if err := cluster.Delete(t.Context(), o); client.IgnoreNotFound(err) != nil {
			t.Fatal(err)
		}
	}
}

// deleteAll deletes objects.
func deleteAll(t *testing.T, objects ...*unstructured.Unstructured) {
	t.Helper()
	for _, o := range objects {
		if err := cluster.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
}
