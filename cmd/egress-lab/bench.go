package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// The goals of the benchmark. A goal that is missed is shown, not punished: the
// ratio of two processes depends on what else the machine does.
const (
	goalExample = 10  // times the restore of the example's rules
	goalLarge   = 1.3 // times the restore of 10,000 rules
	goalBinary  = 8   // MB, 10^6 bytes
)

// How often each pair is measured; the first round, in which files are read
// from disk and the kernel loads modules, is not counted.
const (
	roundsSmall = 25
	roundsLarge = 11
)

// pause lets the kernel remove the namespaces of one load before the next is
// measured, which it does in the background.
const pause = time.Second

// A load is a destination list for the router to work on.
type load struct {
	name      string
	redirects int // DNAT rules that it makes
	rounds    int
	goal      float64 // of init; 0: none
	start     bool    // also measure what starting the process takes
	env       []string
}

const benchHead = `The router from its start to its exit, beside a bare iptables-restore of the rules
that its init loads, in turns and each time in fresh namespaces.

`

const benchFoot = `
Each ratio is that of the medians of %d rounds, %d with 10,000 lines; the spread is
the middle half of the ratios of single rounds. init again finds nothing to change.
unit-test prints the rules and does nothing else, so it is what starting the
process and reading its configuration take. A goal is the most that is allowed.
MISSED means that it was not met in this run; the exit code stays 0.
`

// bench measures the router as ratios: times are those of one machine on one day.
func bench(ctx context.Context, program string, stdout io.Writer) error {
	found, err := flavours()
	if err != nil {
		return err
	}
	loads, err := makeLoads()
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, benchHead)
	printHeader(stdout)
	for _, f := range found {
		for _, l := range loads {
			rows, err := measure(ctx, program, f, l)
			if err != nil {
				return fmt.Errorf("measuring %s with iptables-%s: %w", l.name, f.name, err)
			}
			for _, r := range rows {
				r.print(stdout)
			}
			time.Sleep(pause)
		}
	}
	if err := printSizes(ctx, program, found[0], []load{loads[0], loads[len(loads)-1]}, stdout); err != nil {
		return err
	}
	fmt.Fprintf(stdout, benchFoot, roundsSmall, roundsLarge)
	return nil
}

// makeLoads returns all loads. Their files are in this process's own /run and end
// with it.
func makeLoads() ([]load, error) {
	directory, err := os.MkdirTemp("/run", "bench-")
	if err != nil {
		return nil, fmt.Errorf("making a directory: %w", err)
	}
	loads := []load{
		{name: "example", redirects: 4, rounds: roundsSmall, goal: goalExample, start: true, env: []string{"EGRESS_DESTINATION=" + exampleDestination}},
		{name: "10 lines", redirects: 10, rounds: roundsSmall},
		{name: "1,000 lines", redirects: 1000, rounds: roundsSmall},
		{name: "10,000 lines", redirects: 10000, rounds: roundsLarge, goal: goalLarge, start: true},
	}
	for i, l := range loads {
		if l.env != nil {
			continue
		}
		file := filepath.Join(directory, fmt.Sprint(l.redirects))
		if err := os.WriteFile(file, []byte(destinations(l.redirects)), 0o600); err != nil {
			return nil, fmt.Errorf("writing a list: %w", err)
		}
		loads[i].env = []string{"EGRESS_DESTINATION_FILE=" + file}
	}
	return loads, nil
}

// destinations returns a list of n lines, each with a port of its own.
func destinations(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d tcp 203.0.113.26 443\n", 10001+i)
	}
	return b.String()
}

// measure measures one load with one flavour. Every round has a lab of its own:
// the reference runs in the client's namespace, which has no rules either, the
// router in the pod's. The labs end together, after the last round, because
// their removal keeps the kernel busy.
func measure(ctx context.Context, program string, f flavour, load load) ([]row, error) {
	input, err := reference(ctx, program, f, load)
	if err != nil {
		return nil, err
	}
	rows := []row{
		{what: "init, " + load.name, flavour: f.name, goal: load.goal},
		{what: "init again, " + load.name, flavour: f.name},
	}
	if load.start {
		rows = append(rows, row{what: "unit-test, " + load.name, flavour: f.name})
	}
	modes := []string{"init", "init", "unit-test"}
	for round := range load.rounds + 1 {
		l, err := lab.New(lab.Options{})
		if err != nil {
			return nil, err
		}
		defer l.Close()
		bare, err := f.restore(ctx, l, l.Client, input)
		if err != nil {
			return nil, err
		}
		for i := range rows {
			o, err := runRouter(ctx, l, program, f, modes[i], load)
			if err != nil {
				return nil, err
			}
			if round > 0 {
				rows[i].pairs = append(rows[i].pairs, pair{bare.took, o.took})
			}
		}
	}
	return rows, nil
}

// reference writes a file of the rules that a router loads, for iptables-restore.
// Taking them from the kernel makes sure that both do the same work; that it is
// the work asked for is seen by the number of redirects.
func reference(ctx context.Context, program string, f flavour, load load) (file string, err error) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return "", err
	}
	defer l.Close()
	if _, err := runRouter(ctx, l, program, f, "init", load); err != nil {
		return "", err
	}
	rules, err := f.rules(ctx, l, l.Router)
	if err != nil {
		return "", err
	}
	if n := strings.Count(rules, " -j DNAT "); n != load.redirects {
		return "", fmt.Errorf("reading the rules of the router: there are %d redirects, want %d", n, load.redirects)
	}
	file = filepath.Join(f.directory, "rules") // each load's in turn
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		return "", fmt.Errorf("writing the rules: %w", err)
	}
	return file, nil
}

// runRouter runs the router to its end.
func runRouter(ctx context.Context, l *lab.Lab, program string, f flavour, mode string, load load) (outcome, error) {
	o, err := execute(ctx, l, l.Router, environment(mode, append(load.env, f.path())...), nil, program)
	if err != nil {
		return o, fmt.Errorf("%w: %s", err, strings.TrimSpace(o.stderr))
	}
	return o, nil
}
