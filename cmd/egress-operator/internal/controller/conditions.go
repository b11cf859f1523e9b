package controller

import (
	"cmp"
	"fmt"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
)

// A problem is what prevents a router from running: a word and a sentence.
type problem struct{ reason, message string }

var standAside = problem{reasonPlatform, "the network operator of the platform manages this router, and egress-operator does not: start it with --take-over to change that"}

// Reasons of conditions.
const (
	reasonReady       = "PodReady"
	reasonNotReady    = "PodNotReady"
	reasonNoPod       = "NoPod"
	reasonRollout     = "Rollout"
	reasonComplete    = "RolloutComplete"
	reasonAsExpected  = "AsExpected"
	reasonWarning     = "Warning"
	reasonInvalid     = "InvalidSpec"
	reasonAddress     = "AddressInUse"
	reasonForeign     = "ForeignObject"
	reasonApply       = "ApplyFailed"
	reasonPlatform    = "ManagedByPlatform"
	reasonWaiting     = "WaitingForDeletion"
	reasonNetwork     = "NetworkFailed"
	reasonUnscheduled = "Unschedulable"
	reasonContainer   = "ContainerFailed"
	reasonReplica     = "PodRefused"
	reasonNotWatched  = "NotWatched"
	reasonConflict    = "AddressConflict"
)

// An observation is the state of a router's objects.
type observation struct {
	deployment *appsv1.Deployment // nil if there is none
	pods       []corev1.Pod
	events     []corev1.Event // FailedCreatePodSandBox of these pods
	health     func(*corev1.Pod) podHealth
	problem    problem // what prevented an apply
	unwatched  problem // why there is no container in mode monitor, if it is requested
	warnings   string
}

// mostMessage is the length, in bytes, below which the message of a condition stays: that of
// the API's own conditions (Condition in k8s.io/apimachinery/pkg/apis/meta/v1). A resource
// may have a fault in each of thousands of rules, and the API server limits its size.
const mostMessage = 32768

// conditions returns the conditions of a router, with times of the earlier ones if their
// status is the same.
func (o observation) conditions(earlier []api.Condition, now metav1.Time) []api.Condition {
	ready := o.deployment != nil && o.deployment.Status.AvailableReplicas > 0
	found := o.find()
	made := []api.Condition{
		{Type: api.Available, Status: metav1.ConditionFalse, Reason: reasonNotReady, Message: "no pod is ready"},
		{Type: api.Progressing, Status: metav1.ConditionFalse, Reason: reasonComplete, Message: "the pod has the current configuration"},
		{Type: api.Degraded, Status: metav1.ConditionFalse, Reason: reasonAsExpected},
	}
	switch {
	case ready:
		made[0].Status, made[0].Reason, made[0].Message = metav1.ConditionTrue, reasonReady, "a pod is ready"
	case o.deployment == nil:
		made[0].Reason, made[0].Message = reasonNoPod, "there is no Deployment"
	}
	switch {
	case o.problem.reason == reasonWaiting:
		made[1].Status, made[1].Reason, made[1].Message = metav1.ConditionTrue, reasonWaiting, o.problem.message
	case o.problem.reason != "":
		made[1].Reason, made[1].Message = o.problem.reason, "the configuration is not applied"
	case !rolledOut(o.deployment):
		made[1].Status, made[1].Reason, made[1].Message = metav1.ConditionTrue, reasonRollout, "the pod is being replaced"
		if !ready {
			made[1].Message = "the pod is starting"
		}
	}
	switch {
	case found.reason != "" && found.reason != reasonWaiting:
		made[2].Status, made[2].Reason, made[2].Message = metav1.ConditionTrue, found.reason, found.message
	case o.warnings != "":
		made[2].Reason, made[2].Message = reasonWarning, o.warnings
	}
	for i := range made {
		if o.problem == standAside {
			made[i].Status, made[i].Reason, made[i].Message = metav1.ConditionUnknown, standAside.reason, standAside.message
		}
		made[i].Message = short(made[i].Message, mostMessage)
		made[i].LastTransitionTime = now
		before := slices.IndexFunc(earlier, func(c api.Condition) bool { return c.Type == made[i].Type })
		if before >= 0 && earlier[before].Status == made[i].Status && !earlier[before].LastTransitionTime.IsZero() {
			made[i].LastTransitionTime = earlier[before].LastTransitionTime
		}
	}
	return made
}

// rolledOut reports whether the pod that is ready has the configuration of the Deployment.
func rolledOut(d *appsv1.Deployment) bool {
	return d != nil && d.Status.ObservedGeneration >= d.Generation &&
		d.Status.UpdatedReplicas > 0 && d.Status.AvailableReplicas >= d.Status.UpdatedReplicas &&
		d.Status.Replicas == d.Status.UpdatedReplicas
}

// find returns what prevents the router from running: first what prevented an apply, then
// what a pod reports, then what prevents a pod, at last what it runs without.
func (o observation) find() problem {
	if o.problem.reason != "" {
		return o.problem
	}
	for _, pod := range o.pods {
		if p := o.findInPod(&pod); p.reason != "" {
			return p
		}
	}
	if o.deployment != nil {
		for _, c := range o.deployment.Status.Conditions {
			if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
				return problem{reasonReplica, c.Message}
			}
		}
	}
	for _, pod := range o.pods {
		if pod.DeletionTimestamp == nil && o.health(&pod).conflict {
			return problem{reasonConflict, "another host on the physical network claims the reserved address: stop it, or use another address; the log of pod " + pod.Name + " has its hardware address"}
		}
	}
	return o.unwatched
}

func (o observation) findInPod(pod *corev1.Pod) problem {
	ready := condition(pod, corev1.PodReady)
	// A pod that a node has evicted stays as Failed beside its successor.
	if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded || ready.Status == corev1.ConditionTrue {
		return problem{}
	}
	if c := condition(pod, corev1.PodScheduled); c.Status == corev1.ConditionFalse {
		return problem{reasonUnscheduled, "pod " + pod.Name + " has no node: " + c.Message}
	}
	for _, c := range pod.Status.ContainerStatuses {
		// Waiting with this reason is the normal start, and also lasts while the network fails.
		if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return problem{reasonContainer, fmt.Sprintf("container %s of pod %s: %s: %s", c.Name, pod.Name, w.Reason, w.Message)}
		}
		if running := c.State.Running; running != nil {
			why := o.health(pod).notReady
			switch {
			case ready.LastTransitionTime.After(running.StartedAt.Time):
				return problem{reasonNotReady, "pod " + pod.Name + " was ready and is not any more: " + cmp.Or(why, "look at its node, and at the log of its container")}
			case why != "":
				return problem{reasonNotReady, "pod " + pod.Name + " is not ready: " + why}
			}
			return problem{} // its network was there when it started
		}
	}
	var last *corev1.Event
	for i, e := range o.events {
		if e.InvolvedObject.UID == pod.UID && (last == nil || last.LastTimestamp.Before(&e.LastTimestamp)) {
			last = &o.events[i]
		}
	}
	if last == nil {
		return problem{}
	}
	return problem{reasonNetwork, sentence(last.Message)}
}

// condition returns a condition of a pod, without a status if the pod does not have it.
func condition(pod *corev1.Pod, kind corev1.PodConditionType) corev1.PodCondition {
	for _, c := range pod.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return corev1.PodCondition{}
}
