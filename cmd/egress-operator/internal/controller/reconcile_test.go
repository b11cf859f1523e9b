package controller

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
	"github.com/egress-router/egress-router/internal/object"
)

// A server is an API server with some objects. It refuses to apply objects of one kind.
type server struct {
	client.Client
	attachments []unstructured.Unstructured
	deployments []appsv1.Deployment
	refuses     string
	applied     []string // kinds
}

func (s *server) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	switch list := list.(type) {
	case *unstructured.UnstructuredList:
		list.Items = s.attachments
	case *appsv1.DeploymentList:
		list.Items = s.deployments
	}
	return nil
}

func (s *server) Get(_ context.Context, key client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
	return apierrors.NewNotFound(schema.GroupResource{}, key.Name)
}

func (s *server) GroupVersionKindFor(o runtime.Object) (schema.GroupVersionKind, error) {
	return o.GetObjectKind().GroupVersionKind(), nil
}

func (s *server) Apply(_ context.Context, o runtime.ApplyConfiguration, _ ...client.ApplyOption) error {
	kind := o.(interface{ GetKind() string }).GetKind()
	if kind == s.refuses {
		return apierrors.NewForbidden(schema.GroupResource{Resource: kind}, "", nil)
	}
	s.applied = append(s.applied, kind)
	return nil
}

// add adds the objects of a router with names, as the operator has made them or, with another
// namespace or other names, as somebody has copied them.
func (s *server) add(owner *api.EgressRouter, namespace, attachment, deployment, config string) {
	a := unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"config": config}}}
	a.SetNamespace(namespace)
	a.SetName(attachment)
	owners := []metav1.OwnerReference{*metav1.NewControllerRef(owner, api.GroupVersion.WithKind("EgressRouter"))}
	a.SetOwnerReferences(owners)
	s.attachments = append(s.attachments, a)
	s.deployments = append(s.deployments, appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: deployment, OwnerReferences: owners}})
}

// The copies of a router's objects, which have its labels and its owner too, change neither
// the names nor the addresses that it has.
func TestCopiedObjects(t *testing.T) {
	const config, other = `{"ip":{"addresses":["192.168.12.99/24"]}}`, `{"ip":{"addresses":["192.168.12.98/24"]}}`
	one, two := &api.EgressRouter{}, &api.EgressRouter{}
	one.Namespace, one.Name, one.UID = "egress", "one", "1"
	two.Namespace, two.Name, two.UID = "egress", "two", "2"
	for _, test := range []struct {
		name string
		copy func(s *server)
	}{
		{"none", func(*server) {}},
		{"with another name", func(s *server) { s.add(one, "egress", "copy", "copy", other) }},
		{"in another namespace", func(s *server) {
			s.add(one, "other", "copy", "copy", other)
			s.add(one, "other", render.Further("one").Attachment, render.Further("one").Deployment, other)
			s.add(two, "other", render.First().Attachment, render.First().Deployment, other)
		}},
		{"with the names of another router", func(s *server) { s.add(one, "egress", render.Further("two").Attachment, "copy", other) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &server{}
			s.add(one, "egress", render.First().Attachment, render.First().Deployment, config)
			further := render.Further("two")
			s.add(two, "egress", further.Attachment, further.Deployment, `{"ip":{"addresses":["192.168.12.97/24"]}}`)
			test.copy(s)
			all, err := (&reconciler{Client: s}).claims(t.Context(), []api.EgressRouter{*one, *two})
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range []render.Names{render.First(), further} {
				if found := namesFor(all[i], all); found != want {
					t.Errorf("router %s: names %+v, want %+v", all[i].Name, found, want)
				}
				if address := []string{"192.168.12.99", "192.168.12.97"}[i]; len(all[i].has) != 1 || all[i].has[0].address.String() != address {
					t.Errorf("router %s: reservations %v, want %s", all[i].Name, all[i].has, address)
				}
			}
		})
	}
}

// If the API server refuses the ConfigMap, the attachment stays as it is: it would have other
// addresses than the container that monitors, and the former ones would be free for another
// router while a pod runs with them.
func TestRefusedConfigMap(t *testing.T) {
	for _, test := range []struct {
		refuses string
		want    []string // applied
	}{
		{"", []string{"ConfigMap", "NetworkAttachmentDefinition", "Deployment"}},
		{"ConfigMap", nil},
	} {
		s := &server{refuses: test.refuses}
		c := claim{EgressRouter: &api.EgressRouter{}}
		c.Namespace, c.Name, c.UID = "egress", "one", types.UID("1")
		c.Annotations = map[string]string{render.WatchAnnotation: "always"}
		c.Spec.Addresses = []object.Address{{IP: "192.168.12.99/24", Gateway: "192.168.12.1"}}
		c.Spec.Redirect = &object.Redirect{FallbackIP: "203.0.113.27"}
		var o observation
		err := (&reconciler{Client: s, uncached: s}).apply(t.Context(), c, render.First(), []claim{c}, &o)
		if (err != nil) != (test.refuses != "") || err != nil && o.problem.reason != reasonApply {
			t.Errorf("refused %q: error %v, problem %+v", test.refuses, err, o.problem)
		}
		if !slices.Equal(s.applied, test.want) {
			t.Errorf("refused %q: applied %q, want %q", test.refuses, s.applied, test.want)
		}
	}
}

