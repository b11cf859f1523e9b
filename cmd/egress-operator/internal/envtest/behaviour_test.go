package envtest

import (
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/controller"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// patch patches an object as a user does with kubectl patch.
func patch(t *testing.T, o client.Object, text string) {
	t.Helper()
	if err := cluster.Patch(t.Context(), o, client.RawPatch(types.MergePatchType, []byte(text))); err != nil {
		t.Fatal(err)
	}
}

// text returns a field of an object as text, empty if there is no object or field.
func text(o *unstructured.Unstructured, fields ...string) string {
	if o == nil {
		return ""
	}
	value, _, _ := unstructured.NestedFieldNoCopy(o.Object, fields...)
	return fmt.Sprint(value)
}

// status waits until the conditions of a router are as wanted: Available, Progressing and
// Degraded as T, F or U, and a part of the message of Degraded.
func status(t *testing.T, namespace, name, want, message string) {
	t.Helper()
	eventually(t, fmt.Sprintf("wait for conditions %s and message %q", want, message), func() (bool, any) {
		var router api.EgressRouter
		if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &router); err != nil {
			return false, err
		}
		found := ""
		for i, c := range router.Status.Conditions {
			if c.Type != []api.ConditionType{api.Available, api.Progressing, api.Degraded}[i] {
				t.Fatalf("condition %d is %s", i, c.Type)
			}
			if c.LastTransitionTime.IsZero() || c.Reason == "" {
				t.Fatalf("condition without time or reason: %+v", c)
			}
			found += string(c.Status[0])
		}
		return found == want && strings.Contains(router.Status.Conditions[2].Message, message), router.Status.Conditions
	})
}

// What somebody edits in a field that the operator sets is restored; fields that it does
// not set are the users'.
func TestEdits(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	create(t, namespace)
	d := exists(t, namespace, deployment)

	patch(t, d, `{"spec":{"template":{"spec":{"nodeName":"node1","tolerations":[{"operator":"Exists"}]}}}}`)
	for _, edit := range []struct {
		name, patch string
		path        []string
	}{
		{"replicas", `{"spec":{"replicas":2}}`, []string{"spec", "replicas"}},
		{"strategy", `{"spec":{"strategy":{"type":"RollingUpdate"}}}`, []string{"spec", "strategy"}},
		{"annotation", `{"spec":{"template":{"metadata":{"annotations":{"k8s.v1.cni.cncf.io/networks":"other"}}}}}`, []string{"spec", "template", "metadata"}},
		{"container", `{"spec":{"template":{"spec":{"containers":[{"name":"egress-router-cni-pod","image":"other"}]}}}}`, []string{"spec", "template", "spec", "containers"}},
		{"label", `{"metadata":{"labels":{"app":"other"}}}`, []string{"metadata", "labels"}},
		{"label of the cache", `{"metadata":{"labels":{"app.kubernetes.io/managed-by":null}}}`, []string{"metadata", "labels"}},
		{"owner", `{"metadata":{"ownerReferences":null}}`, []string{"metadata", "ownerReferences"}},
	} {
		want := text(getDeployment(t, namespace, deployment), edit.path...)
		patch(t, d, edit.patch)
		eventually(t, "wait until "+edit.name+" is restored", func() (bool, any) {
			found := text(getDeployment(t, namespace, deployment), edit.path...)
			return found == want, found
		})
	}
	a := getAttachment(t, namespace, attachment)
	want := text(a, "spec", "config")
	patch(t, a, `{"spec":{"config":"{}"}}`)
	eventually(t, "wait until the attachment is restored", func() (bool, any) {
		found := text(getAttachment(t, namespace, attachment), "spec", "config")
		return found == want, found
	})
	for _, o := range []*unstructured.Unstructured{d, a} {
		deleteAll(t, o)
		eventually(t, "wait until "+o.GetName()+" exists again", func() (bool, any) {
			again := get(t, o.GetAPIVersion(), o.GetKind(), namespace, o.GetName())
			return again != nil && again.GetUID() != o.GetUID(), nil
		})
	}
}

// A change of the resource changes the pods' template; the users' fields stay.
func TestChangeOfTheResource(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace)
	d := exists(t, namespace, deployment)
	patch(t, d, `{"spec":{"template":{"spec":{"nodeName":"node1"}}}}`)
	hash := func() string {
		return text(getDeployment(t, namespace, deployment), "spec", "template", "metadata", "annotations", render.HashAnnotation)
	}
	before := hash()
	patch(t, router, `{"spec":{"redirect":{"fallbackIP":"203.0.113.28"}}}`)
	eventually(t, "wait for another hash", func() (bool, any) { return hash() != before, before })
	if node := text(getDeployment(t, namespace, deployment), "spec", "template", "spec", "nodeName"); node != "node1" {
		t.Errorf("nodeName is %q, want node1", node)
	}
	if config := text(getAttachment(t, namespace, attachment), "spec", "config"); !strings.Contains(config, `"fallbackIP":"203.0.113.28"`) {
		t.Errorf("attachment %s", config)
	}

	// An invalid resource leaves the pod as it is.
	before = hash()
	patch(t, router, `{"spec":{"addresses":[{"ip":"foo"}]}}`)
	status(t, namespace, router.GetName(), "FFT", `spec.addresses[0].ip is "foo"`)
	if after := hash(); after != before {
		t.Error("an invalid resource replaces the pod")
	}
}

