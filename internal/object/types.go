package object

// The types are those of the group network.operator.openshift.io, version v1, kind
// EgressRouter, whose schema is that of the platform which introduced it.

// A Spec is what a user wants of an egress router.
type Spec struct {
	// Mode is always Redirect.
	Mode Mode `json:"mode,omitempty"`
	// NetworkInterface is the interface on the physical network.
	NetworkInterface NetworkInterface `json:"networkInterface,omitzero"`
	// Addresses are the reserved addresses. The first one of each family is the source of
	// connections.
	Addresses []Address `json:"addresses"`
	// Redirect is where connections are redirected to.
	Redirect *Redirect `json:"redirect,omitempty"`
}

// A Mode is what a router does with connections.
type Mode string

// ModeRedirect redirects connections to the router's ports.
const ModeRedirect Mode = "Redirect"

// A NetworkInterface describes the interface on the physical network.
type NetworkInterface struct {
	// Macvlan is a macvlan of a NIC of the node.
	Macvlan Macvlan `json:"macvlan,omitzero"`
}

// A Macvlan describes a macvlan.
type Macvlan struct {
	// Mode selects the macvlans of the node that exchange frames with it.
	Mode MacvlanMode `json:"mode,omitempty"`
	// Master is the NIC of the node. If it is empty, the node chooses one.
	Master string `json:"master,omitempty"`
}

// A MacvlanMode selects the macvlans that exchange frames with a macvlan (ip-link(8)).
type MacvlanMode string

// The modes of a macvlan.
const (
	Bridge   MacvlanMode = "Bridge"
	Private  MacvlanMode = "Private"
	VEPA     MacvlanMode = "VEPA"
	Passthru MacvlanMode = "Passthru"
)

// An Address is a reserved address.
type Address struct {
	// IP is the address with the length of its subnet, for example 192.168.12.99/24.
	IP string `json:"ip"`
	// Gateway is the address of the gateway of the physical network.
	Gateway string `json:"gateway,omitempty"`
}

// A Redirect is where connections are redirected to.
type Redirect struct {
	// RedirectRules are the ports that are redirected, each to a server of its own.
	RedirectRules []RedirectRule `json:"redirectRules,omitempty"`
	// FallbackIP is the server for all other ports. Without it they are refused.
	FallbackIP string `json:"fallbackIP,omitempty"`
}

// A RedirectRule redirects a port.
type RedirectRule struct {
	// DestinationIP is the server.
	DestinationIP string `json:"destinationIP"`
	// Port is the port of the router, from 1 to 65535.
	Port int32 `json:"port"`
	// TargetPort is the port of the server. If it is absent, it is the same as Port.
	TargetPort int32 `json:"targetPort,omitempty"`
	// Protocol is TCP, UDP or SCTP.
	Protocol Protocol `json:"protocol"`
}

// A Protocol is the protocol of a port.
type Protocol string

// The protocols.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)
