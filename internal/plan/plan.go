// Package plan orders what a router does to a network namespace. It is pure: from what the
// namespace shall be and the state in which it was observed it derives the steps between
// the two. An apply carries them out, a check asks whether there are any, and a person can
// read them. Nothing else knows their order.
package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A Want is what a namespace shall be.
type Want struct {
	Network  Network
	Macvlan  *Macvlan // nil: another program creates the egress interface
	Rules    rules.Plan
	Forward  bool // the namespace forwards between the two sides
	Conflict spec.Conflict
	Gate     *Gate  // nil: the router is the only one with its addresses
	Role     Role   // with a gate: who announces the addresses is decided elsewhere
	Carry    *Carry // nil: connections stay with the router that they enter by
	// Flowtable is the shortcut of established connections; nil: there is none.
	Flowtable *Flowtable
	// Start: the address is announced and the gateway asked also without a change, and
	// other holders are looked for before the address is taken. Without it the steps are
	// repairs.
	Start    bool
	Announce bool // the address is announced also without a change
	Retry    bool // IPv6 addresses that another host had are tried again
}

// WantOf returns what a namespace shall be with a router.
func WantOf(r spec.Router) Want {
	want := Want{
		Network: Network{
			Interface: r.Egress, Sources: r.Sources,
			Cluster: ClusterSide{Interface: r.Cluster, Mark: uint32(r.ReplyMark), Table: r.ReplyTable, Destinations: r.ClusterDestinations},
		},
		Rules: r.Plan(), Forward: r.Forward, Conflict: r.Conflict, Gate: gateOf(r), Carry: carryOf(r),
		Flowtable: flowtableOf(r),
	}
	if want.Gate != nil {
		want = want.WithRole(Standby)
		want.Network.Shared = true
	}
	if r.Macvlan != nil {
		want.Macvlan = &Macvlan{r.Egress, *r.Macvlan}
	}
	return want
}

// A Have is the state of a namespace, and what a run has done to it.
type Have struct {
	Missing   bool     // the egress interface does not exist, and Macvlan creates it
	State     State    // of the network
	Differs   []string // the differences between the kernel's rules and those wanted
	Redirects bool     // the kernel has redirects of ours
	// The reserved addresses of the rules that the run has found.
	Former []netip.Addr
	Strays []string // the rules of other backends, for people
	// Gate has the differences between the kernel's gate and that wanted; without one wanted,
	// what is there.
	Gate   []string
	Fenced bool // this run has changed the gate
	// Carry has the same of the tunnel.
	Carry     []string
	Connected bool // this run has set the tunnel up, or failed to
	// Flowtable has the same of the flowtable.
	Flowtable []string
	Offloads  bool // this run has changed it, or failed to

	Failed    []string    // the optional changes that failed, which are not tried again
	Loaded    *rules.Plan // what this run has loaded last; nil: nothing
	Changed   bool        // this run has changed something
	Trusted   bool        // the gateways are on the physical network, against appearances
	Probed    bool
	Claimed   bool    // this run has taken the addresses that it may take
	Opened    bool    // only what waits for IPv6 addresses is left
	Awaited   bool    // this run has waited for them
	Announced [2]bool // of IPv4 and IPv6
	Asked     [2]bool
}

// A Stage is a part of the steps. The state is observed again between two stages if the
// first one has changed the network: the kernel adds routes by itself.
type Stage uint8

// The stages, in their order.
const (
	Creation   Stage = iota + 1 // of the egress interface
	Inquiry                     // of the physical network: answers that come later, or end the run
	Guard                       // rules and sysctls that close the pod, and the interface
	Permission                  // to claim the address, which may not come for long
	Claim                       // of the address
	Routing                     // of both sides
	Rules                       // all of them
	Leaving                     // of addresses and routes of an earlier configuration
	Opening                     // of the way between the sides, and the end of stale state
	Detection                   // of other hosts with an IPv6 address, by the kernel
	Admission                   // of IPv6 packets to the physical network
)

// A Step is one of the things that a run does: a Change, or one of the types below. Its text
// is a sentence in the imperative, without a full stop.
type Step interface{ fmt.Stringer }

type (
	// Create creates the egress interface.
	Create struct{ Macvlan }
	// Destroy deletes an egress interface that the router has created.
	Destroy struct{ Interface string }
	// Settle asks on the physical network for a gateway that seems to be on the
	// cluster side.
	Settle struct{ Doubt *RefusedError }
	// Probe looks for other hosts with reserved addresses.
	Probe struct {
		Addresses []netip.Addr
		Conflict  spec.Conflict
	}
	// Load loads rules.
	Load struct {
		Rules rules.Plan
		Part  bool   // without the redirects
		Why   string // the differences of the kernel's rules
	}
	// Announce announces the reserved addresses to the physical network.
	Announce struct{ Addresses []netip.Addr }
	// Ask sends a request to the gateway of a source.
	Ask struct{ spec.Source }
	// RemoveStray removes the rules of another backend, the first of Have.Strays.
	RemoveStray struct{ Name string }
	// Await waits for the end of duplicate address detection.
	Await struct{ Addresses []netip.Addr }
	// Forget deletes the tracked connections that the rules would treat otherwise.
	Forget struct{}
)

