package config

import (
	"fmt"
	"slices"
	"strings"
)

// A MacvlanMode is who else a macvlan exchanges frames with on the host
// (ip-link(8)).
type MacvlanMode string

// The modes, by the values of EGRESS_MACVLAN_MODE. The original's cluster
// network made private ones.
const (
	Private  MacvlanMode = "private"  // with no other macvlan of the same NIC
	Bridge   MacvlanMode = "bridge"   // with those in the same mode, inside the host
	VEPA     MacvlanMode = "vepa"     // with those whose frames the switch sends back
	Passthru MacvlanMode = "passthru" // there is no other, and the host loses the NIC
)

// MacvlanModes lists every mode.
var MacvlanModes = []MacvlanMode{Private, Bridge, VEPA, Passthru}

// DefaultHostNetns is the host's network namespace where the container shares
// the host's process numbers: that of its first process. Elsewhere the first
// process is the container's own, and so is its namespace.
const DefaultHostNetns = "/proc/1/ns/net"

// macvlanDefaultRoute is the value of EGRESS_MACVLAN_PARENT that names no NIC.
// It is that of the original's annotation assign-macvlan.
const macvlanDefaultRoute = "true"

// A Macvlan says how the router makes the egress interface itself.
type Macvlan struct {
	Parent    string // NIC of the host; empty: that of its IPv4 default route
	Mode      MacvlanMode
	HostNetns string // file of the host's network namespace
}

// parseMacvlan checks the variables of the macvlan, also where it is not
// wanted: a typing error is told at once, not when it is.
func (c *Config) parseMacvlan(env Environment) Errors {
	var faults Errors
	mode := MacvlanMode(orDefault(env.MacvlanMode, string(Private)))
	if !slices.Contains(MacvlanModes, mode) {
		var names []string
		for _, m := range MacvlanModes {
			names = append(names, string(m))
		}
		faults = append(faults, &Error{"EGRESS_MACVLAN_MODE", fmt.Sprintf("EGRESS_MACVLAN_MODE %q is not a mode of a macvlan", mode),
			"hint: the modes are " + strings.Join(names, ", ")})
	}
	if env.MacvlanParent == "" {
		for _, v := range []struct{ name, value string }{{"EGRESS_MACVLAN_MODE", env.MacvlanMode}, {"EGRESS_HOST_NETNS", env.HostNetns}} {
			if v.value != "" {
				c.Warnings = append(c.Warnings, v.name+" has no effect without EGRESS_MACVLAN_PARENT")
			}
		}
		return faults
	}
	if fault := checkInterface("EGRESS_MACVLAN_PARENT", env.MacvlanParent); fault != nil {
		faults = append(faults, fault)
	}
	c.Macvlan = &Macvlan{Parent: env.MacvlanParent, Mode: mode, HostNetns: orDefault(env.HostNetns, DefaultHostNetns)}
	if c.Macvlan.Parent == macvlanDefaultRoute {
		c.Macvlan.Parent = ""
	}
	return faults
}
