package object

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// PluginType is the type of an attachment: the name of the plugin's file.
const PluginType = "egress-router"

// An Attachment is the JSON of a network attachment, the configuration of the CNI plugin.
type Attachment struct {
	CNIVersion    string        `json:"cniVersion"`
	Type          string        `json:"type"`
	Name          string        `json:"name"`
	InterfaceType string        `json:"interfaceType,omitempty"` // macvlan
	InterfaceArgs InterfaceArgs `json:"interfaceArgs,omitzero"`
	IP            *IP           `json:"ip,omitempty"`
	// Capabilities are the keys of RuntimeConfig that the runtime may set.
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	// MonitorPort is the TCP port at which a container of the pod in mode monitor serves its
	// health; zero: there is none. The port is not redirected, and CHECK leaves the rules to
	// the container, which changes them with the resource.
	MonitorPort uint16 `json:"monitorPort,omitempty"`
	LogFile     string `json:"log_file,omitempty"`  // on the node
	LogLevel    string `json:"log_level,omitempty"` // debug, warning or error
}

// InterfaceArgs are the arguments of the macvlan.
type InterfaceArgs struct {
	Master Text `json:"master,omitempty"` // NIC of the node
	Mode   Text `json:"mode,omitempty"`   // bridge, private, vepa or passthru
	MTU    Text `json:"mtu,omitempty"`    // in bytes
}

// An IP is the addresses of an attachment.
type IP struct {
	// Addresses are the reserved addresses with the length of their subnet.
	Addresses []string `json:"addresses"`
	// Destinations are redirects, each PORT PROTOCOL IP, and the port of the server behind it
	// if it differs.
	Destinations []string `json:"destinations"`
	FallbackIP   string   `json:"fallbackIP,omitempty"`
	// Gateway is the gateway of the physical network, in a list those of both families.
	Gateway Texts `json:"gateway,omitempty"`
}

// A Text is a string that JSON may contain as a number.
type Text string

// UnmarshalJSON accepts a string and a number.
func (t *Text) UnmarshalJSON(b []byte) error {
	var n json.Number
	if err := json.Unmarshal(b, &n); err == nil && len(b) > 0 && b[0] != '"' {
		*t = Text(n.String())
		return nil
	}
	return json.Unmarshal(b, (*string)(t))
}

// Texts are strings, of which one is no list in JSON.
type Texts []string

// MarshalJSON returns one string without a list.
func (t Texts) MarshalJSON() ([]byte, error) {
	if len(t) == 1 {
		return json.Marshal(t[0])
	}
	return json.Marshal([]string(t))
}

// UnmarshalJSON accepts a string and a list. An empty string is an empty list.
func (t *Texts) UnmarshalJSON(b []byte) error {
	if len(b) == 0 || b[0] != '"' {
		return json.Unmarshal(b, (*[]string)(t))
	}
	var one string
	err := json.Unmarshal(b, &one)
	if one != "" {
		*t = Texts{one}
	}
	return err
}

// The log of the plugin on the node. They are not configurable in the resource.
const (
	LogFile  = "/tmp/egress-router-log"
	LogLevel = "debug"
)

// attachmentVersion is the version of the CNI specification of an attachment, that of the
// resource's original.
const attachmentVersion = "0.4.0"

