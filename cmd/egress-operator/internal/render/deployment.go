package render

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	appsv1ac "k8s.io/client-go/applyconfigurations/apps/v1"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	metav1ac "k8s.io/client-go/applyconfigurations/meta/v1"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
)

// user is the numeric user of the container, as in the project's other manifests: the
// image has no list of users.
const user = 65532

// deployment returns the Deployment of a router. Its fields are those that the operator
// decides on: server-side apply leaves all others, such as nodeName, to users.
//
// Two pods with the same reserved address never run at the same time: one replica,
// and Recreate, which starts a pod after its predecessor has ended.
func deployment(router *api.EgressRouter, names Names, options Options, networks, attachmentHash string) *appsv1ac.DeploymentApplyConfiguration {
	labels := map[string]string{"app": names.App, ManagedBy: Manager}
	o := owner(router)
	return appsv1ac.Deployment(names.Deployment, router.Namespace).
		WithLabels(labels).
		WithOwnerReferences(metav1ac.OwnerReference().
			WithAPIVersion(o.APIVersion).WithKind(o.Kind).WithName(o.Name).WithUID(o.UID).
			WithController(true).WithBlockOwnerDeletion(true)).
		WithSpec(appsv1ac.DeploymentSpec().
			WithReplicas(1).
			WithStrategy(appsv1ac.DeploymentStrategy().WithType(appsv1.RecreateDeploymentStrategyType)).
			WithSelector(metav1ac.LabelSelector().WithMatchLabels(map[string]string{"app": names.App})).
			WithTemplate(corev1ac.PodTemplateSpec().
				WithLabels(labels).
				WithAnnotations(map[string]string{
					NetworksAnnotation: networks,
					RouterAnnotation:   router.Name,
					HashAnnotation:     attachmentHash,
				}).
				WithSpec(corev1ac.PodSpec().
					WithAutomountServiceAccountToken(false).
					WithContainers(wait(options)))))
}

// wait returns the container of a router that has no program: it ends when the pod ends.
// It satisfies the Pod Security Standard "restricted".
func wait(options Options) *corev1ac.ContainerApplyConfiguration {
	security := corev1ac.SecurityContext().
		WithAllowPrivilegeEscalation(false).
		WithCapabilities(corev1ac.Capabilities().WithDrop("ALL")).
		WithReadOnlyRootFilesystem(true).
		WithRunAsNonRoot(true).
		WithSeccompProfile(corev1ac.SeccompProfile().WithType(corev1.SeccompProfileTypeRuntimeDefault))
	if !options.AnyUser {
		security.WithRunAsUser(user)
	}
	return corev1ac.Container().
		WithName(containerName).
		WithImage(options.Image).
		WithImagePullPolicy(corev1.PullIfNotPresent). // the default of a tag "latest" is Always
		WithArgs("wait").
		WithResources(corev1ac.ResourceRequirements().WithRequests(corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("100m"),
		})).
		WithSecurityContext(security).
		WithTerminationMessagePolicy(corev1.TerminationMessageFallbackToLogsOnError)
}
