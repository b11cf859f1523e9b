// Package health serves and reads the health of a running program.
//
// A program makes a Report for each request. Serve serves it on a unix socket, which
// needs no port and no privilege, for exec probes (Ask) and people (WriteTable).
// Handler and Listen serve it by HTTP.
package health

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// The programs that serve health.
const (
	Router    = "router"
	HTTPProxy = "http-proxy"
	DNSProxy  = "dns-proxy"
)

var programs = []string{Router, HTTPProxy, DNSProxy}

// A State is the state of a check.
type State int

// The states, from good to bad.
const (
	OK      State = iota
	Warning       // a fault that does not keep the program from its work
	Failed
)

var states = []string{"ok", "warning", "failed"}

// String returns the name of the state.
func (s State) String() string {
	if s < 0 || int(s) >= len(states) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return states[s]
}

// MarshalText returns the name of the state, for JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText parses the name of a state.
func (s *State) UnmarshalText(text []byte) error {
	i := slices.Index(states, string(text))
	if i < 0 {
		return fmt.Errorf("parsing health state %q: expected ok, warning or failed", text)
	}
	*s = State(i)
	return nil
}

// A Check is the state of one part of a program.
type Check struct {
	Name   string    `json:"name"`
	State  State     `json:"state"`
	Detail string    `json:"detail,omitempty"`
	Since  time.Time `json:"since,omitzero"`  // start of the state
	Fault  string    `json:"fault,omitempty"` // cause, for scripts, in the words of egress-router diagnose; empty: none, or another one
}

// A Report is the health of a program.
type Report struct {
	Program string    `json:"program"` // Router, HTTPProxy or DNSProxy
	Version string    `json:"version"`
	Mode    string    `json:"mode,omitempty"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Reasons []string  `json:"reasons,omitempty"` // why it is not ready
	Checks  []Check   `json:"checks"`
	Routers []Member  `json:"routers,omitempty"` // those with the same addresses that are known, this one first; none: it is the only one
}

// A Member is one of several routers with the same addresses.
type Member struct {
	Address  netip.Addr `json:"address"` // on the cluster side
	Own      bool       `json:"own,omitempty"`
	Role     string     `json:"role"`            // standby, claiming, active or resuming
	Holds    bool       `json:"holds,omitempty"` // it holds the addresses now, as far as this router knows
	Ready    bool       `json:"ready"`           // it could take over
	Priority int        `json:"priority"`
	MAC      string     `json:"mac,omitempty"`  // on the physical network; empty: it has no interface there
	Heard    time.Time  `json:"heard,omitzero"` // last heartbeat
}

// A Board holds the checks of a program and the time of their last change of state.
// Its methods may be called from any goroutine; the zero value is an empty Board.
type Board struct {
	mu     sync.Mutex
	checks []Check // in the order of their first Set
}

// Set sets the state and the detail of a check.
func (b *Board) Set(name string, state State, detail string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.checks, func(c Check) bool { return c.Name == name })
	if i < 0 {
		i = len(b.checks)
		b.checks = append(b.checks, Check{Name: name, Since: time.Now()})
	} else if b.checks[i].State != state {
		b.checks[i].Since = time.Now()
	}
	b.checks[i].State, b.checks[i].Detail = state, detail
}

// Remove removes a check.
func (b *Board) Remove(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.checks = slices.DeleteFunc(b.checks, func(c Check) bool { return c.Name == name })
}

// Checks returns a copy of all checks.
func (b *Board) Checks() []Check {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.checks)
}
