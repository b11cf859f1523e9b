// Package render makes the objects of a router from its resource: the attachment of the
// network and the Deployment of the pod. It is pure: names, labels and contents depend on
// its arguments alone.
package render

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/internal/object"
)

// The names of the objects of a namespace's first router. They are frozen: Services
// select pods by the label app, and manuals contain the other two.
const (
	attachmentName = "egress-router-cni-nad"
	deploymentName = "egress-router-cni-deployment"
	appLabel       = "egress-router-cni"
	configName     = "egress-router-cni-config"
	containerName  = "egress-router-cni-pod"
)

// ManagedBy is the label of every object that the operator makes, and Manager its value
// and the field manager of server-side apply.
const (
	ManagedBy = "app.kubernetes.io/managed-by"
	Manager   = "egress-operator"
)

// Annotations.
const (
	// RouterAnnotation is the name of a pod's router. A label is too short for it.
	RouterAnnotation = "egress-router.io/router"
	// HashAnnotation is the hash of a pod's attachment: a new one replaces the pod. With a
	// container in mode monitor it is that of the attachment without destinations.
	HashAnnotation = "egress-router.io/attachment-hash"
	// MACAnnotation on a router, with the value auto, gives it a fixed hardware address.
	MACAnnotation = "egress-router.io/mac"
	// WatchAnnotation on a router, with the value auto, always or never, selects whether a
	// container in mode monitor runs in its pod.
	WatchAnnotation = "egress-router.io/watch"
	// PortAnnotation on a pod is the port of the health endpoint of its container in mode
	// monitor, by which Prometheus finds it too.
	PortAnnotation = "prometheus.io/port"
	// NetworksAnnotation selects the attachments of a pod (Kubernetes Network Custom
	// Resource Definition De-facto Standard, version 1.3, section 4).
	NetworksAnnotation = "k8s.v1.cni.cncf.io/networks"
)

// AttachmentKind is the kind of a NetworkAttachmentDefinition.
var AttachmentKind = schema.GroupVersionKind{Group: "k8s.cni.cncf.io", Version: "v1", Kind: "NetworkAttachmentDefinition"}

// Options are the settings of the operator that its objects depend on.
type Options struct {
	// Image is the image of egress-router.
	Image string
	// DefaultRoute requests the default route in the annotation of the pod. OVN-Kubernetes
	// needs that; elsewhere Multus would delete the cluster's default route before the
	// plugin reads it.
	DefaultRoute bool
	// AnyUser leaves the user of the pod to the cluster, which on OpenShift assigns a range
	// of users to each namespace and refuses others.
	AnyUser bool
}

// Names are the names of a router's objects.
type Names struct {
	Attachment string
	Deployment string
	App        string // value of the label app
	Config     string // of the ConfigMap
}

// First returns the names of a namespace's first router.
func First() Names { return Names{attachmentName, deploymentName, appLabel, configName} }

// Further returns the names of a further router of a namespace.
func Further(router string) Names {
	return Names{join(attachmentName, router), join(deploymentName, router), join(appLabel, router), join(configName, router)}
}

// longest is the maximum length of a label's value (RFC 1123, as Kubernetes uses it). The
// names of pods and ReplicaSets add 17 characters to that of the Deployment.
const longest = 63

// join returns PREFIX-NAME, with a hash instead of the end of a name that is too long.
func join(prefix, name string) string {
	whole := prefix + "-" + name
	if len(whole) <= longest {
		return whole
	}
	// A hyphen may not follow a dot (RFC 1123).
	return strings.TrimRight(whole[:longest-9], ".") + "-" + hash(whole)[:8]
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// Objects are the objects of a router.
type Objects struct {
	Attachment *unstructured.Unstructured
	Deployment *unstructured.Unstructured
	ConfigMap  *unstructured.Unstructured // nil: no container in mode monitor
}

// New returns the objects of a router, with a container in mode monitor if watch is set.
func New(router *api.EgressRouter, names Names, options Options, watch bool) (Objects, error) {
	mac, err := MAC(router)
	if err != nil {
		return Objects{}, err
	}
	attachment := router.Spec.Attachment(names.Attachment)
	if mac != "" {
		attachment.Capabilities = map[string]bool{"mac": true}
	}
	if watch {
		attachment.MonitorPort = healthPort(router.Spec)
	}
	config, err := json.Marshal(attachment)
	if err != nil {
		return Objects{}, fmt.Errorf("marshal attachment: %w", err)
	}
	fixed := config // what a change of replaces the pod
	if watch {
		without := *attachment.IP
		without.Destinations, without.FallbackIP = nil, ""
		a := attachment
		a.IP = &without
		if fixed, err = json.Marshal(a); err != nil {
			return Objects{}, fmt.Errorf("marshal attachment: %w", err)
		}
	}
	attachmentHash := hash(string(fixed))
	networks, err := json.Marshal([]network{{
		Name: names.Attachment, MAC: mac, DefaultRoute: defaultRoute(attachment, options),
	}})
	if err != nil {
		return Objects{}, fmt.Errorf("marshal annotation %s: %w", NetworksAnnotation, err)
	}
	made := Objects{Attachment: networkAttachment(router, names, string(config))}
	deployment := deployment(router, names, options, string(networks), attachmentHash)
	if watch {
		monitor(deployment.Spec.Template, names, attachmentHash, attachment.MonitorPort)
		if made.ConfigMap, err = configMap(router, names, attachmentHash); err != nil {
			return Objects{}, err
		}
	}
	d, err := runtime.DefaultUnstructuredConverter.ToUnstructured(deployment)
	if err != nil {
		return Objects{}, fmt.Errorf("convert deployment: %w", err)
	}
	made.Deployment = &unstructured.Unstructured{Object: d}
	return made, nil
}

// network is an element of the annotation of attachments.
type network struct {
	Name         string   `json:"name"`
	MAC          string   `json:"mac,omitempty"`
	DefaultRoute []string `json:"default-route,omitempty"`
}

func defaultRoute(a object.Attachment, options Options) []string {
	if !options.DefaultRoute {
		return nil
	}
	return a.IP.Gateway
}

// owner is the reference by which the garbage collector deletes an object with its
// router.
func owner(router *api.EgressRouter) metav1.OwnerReference {
	return *metav1.NewControllerRef(router, api.GroupVersion.WithKind("EgressRouter"))
}

func networkAttachment(router *api.EgressRouter, names Names, config string) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"config": config}}}
	u.SetGroupVersionKind(AttachmentKind)
	u.SetNamespace(router.Namespace)
	u.SetName(names.Attachment)
	u.SetLabels(map[string]string{ManagedBy: Manager, "app": names.App})
	u.SetOwnerReferences([]metav1.OwnerReference{owner(router)})
	return u
}
