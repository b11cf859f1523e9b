package controller

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// A podLister is a cache with some pods.
type podLister struct {
	client.Reader
	pods []corev1.Pod
}

func (l *podLister) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	list.(*corev1.PodList).Items = l.pods
	return nil
}

// An answer is what a container in mode monitor answers.
type answer struct {
	status  int
	reasons string
	claims  int
}

// monitored returns a pod with a container in mode monitor, which gives answers.
func monitored(t *testing.T, started time.Time, a *atomic.Pointer[answer]) corev1.Pod {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch now := a.Load(); {
		case r.URL.Path == "/metrics":
			fmt.Fprintf(w, "# TYPE %s counter\n%[1]s %d\n", conflictsMetric, now.claims)
		case now.status == http.StatusFound:
			http.Redirect(w, r, "/metrics", now.status)
		default:
			w.WriteHeader(now.status)
			fmt.Fprint(w, now.reasons)
		}
	}))
	t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "egress", Name: "router-1", UID: "1", Annotations: map[string]string{render.RouterAnnotation: "one", render.PortAnnotation: port}}}
	pod.Status.PodIP, pod.Status.HostIP = "127.0.0.1", "192.0.2.1"
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(started)}}}}
	return pod
}

func setReady(pod *corev1.Pod, status corev1.ConditionStatus) {
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: status}}
}

// The reasons of a container that is not ready, and a conflict of addresses of one that is,
// are known until they end.
func TestHealth(t *testing.T) {
	const ready, notReady = corev1.ConditionTrue, corev1.ConditionFalse
	start := time.Unix(1000, 0)
	var a atomic.Pointer[answer]
	pods := &podLister{pods: []corev1.Pod{monitored(t, start, &a)}}
	h := newHealthReader(pods)
	now := start
	h.now, h.timeout = func() time.Time { return now }, time.Minute
	for _, step := range []struct {
		name     string
		after    time.Duration // from the start of the container
		status   corev1.ConditionStatus
		answer   answer
		notReady string
		conflict bool
		changed  bool
	}{
		{"starts", 5 * time.Second, notReady, answer{status: 503, reasons: "not ready"}, "", false, false},
		{"does not get ready", 20 * time.Second, notReady, answer{status: 503, reasons: "gateway 192.168.12.1 does not answer ARP\nno carrier\x1b\n"}, "gateway 192.168.12.1 does not answer ARP; no carrier ", false, true},
		{"has the same reasons", 30 * time.Second, notReady, answer{status: 503, reasons: "gateway 192.168.12.1 does not answer ARP\nno carrier\x1b\n"}, "gateway 192.168.12.1 does not answer ARP; no carrier ", false, false},
		{"refers to another page", 35 * time.Second, notReady, answer{status: 302}, "gateway 192.168.12.1 does not answer ARP; no carrier ", false, false},
		{"is ready", 45 * time.Second, ready, answer{status: 200}, "", false, true},
		{"has a conflict", time.Minute, ready, answer{status: 200, claims: 1}, "", true, true},
		{"has another one", 8 * time.Minute, ready, answer{status: 200, claims: 2}, "", true, false},
		{"has it still", 17 * time.Minute, ready, answer{status: 200, claims: 2}, "", true, false},
		{"has none any more", 18 * time.Minute, ready, answer{status: 200, claims: 2}, "", false, true},
		{"has started again, with a conflict", 20 * time.Minute, ready, answer{status: 200, claims: 1}, "", true, true},
	} {
		a.Store(&step.answer)
		setReady(&pods.pods[0], step.status)
		now = start.Add(step.after)
		if changed := readOnce(t, h); changed != step.changed {
			t.Errorf("%s: changed %t, want %t", step.name, changed, step.changed)
		}
		if found := h.of(&pods.pods[0]); found.notReady != step.notReady || found.conflict != step.conflict {
			t.Errorf("%s: %+v, want %q, %t", step.name, found, step.notReady, step.conflict)
		}
	}
	pods.pods = nil
	readOnce(t, h)
	if len(h.pods) > 0 {
		t.Errorf("the health of a deleted pod: %+v", h.pods)
	}
}

// readOnce reads the health of all pods, and reports whether that of one has changed.
func readOnce(t *testing.T, h *healthReader) (changed bool) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.read(t.Context())
	}()
	for {
		select {
		case <-h.changed:
			changed = true
		case <-done:
			return changed
		}
	}
}

