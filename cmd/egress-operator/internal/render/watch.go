package render

import (
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/intstr"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/internal/object"
)

// monitorPort is the port of the health endpoint, which is that of the project's other
// manifests, unless a rule of the router has it.
const monitorPort = 9465

// configDirectory is the directory of the container in mode monitor with the resource. A
// directory follows the ConfigMap, which a single mounted file (subPath) does not.
const configDirectory = "/etc/egress"

// Watch reports whether the pod of a router gets a container in mode monitor, which needs
// NET_ADMIN and NET_RAW. The value auto depends on whether the Pod Security of the
// namespace allows these. The error is why a router whose annotation is set gets none.
func Watch(router *api.EgressRouter, allowed bool) (bool, error) {
	value := router.Annotations[WatchAnnotation]
	switch value {
	case "", "never":
		return false, nil
	case "auto":
		if !allowed {
			return false, nil
		}
	case "always":
	default:
		return false, fmt.Errorf("metadata.annotations[%s] is %q: expected auto, always or never; the router runs as with never", WatchAnnotation, value)
	}
	// The plugin takes the gateway of the node's NIC then, which the container does not know.
	if i := slices.IndexFunc(router.Spec.Addresses, func(a object.Address) bool { return a.Gateway == "" }); i >= 0 && value == "always" {
		return false, fmt.Errorf("metadata.annotations[%s] is always and spec.addresses[%d].gateway is missing: add the gateway; the router runs as with never", WatchAnnotation, i)
	} else if i >= 0 {
		return false, nil
	}
	return true, nil
}

// WantsNamespace reports whether the way in which a router runs depends on its namespace.
func WantsNamespace(router *api.EgressRouter) bool {
	return router.Annotations[WatchAnnotation] == "auto"
}

// Allows reports whether a namespace with these labels admits a pod with NET_ADMIN and
// NET_RAW. Of the Pod Security Standards only "privileged" does, which is also the one of
// a namespace without the label.
func Allows(labels map[string]string) bool {
	level := labels["pod-security.kubernetes.io/enforce"]
	return level == "" || level == "privileged"
}

// healthPort returns the port of the health endpoint: the first one that no rule has.
func healthPort(spec object.Spec) uint16 {
	port := int32(monitorPort)
	if spec.Redirect != nil {
		for slices.ContainsFunc(spec.Redirect.RedirectRules, func(r object.RedirectRule) bool { return r.Port == port }) {
			port++
		}
	}
	return uint16(port)
}

// configFile is the key of the ConfigMap. Other addresses have another key: a new pod whose
// node still has the former content starts without a file, and not with the former address.
func configFile(attachmentHash string) string { return "router-" + attachmentHash[:8] + ".yaml" }

// configMap returns the ConfigMap with the resource, which the container follows.
func configMap(router *api.EgressRouter, names Names, attachmentHash string) (*unstructured.Unstructured, error) {
	text, err := yaml.Marshal(map[string]any{"apiVersion": api.GroupVersion.String(), "kind": "EgressRouter", "spec": router.Spec})
	if err != nil {
		return nil, fmt.Errorf("marshal router: %w", err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{"data": map[string]any{configFile(attachmentHash): string(text)}}}
	u.SetAPIVersion("v1")
	u.SetKind("ConfigMap")
	u.SetNamespace(router.Namespace)
	u.SetName(names.Config)
	u.SetLabels(map[string]string{ManagedBy: Manager, "app": names.App})
	u.SetOwnerReferences([]metav1.OwnerReference{owner(router)})
	return u, nil
}

// monitor changes a pod so that its container keeps what the plugin has made: it repairs
// drift, follows the ConfigMap, and serves health and metrics.
func monitor(pod *corev1ac.PodTemplateSpecApplyConfiguration, names Names, attachmentHash string, port uint16) {
	const volume = "config"
	number := strconv.Itoa(int(port))
	pod.WithAnnotations(map[string]string{"prometheus.io/scrape": "true", PortAnnotation: number})
	// The destinations are addresses. With a name server, the container would add a route
	// to it, which the plugin does not make.
	pod.Spec.WithDNSPolicy(corev1.DNSNone).WithDNSConfig(corev1ac.PodDNSConfig().WithNameservers("127.0.0.1"))
	pod.Spec.WithVolumes(corev1ac.Volume().WithName(volume).WithConfigMap(corev1ac.ConfigMapVolumeSource().WithName(names.Config)))
	c := &pod.Spec.Containers[0]
	c.Args = nil
	// The user root gets the added capabilities, other users do not (capabilities(7)).
	c.SecurityContext.WithRunAsUser(0).Capabilities.WithAdd("NET_ADMIN", "NET_RAW")
	c.SecurityContext.RunAsNonRoot = nil
	for _, e := range []struct{ name, value string }{
		{"EGRESS_ROUTER_MODE", "monitor"},
		{"EGRESS_CONFIG", configDirectory + "/" + configFile(attachmentHash)},
		{"EGRESS_INTERFACE", "net1"},
		{"EGRESS_ROUTER_BACKEND", "nftables"}, // that of the plugin
		{"EGRESS_HEALTH_LISTEN", ":" + number},
		{"EGRESS_AUDIT_LOG", "true"},
		{"EGRESS_LOG_FORMAT", "json"},
	} {
		c.WithEnv(corev1ac.EnvVar().WithName(e.name).WithValue(e.value))
	}
	probe := func(path string) *corev1ac.ProbeApplyConfiguration {
		return corev1ac.Probe().WithHTTPGet(corev1ac.HTTPGetAction().WithPath(path).WithPort(intstr.FromInt32(int32(port)))).WithPeriodSeconds(5)
	}
	c.WithPorts(corev1ac.ContainerPort().WithName("metrics").WithContainerPort(int32(port))).
		WithLivenessProbe(probe("/healthz")).
		WithReadinessProbe(probe("/readyz")).
		WithVolumeMounts(corev1ac.VolumeMount().WithName(volume).WithMountPath(configDirectory).WithReadOnly(true))
}
