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

// faultRounds is the number of rounds without an argument.
const faultRounds = 20

// A faultVariant is a kind of routers.
type faultVariant struct {
	nodes  int
	shared bool // two of them are on one node
	carry  bool
}

// faultVariants are the kinds among which the rounds are divided.
var faultVariants = []faultVariant{{nodes: 3}, {nodes: 3, carry: true}, {nodes: 2}, {nodes: 4, shared: true, carry: true}, {nodes: 2, shared: true}}

// heldByEach is the number of connections that enter by each router, if routers carry.
const heldByEach = 6

func (v faultVariant) String() string {
	text := fmt.Sprintf("%d routers", v.nodes)
	if v.shared {
		text += ", two of them on one node"
	}
	if v.carry {
		text += ", with EGRESS_STANDBY_CARRY=vxlan"
	}
	return text
}

// errViolations is the result of routers of which two have sent at the same time.
var errViolations = errors.New("two routers sent at the same time")

// The results of other faults.
var (
	errSource = errors.New("a router sent packets with another source than the reserved address")
	errLost   = errors.New("connections were lost, although routers carry")
)

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
		fmt.Fprintf(stdout, "%d rounds of faults, seed %d\n", rounds, seed)
		var all faults.Result
		for i, v := range faultVariants {
			// Earlier kinds have one round more if there is a remainder.
			count := (rounds + len(faultVariants) - 1 - i) / len(faultVariants)
			if count == 0 {
				break
			}
			fmt.Fprintf(stdout, "%s\n", v)
			o := faults.Options{Nodes: v.nodes, Shared: v.shared, First: len(all.Gaps), Count: count, Seed: seed + uint64(i)<<32, Out: stdout}
			var more []string
			if v.carry {
				o.Held, more = heldByEach, []string{"EGRESS_STANDBY_CARRY=vxlan"}
			}
			o.Command = standbyRouter(ctx, program, more...)
			result, err := faults.Run(ctx, o)
			for _, found := range result.Violations {
				fmt.Fprint(stdout, found)
			}
			for _, f := range result.Leaks {
				fmt.Fprintf(stdout, "a router sent with another source: %s\n", f)
			}
			for _, why := range result.Lost {
				fmt.Fprintf(stdout, "lost: %s\n", why)
			}
			fmt.Fprint(stdout, result.Logs)
			if err != nil {
				return err
			}
			all.Violations, all.Leaks, all.Lost = append(all.Violations, result.Violations...), append(all.Leaks, result.Leaks...), append(all.Lost, result.Lost...)
			all.Gaps, all.Takeovers = append(all.Gaps, result.Gaps...), all.Takeovers+result.Takeovers
		}
		switch {
		case len(all.Violations) > 0:
			return fmt.Errorf("%w: %d frames in %d rounds, seed %d", errViolations, len(all.Violations), rounds, seed)
		case len(all.Leaks) > 0:
			return fmt.Errorf("%w: %d packets in %d rounds, seed %d", errSource, len(all.Leaks), rounds, seed)
		case len(all.Lost) > 0:
			return fmt.Errorf("%w: in %d of %d rounds, seed %d", errLost, len(all.Lost), rounds, seed)
		}
		fmt.Fprintf(stdout, "faults: no two routers sent at the same time, and no connection was lost; %d take-overs, longest gap %d ms\n", all.Takeovers, slices.Max(all.Gaps)/time.Millisecond)
		return nil
	}
}

// standbyRouter returns the commands of routers that stand by for each other, with more
// variables.
func standbyRouter(ctx context.Context, program string, more ...string) func(*lab.Site, int) *exec.Cmd {
	return func(s *lab.Site, node int) *exec.Cmd {
		return prepare(ctx, append(faults.Environment(s, node), more...), program)
	}
}
