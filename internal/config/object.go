package config

import (
	"errors"
	"fmt"
	"slices"

	"github.com/egress-router/egress-router/internal/object"
)

// parseObject reads the file of EGRESS_CONFIG, which has the reserved addresses and the
// destinations. Its interface is that of the CNI plugin: here it exists, or
// EGRESS_MACVLAN_PARENT creates it.
func (c *Config) parseObject(env Environment, readFile func(name string) ([]byte, error)) Errors {
	const variable = "EGRESS_CONFIG"
	for _, other := range []struct{ name, value string }{
		{"EGRESS_SOURCE", env.Source}, {"EGRESS_GATEWAY", env.Gateway}, {"EGRESS_DESTINATION", env.Destination},
		{"EGRESS_DESTINATION_FILE", env.DestinationFile}, {"EGRESS_GRAMMAR", env.Grammar},
	} {
		if other.value != "" {
			return Errors{{variable, fmt.Sprintf("%s and %s are both set: unset one of them", variable, other.name),
				remedy("the file has the reserved addresses, their gateways and the destinations")}}
		}
	}
	text, err := readFile(env.ConfigFile)
	if err != nil {
		return Errors{{variable, fmt.Sprintf("%s %s cannot be read: %v", variable, quote(env.ConfigFile), cause(err)), fileHint(env.ConfigFile, err)}}
	}
	bad := func(why string) *Error {
		return &Error{variable, fmt.Sprintf("%s %s: %s", variable, env.ConfigFile, why), remedy("correct the file")}
	}
	written, err := object.Parse(text)
	var d object.Description
	if err == nil {
		if !c.Mode.Redirects() { // they may be invalid
			written.Redirect = &object.Redirect{}
		}
		d, err = written.Description()
	}
	if faults, ok := errors.AsType[object.Faults](err); ok {
		var all Errors
		for _, f := range faults {
			all = append(all, bad(f.Error()))
		}
		return all
	} else if err != nil {
		return Errors{bad(err.Error())}
	}
	for i, s := range d.Sources {
		if !s.Gateway.IsValid() {
			return Errors{bad(fmt.Sprintf("spec.addresses[%d].gateway is missing: add the gateway of %s on the physical network", i, s.Prefix))}
		}
	}
	c.Sources = d.Sources
	for _, w := range d.Warnings {
		c.Warnings = append(c.Warnings, bad(w).Sentence)
	}
	if c.Mode.Redirects() {
		c.Set = d.Set
		if len(c.Set.Redirects) == 0 && len(c.Set.Fallbacks()) == 0 {
			c.Warnings = append(c.Warnings, bad("spec.redirect has neither a rule nor a fallbackIP: nothing is redirected").Sentence)
		}
	}
	return nil
}

// rereadObject is parseObject for a router that stays: it takes other destinations, and no
// other addresses, which have to be announced and probed as at a start.
func (c *Config) rereadObject(env Environment, readFile func(name string) ([]byte, error)) *Error {
	before := c.Sources
	if faults := c.parseObject(env, readFile); len(faults) > 0 {
		first := *faults[0]
		if more := len(faults) - 1; more > 0 {
			first.Hint = remedy("correct the file: %d more of its fields are invalid", more)
		}
		return &first
	}
	if !slices.Equal(before, c.Sources) {
		return &Error{"EGRESS_CONFIG", fmt.Sprintf("EGRESS_CONFIG %s: spec.addresses is another one than at the start", env.ConfigFile),
			remedy("restart the router: it takes other addresses at a start only")}
	}
	return nil
}
