package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strconv"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// The rounds of faults without an argument, and the number of routers.
const (
	faultRounds = 20
	faultNodes  = 3
)

// errViolations is the result of routers of which two have sent at the same time.
var errViolations = errors.New("two routers sent at the same time")

// injectFaults injects random faults into routers that stand by for each other. The
// arguments are those of the command after the program: the number of rounds, and the seed
// that a run before has printed. It returns nil if they are invalid.
func injectFaults(args []string) func(ctx context.Context, program string, stdout io.Writer) error {
	rounds, seed := faultRounds, uint64(rand.Uint32())
	var err error
	if len(args) > 0 {
		rounds, err = strconv.Atoi(args[0])
	}
	if err == nil && len(args) > 1 {
		seed, err = strconv.ParseUint(args[1], 10, 64)
	}
	if err != nil || rounds < 1 || len(args) > 2 {
		return nil
	}
	return func(ctx context.Context, program string, stdout io.Writer) error {
		fmt.Fprintf(stdout, "%d rounds of faults, %d routers, seed %d\n", rounds, faultNodes, seed)
		result, err := faults.Run(ctx, faults.Options{
			Nodes: faultNodes, Count: rounds, Seed: seed, Out: stdout,
			Command: standbyRouter(ctx, program),
		})
		for _, v := range result.Violations {
			fmt.Fprint(stdout, v)
		}
		fmt.Fprint(stdout, result.Logs)
		if err == nil && len(result.Violations) > 0 {
			err = fmt.Errorf("%w: %d frames in %d rounds, seed %d", errViolations, len(result.Violations), rounds, seed)
		}
		if err == nil {
			longest := slices.Max(result.Gaps)
			fmt.Fprintf(stdout, "faults: no two routers sent at the same time; %d take-overs, longest gap %d ms\n", result.Takeovers, longest/time.Millisecond)
		}
		return err
	}
}

// standbyRouter returns the commands of routers that stand by for each other, with more
// variables.
func standbyRouter(ctx context.Context, program string, more ...string) func(*lab.Site, int) *exec.Cmd {
	return func(s *lab.Site, node int) *exec.Cmd {
		return prepare(ctx, append(faults.Environment(s, node), more...), program)
	}
}
