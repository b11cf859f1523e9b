package config

import (
	"fmt"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Backend selects how rules are loaded into the kernel.
type Backend string

// The backends, by the values of EGRESS_ROUTER_BACKEND.
const (
	Auto     Backend = "auto"     // iptables if it works, otherwise nftables
	IPTables Backend = "iptables" // by the programs of iptables, of either flavour
	NFTables Backend = "nftables" // by netlink, without a program
)

// Backends lists every backend.
var Backends = []Backend{Auto, IPTables, NFTables}

// parseBackend parses the backend.
func (c *Config) parseBackend(s string) *Error {
	c.Backend = Backend(orDefault(s, string(Auto)))
	if slices.Contains(Backends, c.Backend) {
		return nil
	}
	var names []string
	for _, b := range Backends {
		names = append(names, string(b))
	}
	return &Error{"EGRESS_ROUTER_BACKEND", fmt.Sprintf("EGRESS_ROUTER_BACKEND %s is not a backend", quote(s)),
		orDefault(meant(s, names...), remedy("the backends are %s", strings.Join(names, ", ")))}
}

// The values of EGRESS_FORWARD.
const (
	forwardRedirected = "redirected"
	forwardOpen       = "open"
)

// parseForward parses the connections that cross from the cluster side.
func (c *Config) parseForward(s string) *Error {
	switch orDefault(s, forwardRedirected) {
	case forwardRedirected:
		return nil
	case forwardOpen:
		if !c.Mode.Redirects() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_FORWARD=%s has no effect in mode %s: nothing is forwarded", forwardOpen, c.Mode))
			return nil
		}
		c.Crossing = rules.CrossAll
		return nil
	}
	return choose("EGRESS_FORWARD", s, forwardRedirected, forwardOpen)
}

// parseHelpers parses the names of protocols, each once.
func (c *Config) parseHelpers(s string) *Error {
	var names, known []string
	for _, g := range rules.HelperGroups {
		known = append(known, g.Name)
	}
	for name := range strings.SplitSeq(s, ",") {
		name = strings.TrimSpace(name)
		at := slices.Index(known, name)
		switch {
		case name == "" || slices.Contains(names, name):
			continue
		case at < 0:
			return &Error{"EGRESS_HELPERS", fmt.Sprintf("EGRESS_HELPERS %s is not a helper", quote(name)), "hint: the helpers are " + strings.Join(known, ", ")}
		}
		names = append(names, name)
		c.Helpers = append(c.Helpers, rules.HelperGroups[at].Helpers...)
	}
	if s != "" && len(names) == 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_HELPERS %s names no helper", quote(s)))
	}
	if len(names) > 0 && !c.Mode.Redirects() {
		c.Helpers = nil
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_HELPERS has no effect in mode %s: nothing is redirected", c.Mode))
	}
	return nil
}
