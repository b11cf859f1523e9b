package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// The goals of the benchmark. A missed goal is printed and does not change the exit code:
// the ratio of two measurements depends on the load of the machine.
var (
	goalExample = atMost(10)    // times the load of the example's rules
	goalLarge   = atMost(1.3)   // times the load of 10,000 destinations
	goalRival   = atMost(0.5)   // times the load of 10,000 with iptables-restore
	goalFlat    = atLeast(0.9)  // connections with 10,000 destinations, times those with one
	goalMixed   = atLeast(0.95) // the same with 10,000 destinations of every kind
	goalLinear  = atLeast(5)    // connections with 10,000 destinations, times those through a linear chain
	goalBulk    = atLeast(0.95) // TCP bytes, times those without any rule
	goalBinary  = atMost(15)    // MB, 10^6 bytes
	goalIdle    = atMost(15)    // MB, 10^6 bytes
)

// The parts of the benchmark, in the order of a whole one.
const (
	partLoad        = "load"
	partConnections = "connections"
	partThroughput  = "throughput"
)

var parts = []string{partLoad, partConnections, partThroughput, partStandby}

const benchFoot = `Each ratio is the median of the ratios of all rounds, the spread their middle half; the
figures are medians. MISSED means that this run missed a goal; the exit code is 0.
`

// bench measures parts of the benchmark, as ratios: absolute figures depend on the machine.
// With the name of a README it writes the tables there, too.
func bench(parts []string, file string) func(context.Context, string, io.Writer) error {
	measures := map[string]func(context.Context, string, []variant, io.Writer) error{
		partLoad:        benchLoad,
		partConnections: benchConnections,
		partThroughput:  benchThroughput,
		partStandby:     benchStandby,
	}
	return func(ctx context.Context, program string, stdout io.Writer) error {
		r, err := openReadme(file, "bench", parts)
		if err != nil {
			return err
		}
		found, err := variants()
		if err != nil {
			return err
		}
		for _, v := range found {
			if err := try(ctx, program, v); err != nil {
				return fmt.Errorf("trying %s: %w", v.name, err)
			}
		}
		for _, p := range parts {
			if err := measures[p](ctx, program, found, r.tee(p, stdout)); err != nil {
				return err
			}
			fmt.Fprintln(stdout)
		}
		fmt.Fprint(stdout, benchFoot)
		return r.write()
	}
}

// try runs a router with the example once, so that a router that cannot be measured fails at
// once and not after minutes.
func try(ctx context.Context, program string, v variant) error {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return err
	}
	defer l.Close()
	_, err = runInit(ctx, l, program, v, example())
	return err
}

// runRouter runs the router to its end.
func runRouter(ctx context.Context, l *lab.Lab, program string, v variant, mode string, load load) (outcome, error) {
	return report(ctx, l, l.Router, environment(mode, append(slices.Clip(load.env), v.env...)...), nil, program)
}

// runInit runs the router in mode init and returns the rules that it has loaded. Another
// number of redirects than that of load is an error.
func runInit(ctx context.Context, l *lab.Lab, program string, v variant, load load) (string, error) {
	if _, err := runRouter(ctx, l, program, v, "init", load); err != nil {
		return "", err
	}
	rules, err := v.tool.rules(ctx, l, l.Router)
	if err != nil {
		return "", fmt.Errorf("reading the rules of the router: %w", err)
	}
	if n := v.tool.redirects(rules); n != load.redirects {
		return "", fmt.Errorf("reading the rules of the router: %d redirects, want %d", n, load.redirects)
	}
	return rules, nil
}

// report executes a program. If it fails, the error contains its stderr.
func report(ctx context.Context, l *lab.Lab, ns *netns.Namespace, env []string, input *os.File, program ...string) (outcome, error) {
	o, err := execute(ctx, l, ns, env, input, program...)
	if err != nil {
		return o, fmt.Errorf("%w: %s", err, strings.TrimSpace(o.stderr))
	}
	return o, nil
}