func (s Destroy) String() string { return "delete " + s.Interface }

func (s Settle) String() string {
	return "ask for the gateway on the physical network: " + s.Doubt.Error()
}

func (s Probe) String() string {
	return fmt.Sprintf("probe for another host with %s, and %s", list(s.Addresses), map[spec.Conflict]string{
		spec.ConflictWarn: "log it", spec.ConflictRefuse: "end if there is one", spec.ConflictDefend: "announce the address again if there is one",
	}[s.Conflict])
}

// list returns addresses for people.
func list(addresses []netip.Addr) string {
	var all []string
	for _, a := range addresses {
		all = append(all, a.String())
	}
	return strings.Join(all, ", ")
}

func (s Load) String() string {
	if s.Part {
		return "load the rules without the redirects: they mark connections, set the source address and drop everything else"
	}
	if s.Why == "" {
		return "load the rules"
	}
	return "load the rules, because " + s.Why
}

func (s Announce) String() string {
	if s.Addresses[0].Is6() {
		return fmt.Sprintf("announce %s by unsolicited neighbour advertisement", list(s.Addresses))
	}
	return fmt.Sprintf("announce %s by gratuitous ARP, as reply and as request", list(s.Addresses))
}

func (s Ask) String() string {
	if s.Gateway.Is6() {
		return fmt.Sprintf("request the gateway %s by neighbour solicitation", s.Gateway)
	}
	return fmt.Sprintf("request the gateway %s by ARP", s.Gateway)
}

func (s Await) String() string {
	return fmt.Sprintf("wait for the kernel's duplicate address detection of %s, while IPv4 works", list(s.Addresses))
}

func (s RemoveStray) String() string { return "remove " + s.Name }

func (s Forget) String() string {
	return "delete the tracked connections that the rules would treat otherwise"
}

// A Group is the steps of a stage.
type Group struct {
	Stage Stage
	Steps []Step
}

// Steps returns the steps that lead from have to want, in their order; none if there is
// nothing to do. The steps of later stages are those that the present state needs: another
// observation after the first stage may show others.
//
// In this order, redirected traffic never has another source than the reserved address or
// another path than the egress interface, and the physical network never reaches the pod:
// rules come before the address and the routes; redirects come after these if packets could
// already be redirected, or if there are so many that the answer to a probe arrives while they
// are loaded; forwarding is enabled last. If the network is right, the new rules
// replace the old ones at once, so that no new connection is rejected in between. Stale
// rules of another backend work until they are removed, with the reserved address of their
// time.
func Steps(want Want, have Have) []Group {
	want.Network.retry = (want.Start || want.Retry) && !have.Claimed
	if have.Opened {
		return admit(want, have)
	}
	var groups []Group
	add := func(stage Stage, steps ...Step) {
		if len(steps) > 0 {
			groups = append(groups, Group{stage, steps})
		}
	}
	if have.Missing {
		add(Creation, Create{*want.Macvlan})
	}
	prepare := have.remaining(prepare(want.Network, have.State))
	claim := have.remaining(claim(want.Network, have.State))
	all := have.remaining(diff(want.Network, have.State))
	required := slices.ContainsFunc(all, func(c Change) bool { return !c.Optional })

	// A question needs an interface that is up. While another host has the address, the
	// pod is closed, and its rules are repaired.
	early, late := inquire(want, have)
	if !have.State.Up {
		early, late = nil, append(early, late...)
	}
	add(Inquiry, early...)
	var guard []Step
	loaded, why := have.Loaded, strings.Join(have.Differs, "; ")
	if required && len(have.Differs) > 0 && loaded == nil {
		first := Load{Rules: want.Rules, Why: why}
		if want.Forward && (have.Redirects || have.State.ForwardsAny() || len(want.Rules.Redirects) >= manyRedirects && slices.ContainsFunc(late, awaited)) {
			first = Load{Rules: want.Rules.WithoutRedirects(), Part: true}
		}
		guard, loaded = append(guard, first), &first.Rules
	}
	add(Guard, slices.Concat(slow(want, have), fence(want, have), guard, steps(prepare))...)
	add(Permission, late...)
	claim = without(claim, prepare)
	of4 := func(c Change) bool { return !c.Address.Addr().Is6() }
	add(Claim, slices.Concat(unfence(want, have), steps(claim), announce(want, have, slices.ContainsFunc(claim, of4)))...)
	add(Routing, steps(without(all, slices.Concat(prepare, claim)))...)
	var complete []Step
	if len(have.Differs) > 0 && (loaded == nil || !loaded.Equal(want.Rules)) {
		complete = append(complete, Load{Rules: want.Rules, Why: why})
	}
	add(Rules, slices.Concat(complete, connect(want, have), offload(want, have))...)
	if want.Start { // while a router stays, another program may have changed the rules
		add(Leaving, steps(have.remaining(want.Network.leave(have.State, have.Former)))...)
	}
	var opening []Step
	if want.Forward {
		opening = steps(have.remaining(Forwarding(want.Network, have.State)))
	}
	for _, s := range have.Strays {
		opening = append(opening, RemoveStray{s})
	}
	changes := have.Changed || len(opening) > 0 || slices.ContainsFunc(groups, Group.Changes)
	if want.Forward && changes {
		opening = append(opening, Forget{})
	}
	add(Opening, opening...)
	if want.awaits(have) {
		add(Detection, Await{want.Network.Sources.Of(true).Addresses()})
		have.State, have.Awaited = want.Network.settled(have.State), true
		for _, g := range admit(want, have) {
			add(g.Stage, slices.DeleteFunc(g.Steps, func(s Step) bool { return isListed(s, groups) })...)
		}
	}
	return groups
}

