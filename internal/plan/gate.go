package plan

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/spec"
)

// A Role is that of a router among those with the same addresses.
type Role uint8

// The roles.
const (
	Alone    Role = iota // it is the only one
	Standby              // another one may hold the addresses
	Claiming             // it is about to take them
	Active               // it holds them
)

// gateMark is the mark of the packet sockets that claim the addresses. It is on no packet of
// a connection: their marks are bits (see spec.DefaultReplyMark).
const gateMark = 0x53746279

// A Gate is what the kernel has to hold back while the router does not hold the addresses, and
// what opens it.
type Gate struct {
	Interface      string
	Sources        []netip.Addr
	Witness        netip.Addr // whose answers to pings open it
	Mark           uint32
	Ticket, Permit time.Duration // time for an answer, and that it permits
	// Partial: the kernel cannot hold back ARP, so that it has to leave requests for the
	// addresses unanswered, in any role: it would answer on after the end of the process, which
	// answers them itself.
	Partial bool
	// Steers is the interface whose packets are marked while the gate is shut; empty: none.
	Steers               string
	SteerMark, SteerMask uint32
}

// WithRole returns what the namespace shall be in a role.
func (w Want) WithRole(role Role) Want {
	w.Role = role
	w.Network.Silent = w.Gate != nil && w.Gate.Partial
	return w
}

// gateOf returns the gate of a router; nil: it needs none.
func gateOf(r spec.Router) *Gate {
	if r.Standby == nil {
		return nil
	}
	times := election.Settings{Interval: r.Standby.Interval}
	g := &Gate{Interface: r.Egress, Sources: r.Sources.Addresses(), Witness: r.Standby.Witness, Mark: gateMark, Ticket: times.Ticket(), Permit: times.Permit()}
	g.steer(carryOf(r))
	return g
}

type (
	// Fence loads the gate, shut.
	Fence struct {
		Gate
		Why string // what differs in the kernel
	}
	// RemoveGate removes it.
	RemoveGate struct{}
)

func (s Fence) String() string {
	return fmt.Sprintf("load the gate of %s, shut: nothing leaves with %s before %s answers a ping", s.Interface, list(s.Sources), s.Witness)
}

func (s RemoveGate) String() string { return "remove the gate" }

// fence returns the steps for the gate, which comes before the address.
func fence(want Want, have Have) []Step {
	if want.Gate == nil || len(have.Gate) == 0 || have.Fenced {
		return nil
	}
	return []Step{Fence{*want.Gate, strings.Join(have.Gate, "; ")}}
}

// unfence returns the steps that take the gate of an earlier configuration away.
func unfence(want Want, have Have) []Step {
	if want.Gate != nil || len(have.Gate) == 0 || have.Fenced {
		return nil
	}
	return []Step{RemoveGate{}}
}
