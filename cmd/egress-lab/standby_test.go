package main

import (
	"strings"
	"testing"
	"time"
)

// One round of each outage shows that it measures; the figures do not matter. At a longer
// interval a busy machine causes no take-overs.
func TestMeasureStandby(t *testing.T) {
	var out strings.Builder
	err := measureStandby(t.Context(), router(t), standbyEffort{rounds: 1, interval: 200 * time.Millisecond, idle: 100 * time.Millisecond, load: 100 * time.Millisecond}, &out)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range outages {
		if !strings.Contains(out.String(), "\n"+o.name+" ") {
			t.Errorf("the table lacks %q:\n%s", o.name, &out)
		}
	}
	for _, figure := range []string{"take-overs in 100ms of load", "idle processor time, active, %", "idle processor time, standby, %"} {
		if !strings.Contains(out.String(), "\n"+figure+" ") {
			t.Errorf("the table lacks %q:\n%s", figure, &out)
		}
	}
}

// One round of each row shows that established connections live through every outage if routers
// carry, except that of the node by which they enter, and end without.
func TestMeasureHeld(t *testing.T) {
	var out strings.Builder
	err := measureHeld(t.Context(), router(t), standbyEffort{rounds: 1, held: 6, ends: 100 * time.Millisecond, interval: 200 * time.Millisecond}, &out)
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(out.String()) {
		lost := " 0 of 6\n"
		switch {
		case !strings.Contains(line, " of 6\n"):
			continue
		case strings.Contains(line, " off "), strings.HasPrefix(line, nodeLost) && strings.Contains(line, string(byHolder)):
			lost = " 6 of 6\n"
		}
		if rows++; !strings.HasSuffix(line, lost) {
			t.Errorf("expected %q in %q", lost, line)
		}
	}
	if want := 2*len(outages) + 2; rows != want {
		t.Errorf("expected %d rows, found %d:\n%s", want, rows, &out)
	}
}

// The command injects as many rounds as it is asked for, and prints each.
func TestInjectFaults(t *testing.T) {
	code, stdout, stderr := finish(t, labCommand(t, "faults", router(t), "2", "1"))
	if code != 0 || stderr != "" {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
	for _, want := range []string{"2 rounds of faults, seed 1\n3 routers\n1: ", "\n3 routers, with EGRESS_STANDBY_CARRY=vxlan\n2: ", "\nfaults: no two routers sent at the same time, and no connection was lost; "} {
		if !strings.Contains(stdout, want) {
			t.Errorf("stdout lacks %q:\n%s", want, stdout)
		}
	}
}
