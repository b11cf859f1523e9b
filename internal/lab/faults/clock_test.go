package faults_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// Routers whose monotonic clocks differ by months, as those of nodes do, take over from each
// other: no time of one means anything to another. The time of day is not set: all processes of a
// machine have the same.
func TestOtherClocks(t *testing.T) {
	plain := program(t)
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Fatal(err)
	}
	ring, err := faults.Build(2, false, func(s *lab.Site, node int) *exec.Cmd {
		cmd := plain(s, node)
		offset := 10_000_000 * (node + 1)
		// Without a child process: the program enters the namespace as it begins.
		cmd.Args = append([]string{unshare, "--time", fmt.Sprint("--monotonic=", offset), fmt.Sprint("--boottime=", offset), cmd.Path}, cmd.Args[1:]...)
		cmd.Path = unshare
		return cmd
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	if err := ring.AwaitTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
	clocks := map[string]bool{}
	for _, path := range []string{"/proc/self/ns/time", ring.Routers[0].Proc("ns/time"), ring.Routers[1].Proc("ns/time")} {
		name, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		clocks[name] = true
	}
	if len(clocks) != 3 {
		t.Fatalf("expected a time namespace of its own for each router, found %v", clocks)
	}
	for range 2 {
		ring.Judge()
		holder := ring.Holder()
		try(t, ring.Routers[holder].Kill())
		awaitTakeover(t, ring, holder)
		if err := ring.AwaitTraffic(t.Context()); err != nil {
			t.Fatal(err)
		}
		restart(t, ring, holder)
	}
	found, err := ring.Stop()
	if err != nil || len(found) > 0 {
		t.Errorf("violations %v, %v", found, err)
	}
}

// A gateway that answers no pings opens no gate; with an address beyond it as the witness, which
// does, routers take over from each other.
func TestGatewaySilentToPings(t *testing.T) {
	plain := program(t)
	witness := ""
	ring, err := faults.Build(2, false, func(s *lab.Site, node int) *exec.Cmd {
		if node == 0 {
			try(t, s.Lose(lab.Loss{Port: lab.GatewayPort, Kind: lab.LosePings, Percent: 100}))
		}
		cmd := plain(s, node)
		if witness != "" {
			cmd.Env = append(cmd.Env, "EGRESS_STANDBY_WITNESS="+witness)
		}
		return cmd
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	for end := time.Now().Add(limit); !strings.Contains(ring.Logs(), "gateway does not answer"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no router has claimed\n%s", ring.Logs())
		}
	}
	for _, a := range ring.Traffic.Take() {
		if a.Answered {
			t.Fatal("a router has sent while the gateway answers no pings")
		}
	}
	witness = lab.Remote[1].String()
	for _, r := range ring.Routers {
		try(t, r.Kill())
	}
	for _, r := range ring.Routers {
		try(t, r.Start())
	}
	if err := ring.AwaitTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
	ring.Judge()
	holder := ring.Holder()
	try(t, ring.Routers[holder].Kill())
	awaitTakeover(t, ring, holder)
	found, err := ring.Stop()
	if err != nil || len(found) > 0 {
		t.Errorf("violations %v, %v", found, err)
	}
}

// awaitTakeover waits until another router holds.
func awaitTakeover(t *testing.T, ring *faults.Ring, holder int) {
	t.Helper()
	for end := time.Now().Add(limit); ring.Holder() == holder; time.Sleep(time.Millisecond) {
		for _, v := range ring.Judge() {
			t.Errorf("violation: %s", v)
		}
		if time.Now().After(end) {
			t.Fatalf("no other router has taken over\n%s", ring.Logs())
		}
	}
}
