package envtest

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/controller"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// A resource that becomes invalid while its pod runs leaves the pod and the attachment as
// they are: the router stays available, and Degraded has the fault until it is corrected.
func TestInvalidWhileThePodRuns(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace)
	exists(t, namespace, deployment)
	writeStatus(t, namespace, 1)
	status(t, namespace, router.GetName(), "TFF", "")
	before := text(getDeployment(t, namespace, deployment), "metadata", "generation") + text(getAttachment(t, namespace, attachment), "spec")
	for _, test := range []struct{ patch, message, undo string }{
		{`{"spec":{"addresses":[]}}`, "spec.addresses is empty", `{"spec":{"addresses":[{"ip":"192.168.12.99/24","gateway":"192.168.12.1"}]}}`},
		{`{"spec":{"redirect":{"fallbackIP":"2001:db8::1"}}}`, `"2001:db8::1"`, `{"spec":{"redirect":{"fallbackIP":null}}}`},
		{`{"metadata":{"annotations":{"egress-router.io/mac":"no"}}}`, `[egress-router.io/mac] is "no"`, `{"metadata":{"annotations":{"egress-router.io/mac":null}}}`},
	} {
		patch(t, router, test.patch)
		status(t, namespace, router.GetName(), "TFT", test.message)
		patch(t, router, test.undo)
		status(t, namespace, router.GetName(), "TFF", "")
		if after := text(getDeployment(t, namespace, deployment), "metadata", "generation") + text(getAttachment(t, namespace, attachment), "spec"); after != before {
			t.Errorf("%s: the objects have changed: %s, before %s", test.patch, after, before)
		}
	}
}

// A safeBuffer is the log of an operator, read while it runs.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// In a namespace that is being deleted the API server refuses new objects. That is no fault of
// the router, which goes too.
func TestNamespaceIsDeleted(t *testing.T) {
	namespace := newNamespace(t)
	var log safeBuffer
	stop := startOperator(t, namespace, func(o *controller.Options) { o.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	router := create(t, namespace)
	d := exists(t, namespace, deployment)
	status(t, namespace, router.GetName(), "FTF", "")
	if err := cluster.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
		t.Fatal(err)
	}
	deleteAll(t, d)
	patch(t, router, `{"spec":{"redirect":{"fallbackIP":"203.0.113.28"}}}`)
	eventually(t, "wait until the router is reconciled", func() (bool, any) {
		config := text(getAttachment(t, namespace, attachment), "spec", "config")
		return strings.Contains(config, "203.0.113.28"), config
	})
	stop()
	if getDeployment(t, namespace, deployment) != nil {
		t.Error("there is a Deployment again: the test proves nothing")
	}
	if strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("log:\n%s", &log)
	}
	status(t, namespace, router.GetName(), "FTF", "")
	if all := events(t, namespace, router.GetName()); len(all) > 0 {
		t.Errorf("events %q", all)
	}
}

// A router that is being deleted in the foreground keeps its address until its attachment is
// gone, and gets no objects again.
func TestDeletionInTheForeground(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	one := create(t, namespace, named("one", "192.168.12.97/24"))
	d := exists(t, namespace, deployment)
	create(t, namespace, named("two", "192.168.12.97/24"))
	status(t, namespace, "two", "FFT", "belongs to EgressRouter "+namespace+"/one")
	patch(t, one, `{"metadata":{"finalizers":["example.com/hold"]}}`)
	deleteAll(t, one, d)
	// A router that comes later is reconciled later.
	create(t, namespace, named("three", "192.168.12.96/24"))
	exists(t, namespace, deployment+"-three")
	status(t, namespace, "two", "FFT", "belongs to EgressRouter "+namespace+"/one")
	if getDeployment(t, namespace, deployment) != nil {
		t.Error("the router that is being deleted has a Deployment again")
	}
	deleteAll(t, getAttachment(t, namespace, attachment))
	exists(t, namespace, deployment)
	status(t, namespace, "two", "FTF", "")
	patch(t, one, `{"metadata":{"finalizers":null}}`)
}

// A pod that its node has evicted stays as Failed beside its successor, and what was wrong with
// it is no fault of the router any more.
func TestEvictedPod(t *testing.T) {
	const sentence = "no network"
	namespace := newNamespace(t)
	startOperator(t, namespace)
	router := create(t, namespace)
	exists(t, namespace, deployment)
	pod := createPod(t, namespace)
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "event-", Namespace: namespace},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: namespace, Name: pod.Name, UID: pod.UID},
		Reason:         "FailedCreatePodSandBox", Type: corev1.EventTypeWarning, LastTimestamp: metav1.Now(),
		Message: "Failed to create pod sandbox: " + sentence,
	}
	if err := cluster.Create(t.Context(), event); err != nil {
		t.Fatal(err)
	}
	status(t, namespace, router.GetName(), "FTT", sentence)
	pod.Status.Phase, pod.Status.Reason = corev1.PodFailed, "Evicted"
	if err := cluster.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	createPod(t, namespace)
	writeStatus(t, namespace, 1)
	status(t, namespace, router.GetName(), "TFF", "")
}

// The reasons of a container that monitors, and a conflict of addresses that leaves it ready,
// are in the status and in an event, without an exec into its pod.
func TestHealthOfTheContainer(t *testing.T) {
	var answer atomic.Pointer[string]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/readyz" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprint(w, *answer.Load())
	}))
	defer server.Close()
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	namespace := newNamespace(t)
	enforce(t, namespace, "")
	startOperator(t, namespace)
	router := create(t, namespace, watched("always"))
	exists(t, namespace, deployment)
	pod := createPod(t, namespace)
	patch(t, pod, `{"metadata":{"annotations":{"`+render.PortAnnotation+`":"`+port+`"}}}`)

	const sentence = "gateway 192.168.12.1 does not answer ARP"
	answer.Store(new(sentence))
	pod.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: "127.0.0.1", PodIPs: []corev1.PodIP{{IP: "127.0.0.1"}}, HostIP: "192.0.2.1",
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "egress-router-cni-pod", State: corev1.ContainerState{
			Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Add(-time.Minute))},
		}}},
	}
	if err := cluster.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	writeStatus(t, namespace, 0)
	status(t, namespace, router.GetName(), "FTT", "pod "+pod.Name+" is not ready: "+sentence)
	eventually(t, "wait for the event with the sentence", func() (bool, any) {
		all := events(t, namespace, router.GetName())
		return slices.Contains(all, "Warning PodNotReady: pod "+pod.Name+" is not ready: "+sentence), all
	})

	answer.Store(new("egress_router_address_conflicts_total 7\n"))
	pod.Status.Conditions[0].Status = corev1.ConditionTrue
	if err := cluster.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	writeStatus(t, namespace, 1)
	status(t, namespace, router.GetName(), "TFT", "another host on the physical network claims the reserved address")
}
