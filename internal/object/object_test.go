package object

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// documented is the resource of the original's documentation.
const documented = `
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

func parse(t *testing.T, text string) Spec {
	t.Helper()
	s, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDocumentedResource(t *testing.T) {
	s := parse(t, documented)
	d, err := s.Description()
	if err != nil {
		t.Fatal(err)
	}
	if want := (spec.Sources{{Prefix: netip.MustParsePrefix("192.168.12.99/24"), Gateway: netip.MustParseAddr("192.168.12.1")}}); !cmp.Equal(d.Sources, want, cmp.Comparer(func(a, b spec.Source) bool { return a == b })) {
		t.Errorf("sources %v, want %v", d.Sources, want)
	}
	if want := "80 udp 10.0.0.99\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.27 443\n"; d.Set.String() != want || d.Warnings != nil {
		t.Errorf("set, warnings %q:\n%swant:\n%s", d.Warnings, d.Set, want)
	}
}

func TestAttachmentOfDocumentedResource(t *testing.T) {
	got, err := json.MarshalIndent(parse(t, documented).Attachment("egress-router-cni-nad"), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	const want = `{
  "cniVersion": "0.4.0",
  "type": "egress-router",
  "name": "egress-router-cni-nad",
  "ip": {
    "addresses": [
      "192.168.12.99/24"
    ],
    "destinations": [
      "80 UDP 10.0.0.99",
      "8080 TCP 203.0.113.26 80",
      "8443 TCP 203.0.113.27 443"
    ],
    "gateway": "192.168.12.1"
  },
  "log_file": "/tmp/egress-router-log",
  "log_level": "debug"
}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("attachment (-want +got):\n%s", diff)
	}
}

// dual has everything that a resource can have.
const dual = `
networkInterface: {macvlan: {mode: VEPA, master: eth1}}
addresses:
- {ip: 192.168.12.99/24, gateway: 192.168.12.1}
- {ip: 192.168.12.98/24, gateway: 192.168.12.1}
- {ip: "2001:db8:12::99/64", gateway: "2001:0db8:12::1"}
- {ip: "2001:db8:12::98/64", gateway: "2001:db8:12::1"}
redirect:
  redirectRules:
  - {destinationIP: 203.0.113.26, port: 80, protocol: SCTP, targetPort: 81}
  - {destinationIP: "2001:db8::26", port: 80, protocol: SCTP}
  - {destinationIP: 203.0.113.26, port: 80, protocol: TCP, targetPort: 80}
  fallbackIP: "2001:db8::27"
`

// A router described by an attachment is the same as that of its resource.
func TestAttachmentDescribesSameRouter(t *testing.T) {
	for name, text := range map[string]string{"documented": documented, "dual": dual} {
		s := parse(t, text)
		want, err := s.Description()
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(s.Attachment("x"))
		if err != nil {
			t.Fatal(err)
		}
		var a Attachment
		if err := json.Unmarshal(b, &a); err != nil {
			t.Fatal(err)
		}
		got, err := a.Description()
		if err != nil {
			t.Fatal(err)
		}
		if got.Sources.String() != want.Sources.String() || got.Sources.Gateways() != want.Sources.Gateways() || got.Set.String() != want.Set.String() || got.Mode != want.Mode || got.Master != want.Master {
			t.Errorf("%s: attachment %s\n is %+v\nwant %+v", name, b, got, want)
		}
	}
}

// valid is a resource in JSON, of which tests replace a part.
const valid = `{"addresses": [{"ip": "192.168.12.99/24", "gateway": "192.168.12.1"}], "redirect": {"redirectRules": [{"destinationIP": "203.0.113.26", "port": 80, "protocol": "TCP"}], "fallbackIP": "203.0.113.27"}}`

