// Package controller reconciles EgressRouter resources: it applies the objects of package
// render and writes the status of each router.
package controller

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	ctrlcontroller "sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// Options are the settings of the operator.
type Options struct {
	Image         string // of egress-router
	Namespace     string // whose routers are reconciled; empty: all namespaces
	TakeOver      bool   // reconcile also what another operator manages
	DefaultRoute  Choice // request the default route in the pod's annotation
	MetricsListen string // address of /metrics; 0: none
	HealthListen  string // address of /healthz and /readyz; 0: none
	LeaderElect   bool   // wait until no other operator runs
	LeaseIn       string // namespace of the Lease; empty: that of the operator's pod
	Log           *slog.Logger
}

// A Choice is auto, always or never.
type Choice string

// The choices. Auto depends on the cluster.
const (
	Auto   Choice = "auto"
	Always Choice = "always"
	Never  Choice = "never"
)

// Kinds by which a cluster is recognised.
var (
	openShiftNetwork = schema.GroupKind{Group: "operator.openshift.io", Kind: "Network"}
	openShiftSCC     = schema.GroupKind{Group: "security.openshift.io", Kind: "SecurityContextConstraints"}
	ovnKubernetes    = schema.GroupKind{Group: "k8s.ovn.org", Kind: "EgressIP"}
)

// New returns a manager that runs the operator when it is started. The error names a
// resource that the cluster lacks.
func New(cfg *rest.Config, o Options) (manager.Manager, error) {
	scheme := runtime.NewScheme()
	if err := clientscheme.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register types: %w", err)
	}
	if err := api.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register types: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	// 200 routers start within 5 s. The API server has limits of its own.
	cfg.QPS, cfg.Burst = 100, 200
	m, err := manager.New(cfg, manager.Options{
		Scheme:                        scheme,
		Logger:                        logr.FromSlogHandler(o.Log.Handler()),
		Cache:                         cacheOptions(o.Namespace),
		Client:                        client.Options{Cache: &client.CacheOptions{Unstructured: true}},
		Metrics:                       metricsserver.Options{BindAddress: o.MetricsListen},
		HealthProbeBindAddress:        o.HealthListen,
		LeaderElection:                o.LeaderElect,
		LeaderElectionID:              render.Manager,
		LeaderElectionNamespace:       o.LeaseIn,
		LeaderElectionReleaseOnCancel: true,
		// Tests start several managers in one process.
		Controller: config.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		return nil, fmt.Errorf("create manager: %w", err)
	}
	r := &reconciler{Client: m.GetClient(), uncached: m.GetAPIReader(), recorder: m.GetEventRecorder(render.Manager), health: newHealthReader(m.GetClient()), options: o}
	if err := r.detect(m.GetRESTMapper()); err != nil {
		return nil, err
	}
	if err := m.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return nil, fmt.Errorf("add health check: %w", err)
	}
	if err := m.AddReadyzCheck("ping", healthz.Ping); err != nil {
		return nil, fmt.Errorf("add readiness check: %w", err)
	}
	if err := m.Add(r.health); err != nil {
		return nil, fmt.Errorf("add reader of health: %w", err)
	}
	return m, r.watch(m)
}

// detect sets what depends on the cluster.
func (r *reconciler) detect(mapper meta.RESTMapper) error {
	has := func(kind schema.GroupKind) (bool, error) {
		_, err := mapper.RESTMapping(kind)
		if meta.IsNoMatchError(err) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look up kind %s: %w", kind, err)
		}
		return true, nil
	}
	r.render = render.Options{Image: r.options.Image, DefaultRoute: r.options.DefaultRoute == Always}
	for _, kind := range []struct {
		schema.GroupKind
		found  *bool
		remedy string
	}{
		{api.GroupVersion.WithKind("EgressRouter").GroupKind(), nil, "install it with the operator's manifests"},
		{render.AttachmentKind.GroupKind(), nil, "install Multus, which attaches pods to the physical network"},
		{openShiftNetwork, &r.platform, ""},
		{openShiftSCC, &r.render.AnyUser, ""},
		{ovnKubernetes, &r.render.DefaultRoute, ""},
	} {
		found, err := has(kind.GroupKind)
		switch {
		case err != nil:
			return err
		case kind.found == nil && !found:
			return fmt.Errorf("look up kind %s: the cluster does not have it: %s", kind.GroupKind, kind.remedy)
		case kind.found == nil || kind.found == &r.render.DefaultRoute && r.options.DefaultRoute != Auto:
		default:
			*kind.found = found
		}
	}
	return nil
}

// cacheOptions limits the cache to the objects of routers, and to the parts of them that
// are read: 200 routers fit in a few megabytes.
func cacheOptions(namespace string) cache.Options {
	own := labels.SelectorFromSet(labels.Set{render.ManagedBy: render.Manager})
	attachment := &unstructured.Unstructured{}
	attachment.SetGroupVersionKind(render.AttachmentKind)
	o := cache.Options{
		DefaultTransform: slim,
		ByObject: map[client.Object]cache.ByObject{
			attachment:           {Label: own},
			&appsv1.Deployment{}: {Label: own},
			&corev1.Pod{}:        {Label: own},
			&corev1.ConfigMap{}:  {Label: own},
			&corev1.Event{}:      {Field: fields.OneTermEqualSelector("reason", "FailedCreatePodSandBox")},
		},
	}
	if namespace != "" {
		o.DefaultNamespaces = map[string]cache.Config{namespace: {}}
	}
	return o
}

