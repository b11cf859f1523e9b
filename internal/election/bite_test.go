package election

import (
	"testing"
	"time"
)

// TestSchedulesBite breaks what the invariant rests on: the judge of TestSchedules has to
// notice each.
func TestSchedulesBite(t *testing.T) {
	for _, test := range []struct {
		name   string
		breaks breaks
	}{
		{"permit of an hour", breaks{permit: time.Hour}},
		{"ticket of an hour", breaks{ticket: time.Hour, likely: lagDown}},
		{"no wait before opening", breaks{early: time.Hour, likely: deaf}},
		{"wait without the life of a ticket", breaks{early: Settings{Interval: DefaultInterval}.Ticket(), likely: lagDown}},
		{"promise without a fresh reply", breaks{stale: true, likely: upgrade}},
		{"promise used late", breaks{late: true, likely: upgrade}},
		{"promise without shutting", breaks{unshut: true, likely: upgrade}},
		{"resuming late without the wait", breaks{resume: true, likely: lagUp}},
	} {
		t.Run(test.name, func(t *testing.T) {
			begin := time.Now()
			seed, failure, _ := search(100_000, test.breaks, "are open")
			if failure == "" {
				t.Fatalf("no violation in 100,000 worlds")
			}
			t.Logf("seed %d: %s (%v)", seed, failure, time.Since(begin))
		})
	}
}
