package envtest

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

const configMap = "egress-router-cni-config"

// watched sets the annotation by which a container monitors.
func watched(value string) func(*unstructured.Unstructured) {
	return func(o *unstructured.Unstructured) {
		o.SetAnnotations(map[string]string{render.WatchAnnotation: value})
	}
}

// enforce sets the Pod Security label of a namespace; empty: none.
func enforce(t *testing.T, namespace, level string) {
	t.Helper()
	value := "null"
	if level != "" {
		value = `"` + level + `"`
	}
	patch(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, `{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":`+value+`}}}`)
}

func getConfigMap(t *testing.T, namespace string) *unstructured.Unstructured {
	t.Helper()
	return get(t, "v1", "ConfigMap", namespace, configMap)
}

// capabilities waits until the pods' template adds capabilities, as text.
func capabilities(t *testing.T, namespace, want string) *unstructured.Unstructured {
	t.Helper()
	var d *unstructured.Unstructured
	eventually(t, "wait for capabilities "+want, func() (bool, any) {
		d = getDeployment(t, namespace, deployment)
		if d == nil {
			return false, nil
		}
		containers, _, _ := unstructured.NestedSlice(d.Object, "spec", "template", "spec", "containers")
		added, _, _ := unstructured.NestedStringSlice(containers[0].(map[string]any), "securityContext", "capabilities", "add")
		return strings.Join(added, " ") == want, added
	})
	return d
}

const monitoring = "NET_ADMIN NET_RAW"

// With auto, a container monitors while the namespace admits its capabilities. A change of
// the label, or of the annotation, takes effect.
func TestWatchByNamespace(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace, watched("auto"))
	exists(t, namespace, deployment)
	capabilities(t, namespace, "")
	if getConfigMap(t, namespace) != nil {
		t.Error("there is a ConfigMap without a container that reads it")
	}
	enforce(t, namespace, "")
	d := capabilities(t, namespace, monitoring)
	if pod, _, _ := unstructured.NestedMap(d.Object, "spec", "template", "spec"); strings.Contains(text(d, "spec", "template", "spec"), "wait") || pod["dnsPolicy"] != "None" {
		t.Errorf("pod %v", pod)
	}
	enforce(t, namespace, "baseline")
	d = capabilities(t, namespace, "")
	if pod := text(d, "spec", "template", "spec"); !strings.Contains(pod, "wait") || strings.Contains(pod, configMap) || strings.Contains(pod, "EGRESS_") {
		t.Errorf("the pod has parts of a container that monitors: %s", pod)
	}
	enforce(t, namespace, "privileged")
	capabilities(t, namespace, monitoring)
	patch(t, router, `{"metadata":{"annotations":{"egress-router.io/watch":"never"}}}`)
	capabilities(t, namespace, "")
	status(t, namespace, router.GetName(), "FTF", "")
	patch(t, router, `{"metadata":{"annotations":{"egress-router.io/watch":"always"}}}`)
	capabilities(t, namespace, monitoring)

	// An unknown value is reported, and the router runs without the container.
	patch(t, router, `{"metadata":{"annotations":{"egress-router.io/watch":"yes"}}}`)
	capabilities(t, namespace, "")
	status(t, namespace, router.GetName(), "FTT", `metadata.annotations[egress-router.io/watch] is "yes": expected auto, always or never`)
	patch(t, router, `{"metadata":{"annotations":{"egress-router.io/watch":null}}}`)
	status(t, namespace, router.GetName(), "FTF", "")
}

