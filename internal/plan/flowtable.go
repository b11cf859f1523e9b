package plan

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
)

// A Flowtable is the kernel's shortcut for packets of established connections, past rules and
// routing.
type Flowtable struct {
	Cluster, Egress string // the two sides
	Sources         []netip.Addr
	Mark            uint32 // of connections from the cluster side
}

// flowtableOf returns the flowtable of a router; nil: it has none.
func flowtableOf(r spec.Router) *Flowtable {
	if !r.Forward || r.Flowtable == spec.FlowtableOff {
		return nil
	}
	sides := r.Sides()
	return &Flowtable{Cluster: r.Cluster, Egress: r.Egress, Sources: sides.Sources, Mark: uint32(r.ReplyMark)}
}

type (
	// Offload loads the flowtable.
	Offload struct {
		Flowtable
		Why string // what differs in the kernel
	}
	// RemoveFlowtable removes it.
	RemoveFlowtable struct{}
)

func (s Offload) String() string {
	return fmt.Sprintf("load the flowtable of %s and %s: packets of established connections bypass rules and routing", s.Cluster, s.Egress)
}

func (s RemoveFlowtable) String() string { return "remove the flowtable" }

// offload returns the step for the flowtable, which comes behind all rules.
func offload(want Want, have Have) []Step {
	if want.Flowtable == nil || len(have.Flowtable) == 0 || have.Offloads {
		return nil
	}
	return []Step{Offload{*want.Flowtable, strings.Join(have.Flowtable, "; ")}}
}

// slow returns the step that takes the flowtable of an earlier configuration away, before anything
// else changes.
func slow(want Want, have Have) []Step {
	if want.Flowtable != nil || len(have.Flowtable) == 0 || have.Offloads {
		return nil
	}
	return []Step{RemoveFlowtable{}}
}
