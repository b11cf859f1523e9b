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

// The numbers of rounds of each pair. A first round, in which files are read from disk and
// the kernel loads modules, is not counted.
const (
	roundsSmall = 25
	roundsLarge = 11
)

// pause is the time in which the kernel removes the namespaces of one load, in the
// background, before the next load is measured.
const pause = time.Second

// A load is a destination list to measure the router with.
type load struct {
	name      string
	redirects int // number of destinations
	rounds    int
	goal      goal // goal of init
	rivalGoal goal // goal of init beside the tool of the variant's rival
	start     bool // also measure the start of the process
	env       []string
}

const loadHead = `Load: the router from its start to its exit. Reference: the bare tool (iptables-restore
--noflush, nft -f) with the rules that init loads. In turns, each time in new namespaces.

`

const loadFoot = `
%d rounds, %d with 10,000 lines. The second init changes nothing. unit-test only prints
the rules: its time is that of starting the process and reading its configuration.
`

// benchLoad measures the time of loading rules, and the sizes of the program.
func benchLoad(ctx context.Context, program string, found []variant, stdout io.Writer) error {
	loads, err := makeLoads()
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, loadHead)
	printHeader(stdout, "ms")
	for _, v := range found {
		for _, l := range loads {
			rows, err := measure(ctx, program, v, l)
			if err != nil {
				return fmt.Errorf("measuring %s with %s: %w", l.name, v.name, err)
			}
			for _, r := range rows {
				r.print(stdout)
			}
			time.Sleep(pause)
		}
	}
	if err := printSizes(ctx, program, found, []load{loads[0], loads[len(loads)-1]}, stdout); err != nil {
		return err
	}
	fmt.Fprintf(stdout, loadFoot, roundsSmall, roundsLarge)
	return nil
}

// makeLoads returns all loads.
func makeLoads() ([]load, error) {
	loads := []load{example()}
	for _, n := range []int{10, 1000, 10000} {
		l, err := makeLoad(n)
		if err != nil {
			return nil, err
		}
		loads = append(loads, l)
	}
	large := &loads[len(loads)-1]
	large.rounds, large.goal, large.rivalGoal, large.start = roundsLarge, goalLarge, goalRival, true
	return loads, nil
}

// example is the load of the documentation.
func example() load {
	return load{name: "example", redirects: 4, rounds: roundsSmall, goal: goalExample, start: true, env: []string{"EGRESS_DESTINATION=" + exampleDestination}}
}

// makeLoad returns a load of n destinations.
func makeLoad(n int) (load, error) {
	l, err := writeLoad(thousands(n)+" lines", destinations(n))
	l.redirects = n
	return l, err
}

// writeLoad returns a load of a list, without the number of redirects. Its file is in this
// process's own /run and ends with it.
func writeLoad(name, list string) (load, error) {
	directory, err := os.MkdirTemp("/run", "bench-")
	if err != nil {
		return load{}, fmt.Errorf("making a directory: %w", err)
	}
	file := filepath.Join(directory, "destinations")
	if err := os.WriteFile(file, []byte(list), 0o600); err != nil {
		return load{}, fmt.Errorf("writing a list: %w", err)
	}
	return load{name: name, rounds: roundsSmall, env: []string{"EGRESS_DESTINATION_FILE=" + file}}, nil
}

// The destinations of a list that is not the example have the ports from
// firstPort on, and one server.
const (
	firstPort = 10001
	server    = "203.0.113.26"
	onePort   = 443
)

// destinations returns a list of n lines, each with a port of its own.
func destinations(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d tcp %s %d\n", firstPort+i, server, onePort)
	}
	return b.String()
}

// measure measures one load with one variant. Every round has a lab of its own:
// the references run in the namespaces of the clients, which have no rules
// either, the router in the pod's. The labs end together, after the last round,
// because their removal keeps the kernel busy.
func measure(ctx context.Context, program string, v variant, load load) ([]row, error) {
	own, err := reference(ctx, program, v, load)
	if err != nil {
		return nil, err
	}
	rows := []row{
		{what: "init, " + load.name, variant: v.name, goal: load.goal},
		{what: "init again, " + load.name, variant: v.name},
	}
	if load.start {
		rows = append(rows, row{what: "unit-test, " + load.name, variant: v.name})
	}
	modes := []string{"init", "init", "unit-test"}
	versus := row{variant: v.name, goal: load.rivalGoal}
	var rivals string
	if v.rival != nil && load.rivalGoal != (goal{}) {
		versus.what = "init, " + load.name + ", to " + v.rival.name
		if rivals, err = reference(ctx, program, *v.rival, load); err != nil {
			return nil, err
		}
	}
	for round := range load.rounds + 1 {
		l, err := lab.New(lab.Options{})
		if err != nil {
			return nil, err
		}
		defer l.Close()
		var other outcome
		if versus.what != "" {
			if other, err = v.rival.tool.load(ctx, l, l.Far, rivals); err != nil {
				return nil, err
			}
		}
		bare, err := v.tool.load(ctx, l, l.Client, own)
		if err != nil {
			return nil, err
		}
		for i := range rows {
			o, err := runRouter(ctx, l, program, v, modes[i], load)
			if err != nil {
				return nil, err
			}
			if round == 0 {
				continue
			}
			rows[i].pairs = append(rows[i].pairs, pair{milliseconds(bare.took), milliseconds(o.took)})
			if i == 0 {
				versus.pairs = append(versus.pairs, pair{milliseconds(other.took), milliseconds(o.took)})
			}
		}
	}
	if versus.what != "" {
		rows = append(rows, versus)
	}
	return rows, nil
}

// reference writes a file of the rules that a router loads, for the bare tool.
// Taking them from the kernel makes sure that both do the same work.
func reference(ctx context.Context, program string, v variant, load load) (file string, err error) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return "", err
	}
	defer l.Close()
	rules, err := runInit(ctx, l, program, v, load)
	if err != nil {
		return "", err
	}
	return writeRules(rules)
}

// writeRules writes a file for the bare tool.
func writeRules(rules string) (file string, err error) {
	directory, err := os.MkdirTemp("/run", "rules-")
	if err != nil {
		return "", fmt.Errorf("making a directory: %w", err)
	}
	file = filepath.Join(directory, "rules")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		return "", fmt.Errorf("writing the rules: %w", err)
	}
	return file, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
