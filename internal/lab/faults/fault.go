package faults

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// A Fault is what happens to one node or to all of them.
type Fault struct {
	Name  string
	begin func(f *field, node int) error
	end   func(f *field, node int) error // the opposite of begin; nil if there is none
	short time.Duration
	long  time.Duration // between begin and end
}

// A field is where faults happen: their state, which faults at the same time share.
type field struct {
	site    *lab.Site
	routers []*Router
	losses  map[string][]lab.Loss                // by what causes them
	bite    func(node int) (func() error, error) // see Options.Bite; nil if there is nothing to do
	held    bool                                 // there are connections, for which a program that was asked to end goes on
}

// lose sets or ends the losses of one cause.
func (f *field) lose(cause string, losses ...lab.Loss) error {
	f.losses[cause] = losses
	var all []lab.Loss
	for _, l := range f.losses {
		all = append(all, l...)
	}
	return f.site.Lose(all...)
}

func kill(f *field, node int) error {
	// A process that is stopped cannot repair what bite does.
	if err := freeze(f, node); err != nil {
		return err
	}
	return f.routers[node].Kill()
}

func restart(f *field, node int) error {
	if r := f.routers[node]; r.Running() {
		return nil
	}
	return f.routers[node].Start()
}

func freeze(f *field, node int) error {
	after := func() error { return nil }
	if f.bite != nil {
		var err error
		if after, err = f.bite(node); err != nil {
			return err
		}
	}
	if err := f.routers[node].Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return after()
}

func thaw(f *field, node int) error { return f.routers[node].Signal(syscall.SIGCONT) }

// terminate asks a program to end, even if another fault has stopped it.
func terminate(f *field, node int) error { return f.routers[node].Terminate() }

// ended waits until a program that was asked to end has ended, and starts it again. One that
// goes on for its connections is killed, as at the end of a pod's grace period.
func ended(f *field, node int) error {
	if err := thaw(f, node); err != nil {
		return err
	}
	if f.held {
		if err := f.routers[node].Kill(); err != nil {
			return err
		}
	}
	f.routers[node].AwaitEnd()
	return restart(f, node)
}

// setPorts returns a function that sets ports of a node up or down.
func setPorts(up, lan, cluster bool) func(*field, int) error {
	return func(f *field, node int) error {
		n := f.site.Nodes[node]
		if lan {
			if err := f.site.SetPort(n.LAN, up); err != nil {
				return err
			}
		}
		if cluster {
			return f.site.SetPort(n.ClusterPort, up)
		}
		return nil
	}
}

// lossy returns a fault in which ports of a node lose a share of the frames of a kind.
func lossy(name string, kind lab.LossKind, percent int, lan, cluster, in, out bool) Fault {
	cause := func(node int) string { return fmt.Sprint(name, percent, node) }
	return Fault{
		Name: fmt.Sprintf("%s %d %%", name, percent),
		begin: func(f *field, node int) error {
			n := f.site.Nodes[node]
			var losses []lab.Loss
			for _, p := range []struct {
				port string
				use  bool
			}{{n.LAN, lan}, {n.ClusterPort, cluster}} {
				if p.use && in {
					losses = append(losses, lab.Loss{Port: p.port, In: true, Kind: kind, Percent: percent})
				}
				if p.use && out {
					losses = append(losses, lab.Loss{Port: p.port, Kind: kind, Percent: percent})
				}
			}
			return f.lose(cause(node), losses...)
		},
		end:   func(f *field, node int) error { return f.lose(cause(node)) },
		short: 20 * time.Millisecond, long: 3 * time.Second,
	}
}

// silent returns a fault in which the gateway loses what arrives for it, of a kind.
func silent(name string, kind lab.LossKind) Fault {
	return Fault{
		Name: name,
		begin: func(f *field, _ int) error {
			return f.lose(name, lab.Loss{Port: lab.GatewayPort, Kind: kind, Percent: 100})
		},
		end:   func(f *field, _ int) error { return f.lose(name) },
		short: 20 * time.Millisecond, long: 2 * time.Second,
	}
}

// power is the loss of a node: its program, and both links.
func power(f *field, node int) error {
	if err := kill(f, node); err != nil {
		return err
	}
	return setPorts(false, true, true)(f, node)
}

func powerOn(f *field, node int) error {
	if err := setPorts(true, true, true)(f, node); err != nil {
		return err
	}
	return restart(f, node)
}

// onAll returns a function that does something to every node.
func onAll(do func(*field, int) error) func(*field, int) error {
	return func(f *field, _ int) error {
		for n := range f.routers {
			if err := do(f, n); err != nil {
				return err
			}
		}
		return nil
	}
}

