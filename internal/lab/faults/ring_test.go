package faults_test

import (
	"os/exec"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// build makes a ring of pods with rules only, all of which have the reserved address.
func build(t *testing.T, nodes int) *faults.Ring {
	t.Helper()
	ring, err := faults.Build(nodes, true, func(*lab.Site, int) *exec.Cmd { return exec.Command("sleep", "infinity") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ring.Close)
	for node := range nodes {
		if err := ring.Site.AddSource(node); err != nil {
			t.Fatal(err)
		}
	}
	return ring
}

func judge(t *testing.T, r *faults.Ring) []faults.Violation {
	t.Helper()
	found, err := r.Stop()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// The client reaches the server by one router, which alone is seen to send.
func TestOneHolder(t *testing.T) {
	ring := build(t, 1)
	if err := ring.AwaitTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, v := range judge(t, ring) {
		t.Errorf("violation: %s", v)
	}
	if holder := ring.Holder(); holder != 0 {
		t.Errorf("holder: %d, want 0", holder)
	}
	answered := 0
	for _, a := range ring.Traffic.Take() {
		if a.Answered {
			answered++
		}
	}
	if answered < 20 {
		t.Errorf("%d attempts answered, want at least 20", answered)
	}
}

// The judge finds two routers that send at the same time, in what the switch received.
func TestTwoHolders(t *testing.T) {
	ring := build(t, 2)
	if err := ring.AwaitTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found := judge(t, ring); len(found) < 20 {
		t.Errorf("%d violations, want at least 20", len(found))
	}
}
