package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// The parts of the benchmark of the proxies.
const (
	partHTTP = "http"
	partDNS  = "dns"
)

var proxyParts = []string{partHTTP, partDNS}

// The goals of the proxies, as ratios to other proxies.
var (
	goalHTTP    = atLeast(1.2)  // requests, times squid's
	goalEqual   = atLeast(1)    // any other rate
	goalTail    = atMost(1)     // any latency, times squid's
	goalSpliced = atLeast(1.2)  // bytes, times haproxy's
	goalUser    = atLeast(0.9)  // bytes as an ordinary user, times those as root
	goalShort   = atLeast(0.95) // connections, times haproxy's
)

// A trial is one load for all proxies of a part, with its readings.
type trial struct {
	kind    driveKind
	clients int
	// The requests that come in a second, whether those before are answered or not, as a
	// share of those that the second contender answered in the first trial of the round;
	// zero: each client sends the next one when it has an answer.
	share float64
	// Only the first contender has this load. The other ones' figures are those of the
	// first trial.
	alone    bool
	readings []reading
}

// Shares of the requests that squid answers at its most.
const (
	steady = 0.7 // both have time left
	ahead  = 1.4 // for the HTTP proxy alone, which then is as busy as squid was
)

// A reading is one line of the table.
type reading struct {
	what string
	of   func(drove) float64
	less bool // a lower figure is better
	goal goal
}

func rate(d drove) float64 { return d.Rate }
func p50(d drove) float64  { return d.P50 }
func p99(d drove) float64  { return d.P99 }
func gbit(d drove) float64 { return d.Gbit }

// cpu is the figure that the load of the machine changes least.
func cpu(d drove) float64 { return d.Processor }

// A contest is a part: the loads and the proxies.
type contest struct {
	start  func(ctx context.Context, l *lab.Lab, program, directory string) ([]contender, error)
	trials []trial
	idle   driveKind
}

