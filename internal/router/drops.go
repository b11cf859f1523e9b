package router

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/egress-router/egress-router/rules"
)

const (
	// dropsFresh is how long a reading of the counters of dropped packets is used, so
	// that any number of clients causes one reading, with iptables three processes.
	dropsFresh = time.Second
	// dropsTimeout is the timeout of a reading.
	dropsTimeout = 10 * time.Second
	// dropsPatience is how long a report waits for a reading.
	dropsPatience = 500 * time.Millisecond
)

// drops sums the kernel's counters of dropped packets, which start at zero each time a
// rule is loaded.
type drops struct {
	log *slog.Logger

	reading sync.Mutex // held during a reading: counters are added in the order of their time
	last    rules.Drops

	mu      sync.Mutex // guards the fields below
	rules   Rules      // rules in the kernel; nil: not known yet
	plan    rules.Plan
	total   map[rules.Reason]uint64
	readAt  time.Time     // start of the last reading
	pending chan struct{} // closed at the end of the current reading; nil: there is none
	failure string        // last error in the log
}

// add adds the packets since the last reading. A counter that is lower than before is
// that of a rule that was loaded in between.
func (d *drops) add(now rules.Drops) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.total == nil {
		d.total = make(map[rules.Reason]uint64)
	}
	for rule, n := range now {
		before := d.last[rule]
		if n < before {
			before = 0
		}
		d.total[rule.Reason] += n - before
	}
	d.last = now
}

// use sets the rules that are read from now on.
func (d *drops) use(current Rules, plan rules.Plan) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules, d.plan = current, plan
}

// read reads the counters. After an error they are complete with the next reading.
func (d *drops) read(ctx context.Context, current Rules, plan rules.Plan) {
	d.reading.Lock()
	defer d.reading.Unlock()
	ctx, cancel := context.WithTimeout(ctx, dropsTimeout)
	defer cancel()
	begun := time.Now()
	now, err := current.Drops(ctx, plan)
	if err == nil {
		d.add(now)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.readAt = begun
	failure := ""
	if err != nil {
		failure = err.Error()
		if failure != d.failure {
			d.log.Warn("drop counters not read", "error", err)
		}
	}
	d.failure = failure
}

// refresh starts a reading, unless the last one is fresh or has not ended. It returns a
// channel that is closed at the end of the reading, nil if there is none.
func (d *drops) refresh() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.readAt) >= dropsFresh {
		d.start()
	}
	return d.pending
}

// start starts a reading, unless one has not ended. The caller holds mu.
func (d *drops) start() {
	if d.pending != nil || d.rules == nil {
		return
	}
	done, current, plan := make(chan struct{}), d.rules, d.plan
	d.pending = done
	go func() {
		d.read(context.Background(), current, plan)
		d.mu.Lock()
		d.pending = nil
		d.mu.Unlock()
		close(done)
	}()
}

// sums returns a copy of the totals.
func (d *drops) sums() map[rules.Reason]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.total)
}

// Drops returns the packets that the rules have dropped or rejected, by reason: since
// the rules were loaded, and while the process runs also those of rules that were
// loaded again. The values are at most a second old, unless the kernel or the programs
// of iptables do not answer in time.
func (k *Keeper) Drops() map[rules.Reason]uint64 {
	if pending := k.drops.refresh(); pending != nil {
		late := time.NewTimer(dropsPatience)
		defer late.Stop()
		select {
		case <-pending:
		case <-late.C:
		}
	}
	return k.drops.sums()
}

// ReadDrops is Drops with the values of a reading that begins after the call, for which
// it waits. The values are older after an error, and after the end of ctx.
func (k *Keeper) ReadDrops(ctx context.Context) map[rules.Reason]uint64 {
	d, begun := &k.drops, time.Now()
	for {
		d.mu.Lock()
		if d.readAt.Before(begun) {
			d.start()
		}
		pending := d.pending
		done := pending == nil || !d.readAt.Before(begun)
		d.mu.Unlock()
		if done {
			return d.sums()
		}
		select {
		case <-pending:
		case <-ctx.Done():
			return d.sums()
		}
	}
}
