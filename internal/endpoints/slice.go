package endpoints

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
)

// manager is the name of the program as a field manager of server-side apply, and as the
// value of the label managed-by.
const manager = "egress-router"

// heldAnnotation contains the start of the time of holding and the pod's name: see "Two
// writers".
const heldAnnotation = manager + "/held-since"

// The families of a Service, which are the address types of slices.
const (
	ipv4 = "IPv4"
	ipv6 = "IPv6"
)

// A service is what the slices of a Service follow from.
type service struct {
	namespace string
	uid       string
	families  []string
	ports     []port
}

// A serviceObject has the fields of a Service (v1) that are used.
type serviceObject struct {
	Metadata struct {
		Namespace string `json:"namespace"`
		UID       string `json:"uid"`
	} `json:"metadata"`
	Spec struct {
		Type       string            `json:"type"`
		Selector   map[string]string `json:"selector"`
		IPFamilies []string          `json:"ipFamilies"`
		Ports      []struct {
			port
			TargetPort json.RawMessage `json:"targetPort"` // a number, or the name of a pod's port
		} `json:"ports"`
	} `json:"spec"`
}

// A slice is an EndpointSlice (discovery.k8s.io/v1).
type slice struct {
	APIVersion  string     `json:"apiVersion"`
	Kind        string     `json:"kind"`
	Metadata    metadata   `json:"metadata"`
	AddressType string     `json:"addressType"`
	Endpoints   []endpoint `json:"endpoints"`
	Ports       []port     `json:"ports"`
}

type metadata struct {
	Name string `json:"name"`
	revision
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owners      []owner           `json:"ownerReferences,omitempty"`
}

// An owner is an object with which the slice is deleted: a slice that outlives its Service
// would be part of the next one with that name.
type owner struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	UID        string `json:"uid"`
}

// A revision is one content of one object, which may have been deleted and created again;
// the zero revision: there is no object.
type revision struct {
	UID             string `json:"uid,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

type endpoint struct {
	Addresses  []netip.Addr `json:"addresses"`
	Conditions conditions   `json:"conditions"`
	NodeName   string       `json:"nodeName,omitempty"`
	TargetRef  *reference   `json:"targetRef,omitempty"`
}

type conditions struct {
	Ready       bool `json:"ready"`
	Serving     bool `json:"serving"`
	Terminating bool `json:"terminating"`
}

type reference struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

type port struct {
	Name        string `json:"name"`
	Protocol    string `json:"protocol"`
	Port        uint16 `json:"port"`
	AppProtocol string `json:"appProtocol,omitempty"`
}

// service returns what slices follow from, or why a router cannot serve the Service.
func (s *serviceObject) service(o Options) (*service, error) {
	switch {
	case s.Spec.Type == "ExternalName":
		return nil, fmt.Errorf("reading Service %q: expected a Service with endpoints, found the type ExternalName", o.Service)
	case len(s.Spec.Selector) > 0:
		return nil, fmt.Errorf("reading Service %q: expected no selector, found one: Kubernetes adds all pods that it selects to the endpoints", o.Service)
	}
	served := false
	for _, family := range s.Spec.IPFamilies {
		served = served || address(o.Addresses, family).IsValid()
	}
	if !served {
		return nil, fmt.Errorf("reading Service %q: expected an IP family of which the pod has an address, found %q", o.Service, s.Spec.IPFamilies)
	}
	found := &service{s.Metadata.Namespace, s.Metadata.UID, s.Spec.IPFamilies, []port{}}
	for _, p := range s.Spec.Ports {
		name := p.Port
		if len(p.TargetPort) > 0 {
			if err := json.Unmarshal(p.TargetPort, &p.Port); err != nil {
				return nil, fmt.Errorf("reading Service %q, port %d: expected a number as targetPort, found %s: a name is resolved by the pods of a selector", o.Service, name, p.TargetPort)
			}
		}
		found.ports = append(found.ports, p.port)
	}
	return found, nil
}

// slices returns the slices that lead to this router, one for each family of the Service.
// The slice of a family of which the pod has no address has no endpoint, since the one of a
// former holder is wrong.
func (s *service) slices(o Options, since string) []slice {
	var all []slice
	for _, family := range s.families {
		one := slice{
			APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice",
			Metadata: metadata{
				Name: sliceName(o.Service, family),
				Labels: map[string]string{
					"kubernetes.io/service-name":             o.Service,
					"endpointslice.kubernetes.io/managed-by": manager,
				},
				// With the pod's name, since two nodes may have the same time.
				Annotations: map[string]string{heldAnnotation: strings.TrimSpace(since + " " + o.Pod)},
				Owners:      []owner{{"v1", "Service", o.Service, s.uid}},
			},
			AddressType: family, Endpoints: []endpoint{}, Ports: s.ports,
		}
		if a := address(o.Addresses, family); a.IsValid() {
			e := endpoint{Addresses: []netip.Addr{a}, Conditions: conditions{Ready: true, Serving: true}, NodeName: o.Node}
			if o.Pod != "" {
				e.TargetRef = &reference{"Pod", s.namespace, o.Pod}
			}
			one.Endpoints = append(one.Endpoints, e)
		}
		all = append(all, one)
	}
	return all
}

// sliceName returns the name of the slice of a Service and a family.
func sliceName(service, family string) string {
	if family == ipv6 {
		return service + "-" + manager + "-ipv6"
	}
	return service + "-" + manager
}

// address returns the first address of a family that other nodes reach; the zero Addr: none.
func address(all []netip.Addr, family string) netip.Addr {
	for _, a := range all {
		if a = a.Unmap(); a.Is6() == (family == ipv6) && !a.IsLinkLocalUnicast() {
			return a
		}
	}
	return netip.Addr{}
}

// text returns the slice as JSON.
func (s slice) text() string {
	text, _ := json.Marshal(s) // none of its types fails
	return string(text)
}
