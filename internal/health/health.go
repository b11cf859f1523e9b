// Package health is what a running program says about itself, and how it is
// asked.
//
// A program makes a Report whenever somebody asks. Serve hands it out on a unix
// socket, which needs no port and no privilege: that is for exec probes (Ask) and
// for people (WriteTable). Handler and Listen do it by HTTP, for those who come
// by the network.
package health

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// The programs that can be asked.
const (
	Router    = "router"
	HTTPProxy = "http-proxy"
	DNSProxy  = "dns-proxy"
)

var programs = []string{Router, HTTPProxy, DNSProxy}

// A State is how good a thing is.
type State int

// The states, from good to bad.
const (
	OK      State = iota
	Warning       // not as it should be, and the program does its job all the same
	Failed
)

var states = []string{"ok", "warning", "failed"}

// String returns the state's word.
func (s State) String() string {
	if s < 0 || int(s) >= len(states) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return states[s]
}

// MarshalText returns the state's word, for JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the state's word.
func (s *State) UnmarshalText(text []byte) error {
	i := slices.Index(states, string(text))
	if i < 0 {
		return fmt.Errorf("parsing health state %q: expected ok, warning or failed", text)
	}
	*s = State(i)
	return nil
}

// A Check is one thing that is right or not.
type Check struct {
	Name   string    `json:"name"`
	State  State     `json:"state"`
	Detail string    `json:"detail,omitempty"`
	Since  time.Time `json:"since,omitzero"` // when it came into this state
}

// A Report is what a program says about itself.
type Report struct {
	Program string    `json:"program"` // Router, HTTPProxy or DNSProxy
	Version string    `json:"version"`
	Mode    string    `json:"mode,omitempty"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Reasons []string  `json:"reasons,omitempty"` // why it is not ready
	Checks  []Check   `json:"checks"`
}

// A Board keeps the checks of a program and since when each is in its state. Its
// methods may be called from any goroutine; the zero value is an empty one.
type Board struct {
	mu     sync.Mutex
	checks []Check // in the order in which they came
}

// Set says how a thing is.
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

// Remove takes a thing off that is no longer there.
func (b *Board) Remove(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.checks = slices.DeleteFunc(b.checks, func(c Check) bool { return c.Name == name })
}

// Checks returns all of them.
func (b *Board) Checks() []Check {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.checks)
}