// slim removes what is never read. The names of field managers stay.
func slim(o any) (any, error) {
	if m, err := meta.Accessor(o); err == nil {
		managed := m.GetManagedFields()
		for i := range managed {
			managed[i] = metav1.ManagedFieldsEntry{Manager: managed[i].Manager}
		}
		m.SetManagedFields(managed)
	}
	switch o := o.(type) {
	case *appsv1.Deployment:
		o.Spec = appsv1.DeploymentSpec{}
	case *corev1.Pod:
		o.Spec = corev1.PodSpec{}
	case *corev1.Event:
		// Of all pods of the cluster: while a node's network fails, there are thousands.
		if !strings.HasPrefix(o.InvolvedObject.Name, render.First().Deployment) {
			*o = corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion}}
		}
	case *metav1.PartialObjectMetadata: // a namespace or a ConfigMap
		o.Annotations = nil
	}
	return o, nil
}

// watch registers the controller and the kinds whose events it reconciles.
func (r *reconciler) watch(m manager.Manager) error {
	attachment := &unstructured.Unstructured{}
	attachment.SetGroupVersionKind(render.AttachmentKind)
	changed := predicate.Or(predicate.GenerationChangedPredicate{}, predicate.AnnotationChangedPredicate{})
	err := ctrl.NewControllerManagedBy(m).
		Named("egressrouter").
		For(&api.EgressRouter{}, builder.WithPredicates(changed)).
		Watches(&api.EgressRouter{}, handler.EnqueueRequestsFromMapFunc(r.blockedRouters), builder.WithPredicates(changed)).
		Watches(attachment, handler.EnqueueRequestsFromMapFunc(r.ofObject)).
		Watches(&appsv1.Deployment{}, handler.EnqueueRequestsFromMapFunc(r.ofObject)).
		// Only their metadata: of a ConfigMap the owner is read, of a namespace the labels.
		Watches(&corev1.ConfigMap{}, handler.EnqueueRequestsFromMapFunc(r.ofObject), builder.OnlyMetadata).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(r.inNamespace), builder.OnlyMetadata, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(ofPod)).
		Watches(&corev1.Event{}, handler.EnqueueRequestsFromMapFunc(r.ofEvent), builder.WithPredicates(predicate.Funcs{
			DeleteFunc: func(event.DeleteEvent) bool { return false }, // events expire after an hour
		})).
		WatchesRawSource(source.Channel(r.health.changed, handler.EnqueueRequestsFromMapFunc(ofPod))).
		// What the API server refuses, it accepts once an administrator has changed a policy.
		WithOptions(ctrlcontroller.Options{RateLimiter: workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](5*time.Millisecond, 30*time.Second)}).
		Complete(r)
	if err != nil {
		return fmt.Errorf("create controller: %w", err)
	}
	return nil
}

// blockedRouters returns the routers that wait for another object.
func (r *reconciler) blockedRouters(ctx context.Context, _ client.Object) (all []reconcile.Request) {
	var routers api.EgressRouterList
	if err := r.List(ctx, &routers, client.UnsafeDisableDeepCopy); err != nil {
		return nil // the cache has stopped
	}
	for _, router := range routers.Items {
		if isBlocked(&router) {
			all = append(all, request(router.Namespace, router.Name))
		}
	}
	return all
}

// inNamespace returns the routers of a namespace whose way to run depends on its labels.
func (r *reconciler) inNamespace(ctx context.Context, namespace client.Object) (all []reconcile.Request) {
	var routers api.EgressRouterList
	if err := r.List(ctx, &routers, client.InNamespace(namespace.GetName()), client.UnsafeDisableDeepCopy); err != nil {
		return nil // the cache has stopped
	}
	for _, router := range routers.Items {
		if render.WantsNamespace(&router) {
			all = append(all, request(router.Namespace, router.Name))
		}
	}
	return all
}

// ofObject returns the router of an object that the operator makes, and those that wait.
func (r *reconciler) ofObject(ctx context.Context, o client.Object) []reconcile.Request {
	all := r.blockedRouters(ctx, o)
	if c := metav1.GetControllerOfNoCopy(o); c != nil {
		all = append(all, request(o.GetNamespace(), c.Name))
	}
	return all
}

func ofPod(_ context.Context, pod client.Object) []reconcile.Request {
	if name := pod.GetAnnotations()[render.RouterAnnotation]; name != "" {
		return []reconcile.Request{request(pod.GetNamespace(), name)}
	}
	return nil
}

// ofEvent returns the router of the pod that an event is about. An event that comes before
// its pod is read with the pod.
func (r *reconciler) ofEvent(ctx context.Context, o client.Object) []reconcile.Request {
	involved := o.(*corev1.Event).InvolvedObject
	var pod corev1.Pod
	if r.Get(ctx, types.NamespacedName{Namespace: involved.Namespace, Name: involved.Name}, &pod) != nil {
		return nil // of another pod: the cache has those of routers only
	}
	return ofPod(ctx, &pod)
}

func request(namespace, name string) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}
}
