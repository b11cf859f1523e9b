package render_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
	"github.com/egress-router/egress-router/internal/object"
)

func router(change ...func(*api.EgressRouter)) *api.EgressRouter {
	r := &api.EgressRouter{
		ObjectMeta: metav1.ObjectMeta{Namespace: "egress", Name: "one", UID: "1"},
		Spec: object.Spec{
			Addresses: []object.Address{{IP: "192.168.12.99/24", Gateway: "192.168.12.1"}},
			Redirect:  &object.Redirect{FallbackIP: "203.0.113.27"},
		},
	}
	for _, c := range change {
		c(r)
	}
	return r
}

func mac(value string) func(*api.EgressRouter) {
	return func(r *api.EgressRouter) { metav1.SetMetaDataAnnotation(&r.ObjectMeta, render.MACAnnotation, value) }
}

func address(ips ...string) func(*api.EgressRouter) {
	return func(r *api.EgressRouter) {
		r.Spec.Addresses = nil
		for _, ip := range ips {
			r.Spec.Addresses = append(r.Spec.Addresses, object.Address{IP: ip})
		}
	}
}

func TestNames(t *testing.T) {
	for _, test := range []struct {
		name string
		made render.Names
		want render.Names
	}{
		{"first", render.First(), render.Names{"egress-router-cni-nad", "egress-router-cni-deployment", "egress-router-cni", "egress-router-cni-config"}},
		{"further", render.Further("two"), render.Names{"egress-router-cni-nad-two", "egress-router-cni-deployment-two", "egress-router-cni-two", "egress-router-cni-config-two"}},
	} {
		if diff := cmp.Diff(test.want, test.made); diff != "" {
			t.Errorf("%s (-want +found):\n%s", test.name, diff)
		}
	}
	a, b := render.Further(strings.Repeat("x", 250)+"a"), render.Further(strings.Repeat("x", 250)+"b")
	for _, name := range []string{a.Attachment, a.Deployment, a.App, a.Config} {
		if len(name) > 63 {
			t.Errorf("%s has %d characters, want at most 63", name, len(name))
		}
	}
	if a == b {
		t.Errorf("the names of two routers are the same: %+v", a)
	}
}

// The names of a router are valid, wherever a long name is cut.
func TestLongNames(t *testing.T) {
	for _, router := range []string{strings.Repeat("a.", 126) + "a", "a" + strings.Repeat("a.", 125) + "a", strings.Repeat("a-a.", 62) + "a"} {
		n := render.Further(router)
		for _, name := range []string{n.Attachment, n.Deployment, n.Config} {
			if faults := validation.IsDNS1123Subdomain(name); len(faults) > 0 {
				t.Errorf("name %q: %v", name, faults)
			}
		}
		if faults := validation.IsValidLabelValue(n.App); len(faults) > 0 {
			t.Errorf("label %q: %v", n.App, faults)
		}
	}
}

func TestMAC(t *testing.T) {
	auto := mac("auto")
	for _, test := range []struct {
		name   string
		router *api.EgressRouter
		want   string
	}{
		{"no annotation", router(), ""},
		{"IPv4", router(auto), "02:e6:c0:a8:0c:63"},
		{"another subnet length", router(auto, address("192.168.12.99/28")), "02:e6:c0:a8:0c:63"},
		{"without length", router(auto, address("192.168.12.99")), "02:e6:c0:a8:0c:63"},
		{"another address", router(auto, address("192.168.12.100/24")), "02:e6:c0:a8:0c:64"},
		{"IPv6", router(auto, address("2001:db8::99/64")), "06:e6:47:6e:a9:f4"},
		{"the first of both", router(auto, address("192.168.12.99/24", "2001:db8::99/64")), "02:e6:c0:a8:0c:63"},
		{"no valid address", router(auto, address("foo")), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			found, err := render.MAC(test.router)
			if err != nil || found != test.want {
				t.Errorf("want %q, found %q, %v", test.want, found, err)
			}
		})
	}
	if _, err := render.MAC(router(mac("yes"))); err == nil {
		t.Error("the value yes of the annotation is accepted")
	}
}

// annotation returns an annotation of the pods' template.
func annotation(o render.Objects, key string) string {
	value, _, _ := unstructured.NestedString(o.Deployment.Object, "spec", "template", "metadata", "annotations", key)
	return value
}

// networks returns the annotation by which a pod selects its attachments.
func networks(t *testing.T, o render.Objects) string {
	t.Helper()
	text := annotation(o, render.NetworksAnnotation)
	if !json.Valid([]byte(text)) {
		t.Errorf("the annotation is not JSON: %s", text)
	}
	return text
}

func TestNetworksAnnotation(t *testing.T) {
	for _, test := range []struct {
		name    string
		router  *api.EgressRouter
		options render.Options
		want    string
	}{
		{"plain", router(), render.Options{}, `[{"name":"egress-router-cni-nad"}]`},
		{"fixed hardware address", router(mac("auto")), render.Options{}, `[{"name":"egress-router-cni-nad","mac":"02:e6:c0:a8:0c:63"}]`},
		{"default route", router(), render.Options{DefaultRoute: true}, `[{"name":"egress-router-cni-nad","default-route":["192.168.12.1"]}]`},
	} {
		t.Run(test.name, func(t *testing.T) {
			o, err := render.New(test.router, render.First(), test.options, false)
			if err != nil {
				t.Fatal(err)
			}
			if found := networks(t, o); found != test.want {
				t.Errorf("want %s\nfound %s", test.want, found)
			}
		})
	}
}

// A change of the attachment changes the pods' template, so that the pod is replaced. The
// same resource makes the same objects.
func TestHash(t *testing.T) {
	hash := func(r *api.EgressRouter) string {
		o, err := render.New(r, render.First(), render.Options{}, false)
		if err != nil {
			t.Fatal(err)
		}
		return annotation(o, render.HashAnnotation)
	}
	before := hash(router())
	if again := hash(router(func(r *api.EgressRouter) { r.Generation, r.ResourceVersion = 7, "7" })); again != before {
		t.Error("another generation makes another hash")
	}
	for name, change := range map[string]func(*api.EgressRouter){
		"address":  address("192.168.12.98/24"),
		"gateway":  func(r *api.EgressRouter) { r.Spec.Addresses[0].Gateway = "192.168.12.2" },
		"fallback": func(r *api.EgressRouter) { r.Spec.Redirect.FallbackIP = "203.0.113.28" },
		"rule": func(r *api.EgressRouter) {
			r.Spec.Redirect.RedirectRules = []object.RedirectRule{{DestinationIP: "203.0.113.26", Port: 80, Protocol: object.TCP}}
		},
		"master": func(r *api.EgressRouter) { r.Spec.NetworkInterface.Macvlan.Master = "eth1" },
		"mode":   func(r *api.EgressRouter) { r.Spec.NetworkInterface.Macvlan.Mode = object.Private },
		"mac":    mac("auto"),
	} {
		if hash(router(change)) == before {
			t.Errorf("another %s makes the same hash", name)
		}
	}
}
