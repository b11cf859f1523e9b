package object

import (
	"fmt"
	"strings"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Fault is a field with an invalid value.
type Fault struct {
	// Path is the field as users write it, such as
	// spec.redirect.redirectRules[2].destinationIP.
	Path string
	Text string // what was found and what was expected
}

// Error returns the fault as one line.
func (f Fault) Error() string { return f.Path + " " + f.Text }

// Faults are the faults of a description, in the order of its fields.
type Faults []Fault

// Error returns the faults as one line.
func (f Faults) Error() string {
	var all []string
	for _, fault := range f {
		all = append(all, fault.Error())
	}
	return strings.Join(all, "; ")
}

// Err returns the faults as an error, nil if there are none.
func (f Faults) Err() error {
	if len(f) == 0 {
		return nil
	}
	return f
}

// A field is a part of a description that a fault is about.
type field uint8

const (
	mode field = iota + 1
	macvlanMode
	macvlanMaster
	macvlanMTU
	addresses
	addressIP
	gateway
	redirect
	rulePort
	ruleProtocol
	ruleDestination
	ruleTarget
	fallback
)

// paths has the path of each field of a form of the description. An index replaces %d.
type paths map[field]string

// Name returns the path of a field of the description.
func (p paths) Name(f wording.Field) string {
	if f == wording.Gateway {
		return "the gateway"
	}
	return p[addresses]
}

// at returns a fault of a field.
func (p paths) at(f field, index int, format string, args ...any) Fault {
	return Fault{strings.Replace(p[f], "%d", fmt.Sprint(index), 1), fmt.Sprintf(format, args...)}
}

// resourcePaths are the paths of the resource.
var resourcePaths = paths{
	mode:            "spec.mode",
	macvlanMode:     "spec.networkInterface.macvlan.mode",
	macvlanMaster:   "spec.networkInterface.macvlan.master",
	addresses:       "spec.addresses",
	addressIP:       "spec.addresses[%d].ip",
	gateway:         "spec.addresses[%d].gateway",
	redirect:        "spec.redirect",
	rulePort:        "spec.redirect.redirectRules[%d].port",
	ruleProtocol:    "spec.redirect.redirectRules[%d].protocol",
	ruleDestination: "spec.redirect.redirectRules[%d].destinationIP",
	ruleTarget:      "spec.redirect.redirectRules[%d].targetPort",
	fallback:        "spec.redirect.fallbackIP",
}
