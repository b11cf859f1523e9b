package envtest

import (
	"context"
	"strings"
	"sync"
	"testing"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// warnings collects the warnings of an API server.
type warnings struct {
	sync.Mutex
	all []string
}

func (w *warnings) HandleWarningHeaderWithContext(_ context.Context, _ int, _, text string) {
	w.Lock()
	defer w.Unlock()
	w.all = append(w.all, text)
}

func (w *warnings) take() string {
	w.Lock()
	defer w.Unlock()
	all := strings.Join(w.all, "\n")
	w.all = nil
	return all
}

// The policy warns of what the schema accepts and the plugin refuses, and refuses nothing.
func TestAdmission(t *testing.T) {
	namespace := newNamespace(t)
	var w warnings
	c := rest.CopyConfig(admin)
	c.WarningHandlerWithContext = &w
	author, err := client.New(c, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	apply := func(t *testing.T, path, value string) string {
		t.Helper()
		router := parse(t, example)
		router.SetNamespace(namespace)
		set(t, router, path, value)
		w.take()
		if err := author.Create(t.Context(), router, client.DryRunAll); err != nil {
			t.Fatalf("refused: %v", err)
		}
		return w.take()
	}
	// The API server compiles a policy some time after it was created.
	eventually(t, "wait for the policy", func() (bool, any) {
		return apply(t, "spec.addresses", "[]") != "", nil
	})
	for _, test := range []struct{ name, path, value, want string }{
		{"as it is", "spec.mode", "Redirect", ""},
		{"neither rules nor fallback", "spec.redirect", "{}", ""},
		{"fallback alone", "spec.redirect", "{fallbackIP: 203.0.113.26}", ""},
		{"IPv6", "spec.addresses", "[{ip: 192.168.12.99/24}, {ip: '2001:db8::99/64', gateway: '2001:db8::1'}]", ""},
		{"no addresses", "spec.addresses", "[]", "spec.addresses is empty"},
		{"ip of any text", "spec.addresses.0.ip", "foo", `ip is "foo": expected an IPv4 or IPv6 address`},
		{"ip with leading zeros", "spec.addresses.0.ip", "192.168.012.99/24", `ip is "192.168.012.99/24": expected`},
		{"ip with a length of 33", "spec.addresses.0.ip", "192.168.12.99/33", `ip is "192.168.12.99/33": expected`},
		{"ip without length", "spec.addresses.0.ip", "192.168.12.99", `ip is "192.168.12.99", without the length`},
		{"gateway with leading zeros", "spec.addresses.0.gateway", "01.2.3.1", `gateway is "01.2.3.1": expected`},
		{"gateway mapped into IPv6", "spec.addresses.0.gateway", "'::ffff:1.2.3.4'", `gateway is "::ffff:1.2.3.4": expected`},
		{"gateway of another family", "spec.addresses.0.gateway", "'2001:db8::1'", `gateway is "2001:db8::1": there is no reserved address of its family`},
		{"two addresses of a family", "spec.addresses", "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: 192.168.12.98/24, gateway: 192.168.12.1}]", ""},
		{"an address twice", "spec.addresses", "[{ip: 192.168.12.99/24}, {ip: 192.168.12.99/28}]", "an ip is there twice"},
		{"the gateway is a reserved address", "spec.addresses.0.gateway", "192.168.12.99", "a gateway is also a reserved address"},
		{"two gateways of a family", "spec.addresses", "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: 192.168.12.98/24, gateway: 192.168.12.2}]", "two gateways of one family"},
		{"a gateway of each family", "spec.addresses", "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: '2001:db8::99/64', gateway: '2001:db8::1'}]", ""},
		{"master", "spec.networkInterface.macvlan.master", "eth1.100", ""},
		{"master with a name that no NIC has", "spec.networkInterface.macvlan.master", "enp0s31f6.vlan.100", "spec.networkInterface.macvlan.master: expected the name of a NIC"},
		{"destination with leading zeros", "spec.redirect.redirectRules.0.destinationIP", "010.0.0.99", `destination is "010.0.0.99": expected`},
		{"destination of another family", "spec.redirect.redirectRules.0.destinationIP", "'2001:db8::1'", `destination is "2001:db8::1": there is no reserved address`},
		{"fallback of another family", "spec.redirect.fallbackIP", "'2001:db8::1'", `destination is "2001:db8::1": there is no reserved address`},
		{"the same port and protocol twice", "spec.redirect.redirectRules",
			"[{destinationIP: 10.0.0.99, port: 80, protocol: UDP}, {destinationIP: 10.0.0.98, port: 80, protocol: UDP}]", "twice"},
		{"the same port, and another protocol", "spec.redirect.redirectRules",
			"[{destinationIP: 10.0.0.99, port: 80, protocol: UDP}, {destinationIP: 10.0.0.98, port: 80, protocol: TCP}]", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			found := apply(t, test.path, test.value)
			if test.want == "" && found != "" || !strings.Contains(found, test.want) {
				t.Errorf("want a warning with %q, found %q", test.want, found)
			}
		})
	}
}
