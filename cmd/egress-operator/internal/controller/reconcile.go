package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
	"github.com/egress-router/egress-router/internal/object"
)

// platformManager is the prefix of the field managers of OpenShift's network operator,
// which applies the same objects of the same resource.
const platformManager = "cluster-network-operator"

// A reconciler applies the objects of routers and writes the routers' status.
type reconciler struct {
	client.Client               // reads from the cache
	uncached      client.Reader // for objects without the label of the cache
	recorder      events.EventRecorder
	health        *healthReader
	options       Options
	render        render.Options
	platform      bool // the cluster is OpenShift, whose operator implements the resource

	// What was applied and is not in the cache yet. There is one worker.
	applied map[types.UID]claim
}

// Reconcile applies the objects of one router. The objects have it as their owner: with
// it, the garbage collector of the cluster deletes them, also while no operator runs.
func (r *reconciler) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	result, err := r.reconcile(ctx, request)
	switch {
	case ctx.Err() != nil: // the operator ends
		return reconcile.Result{}, nil
	case apierrors.IsConflict(err): // the cache is older than the status
		return reconcile.Result{RequeueAfter: conflictInterval}, nil
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause): // the router goes with it
		return reconcile.Result{}, nil
	}
	return result, err
}

// conflictInterval is the time that the cache gets to receive what was written.
const conflictInterval = 100 * time.Millisecond

func (r *reconciler) reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	var routers api.EgressRouterList
	if err := r.List(ctx, &routers, client.UnsafeDisableDeepCopy); err != nil {
		return reconcile.Result{}, fmt.Errorf("list routers: %w", err)
	}
	i := slices.IndexFunc(routers.Items, func(router api.EgressRouter) bool {
		return router.Namespace == request.Namespace && router.Name == request.Name
	})
	if i < 0 || routers.Items[i].DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	router := routers.Items[i].DeepCopy()
	all, err := r.claims(ctx, routers.Items)
	if err != nil {
		return reconcile.Result{}, err
	}
	n := namesFor(all[i], all)
	observed := observation{health: r.health.of}
	failed := r.apply(ctx, all[i], n, all, &observed)
	if failed != nil && observed.problem.reason == "" {
		return reconcile.Result{}, failed
	}
	if err := r.observe(ctx, router, n, &observed); err != nil {
		return reconcile.Result{}, err
	}
	if err := errors.Join(failed, r.setStatus(ctx, router, observed)); err != nil {
		return reconcile.Result{}, err
	}
	if blocked(observed.problem.reason) {
		return reconcile.Result{RequeueAfter: blockedInterval(routers.Items)}, nil
	}
	return reconcile.Result{}, nil
}

// blockedInterval is the interval at which a router that waits for another object is
// reconciled, besides on events: objects without the operator's label cause none, and are
// read from the API server. All blocked routers together are about 20 reads a second.
func blockedInterval(routers []api.EgressRouter) time.Duration {
	n := 0
	for i := range routers {
		if isBlocked(&routers[i]) {
			n++
		}
	}
	return max(time.Second, time.Duration(n)*50*time.Millisecond)
}

// isBlocked reports whether the status of a router has it as blocked.
func isBlocked(router *api.EgressRouter) bool {
	return slices.ContainsFunc(router.Status.Conditions, func(c api.Condition) bool { return blocked(c.Reason) })
}

// blocked reports whether a router waits for another router or a foreign object.
func blocked(reason string) bool {
	return reason == reasonAddress || reason == reasonForeign || reason == reasonWaiting
}

