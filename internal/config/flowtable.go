package config

import (
	"fmt"

	"github.com/egress-router/egress-router/internal/spec"
)

// parseFlowtable parses whether packets of established connections bypass the rules. The tunnel of
// routers that stand by has rules for each packet: they pass them.
func (c *Config) parseFlowtable(s string) *Error {
	const variable, off = "EGRESS_FLOWTABLE", "off"
	choice := orDefault(s, off)
	fault := choose(variable, choice, off, string(spec.FlowtableAuto), string(spec.FlowtableRequire))
	if fault != nil || choice == off {
		return fault
	}
	switch carries := c.Standby != nil && c.Standby.Carry != nil; {
	case !c.Mode.Redirects() || c.Mode == UnitTest:
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%s has no effect in mode %s", variable, choice, c.Mode))
	case carries && choice == string(spec.FlowtableRequire):
		return &Error{variable, variable + "=require is not possible with EGRESS_STANDBY_CARRY=vxlan, which has rules for each packet", remedy("unset one of them, or write auto")}
	case carries:
		c.Warnings = append(c.Warnings, variable+"=auto has no effect with EGRESS_STANDBY_CARRY=vxlan, which has rules for each packet")
	default:
		c.Flowtable = spec.Flowtable(choice)
	}
	return nil
}
