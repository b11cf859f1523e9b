package envtest

import (
	"encoding/json"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

// example is that of the platform's manual.
const example = `
apiVersion: network.operator.openshift.io/v1
kind: EgressRouter
metadata:
  name: egress-router-redirect
spec:
  networkInterface: {
    macvlan: {
      mode: "Bridge"
    }
  }
  addresses: [
    {
      ip: "192.168.12.99/24",
      gateway: "192.168.12.1"
    }
  ]
  mode: Redirect
  redirect: {
    redirectRules: [
      {
        destinationIP: "10.0.0.99",
        port: 80,
        protocol: UDP
      },
      {
        destinationIP: "203.0.113.26",
        port: 8080,
        targetPort: 80,
        protocol: TCP
      },
      {
        destinationIP: "203.0.113.27",
        port: 8443,
        targetPort: 443,
        protocol: TCP
      }
    ]
  }
`

// parse parses a manifest.
func parse(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
		t.Fatal(err)
	}
	return o
}

// set sets a field by a path such as spec.addresses.0.ip to a value in YAML; an empty
// value removes the field.
func set(t *testing.T, o *unstructured.Unstructured, path, value string) {
	t.Helper()
	var parsed any
	if err := yaml.Unmarshal([]byte(value), &parsed); err != nil {
		t.Fatal(err)
	}
	keys := strings.Split(path, ".")
	var at any = o.Object
	for i, key := range keys {
		last := i == len(keys)-1
		switch in := at.(type) {
		case map[string]any:
			if last && value == "" {
				delete(in, key)
			} else if last {
				in[key] = parsed
			}
			at = in[key]
		case []any:
			n := int(key[0] - '0')
			if last {
				in[n] = parsed
			}
			at = in[n]
		default:
			t.Fatalf("no field %s", path)
		}
	}
}

// The schema accepts and refuses what that of the platform does, so that a resource that
// was accepted there is accepted here. The policy and the operator report the rest.
func TestSchema(t *testing.T) {
	namespace := newNamespace(t)
	rule := func(field, value string) string {
		return `[{destinationIP: 10.0.0.99, port: 80, protocol: UDP, ` + field + `: ` + value + `}]`
	}
	for _, test := range []struct {
		name, path, value string
		refused           string // part of the message; empty: accepted
	}{
		{"as it is", "spec.mode", "Redirect", ""},
		{"no mode", "spec.mode", "", ""},
		{"no interface", "spec.networkInterface", "", ""},
		{"empty interface", "spec.networkInterface", "{}", ""},
		{"empty macvlan", "spec.networkInterface", "{macvlan: {}}", ""},
		{"private", "spec.networkInterface.macvlan.mode", "Private", ""},
		{"vepa", "spec.networkInterface.macvlan.mode", "VEPA", ""},
		{"passthru", "spec.networkInterface.macvlan.mode", "Passthru", ""},
		{"master", "spec.networkInterface.macvlan.master", "eth1", ""},
		{"no addresses in the list", "spec.addresses", "[]", ""},
		{"ip of any text", "spec.addresses.0.ip", "foo", ""},
		{"ip without length", "spec.addresses.0.ip", "192.168.12.99", ""},
		{"no gateway", "spec.addresses", "[{ip: 192.168.12.99/24}]", ""},
		{"gateway with leading zeros", "spec.addresses.0.gateway", "01.2.3.1", ""},
		{"gateway mapped into IPv6", "spec.addresses.0.gateway", "'::ffff:1.2.3.4'", ""},
		{"gateway of IPv6", "spec.addresses.0.gateway", "'fd00::1'", ""},
		{"no rules", "spec.redirect", "{fallbackIP: 203.0.113.26}", ""},
		{"neither rules nor fallback", "spec.redirect", "{}", ""},
		{"fallback", "spec.redirect.fallbackIP", "203.0.113.26", ""},
		{"the same port and protocol twice", "spec.redirect.redirectRules",
			"[{destinationIP: 10.0.0.99, port: 80, protocol: UDP}, {destinationIP: 10.0.0.98, port: 80, protocol: UDP}]", ""},
		{"sctp", "spec.redirect.redirectRules.0.protocol", "SCTP", ""},
		{"mixed families", "spec.redirect.redirectRules.0.destinationIP", "'2001:db8::1'", ""},
		{"largest port", "spec.redirect.redirectRules.0.port", "65535", ""},

		{"no redirect", "spec.redirect", "", "spec.redirect"},
		{"no addresses", "spec.addresses", "", "spec.addresses"},
		{"other mode", "spec.mode", "Proxy", "spec.mode"},
		{"mode in lower case", "spec.networkInterface.macvlan.mode", "bridge", "spec.networkInterface.macvlan.mode"},
		{"protocol in lower case", "spec.redirect.redirectRules.0.protocol", "tcp", "protocol"},
		{"port 0", "spec.redirect.redirectRules.0.port", "0", "port"},
		{"port 65536", "spec.redirect.redirectRules.0.port", "65536", "port"},
		{"target port 65536", "spec.redirect.redirectRules", rule("targetPort", "65536"), "targetPort"},
		{"rule without port", "spec.redirect.redirectRules", "[{destinationIP: 10.0.0.99, protocol: UDP}]", "port"},
		{"rule without protocol", "spec.redirect.redirectRules", "[{destinationIP: 10.0.0.99, port: 80}]", "protocol"},
		{"rule without destination", "spec.redirect.redirectRules", "[{port: 80, protocol: UDP}]", "destinationIP"},
		{"destination with length", "spec.redirect.redirectRules.0.destinationIP", "10.0.0.99/30", "destinationIP"},
		{"destination is a name", "spec.redirect.redirectRules.0.destinationIP", "example.com", "destinationIP"},
		{"gateway with length", "spec.addresses.0.gateway", "192.168.12.1/24", "gateway"},
		{"fallback with length", "spec.redirect.fallbackIP", "203.0.113.26/32", "fallbackIP"},
	} {
		t.Run(test.name, func(t *testing.T) {
			router := parse(t, example)
			router.SetNamespace(namespace)
			set(t, router, test.path, test.value)
			err := cluster.Create(t.Context(), router, client.DryRunAll)
			switch {
			case test.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.refused != "" && (!apierrors.IsInvalid(err) || !strings.Contains(err.Error(), test.refused)):
				t.Errorf("want a refusal of %s, found %v", test.refused, err)
			}
			if err != nil {
				return
			}
			mode, _, _ := unstructured.NestedString(router.Object, "spec", "mode")
			how, _, _ := unstructured.NestedString(router.Object, "spec", "networkInterface", "macvlan", "mode")
			if mode != "Redirect" || how == "" {
				text, _ := json.Marshal(router.Object["spec"])
				t.Errorf("without defaults: %s", text)
			}
		})
	}
}