var contests = map[string]contest{
	partHTTP: {start: startHTTP, idle: driveIdle, trials: []trial{
		{driveKept, 16, 0, false, []reading{
			{"GET keep-alive, 16 clients, 1/s", rate, false, goalHTTP},
			{"the same, processor time of one, µs", cpu, true, goal{}},
			{"the same, median, ms", p50, true, goalTail},
			// A proxy that answers more requests has more of them, and leaves the client
			// and the server less of the processors: see the next trials.
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{driveKept, 16, ahead, true, []reading{
			{fmt.Sprintf("GET keep-alive, %.1f times the requests, 1/s", ahead), rate, false, atLeast(0.98 * ahead)},
			{"the same, median, ms", p50, true, goalTail},
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{driveKept, 16, steady, false, []reading{
			{fmt.Sprintf("GET at %.0f %% of squid's rate, median, ms", steady*100), p50, true, goalTail},
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{driveKept, 16, 1, false, []reading{
			{"GET at squid's rate, median, ms", p50, true, goalTail},
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{driveNew, 16, 0, false, []reading{
			{"GET new connection, 16 clients, 1/s", rate, false, goalHTTP},
			{"the same, processor time of one, µs", cpu, true, goal{}},
			{"the same, median, ms", p50, true, goal{}},
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{driveTunnel, 16, 0, false, []reading{
			{"CONNECT and GET, 16 clients, 1/s", rate, false, goalEqual},
			{"the same, processor time of one, µs", cpu, true, goal{}},
			{"the same, p99, ms", p99, true, goalTail},
		}},
		{drivePour, 1, 0, false, []reading{{"one tunnel, Gbit/s", gbit, false, goalEqual}}},
		{drivePour, 16, 0, false, []reading{{"16 tunnels, Gbit/s", gbit, false, goalEqual}}},
	}},
	partDNS: {start: startDNS, idle: driveDirectIdle, trials: []trial{
		{driveDirect, 1, 0, false, []reading{
			{"short connections, one client, 1/s", rate, false, goal{}},
			{"the same, p99, ms", p99, true, goal{}},
		}},
		{driveDirect, 8, 0, false, []reading{
			{"short connections, 8 clients, 1/s", rate, false, goalShort},
			{"the same, processor time of one, µs", cpu, true, goal{}},
			{"the same, p99, ms", p99, true, goal{}},
		}},
		{driveDirect, 32, 0, false, []reading{
			{"short connections, 32 clients, 1/s", rate, false, goalShort},
			{"the same, processor time of one, µs", cpu, true, goal{}},
			{"the same, p99, ms", p99, true, goal{}},
		}},
		{driveDirectPour, 1, 0, false, []reading{{"one stream, Gbit/s", gbit, false, goalSpliced}}},
		{driveDirectPour, 8, 0, false, []reading{{"8 streams, Gbit/s", gbit, false, goalSpliced}}},
	}},
}

// A proxyEffort is the extent of a measurement of the proxies.
type proxyEffort struct {
	rounds int // measured rounds, after a first one that is not
	each   time.Duration
	idle   int // clients
}

var fullProxyEffort = proxyEffort{rounds: 7, each: 1500 * time.Millisecond, idle: 10000}

const proxiesHead = `Proxies: ours and others, in the network of a pod between a client and a server, in turns
with the same load and server, which are processes of their own.

`

const proxiesFoot = `%d rounds of %s each. Ratios are ours to theirs, medians of the ratios of all rounds, the
spread their middle half; the figures are medians. Another proxy is measured in all its
configurations, and the best one is the reference. Memory is the resident memory of all
processes, measured once. MISSED means that this run missed a goal; the exit code is 0.
`

// benchProxies measures parts of the benchmark of the proxies. With the name of a README it
// writes the tables there, too.
func benchProxies(parts []string, file string) func(context.Context, string, io.Writer) error {
	return func(ctx context.Context, program string, stdout io.Writer) error {
		readme, err := openReadme(file, "bench-proxies", parts)
		if err != nil {
			return err
		}
		fmt.Fprint(stdout, proxiesHead)
		for _, p := range parts {
			table := readme.tee(p, stdout)
			printProxyHeader(table)
			rows, err := measureProxies(ctx, program, contests[p], fullProxyEffort)
			if err != nil {
				return fmt.Errorf("measuring %s: %w", p, err)
			}
			for _, r := range rows {
				r.print(table)
			}
			fmt.Fprintln(stdout)
		}
		fmt.Fprintf(stdout, proxiesFoot, fullProxyEffort.rounds, fullProxyEffort.each)
		return readme.write()
	}
}

// originAt is the address of the server behind all proxies.
var originAt = netip.AddrPortFrom(netip.MustParseAddr(server), 80)

// measureProxies measures one part.
func measureProxies(ctx context.Context, program string, c contest, e proxyEffort) ([]row, error) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := l.RoutePlainly(); err != nil {
		return nil, err
	}
	// Without it, a proxy that lets the kernel choose its ports can run out of them, which
	// would be an error instead of a figure.
	if err := l.SetSysctl(l.Router, "net/ipv4/tcp_tw_reuse", "1"); err != nil {
		return nil, err
	}
	if err := startOrigin(ctx, l); err != nil {
		return nil, err
	}
	directory, err := os.MkdirTemp("/run", "proxies-")
	if err != nil {
		return nil, fmt.Errorf("making a directory: %w", err)
	}
	contenders, err := c.start(ctx, l, program, directory)
	if err != nil {
		return nil, err
	}
	for _, p := range contenders {
		if err := p.await(ctx, l); err != nil {
			return nil, err
		}
	}
	results, err := c.run(ctx, l, contenders, e)
	if err != nil {
		return nil, err
	}
	rows := c.compare(contenders, results)
	memory, err := measureProxyMemory(ctx, l, c.idle, contenders, e.idle)
	return append(rows, memory...), err
}

// run returns the results by trial, contender and round.
func (c contest) run(ctx context.Context, l *lab.Lab, contenders []contender, e proxyEffort) ([][][]drove, error) {
	results := make([][][]drove, len(c.trials))
	order := make([]int, len(contenders))
	for i := range order {
		order[i] = i
	}
	for i := range results {
		results[i] = make([][]drove, len(contenders))
	}
	for round := range e.rounds + 1 {
		// The order is reversed in each round: no position has an advantage.
		slices.Reverse(order)
		first := make([]drove, len(contenders)) // of the first trial
		for i, t := range c.trials {
			for _, k := range order {
				if contenders[k].user && t.kind != drivePour {
					continue
				}
				d := first[k]
				if !t.alone || k == 0 {
					var err error
					if d, err = contenders[k].drive(ctx, l, t.drive(first[1], e.each)); err != nil {
						return nil, fmt.Errorf("%s: %w", contenders[k].name, err)
					}
				}
				if i == 0 {
					first[k] = d
				}
				if round > 0 {
					results[i][k] = append(results[i][k], d)
				}
			}
		}
	}
	return results, nil
}

// drive returns the load of a trial, with the second contender's result of the first trial.
func (t trial) drive(second drove, each time.Duration) drive {
	d := drive{Kind: t.kind, Clients: t.clients, Sent: t.alone, For: each}
	if t.share > 0 {
		d.Rate = max(1, int(t.share*second.Rate))
	}
	return d
}

// compare makes the rows. The first contender is ours as root; the reference is the best
// of the others.
func (c contest) compare(contenders []contender, results [][][]drove) []row {
	var rows []row
	for i, t := range c.trials {
		for _, r := range t.readings {
			figures := func(k int) (all []float64) {
				for _, d := range results[i][k] {
					all = append(all, r.of(d))
				}
				return all
			}
			best := 1
			for k := 2; k < len(contenders); k++ {
				if !contenders[k].user && (quantile(figures(k), 0.5) < quantile(figures(best), 0.5)) == r.less {
					best = k
				}
			}
			rows = append(rows, row{what: r.what, variant: contenders[best].name, pairs: pairs(figures(best), figures(0)), goal: r.goal})
			for k, p := range contenders {
				if p.user && t.kind == drivePour {
					rows = append(rows, row{what: "the same as an ordinary user", variant: "ours as root", pairs: pairs(figures(0), figures(k)), goal: goalUser})
				}
			}
		}
	}
	return rows
}

// measureProxyMemory returns rows of the memory of the first two proxies after the load,
// and with many idle clients, each of which has sent one request.
func measureProxyMemory(ctx context.Context, l *lab.Lab, kind driveKind, contenders []contender, clients int) ([]row, error) {
	clients = min(clients, mostIdle())
	var loaded, idle [2]float64
	for k, p := range contenders[:2] {
		var err error
		if loaded[k], err = p.resident(); err != nil {
			return nil, err
		}
		cmd, input, err := p.startDrive(ctx, l, drive{Kind: kind, Clients: clients})
		if err != nil {
			return nil, err
		}
		time.Sleep(settled)
		idle[k], err = p.resident()
		if err := errors.Join(err, input.Close(), cmd.Wait()); err != nil {
			return nil, err
		}
	}
	name := contenders[1].name
	return []row{
		{what: "memory after the load, MB", variant: name, pairs: []pair{{loaded[1], loaded[0]}}},
		{what: fmt.Sprintf("memory, %s idle clients, MB", thousands(clients)), variant: name, pairs: []pair{{idle[1], idle[0]}}},
	}, nil
}

// mostIdle returns the number of clients for which a proxy has file descriptors, two for
// each.
func mostIdle() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 400
	}
	return int(min(limit.Max, 1<<20)/2) - spareFiles
}

// spareFiles is the number of other descriptors of haproxy (listeners, pipes and others).
const spareFiles = 500

// self returns a command that runs this program as one of the peers.
func self(ctx context.Context, args ...string) (*exec.Cmd, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	cmd := prepare(ctx, nil, append([]string{path}, args...)...)
	cmd.Args[0] = "egress-lab" // a test binary is this program under this name
	return cmd, nil
}

// startOrigin starts the server, which ends with the lab.
func startOrigin(ctx context.Context, l *lab.Lab) error {
	cmd, err := self(ctx, "origin", originAt.String())
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("making a pipe: %w", err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := l.Start(l.Outside, cmd); err != nil {
		return err
	}
	if err := awaitWord(stdout); err != nil {
		return fmt.Errorf("starting the server: %w: %s", errors.Join(err, cmd.Wait()), strings.TrimSpace(stderr.String()))
	}
	go func() { _ = cmd.Wait() }() // it ends with the lab, by a signal
	return nil
}

// awaitWord waits until a process prints that it is ready.
func awaitWord(stdout io.Reader) error {
	line := make([]byte, len(ready)+1)
	if _, err := io.ReadFull(stdout, line); err != nil || string(line) != ready+"\n" {
		return fmt.Errorf("waiting for the line \"ready\": found %q: %w", line, err)
	}
	return nil
}

// command returns the process that puts a load on a proxy.
func (p contender) command(ctx context.Context, d drive) (*exec.Cmd, error) {
	d.To, d.Server = p.at, originAt
	args, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("writing a load: %w", err)
	}
	return self(ctx, "drive", string(args))
}

// drive puts a load on a proxy and returns the result.
func (p contender) drive(ctx context.Context, l *lab.Lab, d drive) (drove, error) {
	cmd, err := p.command(ctx, d)
	if err != nil {
		return drove{}, err
	}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	before, err := p.processor()
	if err != nil {
		return drove{}, err
	}
	if err := l.Run(l.Client, cmd); err != nil {
		return drove{}, fmt.Errorf("%w: %s%s", err, stderr.String(), p.logTail())
	}
	var result drove
	if err := json.Unmarshal([]byte(stdout.String()), &result); err != nil {
		return drove{}, fmt.Errorf("reading the result of a load: %w", err)
	}
	after, err := p.processor()
	result.Processor = float64((after - before).Microseconds()) / float64(max(result.Answers, 1))
	return result, err
}

// startDrive starts a load of idle clients, which lasts until its input is closed.
func (p contender) startDrive(ctx context.Context, l *lab.Lab, d drive) (*exec.Cmd, io.Closer, error) {
	cmd, err := p.command(ctx, d)
	if err != nil {
		return nil, nil, err
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("making a pipe: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("making a pipe: %w", err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := l.Start(l.Client, cmd); err != nil {
		return nil, nil, err
	}
	if err := awaitWord(stdout); err != nil {
		return nil, nil, fmt.Errorf("%s: %w: %s%s", p.name, errors.Join(err, cmd.Wait()), stderr.String(), p.logTail())
	}
	return cmd, stdin, nil
}