// choose returns a random fault, if so asked of those that stop one process.
func choose(r *rand.Rand, stops bool) Fault {
	// Every second loss is complete.
	percent := 100
	if r.IntN(2) == 0 {
		percent = 30 + r.IntN(70)
	}
	const some, second = 20 * time.Millisecond, time.Second
	all := []Fault{
		// The first two stop one process.
		{Name: "kill", begin: kill, end: restart, short: some, long: 2 * second},
		{Name: "freeze", begin: freeze, end: thaw, short: some, long: 2 * second},
		{Name: "terminate", begin: terminate, end: ended, short: some, long: 2 * second},
		{Name: "LAN port down", begin: setPorts(false, true, false), end: setPorts(true, true, false), short: some, long: 3 * second},
		{Name: "cluster port down", begin: setPorts(false, false, true), end: setPorts(true, false, true), short: some, long: 3 * second},
		{Name: "node lost", begin: power, end: powerOn, short: some, long: 2 * second},
		{Name: "all killed", begin: onAll(kill), end: onAll(restart), short: some, long: second},
		{Name: "gateway flushed", begin: func(f *field, _ int) error { return f.site.ForgetNeighbours() }},
		silent("gateway silent", lab.LoseAll),
		silent("gateway silent to ARP", lab.LoseARP),
		silent("gateway silent to pings", lab.LosePings),
		lossy("LAN isolated", lab.LoseAll, 100, true, false, true, true),
		lossy("cluster isolated", lab.LoseAll, 100, false, true, true, true),
		lossy("both isolated", lab.LoseAll, 100, true, true, true, true),
		lossy("LAN loss to the node", lab.LoseAll, percent, true, false, false, true),
		lossy("LAN loss from the node", lab.LoseAll, percent, true, false, true, false),
		lossy("cluster loss to the node", lab.LoseAll, percent, false, true, false, true),
		lossy("cluster loss from the node", lab.LoseAll, percent, false, true, true, false),
		lossy("ARP loss", lab.LoseARP, percent, true, false, true, true),
		lossy("heartbeat loss to the node", lab.LoseHeartbeats, percent, false, true, false, true),
		lossy("heartbeat loss from the node", lab.LoseHeartbeats, percent, false, true, true, false),
	}
	if stops {
		all = all[:2]
	}
	return all[r.IntN(len(all))]
}

// A step is a fault with its times, from the round's begin.
type step struct {
	Fault
	holder     bool // happens to the router that holds, otherwise to another one
	other      int  // which other one
	start, end time.Duration
}

// schedule returns the steps of one round: one fault or, in three of ten rounds, two that
// overlap.
func schedule(r *rand.Rand, nodes int, stops bool) []step {
	count := 1
	if r.IntN(10) < 3 {
		count = 2
	}
	var steps []step
	for range count {
		s := step{Fault: choose(r, stops), holder: r.IntN(3) > 0, other: r.IntN(max(1, nodes-1))}
		if len(steps) > 0 {
			s.start = time.Duration(r.Int64N(int64(300 * time.Millisecond)))
		}
		s.end = s.start
		if s.long > 0 {
			s.end += s.short + time.Duration(r.Int64N(int64(s.long-s.short)))
		}
		steps = append(steps, s)
	}
	return steps
}

// node returns the node of a step while a node holds.
func (s step) node(holder, nodes int) int {
	if s.holder {
		return holder
	}
	return (holder + 1 + s.other) % nodes
}

// inject does the steps of a round, and returns when all faults have ended.
func (f *field) inject(steps []step, holder int, interrupted <-chan struct{}) error {
	type event struct {
		at time.Duration
		do func(*field, int) error
		to int
	}
	var events []event
	for _, s := range steps {
		node := s.node(holder, len(f.routers))
		events = append(events, event{s.start, s.begin, node})
		if s.Fault.end != nil {
			events = append(events, event{s.end, s.Fault.end, node})
		}
	}
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	begin := time.Now()
	for _, e := range events {
		select {
		case <-time.After(e.at - time.Since(begin)):
		case <-interrupted:
		}
		if err := e.do(f, e.to); err != nil {
			return err
		}
	}
	// A program that one fault killed may have been started by the end of another one, or
	// killed again after it was started.
	for n := range f.routers {
		if err := thaw(f, n); err != nil {
			return err
		}
		if err := restart(f, n); err != nil {
			return err
		}
	}
	return nil
}

// describe returns a round's faults as a person reads them.
func describe(steps []step, holder, nodes int) string {
	var all []string
	for _, s := range steps {
		text := fmt.Sprintf("%s of %d", s.Name, s.node(holder, nodes)+1)
		if s.node(holder, nodes) == holder {
			text += " (holder)"
		}
		if s.start > 0 {
			text += fmt.Sprintf(" after %d ms", s.start.Milliseconds())
		}
		if s.end > s.start {
			text += fmt.Sprintf(" for %d ms", (s.end - s.start).Milliseconds())
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}
