package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// The goals of standing by, in milliseconds: the longest time without answers to new
// connections that one takes.
var (
	goalPower   = atMost(250)
	goalKill    = atMost(220)
	goalFreeze  = atMost(200)
	goalLink    = atMost(30)
	goalPlanned = atMost(30)
)

const partStandby = "standby"

// A standbyEffort is the extent of the measurement.
type standbyEffort struct {
	rounds     int
	held       int           // established connections
	ends       time.Duration // time without an answer after which those that cannot live are lost
	interval   time.Duration // between two heartbeats of all contenders
	idle, load time.Duration
}

// A pairing is two routers for one reserved address, in a site of their own.
type pairing struct {
	name string
	ring *faults.Ring
	// The last of these in a router's log is its role. A router that begins as a standby
	// logs that it is ready.
	active  string
	standby []string
}

// An outage is what happens to the router that holds the address.
type outage struct {
	name  string
	goal  goal
	begin func(r *faults.Ring, node int) error
	end   func(r *faults.Ring, node int) error
}

const nodeLost = "node lost"

// outages are the events that are measured. Afterwards all processes are started again.
var outages = []outage{
	{nodeLost, goalPower, func(r *faults.Ring, node int) error {
		n := r.Site.Nodes[node]
		// The links first: a process that ends does not take leave.
		for _, port := range []string{n.LAN, n.ClusterPort} {
			if err := r.Site.SetPort(port, false); err != nil {
				return err
			}
		}
		return r.Routers[node].Kill()
	}, func(r *faults.Ring, node int) error {
		n := r.Site.Nodes[node]
		if err := r.Site.SetPort(n.LAN, true); err != nil {
			return err
		}
		return r.Site.SetPort(n.ClusterPort, true)
	}},
	{"process killed", goalKill, func(r *faults.Ring, node int) error { return r.Routers[node].Kill() }, nil},
	{"process frozen", goalFreeze,
		func(r *faults.Ring, node int) error { return r.Routers[node].Signal(syscall.SIGSTOP) },
		func(r *faults.Ring, node int) error { return r.Routers[node].Signal(syscall.SIGCONT) }},
	{"link lost", goalLink,
		func(r *faults.Ring, node int) error { return r.Site.SetPort(r.Site.Nodes[node].LAN, false) },
		func(r *faults.Ring, node int) error { return r.Site.SetPort(r.Site.Nodes[node].LAN, true) }},
	{"planned", goalPlanned,
		func(r *faults.Ring, node int) error { return r.Routers[node].Terminate() },
		func(r *faults.Ring, node int) error { r.Routers[node].AwaitEnd(); return nil }},
}

// benchStandby measures how long clients wait for another router, beside keepalived, and what
// that costs established connections.
func benchStandby(ctx context.Context, program string, _ []variant, stdout io.Writer) error {
	e := standbyEffort{rounds: 10, held: heldConnections, ends: 5 * time.Second, interval: 20 * time.Millisecond, idle: 10 * time.Second, load: 20 * time.Second}
	if err := measureStandby(ctx, program, e, stdout); err != nil {
		return err
	}
	return measureHeld(ctx, program, e, stdout)
}

