package faults

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// Options are those of [Run].
type Options struct {
	Nodes   int  // 2 to 4
	Shared  bool // the first two routers are on the NIC of one node
	Held    int  // connections by each router that have to live through each round; only of routers that carry
	Count   int  // rounds, each of one or two faults
	First   int  // rounds before, of other runs: where the numbers begin
	Seed    uint64
	Command func(s *lab.Site, node int) *exec.Cmd
	Out     io.Writer // a line for each round

	// Bite is called before a fault stops a process, and the function that it returns
	// afterwards: with [Unfence] the judge must find violations.
	Bite  func(s *lab.Site, node int) (func() error, error)
	Stops bool // only faults that stop a process
	Found bool // end after the first round with violations
}

// Unfence returns a function that makes the permit in the kernel of a router whose process has
// stopped live an hour, if it lives, and so what the fence is for go wrong. A permit lives a few
// tenths of a second: the program that changes it is started before. The kernel then answers no ARP
// either: no router claims an address for which a host answers.
func Unfence(s *lab.Site, node int) (func() error, error) {
	const script = `flush set netdev egress-router-gate ticket
delete element netdev egress-router-gate permit { %[1]q }
add element netdev egress-router-gate permit { %[1]q timeout 1h }
`
	run, err := s.StartScript(s.Nodes[node].Pod)
	if err != nil {
		return nil, err
	}
	return func() error {
		err := run(fmt.Sprintf(script, s.MacvlanName))
		if err == nil {
			return s.SetSysctl(s.Nodes[node].Pod, "net/ipv4/conf/"+s.MacvlanName+"/arp_ignore", "8")
		}
		if strings.Contains(strings.ToLower(err.Error()), unix.ENOENT.Error()) {
			return nil // the gate is shut
		}
		return err
	}, nil
}

// Result is what [Run] found.
type Result struct {
	Violations []Violation
	Leaks      []lab.Frame     // packets of a router with another source than the reserved address
	Lost       []error         // why held connections have ended
	Gaps       []time.Duration // the longest of each round
	Takeovers  int             // rounds after which another router holds
	Logs       string          // of the routers, after the first round with violations
}

// inRow is the number of answered attempts after which a site works: 100 ms without a gap.
const inRow = 20

// Run injects random faults into routers, judges what they send, and returns after the
// last round. After each round traffic must flow again: if it does not within
// [lab.Patience], or ctx ends, that is an error.
func Run(ctx context.Context, o Options) (Result, error) {
	ring, err := build(o.Nodes, false, o.Shared, o.Command)
	if err != nil {
		return Result{}, err
	}
	ring.fenced = true
	defer ring.Close()
	f := &field{site: ring.Site, routers: ring.Routers, losses: map[string][]lab.Loss{}, held: o.Held > 0}
	if o.Bite != nil {
		f.bite = func(node int) (func() error, error) { return o.Bite(ring.Site, node) }
	}
	var result Result
	r := rand.New(rand.NewPCG(o.Seed, 0)) //nolint:gosec // a seed reproduces the faults
	if err := ring.AwaitTraffic(ctx); err != nil {
		return result, err
	}
	ring.Judge()
	for round := range o.Count {
		holder := ring.Holder()
		steps := schedule(r, o.Nodes, o.Stops)
		fmt.Fprintf(o.Out, "%d: %s: ", o.First+round+1, describe(steps, holder, o.Nodes))
		held, err := ring.hold(o.Held)
		if err != nil {
			return result, err
		}
		ring.Traffic.Take()
		if err := f.inject(steps, holder, ctx.Done()); err != nil {
			return result, fmt.Errorf("injecting a fault: %w", err)
		}
		if err := ring.AwaitTraffic(ctx); err != nil {
			return result, err
		}
		lost := held.end()
		result.Lost = append(result.Lost, lost...)
		found := ring.Judge()
		gap := Gap(ring.Traffic.Take())
		result.Violations = append(result.Violations, found...)
		result.Gaps = append(result.Gaps, gap)
		if ring.Holder() != holder {
			result.Takeovers++
		}
		fmt.Fprintf(o.Out, "gap %d ms, %d holds", gap.Milliseconds(), ring.Holder()+1)
		if len(found) > 0 {
			fmt.Fprintf(o.Out, ", %d violations", len(found))
		}
		if len(lost) > 0 {
			fmt.Fprintf(o.Out, ", %d connections lost", len(lost))
		}
		leaks := len(ring.leaks) - len(result.Leaks)
		if leaks > 0 {
			fmt.Fprintf(o.Out, ", %d packets with another source", leaks)
		}
		result.Leaks = ring.leaks
		if len(found)+len(lost)+leaks > 0 {
			result.Logs = cmp.Or(result.Logs, ring.Logs())
		}
		fmt.Fprintln(o.Out)
		if o.Found && len(result.Violations) > 0 {
			break
		}
	}
	found, err := ring.Stop()
	result.Violations, result.Leaks = append(result.Violations, found...), ring.leaks
	return result, err
}

// held are the connections of a round, by each router.
type held []*Connections