// writeStatus writes what the controllers of Kubernetes and a kubelet would: one pod of a
// Deployment that is up to date, and perhaps ready.
func writeStatus(t *testing.T, namespace string, available int32) {
	t.Helper()
	var d appsv1.Deployment
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: deployment}, &d); err != nil {
		t.Fatal(err)
	}
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: 1, UpdatedReplicas: 1, ReadyReplicas: available, AvailableReplicas: available}
	if err := cluster.Status().Update(t.Context(), &d); err != nil {
		t.Fatal(err)
	}
}

// createPod creates a pod of a router from the template of its Deployment.
func createPod(t *testing.T, namespace string) *corev1.Pod {
	t.Helper()
	var d appsv1.Deployment
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: deployment}, &d); err != nil {
		t.Fatal(err)
	}
	template := d.Spec.Template
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: d.Name + "-", Namespace: namespace, Labels: template.Labels, Annotations: template.Annotations}, Spec: template.Spec}
	if err := cluster.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	return pod
}

// events returns the notes of the events of a router.
func events(t *testing.T, namespace, name string) (notes []string) {
	t.Helper()
	var list eventsv1.EventList
	if err := cluster.List(t.Context(), &list, client.InNamespace(namespace)); err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Items {
		if e.Regarding.Kind == "EgressRouter" && e.Regarding.Name == name {
			notes = append(notes, e.Type+" "+e.Reason+": "+e.Note)
		}
	}
	return notes
}

// The conditions follow the pod, from the start to the plugin's error and to readiness.
func TestStatus(t *testing.T) {
	const name = "egress-router-redirect"
	namespace := newNamespace(t)
	startOperator(t, namespace)
	create(t, namespace)
	exists(t, namespace, deployment)
	status(t, namespace, name, "FTF", "")

	pod := createPod(t, namespace)
	writeStatus(t, namespace, 0)
	const sentence = `looking for NIC "eth7" of the node: not found`
	for i := range 2 { // the second attempt is the same fault
		event := &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{GenerateName: "event-", Namespace: namespace},
			InvolvedObject: corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: namespace, Name: pod.Name, UID: pod.UID},
			Reason:         "FailedCreatePodSandBox", Type: corev1.EventTypeWarning,
			LastTimestamp: metav1.Now(),
			Message: fmt.Sprintf(`Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "%064d": plugin type="multus" name="multus-cni-network" failed (add): [%s/%s/%s:%s]: error adding container to network %q: %s`,
				i, namespace, pod.Name, pod.UID, attachment, attachment, sentence),
		}
		if err := cluster.Create(t.Context(), event); err != nil {
			t.Fatal(err)
		}
		status(t, namespace, name, "FTT", sentence)
	}
	eventually(t, "wait for the event with the sentence", func() (bool, any) {
		all := events(t, namespace, name)
		return len(all) == 1 && all[0] == "Warning NetworkFailed: "+sentence, all
	})

	pod.Status.Phase = corev1.PodRunning
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if err := cluster.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	writeStatus(t, namespace, 1)
	status(t, namespace, name, "TFF", "")

	// Not ready again, with a container that does not start.
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "egress-router-cni-pod", State: corev1.ContainerState{
		Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"},
	}}}
	if err := cluster.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	writeStatus(t, namespace, 0)
	status(t, namespace, name, "FTT", "ImagePullBackOff: no such image")
}

// The same reserved address twice: the second router is Degraded and has no objects, until
// the first one is deleted.
func TestSameAddressTwice(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	one := create(t, namespace, named("one", "192.168.12.97/24"))
	exists(t, namespace, deployment)
	create(t, namespace, named("two", "192.168.12.97/28"))
	status(t, namespace, "two", "FFT", "reserved address 192.168.12.97 belongs to EgressRouter "+namespace+"/one")
	if getDeployment(t, namespace, deployment+"-two") != nil || getAttachment(t, namespace, attachment+"-two") != nil {
		t.Error("the second router has objects")
	}
	status(t, namespace, "one", "FTF", "")

	deleteAll(t, one)
	eventually(t, "wait for the Deployment of the second router", func() (bool, any) {
		collect(t, namespace, one)
		d := getDeployment(t, namespace, deployment)
		return d != nil && d.GetOwnerReferences()[0].Name == "two", nil
	})
	status(t, namespace, "two", "FTF", "")
}