// A resource with a fault in each of 10,000 rules has a status that the API server accepts.
func TestLongMessage(t *testing.T) {
	s := object.Spec{Addresses: []object.Address{{IP: "192.168.12.99/24", Gateway: "192.168.12.1"}}, Redirect: &object.Redirect{}}
	for port := range int32(10000) {
		s.Redirect.RedirectRules = append(s.Redirect.RedirectRules, object.RedirectRule{DestinationIP: "2001:db8::1", Port: 1 + port, Protocol: object.TCP})
	}
	_, err := s.Description()
	if err == nil || len(err.Error()) < 1<<20 {
		t.Fatalf("the faults are too short to prove anything: %v", err)
	}
	found := observation{problem: problem{reasonInvalid, err.Error()}}.conditions(nil, metav1.Now())[2].Message
	if len(found) > 32768 || !strings.HasPrefix(err.Error(), strings.TrimSuffix(found, "…")) || !utf8.ValidString(found) {
		t.Errorf("message of %d bytes: %.300s", len(found), found)
	}
}

// Of the events of a cluster's pods, the cache has the text of those of routers only.
func TestSlimEvents(t *testing.T) {
	for pod, want := range map[string]string{
		"web-575465c75c-qkq6m":                              "",
		render.First().Deployment + "-575465c75c-qkq6m":     "no network",
		render.Further("two").Deployment + "-575465c7-abcd": "no network",
	} {
		e := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "egress", Name: "e", ResourceVersion: "7"}, InvolvedObject: corev1.ObjectReference{Name: pod}, Message: "no network"}
		found, err := slim(e)
		if err != nil {
			t.Fatal(err)
		}
		if e = found.(*corev1.Event); e.Message != want || e.Name != "e" || e.Namespace != "egress" || e.ResourceVersion != "7" {
			t.Errorf("event of pod %s: %+v", pod, e)
		}
	}
}

// A router that is reconciled before the cache has the objects of another one gets neither
// the names nor the address of that one, also if it is the first of both.
func TestCacheIsBehind(t *testing.T) {
	s := &server{}
	r := &reconciler{Client: s, uncached: s}
	var all []api.EgressRouter
	for _, name := range []string{"a", "b"} {
		router := api.EgressRouter{}
		router.Namespace, router.Name, router.UID = "egress", name, types.UID(name)
		router.Spec.Addresses = []object.Address{{IP: "192.168.12.99/24", Gateway: "192.168.12.1"}}
		router.Spec.Redirect = &object.Redirect{FallbackIP: "203.0.113.27"}
		all = append(all, router)
	}
	claims := func(routers ...api.EgressRouter) []claim {
		t.Helper()
		found, err := r.claims(t.Context(), routers)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	two := claims(all[1])
	if err := r.apply(t.Context(), two[0], namesFor(two[0], two), two, &observation{}); err != nil {
		t.Fatal(err)
	}
	found := claims(all...)
	if n := namesFor(found[0], found); n != render.Further("a") {
		t.Errorf("names %+v of the second router", n)
	}
	if other, address := holder(found[0], found); other == nil || other.Name != "b" {
		t.Errorf("holder of %s: %v, want b", address, other)
	}
	if other, _ := holder(found[1], found); other != nil {
		t.Errorf("b has lost its address to %s", other.Name)
	}

	// Nothing is kept of what the cache has, and of deleted routers.
	s.add(&all[1], "egress", render.First().Attachment, render.First().Deployment, `{"ip":{"addresses":["192.168.12.99/24"]}}`)
	if claims(all...); len(r.applied) > 0 {
		t.Errorf("kept %+v", r.applied)
	}
	r.remember(found[0], render.Further("a"))
	if claims(all[1]); len(r.applied) > 0 {
		t.Errorf("kept %+v of a deleted router", r.applied)
	}
}

// Routers that wait for objects without events are reconciled each second, and many of them
// together are about 20 reads a second.
func TestBlockedInterval(t *testing.T) {
	blocked := api.EgressRouter{}
	blocked.Status.Conditions = []api.Condition{{}, {}, {Reason: reasonForeign}}
	for n, want := range map[int]time.Duration{0: time.Second, 1: time.Second, 20: time.Second, 200: 10 * time.Second} {
		if found := blockedInterval(append(slices.Repeat([]api.EgressRouter{blocked}, n), api.EgressRouter{})); found != want {
			t.Errorf("%d routers: %s, want %s", n, found, want)
		}
	}
}
