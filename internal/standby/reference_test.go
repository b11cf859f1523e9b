package standby

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A reference of several servers counts as reachable if one answers in time, and no connection more
// than it takes is made.
func TestAnyConnects(t *testing.T) {
	const step = referTimeout / referAttempts
	for name, test := range map[string]struct {
		answers []time.Duration // of each connection; negative: it fails; zero: it is lost
		want    bool
		took    time.Duration
	}{
		"the first":                  {[]time.Duration{time.Millisecond}, true, time.Millisecond},
		"the second":                 {[]time.Duration{0, time.Millisecond}, true, step + time.Millisecond},
		"the third":                  {[]time.Duration{0, 0, time.Millisecond}, true, 2*step + time.Millisecond},
		"the first, late":            {[]time.Duration{step + 2*time.Millisecond, 0}, true, step + 2*time.Millisecond},
		"all lost":                   {[]time.Duration{0, 0, 0}, false, referTimeout},
		"one fails, another answers": {[]time.Duration{-time.Millisecond, time.Millisecond}, true, step + time.Millisecond},
		"all fail":                   {[]time.Duration{-time.Millisecond, -time.Millisecond, -time.Millisecond}, false, 2*step + time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var made atomic.Int32
				began := time.Now()
				got := anyConnects(t.Context(), func(ctx context.Context) bool {
					after := test.answers[made.Add(1)-1]
					if after == 0 {
						<-ctx.Done()
						return false
					}
					time.Sleep(max(after, -after))
					return after > 0
				})
				if took := time.Since(began); got != test.want || took != test.took || int(made.Load()) != len(test.answers) {
					t.Errorf("%t after %s and %d connections, want %t after %s and %d", got, took, made.Load(), test.want, test.took, len(test.answers))
				}
			})
		})
	}
}