// claims returns what routers have in the cluster.
func (r *reconciler) claims(ctx context.Context, routers []api.EgressRouter) ([]claim, error) {
	all := make([]claim, len(routers))
	byUID := map[types.UID]*claim{}
	for i := range routers {
		all[i].EgressRouter = &routers[i]
		byUID[routers[i].UID] = &all[i]
	}
	attachments := &unstructured.UnstructuredList{}
	attachments.SetGroupVersionKind(render.AttachmentKind.GroupVersion().WithKind(render.AttachmentKind.Kind + "List"))
	if err := r.List(ctx, attachments, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list network attachments: %w", err)
	}
	for i := range attachments.Items {
		a := &attachments.Items[i]
		if c := claimOf(a, byUID, func(n render.Names) string { return n.Attachment }); c != nil {
			config, _, _ := unstructured.NestedString(a.Object, "spec", "config")
			c.has = append(c.has, reservations(config)...)
		}
	}
	var deployments appsv1.DeploymentList
	if err := r.List(ctx, &deployments, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list deployments: %w", err)
	}
	for i := range deployments.Items {
		claimOf(&deployments.Items[i], byUID, func(n render.Names) string { return n.Deployment })
	}
	for uid, a := range r.applied {
		c := byUID[uid]
		if c == nil || c.names == a.names && slices.Equal(c.has, a.has) {
			delete(r.applied, uid)
			continue
		}
		if c.names == none {
			c.names = a.names
		}
		c.has = append(c.has, a.has...)
	}
	return all, nil
}

// claimOf returns the claim of the router that has an object, with the names of the object.
// It is nil for an object with another name or in another namespace. The copy of an object
// has its labels and its owner too, and users of other namespaces can write what they like
// there: neither may move a router to other names, and so start a second pod.
func claimOf(o client.Object, byUID map[types.UID]*claim, name func(render.Names) string) *claim {
	owner := metav1.GetControllerOfNoCopy(o)
	if owner == nil {
		return nil
	}
	c := byUID[owner.UID]
	if c == nil || c.Namespace != o.GetNamespace() {
		return nil
	}
	switch o.GetName() {
	case name(render.First()):
		c.names = first
	case name(render.Further(c.Name)):
		if c.names == none {
			c.names = further
		}
	default:
		return nil
	}
	return c
}

// reservations returns what an attachment reserves. It leaves out invalid addresses.
func reservations(config string) []reservation {
	var attachment object.Attachment
	if json.Unmarshal([]byte(config), &attachment) != nil || attachment.IP == nil {
		return nil // somebody else's, or edited: it is about to be restored
	}
	router := api.EgressRouter{}
	router.Spec.NetworkInterface.Macvlan.Master = string(attachment.InterfaceArgs.Master)
	for _, ip := range attachment.IP.Addresses {
		router.Spec.Addresses = append(router.Spec.Addresses, object.Address{IP: ip})
	}
	return wanted(&router)
}

// apply applies the objects of a router, or returns why it does not. A router that has
// run keeps its objects if its resource becomes invalid. The objects of a new one are
// made nevertheless, so that kubectl describe pod shows the sentence of the plugin.
func (r *reconciler) apply(ctx context.Context, router claim, n render.Names, all []claim, o *observation) error {
	if r.platform && !r.options.TakeOver {
		o.problem = standAside
		return nil
	}
	watch, err := r.watches(ctx, router.EgressRouter, o)
	if err != nil {
		return err
	}
	objects, err := render.New(router.EgressRouter, n, r.render, watch)
	if err != nil {
		o.problem = problem{reason: reasonInvalid, message: err.Error()}
		return nil
	}
	if other, address := holder(router, all); other != nil {
		o.problem = problem{reason: reasonAddress, message: fmt.Sprintf("reserved address %s belongs to EgressRouter %s/%s", address, other.Namespace, other.Name)}
		return nil
	}
	attachment, p, err := r.check(ctx, router, objects.Attachment.NewEmptyInstance().(client.Object), objects.Attachment.GetName(), all)
	if err != nil || p.reason != "" {
		o.problem = p
		return err
	}
	deployment, p, err := r.check(ctx, router, &appsv1.Deployment{}, n.Deployment, all)
	if err != nil || p.reason != "" {
		o.problem = p
		return err
	}
	if objects.ConfigMap != nil {
		kept := &metav1.PartialObjectMetadata{}
		kept.SetGroupVersionKind(objects.ConfigMap.GroupVersionKind())
		if _, p, err := r.check(ctx, router, kept, n.Config, all); err != nil || p.reason != "" {
			o.problem = p
			return err
		}
	}
	description, invalid := router.Spec.Description()
	if invalid != nil {
		if o.problem = (problem{reason: reasonInvalid, message: invalid.Error()}); attachment || deployment {
			return nil
		}
	}
	o.warnings = strings.Join(description.Warnings, "; ")
	options := []client.ApplyOption{client.FieldOwner(render.Manager), client.ForceOwnership}
	// First the ConfigMap: a pod that starts in between has either the same addresses in it as
	// in its attachment or, with other addresses, no file.
	if objects.ConfigMap != nil {
		if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(objects.ConfigMap), options...); err != nil {
			o.problem = applyProblem(err)
			return fmt.Errorf("apply config map: %w", err)
		}
	}
	if err := r.Apply(ctx, client.ApplyConfigurationFromUnstructured(objects.Attachment), options...); err != nil {
		o.problem = applyProblem(err)
		return fmt.Errorf("apply network attachment: %w", err)
	}
	r.remember(router, n)
	apply := func() error {
		return r.Apply(ctx, client.ApplyConfigurationFromUnstructured(objects.Deployment), options...)
	}
	err = apply()
	if apierrors.IsInvalid(err) && deployment && r.resetStrategy(ctx, objects.Deployment) == nil {
		err = apply()
	}
	if err != nil {
		o.problem = applyProblem(err)
		return fmt.Errorf("apply deployment: %w", err)
	}
	o.deployment = &appsv1.Deployment{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(objects.Deployment.Object, o.deployment); err != nil {
		return fmt.Errorf("convert deployment: %w", err)
	}
	return nil
}