// hold makes so many connections by each router.
func (r *Ring) hold(count int) (all held, err error) {
	for node := range r.Routers {
		if count == 0 {
			break
		}
		c, err := Hold(r.Site, node, count, uint16(5000+node), Pace) //nolint:gosec // at most 4
		if err != nil {
			all.close()
			return nil, fmt.Errorf("connecting by router %d: %w\n%s", node+1, err, r.Logs())
		}
		all = append(all, c)
	}
	return all, nil
}

func (h held) close() {
	for _, c := range h {
		c.Close()
	}
}

// end waits until all connections have moved on, and ends them. It returns why some have not.
func (h held) end() (lost []error) {
	for node, c := range h {
		if n, _, why := c.Await(lab.Patience); n > 0 {
			lost = append(lost, fmt.Errorf("%d connections by router %d: %w", n, node+1, why))
		}
	}
	h.close()
	return lost
}

// Ring is a site with its routers, a client, and a judge of what they send.
type Ring struct {
	Site    *lab.Site
	Routers []*Router
	Traffic *Traffic

	judge    Judge
	macs     []string
	captures []*lab.Capture
	fenced   bool        // routers send nothing with another source than the reserved address
	leaks    []lab.Frame // packets that left with another source
}

// Build makes a site and starts routers and client. Unfenced pods are routers for the
// reserved address by rules that their programs do not know of.
func Build(nodes int, unfenced bool, command func(s *lab.Site, node int) *exec.Cmd) (*Ring, error) {
	return build(nodes, unfenced, false, command)
}

func build(nodes int, unfenced, shared bool, command func(s *lab.Site, node int) *exec.Cmd) (*Ring, error) {
	site, err := lab.NewSite(nodes)
	if err != nil {
		return nil, err
	}
	if shared {
		if err := site.ShareNIC(1, 0); err != nil {
			site.Close()
			return nil, err
		}
	}
	for node := range nodes {
		if !unfenced {
			break
		}
		if err := site.RouteUnfenced(node); err != nil {
			site.Close()
			return nil, err
		}
	}
	r := &Ring{Site: site, judge: Judge{Source: lab.Source}}
	if err := r.start(command); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Ring) start(command func(s *lab.Site, node int) *exec.Cmd) error {
	for i, n := range r.Site.Nodes {
		mac, err := r.Site.MAC(i)
		if err != nil {
			return err
		}
		r.macs = append(r.macs, mac)
		if slices.ContainsFunc(r.Site.Nodes[:i], func(other *lab.SiteNode) bool { return other.LAN == n.LAN }) {
			continue
		}
		c, err := r.Site.Capture(r.Site.Switch, n.LAN)
		if err != nil {
			return err
		}
		r.captures = append(r.captures, c)
	}
	if _, err := r.Site.Serve(r.Site.Switch, "tcp", reference); err != nil {
		return err
	}
	for i := range r.Site.Nodes {
		router := NewRouter(r.Site, i, func(node int) *exec.Cmd { return command(r.Site, node) })
		r.Routers = append(r.Routers, router)
		if err := router.Start(); err != nil {
			return err
		}
	}
	var err error
	r.Traffic, err = StartTraffic(r.Site)
	return err
}

// Close ends everything.
func (r *Ring) Close() {
	if r.Traffic != nil {
		r.Traffic.Close()
	}
	for _, router := range r.Routers {
		_ = router.Kill() // an error means that it has ended
	}
	r.Site.Close()
}

// AwaitTraffic waits until clients are answered without a gap.
func (r *Ring) AwaitTraffic(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lab.Patience)
	defer cancel()
	if r.Traffic.Await(inRow, ctx.Done()) {
		return nil
	}
	return fmt.Errorf("waiting for answers: %w\n%s", context.Cause(ctx), r.Logs())
}

// Logs returns the ends of the routers' logs, at most 16 KB of each.
func (r *Ring) Logs() string {
	var b strings.Builder
	for i, router := range r.Routers {
		log := router.Log()
		fmt.Fprintf(&b, "log of router %d:\n%s", i+1, log[max(0, len(log)-16<<10):])
	}
	return b.String()
}

// Judge judges the frames so far.
func (r *Ring) Judge() []Violation {
	until := time.Now()
	for _, c := range r.captures {
		frames := c.Take()
		r.judge.Add(frames)
		for _, f := range frames {
			if r.fenced && r.leaked(f) {
				r.leaks = append(r.leaks, f)
			}
		}
	}
	return r.judge.Until(until)
}

// leaked reports whether a router sent an IPv4 packet with another source than the reserved
// address.
func (r *Ring) leaked(f lab.Frame) bool {
	p, ok := f.IPv4()
	return ok && !f.Outgoing && p.Src.Addr() != lab.Source && slices.Contains(r.macs, f.Source().String())
}

// Holder returns the number of the node whose router sent last, of the frames judged; 0 if
// none has.
func (r *Ring) Holder() int {
	for i, mac := range r.macs {
		if mac == r.judge.Holder() {
			return i
		}
	}
	return 0
}

// MAC returns the hardware address of a router.
func (r *Ring) MAC(node int) string { return r.macs[node] }

// Stop ends the captures and judges the last frames. The error says that a capture is
// incomplete.
func (r *Ring) Stop() ([]Violation, error) {
	var err error
	for _, c := range r.captures {
		err = errors.Join(err, c.Stop())
	}
	found := r.Judge()
	return found, err
}
