package object

// The markers are those of controller-gen, which makes the schema and the deep copies of
// them (package api of the operator). The types are those of the group network.operator.openshift.io, version v1, kind
// EgressRouter, whose schema is that of the platform which introduced it.

// A Spec is what a user wants of an egress router.
//
// +kubebuilder:object:generate=true
type Spec struct {
	// Mode is always Redirect.
	//
	// +kubebuilder:default=Redirect
	// +optional
	Mode Mode `json:"mode,omitempty"`
	// NetworkInterface is the interface on the physical network.
	//
	// +kubebuilder:default={macvlan: {mode: Bridge}}
	// +optional
	NetworkInterface NetworkInterface `json:"networkInterface,omitzero"`
	// Addresses are the reserved addresses. The first one of each family is the source of
	// connections.
	//
	// +listType=atomic
	Addresses []Address `json:"addresses"`
	// Redirect is where connections are redirected to.
	//
	// +kubebuilder:validation:Required
	Redirect *Redirect `json:"redirect,omitempty"`
}

// A Mode is what a router does with connections.
//
// +kubebuilder:validation:Enum=Redirect
type Mode string

// ModeRedirect redirects connections to the router's ports.
const ModeRedirect Mode = "Redirect"

// A NetworkInterface describes the interface on the physical network.
//
// +kubebuilder:object:generate=true
type NetworkInterface struct {
	// Macvlan is a macvlan of a NIC of the node.
	//
	// +kubebuilder:default={mode: Bridge}
	// +optional
	Macvlan Macvlan `json:"macvlan,omitzero"`
}

// A Macvlan describes a macvlan.
//
// +kubebuilder:object:generate=true
type Macvlan struct {
	// Mode selects the macvlans of the node that exchange frames with it.
	//
	// +kubebuilder:default=Bridge
	// +optional
	Mode MacvlanMode `json:"mode,omitempty"`
	// Master is the NIC of the node. If it is empty, the node chooses one.
	Master string `json:"master,omitempty"`
}

// A MacvlanMode selects the macvlans that exchange frames with a macvlan (ip-link(8)).
//
// +kubebuilder:validation:Enum=Bridge;Private;VEPA;Passthru
type MacvlanMode string

// The modes of a macvlan.
const (
	Bridge   MacvlanMode = "Bridge"
	Private  MacvlanMode = "Private"
	VEPA     MacvlanMode = "VEPA"
	Passthru MacvlanMode = "Passthru"
)

// An Address is a reserved address.
//
// +kubebuilder:object:generate=true
type Address struct {
	// IP is the address with the length of its subnet, for example 192.168.12.99/24.
	IP string `json:"ip"`
	// Gateway is the address of the gateway of the physical network.
	//
	// +egress-router:ip
	// +optional
	Gateway string `json:"gateway,omitempty"`
}

// A Redirect is where connections are redirected to.
//
// +kubebuilder:object:generate=true
type Redirect struct {
	// RedirectRules are the ports that are redirected, each to a server of its own.
	//
	// +listType=atomic
	// +optional
	RedirectRules []RedirectRule `json:"redirectRules,omitempty"`
	// FallbackIP is the server for all other ports. Without it they are refused.
	//
	// +egress-router:ip
	// +optional
	FallbackIP string `json:"fallbackIP,omitempty"`
}

// A RedirectRule redirects a port.
//
// +kubebuilder:object:generate=true
type RedirectRule struct {
	// DestinationIP is the server.
	//
	// +egress-router:ip
	DestinationIP string `json:"destinationIP"`
	// Port is the port of the router, from 1 to 65535.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`
	// TargetPort is the port of the server. If it is absent, it is the same as Port.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	// +optional
	TargetPort int32 `json:"targetPort,omitempty"`
	// Protocol is TCP, UDP or SCTP.
	Protocol Protocol `json:"protocol"`
}

// A Protocol is the protocol of a port.
//
// +kubebuilder:validation:Enum=TCP;UDP;SCTP
type Protocol string

// The protocols.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)