func TestFaultsOfResourceNameTheirField(t *testing.T) {
	for _, test := range []struct{ old, new, want string }{
		{`{"addresses"`, `{"mode": "Proxy", "addresses"`, `spec.mode is "Proxy": expected Redirect, the only mode`},
		{`{"addresses"`, `{"networkInterface": {"macvlan": {"mode": "Ring"}}, "addresses"`, `spec.networkInterface.macvlan.mode is "Ring": expected one of Bridge, Private, VEPA, Passthru`},
		{`{"addresses"`, `{"networkInterface": {"macvlan": {"master": "eth/1"}}, "addresses"`, `spec.networkInterface.macvlan.master is "eth/1": expected the name of a NIC of the node, for example eth1`},
		{`{"ip": "192.168.12.99/24", "gateway": "192.168.12.1"}`, ``, `spec.addresses is empty: add the reserved address with the length of its subnet, for example 192.168.12.99/24`},
		{`192.168.12.99/24`, `foo`, `spec.addresses[0].ip is "foo": expected an IPv4 or IPv6 address`},
		{`192.168.12.99/24`, `192.168.12.99/33`, `spec.addresses[0].ip is "192.168.12.99/33": the length after the slash is a number from 0 to 32`},
		{`192.168.12.99/24`, `::ffff:1.2.3.4/24`, `spec.addresses[0].ip is "::ffff:1.2.3.4/24": an IPv4 address within IPv6: write 1.2.3.4`},
		{`"192.168.12.1"}`, `"192.168.12.1"}, {"ip": "192.168.12.99/25"}`, `spec.addresses[1].ip is "192.168.12.99": it is there twice: remove one`},
		{`192.168.12.99/24`, `127.0.0.1/8`, `spec.addresses[0].ip is "127.0.0.1": a loopback address cannot be the source of connections`},
		{`192.168.12.99/24`, `192.168.12.255/24`, `spec.addresses[0].ip is "192.168.12.255": the broadcast address of 192.168.12.0/24 cannot be the source of connections`},
		{`"192.168.12.1"`, `"224.0.0.1"`, `spec.addresses[0].gateway is "224.0.0.1": a multicast address cannot be a gateway`},
		{`"192.168.12.99/24", "gateway": "192.168.12.1"}`, `"192.168.12.99/24"}, {"ip": "192.168.12.98/24", "gateway": "192.168.12.99"}`, `spec.addresses[1].gateway is "192.168.12.99": it is the same as spec.addresses: the gateway is another host`},
		{`"192.168.12.1"`, `"01.2.3.1"`, `spec.addresses[0].gateway is "01.2.3.1": an IPv4 address is four numbers from 0 to 255, without leading zeros`},
		{`"192.168.12.1"`, `"192.168.12.1/24"`, `spec.addresses[0].gateway is "192.168.12.1/24": expected one address, without a length`},
		{`"192.168.12.1"`, `"2001:db8::1"`, `spec.addresses[0].gateway is "2001:db8::1": there is no reserved address of IPv6`},
		{`"192.168.12.1"}`, `"192.168.12.1"}, {"ip": "192.168.12.98/24", "gateway": "192.168.12.2"}`, `spec.addresses[1].gateway is "192.168.12.2", and 192.168.12.1 before it: the addresses of a family have one gateway`},
		{`"port": 80`, `"port": 0`, `spec.redirect.redirectRules[0].port is 0: expected a port from 1 to 65535`},
		{`"port": 80`, `"port": 80, "targetPort": 70000`, `spec.redirect.redirectRules[0].targetPort is 70000: expected a port from 1 to 65535`},
		{`"port": 80`, `"port": 80, "targetPort": 0`, `spec.redirect.redirectRules[0].targetPort is 0: expected a port from 1 to 65535`},
		{`{"ip": "192.168.12.99/24"`, strings.Repeat(`{"ip": "192.168.12.99/24"}, `, 64) + `{"ip": "192.168.12.99/24"`, `spec.addresses has 65 entries: expected at most 32 of each family`},
		{`"TCP"`, `"ICMP"`, `spec.redirect.redirectRules[0].protocol is "ICMP": expected TCP, UDP or SCTP`},
		{`203.0.113.26`, `203.0.113.260`, `spec.redirect.redirectRules[0].destinationIP is "203.0.113.260": an IPv4 address is four numbers from 0 to 255, without leading zeros`},
		{`203.0.113.26`, `2001:db8::26`, `spec.redirect.redirectRules[0].destinationIP is "2001:db8::26": it is for IPv6, and spec.addresses has no IPv6 address (connections leave with a source of the same family: remove it, or reserve an address for them)`},
		{`203.0.113.27`, `server`, `spec.redirect.fallbackIP is "server": expected an IPv4 or IPv6 address`},
		{`"redirect": {`, `"redirect": null, "x": {`, `spec.x is unknown: the fields are addresses, mode, networkInterface, redirect`},
		{`"redirect": {`, `"redirect": {"rules": 1, `, `spec.redirect.rules is unknown: the fields are fallbackIP, redirectRules`},
		{`"port": 80`, `"port": "http"`, `spec.redirect.redirectRules[0].port is the text "http": expected a whole number`},
		{`[{"ip": "192.168.12.99/24", "gateway": "192.168.12.1"}]`, `"192.168.12.99/24"`, `spec.addresses is the text "192.168.12.99/24": expected a list`},
		{`"203.0.113.27"`, `7`, `spec.redirect.fallbackIP is 7: expected a text`},
	} {
		text := strings.Replace(valid, test.old, test.new, 1)
		s, err := Parse([]byte(text))
		if err == nil {
			_, err = s.Description()
		}
		if err == nil || err.Error() != test.want {
			t.Errorf("%s:\n got %v\nwant %s", text, err, test.want)
		}
	}
}

