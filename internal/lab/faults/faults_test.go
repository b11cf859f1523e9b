package faults_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// program returns the commands of routers that stand by for each other, which are this test
// binary.
func program(t *testing.T) func(*lab.Site, int) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("egress-router")
	if err != nil {
		t.Fatal(err)
	}
	return func(s *lab.Site, node int) *exec.Cmd {
		cmd := exec.Command(path)
		cmd.Env = append(faults.Environment(s, node), "PATH="+os.Getenv("PATH"))
		// With the race detector, or on a busy machine, processes are late by more than a few
		// of the shorter intervals: routers would take over from each other all the time.
		cmd.Env = append(cmd.Env, "EGRESS_STANDBY_INTERVAL=50ms")
		cmd.Env = append(cmd.Env, nstest.Environment()...)
		return cmd
	}
}

// run injects faults and prints the rounds if the test fails.
func run(t *testing.T, o faults.Options) faults.Result {
	t.Helper()
	if o.Command == nil {
		o.Command = program(t)
	}
	o.Out = t.Output()
	result, err := faults.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// No two routers send at the same time, whatever happens to them, and clients are answered
// again afterwards.
func TestFaults(t *testing.T) {
	rounds := 3
	if nstest.Long() {
		rounds = 20
	}
	for _, variant := range []struct {
		name    string
		options faults.Options
	}{
		{"2 routers", faults.Options{Nodes: 2}},
		{"3 routers", faults.Options{Nodes: 3}},
		{"2 routers on a node", faults.Options{Nodes: 2, Shared: true}},
		{"2 routers that carry", faults.Options{Nodes: 2, Command: carrying(t, "nftables"), Held: 3}},
		{"4 routers that carry, 2 of them on a node", faults.Options{Nodes: 4, Shared: true, Command: carrying(t, "nftables"), Held: 3}},
	} {
		t.Run(variant.name, func(t *testing.T) {
			t.Parallel()
			o := variant.options
			o.Count, o.Seed = rounds, 1
			result := run(t, o)
			for _, v := range result.Violations {
				t.Errorf("violation: %s", v)
			}
			for _, f := range result.Leaks {
				t.Errorf("another source: %s", f)
			}
			for _, err := range result.Lost {
				t.Error(err)
			}
			if t.Failed() {
				t.Log(result.Logs)
			}
		})
	}
}

// A router whose permit lives an hour longer than its process is found to send after
// another one has taken over: the judge would find a fence that does not work.
func TestFaultsWithoutFence(t *testing.T) {
	t.Parallel()
	result := run(t, faults.Options{Nodes: 2, Count: 1000, Seed: 1, Bite: faults.Unfence, Stops: true, Found: true})
	if len(result.Violations) == 0 {
		t.Errorf("no violation in %d rounds", len(result.Gaps))
	}
}