// Attachment returns the attachment with a name for a valid resource.
func (s Spec) Attachment(name string) Attachment {
	a := Attachment{
		CNIVersion: attachmentVersion, Type: PluginType, Name: name,
		IP: &IP{Addresses: []string{}, Destinations: []string{}}, LogFile: LogFile, LogLevel: LogLevel,
	}
	if m := s.NetworkInterface.Macvlan; m.Master != "" || m.Mode != "" && m.Mode != Bridge {
		a.InterfaceType = "macvlan"
		a.InterfaceArgs = InterfaceArgs{Master: Text(m.Master), Mode: Text(strings.ToLower(string(m.Mode)))}
	}
	for _, address := range s.Addresses {
		a.IP.Addresses = append(a.IP.Addresses, address.IP)
		if g := address.Gateway; g != "" && !contains(a.IP.Gateway, g) {
			a.IP.Gateway = append(a.IP.Gateway, g)
		}
	}
	if s.Redirect == nil {
		return a
	}
	for _, r := range s.Redirect.RedirectRules {
		line := fmt.Sprintf("%d %s %s", r.Port, r.Protocol, r.DestinationIP)
		if r.TargetPort != 0 {
			line += fmt.Sprintf(" %d", r.TargetPort)
		}
		a.IP.Destinations = append(a.IP.Destinations, line)
	}
	a.IP.FallbackIP = s.Redirect.FallbackIP
	return a
}

// contains reports whether a list has an address, perhaps in another notation.
func contains(list []string, text string) bool {
	for _, other := range list {
		if a, why := spec.ParseAddress(text); other == text || why == "" && a.String() == other {
			return true
		}
	}
	return false
}

// attachmentPaths are the paths of an attachment.
var attachmentPaths = paths{
	macvlanMode:     "interfaceArgs.mode",
	macvlanMaster:   "interfaceArgs.master",
	macvlanMTU:      "interfaceArgs.mtu",
	addresses:       "ip.addresses",
	addressIP:       "ip.addresses[%d]",
	gateway:         "ip.gateway",
	rulePort:        "ip.destinations[%d]: port",
	ruleProtocol:    "ip.destinations[%d]: protocol",
	ruleDestination: "ip.destinations[%d]: address",
	ruleTarget:      "ip.destinations[%d]: target port",
	fallback:        "ip.fallbackIP",
}

// macvlanModes are the modes of a macvlan in an attachment.
var macvlanModes = []string{"bridge", "private", "vepa", "passthru"}

// Description returns the router that an attachment describes. The error is a Faults with
// every invalid key.
func (a Attachment) Description() (Description, error) {
	b := builder{paths: attachmentPaths}
	b.made.Forward = true
	if a.InterfaceType != "" && a.InterfaceType != "macvlan" {
		b.faults = append(b.faults, Fault{"interfaceType", fmt.Sprintf("is %q: expected macvlan", a.InterfaceType)})
	}
	b.setMacvlan(string(a.InterfaceArgs.Mode), string(a.InterfaceArgs.Master), macvlanModes)
	if mtu := string(a.InterfaceArgs.MTU); mtu != "" {
		var err error
		// The smallest MTU of IPv4 (RFC 791), and the largest of a frame (if_ether.h).
		if b.made.MTU, err = strconv.Atoi(mtu); err != nil || b.made.MTU != 0 && (b.made.MTU < 68 || b.made.MTU > 65535) {
			b.fault(macvlanMTU, 0, "is %q: expected a number of bytes from 68 to 65535", mtu)
		}
	}
	if a.IP == nil {
		b.faults = append(b.faults, Fault{"ip", "is missing: add addresses, gateway and destinations"})
		return b.done()
	}
	var gateways []indexed
	for i, g := range a.IP.Gateway {
		gateways = append(gateways, indexed{i, g})
	}
	b.setSources(a.IP.Addresses, gateways)
	for i, line := range a.IP.Destinations {
		f := strings.Fields(line)
		if len(f) != 3 && len(f) != 4 {
			b.faults = append(b.faults, Fault{fmt.Sprintf("ip.destinations[%d]", i),
				fmt.Sprintf("is %q: expected PORT PROTOCOL IP, and the port of the server behind it if it differs, for example 8080 TCP 203.0.113.26 80", line)})
			continue
		}
		w := words{port: f[0], protocol: f[1], address: f[2]}
		if len(f) == 4 {
			w.target = f[3]
		}
		b.addRule(i, w)
	}
	b.setFallback(a.IP.FallbackIP)
	return b.done()
}
