// Package api contains the resource EgressRouter as Go types. Group, version, kind and
// schema are those of the platform that introduced the resource, so that its manifests
// work unchanged; the types are own ones, because those of the platform come with a
// module that has hundreds of others.
//
// +kubebuilder:object:generate=true
// +groupName=network.operator.openshift.io
// +versionName=v1
package api

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/egress-router/egress-router/internal/object"
)

// GroupVersion is the group and version of the resource.
var GroupVersion = schema.GroupVersion{Group: "network.operator.openshift.io", Version: "v1"}

// AddToScheme registers the types.
func AddToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion, &EgressRouter{}, &EgressRouterList{})
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}

// EgressRouter is a pod that redirects connections to servers on the physical network,
// from a reserved address.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:path=egressrouters,singular=egressrouter,scope=Namespaced
// +kubebuilder:printcolumn:name="Condition",type=string,JSONPath=".status.conditions[*].type"
// +kubebuilder:printcolumn:name="Status",type=string,JSONPath=".status.conditions[*].status"
// +kubebuilder:printcolumn:name="Degraded",type=string,JSONPath=".status.conditions[?(@.type=='Degraded')].status",priority=1
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=".status.conditions[?(@.type=='Degraded')].reason",priority=1
type EgressRouter struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:validation:Required
	Spec object.Spec `json:"spec"`
	// +optional
	Status Status `json:"status,omitzero"`
}

// EgressRouterList is a list of routers.
//
// +kubebuilder:object:root=true
type EgressRouterList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []EgressRouter `json:"items"`
}

// Status is the observed state of a router.
type Status struct {
	// Conditions are Available, Progressing and Degraded, in this order: kubectl get
	// prints the first one.
	//
	// +kubebuilder:validation:Required
	// +listType=atomic
	Conditions []Condition `json:"conditions"`
}

// Condition is one aspect of the observed state.
type Condition struct {
	// Type is Available, Progressing or Degraded.
	//
	// +kubebuilder:validation:Required
	// +kubebuilder:validation:Enum=Available;Progressing;Degraded
	Type ConditionType `json:"type"`
	// Status is True, False or Unknown.
	//
	// +kubebuilder:validation:Required
	// +kubebuilder:validation:Enum="True";"False";Unknown
	Status metav1.ConditionStatus `json:"status"`
	// LastTransitionTime is the time of the last change of the status.
	//
	// +nullable
	// +optional
	LastTransitionTime metav1.Time `json:"lastTransitionTime,omitzero"`
	// Reason is the cause of the status, as one word.
	Reason string `json:"reason,omitempty"`
	// Message is the cause of the status, as a sentence.
	Message string `json:"message,omitempty"`
}

// ConditionType is the type of a condition.
type ConditionType string

// The types of conditions.
const (
	Available   ConditionType = "Available"
	Progressing ConditionType = "Progressing"
	Degraded    ConditionType = "Degraded"
)