// remember keeps what a router has got until the cache has it: a router that is reconciled
// before that would get the same names or address.
func (r *reconciler) remember(router claim, n render.Names) {
	if r.applied == nil {
		r.applied = map[types.UID]claim{}
	}
	got := claim{names: further, has: wanted(router.EgressRouter)}
	if n == render.First() {
		got.names = first
	}
	r.applied[router.UID] = got
}

// watches reports whether the pod of a router gets a container in mode monitor. It sets why
// a router that requests one gets none.
func (r *reconciler) watches(ctx context.Context, router *api.EgressRouter, o *observation) (bool, error) {
	allowed := false
	if render.WantsNamespace(router) {
		namespace := &metav1.PartialObjectMetadata{}
		namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
		if err := r.Get(ctx, types.NamespacedName{Name: router.Namespace}, namespace); err != nil {
			return false, fmt.Errorf("get namespace: %w", err)
		}
		allowed = render.Allows(namespace.Labels)
	}
	watch, err := render.Watch(router, allowed)
	if err != nil {
		o.unwatched = problem{reason: reasonNotWatched, message: err.Error()}
	}
	return watch, nil
}

// resetStrategy sets the strategy of a Deployment without the parameters of another one.
// Whoever sets RollingUpdate owns its parameters afterwards: an apply of Recreate leaves
// them, and the API server refuses both together.
func (r *reconciler) resetStrategy(ctx context.Context, deployment client.Object) error {
	patch := client.RawPatch(types.MergePatchType, []byte(`{"spec":{"strategy":{"type":"Recreate","rollingUpdate":null}}}`))
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: deployment.GetNamespace(), Name: deployment.GetName()}}
	if err := r.Patch(ctx, d, patch, client.FieldOwner(render.Manager)); err != nil {
		return fmt.Errorf("patch strategy: %w", err)
	}
	return nil
}

// applyProblem returns the sentence of an API server that refuses an object. Other errors
// are no fault of the router: they are tried again without a trace in its status.
func applyProblem(err error) problem {
	if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return problem{}
	}
	if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) || apierrors.IsBadRequest(err) {
		return problem{reason: reasonApply, message: err.Error()}
	}
	return problem{}
}