// An object that is somebody else's stays as it is.
func TestForeignObject(t *testing.T) {
	namespace := newNamespace(t)
	foreign := parse(t, `
apiVersion: k8s.cni.cncf.io/v1
kind: NetworkAttachmentDefinition
metadata: {name: `+attachment+`, namespace: `+namespace+`}
spec: {config: "{}"}
`)
	if err := cluster.Create(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	startOperator(t, namespace)
	create(t, namespace)
	status(t, namespace, "egress-router-redirect", "FFT", "NetworkAttachmentDefinition "+attachment+" exists and is not managed by egress-operator")
	if found := getAttachment(t, namespace, attachment); found.GetResourceVersion() != foreign.GetResourceVersion() {
		t.Errorf("the foreign object has changed: %+v", found)
	}
	if getDeployment(t, namespace, deployment) != nil {
		t.Error("there is a Deployment")
	}
	// It has no label of the operator: its deletion is no event.
	deleteAll(t, foreign)
	exists(t, namespace, deployment)
	status(t, namespace, "egress-router-redirect", "FTF", "")
}

// platformApply applies a Deployment as the network operator of OpenShift does.
func platformApply(t *testing.T, namespace string, owner *unstructured.Unstructured) {
	t.Helper()
	d := parse(t, `
apiVersion: apps/v1
kind: Deployment
metadata:
  name: `+deployment+`
  namespace: `+namespace+`
  ownerReferences: [{apiVersion: network.operator.openshift.io/v1, kind: EgressRouter, controller: true, name: `+owner.GetName()+`, uid: `+string(owner.GetUID())+`}]
spec:
  selector: {matchLabels: {app: egress-router-cni}}
  template:
    metadata: {labels: {app: egress-router-cni}}
    spec: {containers: [{name: egress-router-cni-pod, image: platform}]}
`)
	err := cluster.Apply(t.Context(), client.ApplyConfigurationFromUnstructured(d), client.FieldOwner("cluster-network-operator/egress-router"), client.ForceOwnership)
	if err != nil {
		t.Fatal(err)
	}
}

// The operator stands aside where that of the platform manages an object, unless it is
// told to take over.
func TestStandAside(t *testing.T) {
	const name = "egress-router-redirect"
	namespace := newNamespace(t)
	router := create(t, namespace)
	platformApply(t, namespace, router)
	before := getDeployment(t, namespace, deployment)
	stop := startOperator(t, namespace)
	status(t, namespace, name, "UUU", "--take-over")
	if after := getDeployment(t, namespace, deployment); after.GetResourceVersion() != before.GetResourceVersion() {
		t.Error("the Deployment has changed")
	}
	if getAttachment(t, namespace, attachment) != nil {
		t.Error("there is an attachment")
	}
	stop()

	startOperator(t, namespace, func(o *controller.Options) { o.TakeOver = true })
	status(t, namespace, name, "FTF", "")
	after := getDeployment(t, namespace, deployment)
	if image := text(after, "spec", "template", "spec", "containers"); after.GetUID() != before.GetUID() || !strings.Contains(image, "localhost/egress-router") {
		t.Errorf("containers after taking over: %s", image)
	}
}

// An operator that starts changes nothing of what an earlier one has made.
func TestRestart(t *testing.T) {
	namespace := newNamespace(t)
	stop := startOperator(t, namespace)
	router := create(t, namespace)
	exists(t, namespace, deployment)
	status(t, namespace, router.GetName(), "FTF", "")
	versions := func() (all []string) {
		for _, o := range []*unstructured.Unstructured{getAttachment(t, namespace, attachment), getDeployment(t, namespace, deployment), get(t, router.GetAPIVersion(), router.GetKind(), namespace, router.GetName())} {
			all = append(all, o.GetResourceVersion())
		}
		return all
	}
	stop()
	before := fmt.Sprint(versions())
	startOperator(t, namespace)
	// The second router comes after the first one in the queue.
	create(t, namespace, named("two", "192.168.12.98/24"))
	status(t, namespace, "two", "FTF", "")
	if after := fmt.Sprint(versions()); after != before {
		t.Errorf("versions of the objects: %s, before the restart %s", after, before)
	}
}

// A router without a valid address is made as written, so that the plugin refuses it where
// users look.
func TestRefusedByThePlugin(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	create(t, namespace, func(o *unstructured.Unstructured) { set(t, o, "spec.addresses.0.gateway", "01.2.3.1") })
	exists(t, namespace, deployment)
	status(t, namespace, "egress-router-redirect", "FFT", `spec.addresses[0].gateway is "01.2.3.1"`)
	if config := text(getAttachment(t, namespace, attachment), "spec", "config"); !strings.Contains(config, "01.2.3.1") {
		t.Errorf("attachment %s", config)
	}
}

// Of two operators one works, and the other one takes over when it ends.
func TestLeaderElection(t *testing.T) {
	namespace := newNamespace(t)
	elect := func(o *controller.Options) { o.LeaderElect, o.LeaseIn = true, "egress-operator" }
	stop := startOperator(t, namespace, elect)
	create(t, namespace)
	exists(t, namespace, deployment)
	lease := func() string {
		var l coordinationv1.Lease
		if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: "egress-operator", Name: "egress-operator"}, &l); err != nil {
			t.Fatal(err)
		}
		return *l.Spec.HolderIdentity
	}
	one := lease()
	startOperator(t, namespace, elect)
	stop()
	eventually(t, "wait for another leader", func() (bool, any) { two := lease(); return two != "" && two != one, two })
	deleteAll(t, getDeployment(t, namespace, deployment))
	exists(t, namespace, deployment)
}
