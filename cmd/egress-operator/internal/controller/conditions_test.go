package controller

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A router whose pod was ready and is not any more, since its node is lost or its container
// reports a fault, is Degraded. One that starts is not.
func TestReadiness(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, test := range []struct {
		name  string
		ready corev1.ConditionStatus
		since time.Duration // from the start of the container
		why   string
		want  string
	}{
		{"starts", corev1.ConditionFalse, -2 * time.Second, "", ""},
		{"is ready", corev1.ConditionTrue, 5 * time.Second, "", ""},
		{"is not ready any more", corev1.ConditionFalse, time.Minute, "", "pod router-1 was ready and is not any more: look at its node"},
		{"reports why it is not ready any more", corev1.ConditionFalse, time.Minute, "gateway 192.168.12.1 does not answer ARP", "pod router-1 was ready and is not any more: gateway 192.168.12.1 does not answer ARP"},
		{"starts again after it was ready", corev1.ConditionFalse, -time.Minute, "", ""},
		{"reports why it does not get ready", corev1.ConditionFalse, -2 * time.Second, "no carrier", "pod router-1 is not ready: no carrier"},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "router-1"}, Status: corev1.PodStatus{
				Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: test.ready, LastTransitionTime: metav1.NewTime(start.Add(test.since))}},
				ContainerStatuses: []corev1.ContainerStatus{{Name: "egress-router-cni-pod", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(start)}}}},
			}}
			c := observation{deployment: &appsv1.Deployment{}, pods: []corev1.Pod{pod}, health: func(*corev1.Pod) podHealth { return podHealth{notReady: test.why} }}.conditions(nil, metav1.Now())[2]
			if (c.Status == metav1.ConditionTrue) != (test.want != "") || !strings.Contains(c.Message, test.want) {
				t.Errorf("Degraded %s: %q, want %q", c.Status, c.Message, test.want)
			}
		})
	}
}