// Other destinations reach a container that monitors by its ConfigMap alone; other
// addresses replace the pod. Without the container, both do.
func TestLiveDestinations(t *testing.T) {
	for _, test := range []struct {
		watch                 string
		rolls                 bool // by other destinations
		capabilities, changes string
	}{
		{"always", false, monitoring, `{"redirectRules":[{"destinationIP":"203.0.113.26","port":8080,"protocol":"TCP"}],"fallbackIP":"203.0.113.28"}`},
		{"never", true, "", `{"fallbackIP":"203.0.113.28"}`},
	} {
		t.Run(test.watch, func(t *testing.T) {
			namespace := newNamespace(t)
			startOperator(t, namespace)
			router := create(t, namespace, watched(test.watch))
			exists(t, namespace, deployment)
			before := capabilities(t, namespace, test.capabilities)
			patch(t, router, `{"spec":{"redirect":`+test.changes+`}}`)
			eventually(t, "wait for the attachment", func() (bool, any) {
				config := text(getAttachment(t, namespace, attachment), "spec", "config")
				return strings.Contains(config, "203.0.113.28"), config
			})
			if test.watch == "always" {
				eventually(t, "wait for the ConfigMap", func() (bool, any) {
					data := text(getConfigMap(t, namespace), "data")
					return strings.Contains(data, "203.0.113.28"), data
				})
			}
			// The router is reconciled once more, after the Deployment was applied.
			patch(t, router, `{"metadata":{"annotations":{"egress-router.io/mac":"no"}}}`)
			status(t, namespace, router.GetName(), "FFT", `[egress-router.io/mac] is "no"`)
			after := getDeployment(t, namespace, deployment)
			if rolled := after.GetGeneration() != before.GetGeneration(); rolled != test.rolls {
				t.Errorf("rolled out: %t, want %t", rolled, test.rolls)
			}
			patch(t, router, `{"metadata":{"annotations":{"egress-router.io/mac":null}},"spec":{"addresses":[{"ip":"192.168.12.98/24","gateway":"192.168.12.1"}]}}`)
			eventually(t, "wait for another template", func() (bool, any) {
				d := getDeployment(t, namespace, deployment)
				return d.GetGeneration() != after.GetGeneration(), d.GetGeneration()
			})
		})
	}
}

// The ConfigMap is the operator's as the other objects are, and a foreign one stays.
func TestConfigMap(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace, watched("always"))
	exists(t, namespace, deployment)
	before := getConfigMap(t, namespace)
	want := text(before, "data")
	patch(t, before, `{"data":null}`)
	eventually(t, "wait until the ConfigMap is restored", func() (bool, any) {
		found := text(getConfigMap(t, namespace), "data")
		return found == want, found
	})
	deleteAll(t, before)
	eventually(t, "wait until the ConfigMap exists again", func() (bool, any) {
		again := getConfigMap(t, namespace)
		return again != nil && again.GetUID() != before.GetUID() && again.GetOwnerReferences()[0].UID == router.GetUID(), nil
	})

	other := newNamespace(t)
	foreign := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: other, Name: configMap}, Data: map[string]string{"a": "b"}}
	if err := cluster.Create(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	startOperator(t, other)
	create(t, other, watched("always"))
	status(t, other, router.GetName(), "FFT", "ConfigMap "+configMap+" exists and is not managed by egress-operator")
	if getDeployment(t, other, deployment) != nil || len(getConfigMap(t, other).GetLabels()) > 0 {
		t.Error("there is a Deployment, or the foreign object has changed")
	}
}

// A namespace that refuses the container makes the router Degraded with the sentence of the
// API server, which the ReplicaSet passes on.
func TestWatchRefused(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace, watched("always"))
	exists(t, namespace, deployment)
	var d appsv1.Deployment
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: deployment}, &d); err != nil {
		t.Fatal(err)
	}
	// The sentence is that of the API server.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-", Namespace: namespace, Labels: d.Spec.Template.Labels}, Spec: d.Spec.Template.Spec}
	err := cluster.Create(t.Context(), pod, client.DryRunAll)
	if err == nil {
		t.Fatal("the namespace admits the pod")
	}
	d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Reason: "FailedCreate", Message: err.Error()}}
	if err := cluster.Status().Update(t.Context(), &d); err != nil {
		t.Fatal(err)
	}
	status(t, namespace, router.GetName(), "FTT", `violates PodSecurity "restricted:latest": unrestricted capabilities`)
}