// manyRedirects is the number of redirects that take longer to load, about 10 µs each, than
// one more change of the rules.
const manyRedirects = 1000

// awaited reports whether a step is a probe whose answer the run waits for at its end.
func awaited(s Step) bool {
	p, is := s.(Probe)
	return is && p.Conflict != spec.ConflictRefuse
}

// isListed reports whether a change is among the steps of groups.
func isListed(s Step, groups []Group) bool {
	c, is := s.(Change)
	return is && slices.ContainsFunc(groups, func(g Group) bool {
		return slices.ContainsFunc(g.Steps, func(other Step) bool {
			o, is := other.(Change)
			return is && o.String() == c.String()
		})
	})
}

// Changes reports whether a group changes the namespace.
func (g Group) Changes() bool {
	return slices.ContainsFunc(g.Steps, func(s Step) bool {
		switch s.(type) {
		case Create, Load, Change, RemoveStray, Fence, RemoveGate, Connect, RemoveCarry, Offload, RemoveFlowtable:
			return true
		}
		return false
	})
}

// inquire returns the questions to the physical network that decide about the address:
// those that a start may ask at once, and the one whose answer decides whether the address
// may be claimed.
//
// A router that is not the only one asks nothing: another one holds the addresses, and the gate
// lets no question out that has them.
func inquire(want Want, have Have) (early, late []Step) {
	if want.Gate != nil {
		return nil, nil
	}
	if want.Start && !have.Trusted {
		for _, doubt := range doubts(want.Network, have.State) {
			early = append(early, Settle{doubt})
		}
	}
	missing := want.Network.missing(have.State).Of(false) // the kernel itself looks for IPv6
	if have.State.NoARP || len(missing) == 0 || have.Probed {
		return early, nil
	}
	probe := Probe{missing.Addresses(), want.Conflict}
	switch {
	case want.Conflict == spec.ConflictRefuse:
		late = append(late, probe)
	case want.Start: // of a repair the ARP watch detects the other host
		early = append(early, probe)
	}
	return early, late
}

// announce returns the packets to the neighbours that learn the addresses. claims is set if
// IPv4 addresses change.
func announce(want Want, have Have, claims bool) []Step {
	if have.State.NoARP || want.Gate != nil { // a claim announces them
		return nil
	}
	var packets []Step
	for _, first := range want.Network.Sources.Families() {
		ipv6, i := first.Prefix.Addr().Is6(), 0
		if ipv6 {
			i, claims = 1, want.Network.opens(have.State)
		}
		if ipv6 && !want.Network.Usable(have.State, true) {
			continue
		}
		if (want.Start || want.Announce || claims) && !have.Announced[i] {
			packets = append(packets, Announce{want.Network.Sources.Of(ipv6).Addresses()})
		}
		// Of a repair the watch asks. The carrier of an interface that is down is unknown.
		if want.Start && !have.Asked[i] && (have.State.Carrier || !have.State.Up) {
			packets = append(packets, Ask{first})
		}
	}
	return packets
}

// remaining returns the changes without those that failed before.
func (h Have) remaining(changes []Change) []Change {
	return slices.DeleteFunc(changes, func(c Change) bool { return slices.Contains(h.Failed, c.String()) })
}

// without returns the changes that are not among others, by their texts.
func without(changes, others []Change) []Change {
	texts := make(map[string]bool, len(others))
	for _, o := range others {
		texts[o.String()] = true
	}
	return slices.DeleteFunc(changes, func(c Change) bool { return texts[c.String()] })
}

func steps(changes []Change) []Step {
	var all []Step
	for _, c := range changes {
		all = append(all, c)
	}
	return all
}