// check reports whether an object exists, and returns why it is not this router's.
func (r *reconciler) check(ctx context.Context, router claim, o client.Object, name string, all []claim) (bool, problem, error) {
	kind, err := r.GroupVersionKindFor(o)
	if err != nil {
		return false, problem{}, fmt.Errorf("find kind: %w", err)
	}
	key := types.NamespacedName{Namespace: router.Namespace, Name: name}
	err = r.Get(ctx, key, o)
	if apierrors.IsNotFound(err) { // or without the label that the cache selects
		live := &metav1.PartialObjectMetadata{}
		live.SetGroupVersionKind(kind)
		o, err = live, r.uncached.Get(ctx, key, live)
	}
	switch {
	case apierrors.IsNotFound(err):
		return false, problem{}, nil
	case err != nil:
		return false, problem{}, fmt.Errorf("get %s %s: %w", kind.Kind, name, err)
	case r.options.TakeOver:
		return true, problem{}, nil
	case managedBy(o, platformManager):
		return true, standAside, nil
	}
	owner := metav1.GetControllerOfNoCopy(o)
	live := func() bool {
		return slices.ContainsFunc(all, func(c claim) bool { return c.UID == owner.UID })
	}
	switch {
	case owner == nil && managedBy(o, render.Manager), // left by kubectl delete --cascade=orphan
		owner != nil && owner.UID == router.UID:
		return true, problem{}, nil
	case owner != nil && owner.Kind == "EgressRouter" && !live():
		return true, problem{reason: reasonWaiting, message: kind.Kind + " " + name + " of a deleted EgressRouter still exists"}, nil
	}
	return true, problem{reason: reasonForeign, message: kind.Kind + " " + name + " exists and is not managed by egress-operator: delete it, or start egress-operator with --take-over"}, nil
}

// managedBy reports whether a field manager with a prefix has set fields of an object.
func managedBy(o client.Object, prefix string) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool {
		return strings.HasPrefix(f.Manager, prefix)
	})
}

// observe reads the state of a router's objects. The answer to an apply is newer than the
// cache.
func (r *reconciler) observe(ctx context.Context, router *api.EgressRouter, n render.Names, o *observation) error {
	if o.deployment == nil {
		var d appsv1.Deployment
		err := r.Get(ctx, types.NamespacedName{Namespace: router.Namespace, Name: n.Deployment}, &d)
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return fmt.Errorf("get deployment: %w", err)
		}
		if !metav1.IsControlledBy(&d, router) {
			return nil
		}
		o.deployment = &d
	}
	var pods corev1.PodList
	if err := r.List(ctx, &pods, client.InNamespace(router.Namespace)); err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	for _, pod := range pods.Items {
		if pod.Annotations[render.RouterAnnotation] == router.Name {
			o.pods = append(o.pods, pod)
		}
	}
	var list corev1.EventList
	if err := r.List(ctx, &list, client.InNamespace(router.Namespace)); err != nil {
		return fmt.Errorf("list events: %w", err)
	}
	o.events = list.Items
	return nil
}

// setStatus writes the conditions of a router if they have changed.
func (r *reconciler) setStatus(ctx context.Context, router *api.EgressRouter, o observation) error {
	conditions := o.conditions(router.Status.Conditions, metav1.Now())
	if equality.Semantic.DeepEqual(conditions, router.Status.Conditions) {
		return nil
	}
	changed := router.DeepCopy()
	changed.Status.Conditions = conditions
	// The version lets one of two writes from the same old cache fail.
	patch := client.MergeFromWithOptions(router, client.MergeFromWithOptimisticLock{})
	if err := r.Status().Patch(ctx, changed, patch, client.FieldOwner(render.Manager)); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("patch status: %w", err)
	}
	r.announce(router, conditions)
	return nil
}

// announce records an event for a change that a user should see.
func (r *reconciler) announce(router *api.EgressRouter, now []api.Condition) {
	for i, c := range now {
		var before api.Condition
		if i < len(router.Status.Conditions) {
			before = router.Status.Conditions[i]
		}
		switch {
		case c.Type == api.Degraded && c.Message != "" && c.Message != before.Message:
			r.recorder.Eventf(router, nil, corev1.EventTypeWarning, c.Reason, "Reconcile", "%s", short(c.Message, mostNote))
		case c.Type == api.Available && c.Status != before.Status && c.Status == metav1.ConditionTrue:
			r.recorder.Eventf(router, nil, corev1.EventTypeNormal, c.Reason, "Reconcile", "%s", c.Message)
		}
	}
}

// mostNote is the length, in bytes, below which the API server accepts the note of an event
// (k8s.io/kubernetes/pkg/apis/core/validation/events.go).
const mostNote = 1024

// short shortens a message to less than a number of bytes.
func short(message string, most int) string {
	if len(message) < most {
		return message
	}
	return strings.ToValidUTF8(message[:most-4], "") + "…"
}
