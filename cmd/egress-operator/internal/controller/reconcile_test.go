package controller

import (
	"context"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

// A server is an API server with some objects.
type server struct {
	client.Client
	attachments []unstructured.Unstructured
	deployments []appsv1.Deployment
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
				if address := []string{"192.168.12.99", "192.168.12.97"}[i]; len(all[i].addresses) != 1 || all[i].addresses[0].String() != address {
					t.Errorf("router %s: addresses %v, want %s", all[i].Name, all[i].addresses, address)
				}
			}
		})
	}
}