func measureStandby(ctx context.Context, program string, e standbyEffort, stdout io.Writer) error {
	directory, err := os.MkdirTemp("/run", "standby-")
	if err != nil {
		return fmt.Errorf("making a directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(directory) }()
	ours, err := buildOurs(ctx, program, e.interval)
	if err != nil {
		return err
	}
	defer ours.ring.Close()
	theirs, err := buildKeepalived(ctx, directory, e.interval)
	if err != nil {
		return err
	}
	defer theirs.ring.Close()
	fmt.Fprintf(stdout, "Standby: longest time without answers to new connections, ms, at heartbeats of %s\n\n", e.interval)
	const format = "%-32s %20s %20s %8s %s\n"
	fmt.Fprintf(stdout, format, "what", "keepalived (spread)", "router (spread)", "goal", "ok")
	for _, o := range outages {
		var gaps [2][]float64
		for range e.rounds {
			for i, p := range []pairing{theirs, ours} {
				gap, err := p.measure(ctx, o)
				if err != nil {
					return fmt.Errorf("measuring %s, %s: %w", p.name, o.name, err)
				}
				gaps[i] = append(gaps[i], float64(gap)/float64(time.Millisecond))
			}
		}
		fmt.Fprintln(stdout, strings.TrimRight(fmt.Sprintf(format, o.name, spread(gaps[0]), spread(gaps[1]), o.goal, o.goal.judge(quantile(gaps[1], 0.5))), " \n"))
	}
	for _, figure := range []func(context.Context, pairing, standbyEffort) ([]string, error){takeovers, idleTime} {
		a, err := figure(ctx, theirs, e)
		if err != nil {
			return err
		}
		b, err := figure(ctx, ours, e)
		if err != nil {
			return err
		}
		for i := 0; i < len(a); i += 2 {
			fmt.Fprintln(stdout, strings.TrimRight(fmt.Sprintf(format, a[i], a[i+1], b[i+1], "", ""), " \n"))
		}
	}
	return nil
}

// spread returns a median and its middle half.
func spread(figures []float64) string {
	return fmt.Sprintf("%.0f (%.0f to %.0f)", quantile(figures, 0.5), quantile(figures, 0.25), quantile(figures, 0.75))
}

func buildOurs(ctx context.Context, program string, interval time.Duration, more ...string) (pairing, error) {
	ring, err := faults.Build(2, false, standbyRouter(ctx, program, append(more, fmt.Sprint("EGRESS_STANDBY_INTERVAL=", interval))...))
	return pairing{"the router", ring, "role=active", []string{"role=standby", "msg=ready"}}, err
}

// buildKeepalived makes two pods with rules that nothing fences. Their adverts need an
// address of their own: the rules would give them the reserved one.
func buildKeepalived(ctx context.Context, directory string, interval time.Duration) (pairing, error) {
	path, err := findPeer("keepalived", "keepalived")
	if err != nil {
		return pairing{}, err
	}
	const config = `global_defs {
	vrrp_version 3
}
vrrp_instance egress {
	state BACKUP
	nopreempt
	interface %s
	virtual_router_id 99
	priority %d
	advert_int %g
	virtual_ipaddress {
		%s/%d
	}
}
`
	command := func(s *lab.Site, node int) *exec.Cmd {
		file := filepath.Join(directory, fmt.Sprint("keepalived-", node))
		pids := []string{file + ".pid", file + "-vrrp.pid"}
		for _, f := range pids {
			_ = os.Remove(f) // one that was killed leaves its file
		}
		return prepare(ctx, nil, path, "-n", "-l", "-D", "-P", "-f", file+".conf", "-p", pids[0], "-r", pids[1])
	}
	for node := range 2 {
		text := fmt.Appendf(nil, config, "macvlan0", 100+node, interval.Seconds(), lab.Source, lab.LAN.Bits())
		if err := os.WriteFile(filepath.Join(directory, fmt.Sprintf("keepalived-%d.conf", node)), text, 0o600); err != nil {
			return pairing{}, fmt.Errorf("writing the configuration of keepalived: %w", err)
		}
	}
	ring, err := faults.Build(2, true, command)
	return pairing{"keepalived", ring, "Entering MASTER STATE", []string{"Entering BACKUP STATE"}}, err
}

// role returns the role of a router since its start: active, standby, or neither.
func (p pairing) role(node int) string {
	log := p.ring.Routers[node].Log()
	log = log[strings.LastIndex(log, faults.Started)+1:]
	active, standby := strings.LastIndex(log, p.active), -1
	for _, text := range p.standby {
		standby = max(standby, strings.LastIndex(log, text))
	}
	switch {
	case active > standby:
		return "active"
	case standby > active:
		return "standby"
	}
	return ""
}

// holds reports whether a router is active, for the gateway as well, and the other one
// stands by.
func (p pairing) holds(node int) bool {
	if p.role(node) != "active" || p.role(1-node) != "standby" {
		return false
	}
	site := p.ring.Site
	mac, err := site.Neighbour(site.Outside, lab.LANLink, lab.Source)
	return err == nil && mac.String() == p.ring.MAC(node)
}

// settled waits until a router holds, and goes on to while clients are answered, and returns
// its node.
func (p pairing) settled(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, lab.Patience)
	defer cancel()
	for before := -1; ; {
		// A keepalived that loses and regains the address within milliseconds leaves the
		// gateway with the other one's hardware address, for half a minute.
		if before < 0 {
			if err := p.ring.Site.ForgetNeighbours(); err != nil {
				return 0, err
			}
		}
		if err := p.ring.AwaitTraffic(ctx); err != nil {
			return 0, err
		}
		now := slices.IndexFunc([]int{0, 1}, p.holds)
		if now >= 0 && now == before {
			return now, nil
		}
		before = now
	}
}

// measure returns the gap of an outage of the router that holds.
func (p pairing) measure(ctx context.Context, o outage) (time.Duration, error) {
	holder, err := p.settled(ctx)
	if err != nil {
		return 0, err
	}
	p.ring.Traffic.Take()
	if err := o.begin(p.ring, holder); err != nil {
		return 0, err
	}
	for p.role(1-holder) != "active" {
		if err := p.ring.AwaitTraffic(ctx); err != nil {
			return 0, err
		}
	}
	if err := p.ring.AwaitTraffic(ctx); err != nil {
		return 0, err
	}
	gap := faults.Gap(p.ring.Traffic.Take())
	if o.end != nil {
		if err := o.end(p.ring, holder); err != nil {
			return 0, err
		}
	}
	return gap, p.ring.Routers[holder].Start()
}

// takeovers returns how often a router becomes active while the machine is busy, which
// nothing but the load causes: names and figures in turns.
func takeovers(ctx context.Context, p pairing, e standbyEffort) ([]string, error) {
	if _, err := p.settled(ctx); err != nil {
		return nil, err
	}
	count := func() (n int) {
		for _, r := range p.ring.Routers {
			n += strings.Count(r.Log(), p.active)
		}
		return n
	}
	before := count()
	loaded, cancel := context.WithCancel(ctx)
	defer cancel()
	for range 4 * runtime.NumCPU() {
		cmd := prepare(loaded, nil, "sh", "-c", "while :; do :; done")
		if err := p.ring.Site.Start(p.ring.Site.Client, cmd); err != nil {
			return nil, err
		}
		go func() { _ = cmd.Wait() }() // it ends by a signal
	}
	select {
	case <-time.After(e.load):
	case <-ctx.Done():
	}
	return []string{fmt.Sprintf("take-overs in %s of load", e.load), fmt.Sprint(count() - before)}, ctx.Err()
}

// idleTime returns the processor time of both routers without any traffic: names and
// figures in turns.
func idleTime(ctx context.Context, p pairing, e standbyEffort) ([]string, error) {
	holder, err := p.settled(ctx)
	if err != nil {
		return nil, err
	}
	p.ring.Traffic.Pause()
	defer p.ring.Traffic.Resume()
	var figures []string
	used := func() (times [2]time.Duration, err error) {
		for i, node := range []int{holder, 1 - holder} {
			if times[i], err = p.ring.Routers[node].Processor(); err != nil {
				return times, err
			}
		}
		return times, nil
	}
	before, err := used()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	select {
	case <-time.After(e.idle):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	after, err := used()
	took := time.Since(begin)
	for i, role := range []string{"active", "standby"} {
		figures = append(figures, "idle processor time, "+role+", %", fmt.Sprintf("%.1f", 100*float64(after[i]-before[i])/float64(took)))
	}
	return figures, err
}
