package router

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// A counter that is lower than before is that of a rule that was loaded again.
func TestDropsAdd(t *testing.T) {
	first := rules.DropRule{Family: rules.IPv4, Table: rules.Filter, Hook: rules.Input, Number: 1, Reason: rules.Invalid}
	second := first
	second.Number = 2
	other := first
	other.Hook, other.Reason = rules.Forward, rules.OtherInterface
	var d drops
	for i, step := range []struct {
		now            rules.Drops
		invalid, other uint64
	}{
		{rules.Drops{first: 5, second: 7, other: 1}, 12, 1},
		{rules.Drops{first: 5, second: 8, other: 1}, 13, 1},
		{rules.Drops{first: 2, second: 9, other: 3}, 16, 3}, // the first rule was loaded again
		{rules.Drops{other: 3}, 16, 3},                      // the chain is missing
		{rules.Drops{first: 4, second: 9, other: 0}, 29, 3},
		{rules.Drops{first: 4, second: 9, other: 1}, 29, 4},
	} {
		d.add(step.now)
		if want := map[rules.Reason]uint64{rules.Invalid: step.invalid, rules.OtherInterface: step.other}; !maps.Equal(d.total, want) {
			t.Errorf("step %d: %v, want %v", i, d.total, want)
		}
	}
}

// counting are rules whose counters are read by a function.
type counting struct {
	Rules
	read func(context.Context) (rules.Drops, error)
}

func (c counting) Drops(ctx context.Context, _ rules.Plan) (rules.Drops, error) { return c.read(ctx) }

// Any number of reports causes one reading a second, and none waits for a backend that
// hangs. An error is logged once, and the counters continue after it.
func TestDropsAreReadOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		k := NewKeeper(&Router{Log: slog.New(slog.NewTextHandler(&log, nil))})
		if got := k.Drops(); len(got) > 0 {
			t.Errorf("before the first comparison: %v", got)
		}
		rule := rules.DropRule{Reason: rules.Invalid}
		reads, err := 0, error(nil)
		k.drops.use(counting{read: func(context.Context) (rules.Drops, error) {
			reads++
			return rules.Drops{rule: uint64(reads)}, err
		}}, rules.Plan{})
		want := func(n uint64, readings int) {
			t.Helper()
			if got := k.Drops()[rules.Invalid]; got != n || reads != readings {
				t.Errorf("%d drops after %d readings, want %d after %d", got, reads, n, readings)
			}
		}
		for range 1000 {
			want(1, 1)
			time.Sleep(dropsFresh / 1001)
		}
		err = errors.New("injected failure")
		for range 2 {
			time.Sleep(dropsFresh)
			k.Drops()
		}
		if n := strings.Count(log.String(), "drop counters not read"); n != 1 {
			t.Errorf("logged %d times, want once:\n%s", n, &log)
		}
		err = nil
		time.Sleep(dropsFresh)
		want(4, 4)

		hanging := 0
		k.drops.use(counting{read: func(ctx context.Context) (rules.Drops, error) {
			hanging++
			<-ctx.Done()
			return nil, ctx.Err()
		}}, rules.Plan{})
		time.Sleep(dropsFresh)
		begin := time.Now()
		for range 3 {
			want(4, 4)
		}
		took := time.Since(begin)
		synctest.Wait()
		if took != 3*dropsPatience || hanging != 1 {
			t.Errorf("%v and %d readings for three reports of a backend that hangs", took, hanging)
		}
		time.Sleep(dropsTimeout)
	})
}

// ReadDrops waits for a reading that begins after the call, however long that takes, and
// after an error returns what there is.
func TestReadDropsIsCurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := NewKeeper(&Router{Log: slog.New(slog.DiscardHandler)})
		if got := k.ReadDrops(t.Context()); len(got) > 0 {
			t.Errorf("before the first comparison: %v", got)
		}
		rule := rules.DropRule{Reason: rules.Invalid}
		const slow = 3 * time.Second
		var counter atomic.Uint64
		counter.Store(1)
		var err error
		k.drops.use(counting{read: func(context.Context) (rules.Drops, error) {
			now := counter.Load() // at the start
			time.Sleep(slow)
			return rules.Drops{rule: now}, err
		}}, rules.Plan{})
		k.drops.refresh()
		time.Sleep(time.Second)
		counter.Store(100)
		begin := time.Now()
		if got, took := k.ReadDrops(t.Context())[rules.Invalid], time.Since(begin); got != 100 || took != 2*slow-time.Second {
			t.Errorf("%d drops after %s, want 100 with the second reading", got, took)
		}
		counter.Store(200)
		err = errors.New("injected failure")
		if got := k.ReadDrops(t.Context())[rules.Invalid]; got != 100 {
			t.Errorf("%d drops after a failure, want the 100 before", got)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if got := k.ReadDrops(ended)[rules.Invalid]; got != 100 {
			t.Errorf("%d drops after the end, want the 100 before", got)
		}
		time.Sleep(slow)
	})
}