// A conflict of before the operator's start is reported only if the container is young: the
// counter has no times.
func TestHealthOfBefore(t *testing.T) {
	for _, test := range []struct {
		age    time.Duration
		before int
		want   bool
	}{
		{time.Minute, 7, true},
		{time.Hour, 7, false},
		{time.Hour, 0, false},
	} {
		age, want := test.age, test.want
		var a atomic.Pointer[answer]
		a.Store(&answer{claims: test.before})
		now := time.Unix(100000, 0)
		pods := &podLister{pods: []corev1.Pod{monitored(t, now.Add(-age), &a)}}
		setReady(&pods.pods[0], corev1.ConditionTrue)
		h := newHealthReader(pods)
		h.now, h.timeout = func() time.Time { return now }, time.Minute
		readOnce(t, h)
		if found := h.of(&pods.pods[0]).conflict; found != want {
			t.Errorf("conflict of a container of %s: %t, want %t", age, found, want)
		}
		a.Store(&answer{claims: test.before + 1})
		if !readOnce(t, h) && !want || !h.of(&pods.pods[0]).conflict {
			t.Errorf("no later conflict of a container of %s", age)
		}
	}
}

// No other program than a router's is read.
func TestHealthEndpoint(t *testing.T) {
	for name, change := range map[string]func(*corev1.Pod){
		"that does not monitor":        func(p *corev1.Pod) { p.Annotations = nil },
		"without an address":           func(p *corev1.Pod) { p.Status.PodIP = "" },
		"in the network of the node":   func(p *corev1.Pod) { p.Status.HostIP = p.Status.PodIP },
		"that ends":                    func(p *corev1.Pod) { p.DeletionTimestamp = new(metav1.Now()) },
		"whose container does not run": func(p *corev1.Pod) { p.Status.ContainerStatuses[0].State.Running = nil },
		"whose container is not there": func(p *corev1.Pod) { p.Status.ContainerStatuses = nil },
		"whose port names a host":      func(p *corev1.Pod) { p.Annotations[render.PortAnnotation] = "1@192.0.2.7:80" },
		"whose port has a path":        func(p *corev1.Pod) { p.Annotations[render.PortAnnotation] = "80/admin?" },
		"whose port is 0":              func(p *corev1.Pod) { p.Annotations[render.PortAnnotation] = "0" },
		"whose port is too large":      func(p *corev1.Pod) { p.Annotations[render.PortAnnotation] = "65536" },
	} {
		pod := monitored(t, time.Now(), new(atomic.Pointer[answer]))
		if _, _, monitors := endpoint(&pod); !monitors {
			t.Error("no endpoint of a pod that monitors")
		}
		change(&pod)
		if address, _, monitors := endpoint(&pod); monitors {
			t.Errorf("endpoint %s of a pod %s", address, name)
		}
	}
}

// An answer without an end is read up to a limit, and one that begins with the counter is
// enough.
func TestEndlessMetrics(t *testing.T) {
	for first, answers := range map[string]bool{"other 1": false, conflictsMetric + " 3": true} {
		var sent atomic.Int64
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, first)
			for err := error(nil); err == nil; {
				var n int
				n, err = fmt.Fprintln(w, strings.Repeat("x", 1000))
				sent.Add(int64(n))
			}
		}))
		claims, ok := readClaims(t.Context(), strings.TrimPrefix(server.URL, "http://"))
		if ok != answers || answers && claims != 3 {
			t.Errorf("%s: %g, %t", first, claims, ok)
		}
		server.Close() // waits for the end of the answer
		if n := sent.Load(); n > 64*mostMetrics {
			t.Errorf("%s: %d bytes were read", first, n)
		}
	}
}

// A conflict of addresses makes a router that is available Degraded.
func TestAddressConflict(t *testing.T) {
	pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "router-1"}}
	setReady(&pod, corev1.ConditionTrue)
	o := observation{pods: []corev1.Pod{pod}, health: func(*corev1.Pod) podHealth { return podHealth{conflict: true} }}
	c := o.conditions(nil, metav1.Now())[2]
	if c.Status != metav1.ConditionTrue || c.Reason != reasonConflict || !strings.Contains(c.Message, "another host on the physical network claims the reserved address") {
		t.Errorf("%+v", c)
	}
}
