package plan

import (
	"fmt"
	"net/netip"
)

// An Op is the kind of a Change.
type Op uint8

// The kinds of changes.
const (
	AddAddress Op = iota + 1
	RemoveAddress
	SetUp
	SetDown
	ReplaceRoute // Route replaces Old; without Old it is added
	AppendRoute  // Route is added after routes with the same destination and metric
	DeleteRoute
	WriteSysctl
	AddRule
	DeleteRule
)

// A Change is one change of the network.
type Change struct {
	Op        Op
	Interface string
	Index     int // index of Interface
	Address   netip.Prefix
	Shared    bool // other hosts may have Address: the kernel does not look for duplicates
	Route     Route
	Old       *Route // route that ReplaceRoute replaces
	Rule      Rule
	Sysctl    string // in dotted form
	Value     string
	OldValue  string
	Optional  bool   // the router works without it, less robustly
	Effect    string // what happens without an optional step

	Kernel any // the adapter's own form of Address, if an advertised one
}

// Inverse returns the step that reverts s.
func (s Change) Inverse() Change {
	switch s.Op {
	case AddAddress:
		s.Op = RemoveAddress
	case RemoveAddress:
		s.Op = AddAddress
	case SetUp:
		s.Op = SetDown
	case SetDown:
		s.Op = SetUp
	case ReplaceRoute:
		if s.Old == nil {
			s.Op = DeleteRoute
			break
		}
		now := s.Route
		s.Route, s.Old = *s.Old, &now
	case DeleteRoute:
		s.Op = AppendRoute
	case AppendRoute:
		s.Op = DeleteRoute
	case AddRule:
		s.Op = DeleteRule
	case DeleteRule:
		s.Op = AddRule
	case WriteSysctl:
		s.Value, s.OldValue = s.OldValue, s.Value
	}
	return s
}

// Found returns the state that made the step necessary.
func (s Change) Found() string {
	switch s.Op {
	case AddAddress:
		return fmt.Sprintf("address %s is missing from %s", s.Address, s.Interface)
	case SetUp:
		return fmt.Sprintf("%s is down", s.Interface)
	case ReplaceRoute:
		if s.Old != nil {
			return fmt.Sprintf("route %s", *s.Old)
		}
		return fmt.Sprintf("route %s is missing", s.Route)
	case AppendRoute:
		return fmt.Sprintf("route %s is missing", s.Route)
	case DeleteRoute:
		return fmt.Sprintf("route %s", s.Route)
	case AddRule:
		return fmt.Sprintf("routing rule %s is missing", s.Rule)
	case DeleteRule:
		return fmt.Sprintf("routing rule %s", s.Rule)
	case WriteSysctl:
		return fmt.Sprintf("%s = %s", s.Sysctl, s.OldValue)
	case RemoveAddress:
		return fmt.Sprintf("address %s of %s", s.Address, s.Interface)
	case SetDown: // only for rollback
	}
	return s.String()
}

// String returns the step as a sentence in the imperative, without a full stop.
func (s Change) String() string {
	switch s.Op {
	case AddAddress:
		return fmt.Sprintf("add address %s to %s", s.Address, s.Interface)
	case RemoveAddress:
		return fmt.Sprintf("remove address %s from %s", s.Address, s.Interface)
	case SetUp:
		return fmt.Sprintf("set %s up", s.Interface)
	case SetDown:
		return fmt.Sprintf("set %s down", s.Interface)
	case ReplaceRoute:
		if s.Old == nil {
			return fmt.Sprintf("add route %s", s.Route)
		}
		return fmt.Sprintf("replace route %s by %s", *s.Old, s.Route)
	case AppendRoute:
		return fmt.Sprintf("add route %s", s.Route)
	case DeleteRoute:
		return fmt.Sprintf("delete route %s", s.Route)
	case AddRule:
		return fmt.Sprintf("add routing rule %s", s.Rule)
	case DeleteRule:
		return fmt.Sprintf("delete routing rule %s", s.Rule)
	case WriteSysctl:
		return fmt.Sprintf("set %s = %s", s.Sysctl, s.Value)
	}
	return fmt.Sprintf("unknown step %d", s.Op)
}
