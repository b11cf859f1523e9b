package envtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/internal/endpoints"
)

// Routers write the EndpointSlices of a Service with the rights of the manifest, in turn, and
// restore what others change. The fake server in the tests of internal/endpoints follows the
// API server in what it refuses.
func TestEndpoints(t *testing.T) {
	namespace := newNamespace(t)
	applyStandby(t, namespace)
	a := startRouter(t, namespace, "10.128.0.98", "fd00::98")
	b := startRouter(t, namespace, "10.128.0.99", "fd00::99")
	for i, holder := range []*endpointsRouter{a, b, a, a} {
		holder.Hold()
		awaitSlices(t, namespace, holder)
		holder.await(t, "written", func(s endpoints.Status) bool { return s.Err == nil && s.Took > 0 })
		t.Logf("take-over %d: %s", i+1, holder.Status().Took)
		if i < 3 {
			holder.Release()
		}
	}

	// What others do is corrected.
	names := []string{"egress-standby-egress-router", "egress-standby-egress-router-ipv6"}
	if err := cluster.Delete(t.Context(), &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: names[0]}}); err != nil {
		t.Fatal(err)
	}
	var edited discoveryv1.EndpointSlice
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: names[1]}, &edited); err != nil {
		t.Fatal(err)
	}
	edited.Endpoints[0].Addresses[0] = "fd00::1"
	edited.Labels = map[string]string{discoveryv1.LabelServiceName: "other"}
	if err := cluster.Update(t.Context(), &edited); err != nil {
		t.Fatal(err)
	}
	awaitSlices(t, namespace, a)
	var service corev1.Service
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "egress-standby"}, &service); err != nil {
		t.Fatal(err)
	}
	service.Spec.Ports[0].TargetPort.IntVal = 8181
	if err := cluster.Update(t.Context(), &service); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new port", func() (bool, any) {
		ports := slicesOf(t, namespace)[0].Ports
		return *ports[0].Port == 8181, ports
	})
	a.Release()

	// Without the Role, the error names each rule of it.
	var role rbacv1.Role
	if err := cluster.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "egress-standby"}, &role); err != nil {
		t.Fatal(err)
	}
	rules := role.Rules
	for _, r := range slices.Backward(rules[:2]) {
		role.Rules = slices.DeleteFunc(slices.Clone(rules), func(other rbacv1.PolicyRule) bool { return other.Resources[0] == r.Resources[0] })
		if err := cluster.Update(t.Context(), &role); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf(`needs the rule {apiGroups: [%q], resources: [%q], resourceNames: [%q], verbs: ["get"]}`, r.APIGroups[0], r.Resources[0], r.ResourceNames[0])
		b.await(t, want, func(s endpoints.Status) bool { return s.Err != nil && strings.Contains(s.Err.Error(), want) })
	}
}

// applyStandby applies what standby.yaml has about Services and rights.
func applyStandby(t *testing.T, namespace string) {
	t.Helper()
	text, err := os.ReadFile("../../../../testdata/manifests/standby.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		o := new(unstructured.Unstructured)
		if err := yaml.Unmarshal([]byte(strings.ReplaceAll(document, "namespace: egress", "namespace: "+namespace)), &o.Object); err != nil {
			t.Fatal(err)
		}
		if o.GetKind() == "Deployment" {
			continue // nothing runs pods here
		}
		if o.GetName() == "egress-standby" && o.GetKind() == "Service" {
			// A Service without selector and address has both families on any cluster.
			if err := unstructured.SetNestedField(o.Object, "None", "spec", "clusterIP"); err != nil {
				t.Fatal(err)
			}
		}
		o.SetNamespace(namespace)
		if err := cluster.Apply(t.Context(), client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("test")); err != nil {
			t.Fatal(err)
		}
	}
}

// An endpointsRouter is a running Writer of a router.
type endpointsRouter struct {
	*endpoints.Writer
	addresses []netip.Addr
}

// startRouter starts a Writer with the service account of the manifest. It reaches the API
// server by its name: this machine has no address of a pod.
func startRouter(t *testing.T, namespace string, addresses ...string) *endpointsRouter {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if err := cluster.SubResource("token").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "egress-standby"}}, request); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for file, content := range map[string]string{"token": request.Status.Token, "namespace": namespace, "ca.crt": string(admin.CAData)} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	host := admin.Host
	if u, err := url.Parse(host); err == nil && u.Host != "" {
		host = u.Host
	}
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		t.Fatal(err)
	}
	r := &endpointsRouter{}
	for _, a := range addresses {
		r.addresses = append(r.addresses, netip.MustParseAddr(a))
	}
	r.Writer = endpoints.New(endpoints.Options{
		Service: "egress-standby", Addresses: r.addresses, Pod: "pod-" + addresses[0], Node: "node-1",
		Server: net.JoinHostPort("localhost", port), Account: dir, Log: testLog(t),
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return r
}

func (r *endpointsRouter) await(t *testing.T, what string, done func(endpoints.Status) bool) {
	t.Helper()
	eventually(t, what, func() (bool, any) {
		s := r.Status()
		return done(s), s
	})
}

// slicesOf returns the EndpointSlices that are part of the Service.
func slicesOf(t *testing.T, namespace string) []discoveryv1.EndpointSlice {
	t.Helper()
	var list discoveryv1.EndpointSliceList
	if err := cluster.List(t.Context(), &list, client.InNamespace(namespace), client.MatchingLabels{discoveryv1.LabelServiceName: "egress-standby"}); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// awaitSlices waits until the Service leads to a router, in both families.
func awaitSlices(t *testing.T, namespace string, r *endpointsRouter) {
	t.Helper()
	eventually(t, fmt.Sprintf("the Service leads to %s", r.addresses), func() (bool, any) {
		var got []string
		for _, one := range slicesOf(t, namespace) {
			if len(one.OwnerReferences) != 1 || one.OwnerReferences[0].Kind != "Service" {
				return false, one.ObjectMeta
			}
			for _, e := range one.Endpoints {
				got = append(got, e.Addresses...)
			}
		}
		return slices.Equal(got, []string{r.addresses[0].String(), r.addresses[1].String()}), got
	})
}