func TestMissingRedirectIsFault(t *testing.T) {
	_, err := parse(t, `{"addresses": [{"ip": "192.168.12.99/24"}]}`).Description()
	if want := "spec.redirect is missing: add redirectRules, fallbackIP, or both; {} redirects nothing"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestAllFaultsAreReported(t *testing.T) {
	_, err := parse(t, `{"addresses": [{"ip": "foo"}], "redirect": {"fallbackIP": "bar"}}`).Description()
	faults, _ := err.(Faults)
	if len(faults) != 2 {
		t.Errorf("got %v, want two faults", err)
	}
}

func TestAcceptedInputWithWarning(t *testing.T) {
	for _, test := range []struct{ old, new, warning, set string }{
		{`99/24`, `99`, `spec.addresses[0].ip is "192.168.12.99", without the length of its subnet: hosts of the subnet are reached by the gateway`, ""},
		{`"protocol": "TCP"}`, `"protocol": "TCP"}, {"destinationIP": "203.0.113.25", "port": 80, "protocol": "tcp"}`,
			`spec.redirect.redirectRules[1].port is 80 of tcp, as an earlier one: the first one is used`, "80 tcp 203.0.113.26\n203.0.113.27\n"},
		{`"192.168.12.1"`, `"192.168.13.1"`, `spec.addresses[0].gateway is "192.168.13.1": 192.168.13.1 is outside of the subnet of spec.addresses, 192.168.12.0/24: check both, and the length`, ""},
		{`"protocol": "TCP"}`, `"protocol": "TCP"}, {"destinationIP": "203.0.113.25", "port": 80, "protocol": "TCP"}, {"destinationIP": "192.168.12.99", "port": 81, "protocol": "TCP"}`,
			`spec.redirect.redirectRules[1].port is 80 of TCP, as an earlier one: the first one is used; spec.redirect.redirectRules[2].destinationIP is "192.168.12.99": 192.168.12.99 is the reserved address: connections redirected to it end in the pod`, ""},
		{`203.0.113.27`, `255.255.255.255`, `spec.redirect.fallbackIP is "255.255.255.255": 255.255.255.255 is the broadcast address: connections redirected to it fail`, ""},
	} {
		d, err := parse(t, strings.Replace(valid, test.old, test.new, 1)).Description()
		if err != nil {
			t.Error(err)
		}
		if got := strings.Join(d.Warnings, "; "); got != test.warning {
			t.Errorf("warnings:\n got %s\nwant %s", got, test.warning)
		}
		if test.set != "" && d.Set.String() != test.set {
			t.Errorf("set:\n got %swant %s", d.Set, test.set)
		}
	}
}

func TestOneDocumentAmongEmptyOnes(t *testing.T) {
	for _, text := range []string{"# a comment\n---\n" + documented, "---\n" + documented + "...\n---\n# the end\n", "%YAML 1.1\n---\r\n" + valid + "\r\n---\r\n"} {
		if _, err := parse(t, text).Description(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestOtherDocumentsAreErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":          "expected an object with the field spec",
		"- 1":       "expected an object with the field spec",
		"a: b: c":   "parse EgressRouter: ",
		"{a: 1, ":   "parse EgressRouter: ",
		"kind: Pod": `kind is "Pod": expected EgressRouter; spec is missing`,
		"{apiVersion: v1, kind: List, items: [], spec: {}}":                            "save one object with kubectl get egressrouter NAME -o yaml",
		"{apiVersion: network.operator.openshift.io/v2, kind: EgressRouter, spec: {}}": `apiVersion is "network.operator.openshift.io/v2"`,
		"{addresses: [], addresses: []}":                                               "already set",
		documented + "---\n" + valid:                                                   "parse EgressRouter: expected one document, found 2",
		"--- " + valid + "\n...\n" + valid:                                             "parse EgressRouter: expected one document, found 2",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}

func TestAttachmentAcceptsMoreThanResource(t *testing.T) {
	var a Attachment
	if err := json.Unmarshal([]byte(`{"interfaceType": "macvlan", "interfaceArgs": {"master": "eth1", "mode": "Private", "mtu": 1400}, "ip": {
		"addresses": ["192.168.12.99/24", "2001:db8:12::99/64"], "gateway": ["192.168.12.1", "fe80::1"],
		"destinations": ["80 udp 203.0.113.25/30", "  8080   Tcp 203.0.113.26/30 80 ", "80 UDP 203.0.113.27", "80 sctp 2001:db8::26/64"]}}`), &a); err != nil {
		t.Fatal(err)
	}
	d, err := a.Description()
	if err != nil {
		t.Fatal(err)
	}
	if d.Master != "eth1" || d.Mode != "private" || d.MTU != 1400 || d.Sources.Gateways() != "192.168.12.1, fe80::1" {
		t.Errorf("got %+v", d)
	}
	if want := "80 udp 203.0.113.25\n8080 tcp 203.0.113.26 80\n80 sctp 2001:db8::26\n"; d.Set.String() != want {
		t.Errorf("set:\n got %s\nwant %s", d.Set, want)
	}
	if want := []string{"ip.destinations[2]: port is 80 of UDP, as an earlier one: the first one is used"}; !cmp.Equal(d.Warnings, want) {
		t.Errorf("warnings:\n got %q\nwant %q", d.Warnings, want)
	}
}

func TestFaultsOfAttachmentNameTheirKey(t *testing.T) {
	for text, want := range map[string]string{
		`{}`: "ip is missing: add addresses, gateway and destinations",
		`{"interfaceType": "ipvlan", "interfaceArgs": {"mtu": "big", "mode": "Ring"}, "ip": {"addresses": ["192.168.12.99/24"]}}`: `interfaceType is "ipvlan": expected macvlan; interfaceArgs.mode is "Ring": expected one of bridge, private, vepa, passthru; interfaceArgs.mtu is "big": expected a number of bytes from 68 to 65535`,
		`{"ip": {"addresses": ["192.168.12.99/24"], "destinations": ["80 TCP 203.0.113.25", "80 TCP"]}}`:                          `ip.destinations[1] is "80 TCP": expected PORT PROTOCOL IP, and the port of the server behind it if it differs, for example 8080 TCP 203.0.113.26 80`,
		`{"ip": {"addresses": ["192.168.12.99/24"], "destinations": ["080 TCP 203.0.113.25/33"]}}`:                                `ip.destinations[0]: port is 080: expected a port from 1 to 65535; ip.destinations[0]: address is "203.0.113.25/33": a length is not needed, and this one is none`,
		`{"ip": {"addresses": ["192.168.12.99/24"], "gateway": "192.168.12.99", "fallbackIP": "::1"}}`:                            `ip.gateway is "192.168.12.99": it is the same as ip.addresses: the gateway is another host; ip.fallbackIP is "::1": it is for IPv6, and ip.addresses has no IPv6 address (connections leave with a source of the same family: remove it, or reserve an address for them)`,
	} {
		var a Attachment
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Description(); err == nil || err.Error() != want {
			t.Errorf("%s:\n got %v\nwant %s", text, err, want)
		}
	}
}

// Only a Redirect of the resource has protocols, so every one has to be known to rules.
func TestProtocolsAreThoseOfRules(t *testing.T) {
	for name, p := range protocols {
		if !strings.EqualFold(name, p.String()) {
			t.Errorf("%s is %s", name, p)
		}
	}
	if len(protocols) != len([]rules.Protocol{rules.TCP, rules.UDP, rules.SCTP}) {
		t.Error("a protocol is missing")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{documented, dual, valid, "", "spec: [", "kind: List"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		want, err := s.Description()
		if err != nil {
			return
		}
		got, err := s.Attachment("x").Description()
		if err != nil || got.Set.String() != want.Set.String() || got.Sources.String() != want.Sources.String() {
			t.Errorf("attachment of %q is %v (%v), want %v", text, got, err, want)
		}
	})
}
