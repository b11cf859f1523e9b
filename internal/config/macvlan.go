package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// DefaultHostNetns is the network namespace of process 1, which is the host's if the
// container shares the host's PID namespace. Otherwise it is the container's own.
const DefaultHostNetns = "/proc/1/ns/net"

// macvlanDefaultRoute is the value of EGRESS_MACVLAN_PARENT for the NIC of the
// default route, as in the original's annotation assign-macvlan.
const macvlanDefaultRoute = "true"

// parseMacvlan validates the variables of the macvlan, even without a macvlan, so
// that a typing error is reported at once.
func (c *Config) parseMacvlan(env Environment) Errors {
	var faults Errors
	mode := spec.MacvlanMode(orDefault(env.MacvlanMode, string(spec.Private)))
	if !slices.Contains(spec.MacvlanModes, mode) {
		var names []string
		for _, m := range spec.MacvlanModes {
			names = append(names, string(m))
		}
		faults = append(faults, &Error{"EGRESS_MACVLAN_MODE", fmt.Sprintf("EGRESS_MACVLAN_MODE %s is not a mode of a macvlan", quote(string(mode))),
			orDefault(meant(string(mode), names...), remedy("the modes are %s", strings.Join(names, ", ")))})
	}
	if env.MacvlanParent == "" {
		for _, v := range []struct{ name, value string }{{"EGRESS_MACVLAN_MODE", env.MacvlanMode}, {"EGRESS_HOST_NETNS", env.HostNetns}} {
			if v.value != "" {
				c.Warnings = append(c.Warnings, v.name+" has no effect without EGRESS_MACVLAN_PARENT")
			}
		}
		return faults
	}
	if fault := checkParent(env.MacvlanParent); fault != nil {
		faults = append(faults, fault)
	}
	c.Macvlan = &spec.Macvlan{Parent: env.MacvlanParent, Mode: mode, HostNetns: orDefault(env.HostNetns, DefaultHostNetns)}
	if c.Macvlan.Parent == macvlanDefaultRoute {
		c.Macvlan.Parent = ""
	}
	return faults
}

// checkParent accepts the name of a NIC, and true. Other spellings of a boolean could
// be names, too, but hardly are: the router would look for such a NIC in the host's
// namespace.
func checkParent(s string) *Error {
	const variable = "EGRESS_MACVLAN_PARENT"
	is, boolean := booleans[strings.ToLower(s)]
	switch {
	case s == macvlanDefaultRoute || !boolean || len(s) == 1 && s != "0" && s != "1":
		return checkInterface(variable, s)
	case is == "true":
		return &Error{variable, fmt.Sprintf("%s %q is not a NIC of the host", variable, s), remedy("write true for the NIC of the host's IPv4 default route, or the name of a NIC")}
	}
	return &Error{variable, fmt.Sprintf("%s %q is not a NIC of the host", variable, s), remedy("unset the variable if another program creates the egress interface")}
}
