package cli

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/endpoints"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/lookup"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/standby"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A watch is a run of a router that stays.
type watch struct {
	config  config.Config // of the start
	log     *slog.Logger
	keeper  *router.Keeper
	tracker atomic.Pointer[conntrack.Tracker] // nil: not needed, or not started yet
	failed  atomic.Pointer[string]            // why the tracker is missing or has ended; nil: it is not
	set     atomic.Pointer[rules.Set]         // last destinations; nil: those of the start
	counted *rules.Set                        // those of the counters; nil: those of the start
	names   *lookup.Follower                  // nil: the grammar has none
	standby *standby.Runner                   // nil: the router is the only one with its addresses
	tunnel  *tunnel                           // to others with them
	partial bool                              // the kernel has no egress hook for the gate
	service *endpoints.Writer                 // nil: no Service is led to the active router
	ports   portWatch
	slow    string // why no packets bypass the rules, which may; empty: some do, or none may

	background sync.WaitGroup

	mu     sync.Mutex    // guards latest, and orders changes of the keeper's destinations
	latest config.Config // with the last destinations, as written
}

// stay configures the namespace, in mode legacy, and repairs drift until ctx ends.
// It calls restoreGC when the start is over.
func stay(ctx context.Context, p Process, c config.Config, env config.Environment, file reloader, restoreGC func()) error {
	if err := placeCarry(&c); err != nil {
		return err
	}
	log := file.log
	slow, err := settleFlowtable(&c, log)
	if err != nil {
		return err
	}
	written := c // without the additions below
	keepNameServers(&c, log)
	w := &watch{config: c, latest: c, log: log, ports: portWatch{log: log, ranged: rangedPorts(c)}, slow: slow}
	if c.Grammar == rules.Extended {
		w.names = newFollower(c, log)
	}
	ctx, end := context.WithCancel(ctx)
	// Until the last clients are drained, destinations and names are followed, and connections counted.
	lasting, last := context.WithCancel(context.WithoutCancel(ctx))
	defer w.background.Wait() // also after an error of the start
	defer last()
	defer end()
	r := newRouter(c, log)
	r.Stays = true
	w.keeper = newKeeper(r, c)
	w.keeper.Replaced = w.count
	if err := w.standBy(r); err != nil {
		return err
	}

	// Listen first: an error comes before any change.
	stop, err := w.reporter(p).start(ctx, log)
	if err != nil {
		return err
	}
	defer stop()
	w.follow(ctx, lasting, c, r)
	w.mu.Lock() // Apply reads what the keeper's changes write
	if w.names != nil {
		w.keeper.Resolve(wanted(w.resolved()))
	}
	if c.Mode == config.Legacy || c.Standby != nil { // no init container may claim the addresses
		err = r.Apply(ctx)
	}
	w.mu.Unlock()
	_, conflict := errors.AsType[*router.ConflictError](err)
	switch {
	case stopped(err):
		log.Info("stopping, start interrupted")
		return nil
	case conflict && !partly(err): // another host may give the address up
		log.Error("reserved address not taken", "error", err, "hint", wording.OneLine(hint(err)))
		w.keeper.Failed(err)
	case err != nil:
		return err
	}

	t := w.track(p)
	if t != nil {
		defer t.Close() // after its last use
	}
	defer w.background.Wait()
	defer last()
	defer end()
	if t != nil {
		w.tracker.Store(t)
		w.background.Go(func() {
			if err := t.Run(lasting); err != nil {
				log.Error("connection tracking ended", "error", err)
				w.untracked(err)
			}
		})
		if c.Health.Listen.Port() != 0 { // otherwise nothing is counted
			w.background.Go(func() { w.watchPorts(lasting, t) })
		}
	}
	if c.LogDrops {
		w.logDrops(lasting, p, &w.background)
	}
	file.reload = func() error { return w.reload(written, env) }
	file.result = func(trouble string) {
		if trouble != "" {
			w.keeper.Rejected(trouble)
		}
	}
	w.background.Go(func() { file.run(lasting) })
	restoreGC()
	return w.keep(ctx, p.again)
}

// keep repairs drift until ctx ends, and a router that is one of several has handed over. It drains
// no connections after again is closed.
func (w *watch) keep(ctx context.Context, again <-chan struct{}) error {
	if w.standby == nil {
		err := w.keeper.Run(ctx)
		if err == nil {
			w.log.Info("stopping, configuration stays")
		}
		return err
	}
	stays, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	if w.service != nil {
		w.background.Go(func() { w.service.Run(stays) })
	}
	w.background.Go(func() {
		w.standby.Run(ctx)
		leave()
	})
	if w.config.Standby.Carry != nil {
		w.background.Go(func() { cutAt(again, stays.Done(), w.standby.Cut) })
	}
	err := w.keeper.Run(stays)
	if err != nil {
		w.standby.Cut() // without repairs no connection is drained
		return err
	}
	w.log.Info("stopping, configuration stays, gate shut")
	return nil
}

// cutAt ends the drain of connections at the second signal, or does nothing until stays ends.
func cutAt(again, stays <-chan struct{}, cut func()) {
	select {
	case <-again:
		cut()
	case <-stays:
	}
}

// newKeeper returns a keeper for the router's namespace.
func newKeeper(r *router.Router, c config.Config) *router.Keeper {
	k := router.NewKeeper(r)
	k.Rests = newRest()
	k.Interval, k.AnnounceInterval = c.Health.Interval, c.Health.AnnounceInterval
	if c.Health.Probe {
		k.ProbeInterval, k.ProbeFailsReady = c.Health.ProbeInterval, c.Health.ProbeFailsReady
	}
	var timed []string
	if c.Standby != nil {
		timed = append(timed, nft.GateTable)
	}
	k.Events = func() (router.Events, error) { return events.Subscribe(timed...) }
	k.Neighbours = func(o arp.Options) (router.Neighbours, error) { return arp.NewWatch(o) }
	return k
}

// reload reads the destinations again and passes them to the router.
func (w *watch) reload(written config.Config, env config.Environment) error {
	c, fault := written.Reread(env, readFile)
	if fault != nil {
		return fault
	}
	for _, text := range c.Warnings {
		w.log.Warn("configuration warning", "warning", text)
	}
	keepNameServers(&c, w.log)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.names != nil {
		w.names.Follow(c.Set.Names(), false)
		for _, name := range c.Set.NamesBeside(w.latest.Set) {
			w.names.Distinct(name)
		}
	}
	w.latest = c
	w.set.Store(&c.Set)
	w.keeper.Replace(wanted(w.resolved()))
	return nil
}

// count sets the destinations of the counters, after their rules are loaded.
func (w *watch) count() {
	t, set := w.tracker.Load(), w.set.Load()
	if t == nil || set == w.counted {
		return
	}
	w.counted = set
	if err := t.Replace(*set); err != nil {
		w.log.Warn("counters keep previous destinations", "error", err)
	}
}

// track starts the counters, for metrics, and the audit log, if enabled. The router
// works without them.
func (w *watch) track(p Process) *conntrack.Tracker {
	c := w.config
	o := conntrack.Options{Sources: c.Sources.Addresses(), Mark: c.ReplyMark, Set: c.Set, Count: c.Health.Listen.Port() != 0, Log: w.log}
	if c.Health.AuditLog {
		// The audit log does not depend on the log level.
		audit := logger(p.Stderr, config.Log{JSON: c.Log.JSON, Level: slog.LevelInfo})
		o.Audit = func(e conntrack.Event) { logConnection(audit, e) }
	}
	if !o.Count && o.Audit == nil {
		return nil
	}
	t, err := conntrack.Open(o)
	if err != nil {
		w.log.Error("connection tracking unavailable", "error", err, "hint", wording.OneLine(hint(err)))
		w.untracked(err)
		return nil
	}
	return t
}

// untracked notes, for the report, why connections are neither counted nor logged.
func (w *watch) untracked(err error) {
	text := err.Error()
	w.failed.Store(&text)
}

// logConnection writes the audit log line of an event.
func logConnection(log *slog.Logger, e conntrack.Event) {
	attributes := []any{
		"client", e.Client.String(), "protocol", e.Protocol.String(), "port", e.Port,
		"destination", e.Server.String(), "reserved", e.Reserved.String(), "local", e.Local.String(),
	}
	if e.Began {
		log.Info("connection begins", attributes...)
		return
	}
	if e.Accounted {
		attributes = append(attributes, "packets_sent", e.PacketsOut, "bytes_sent", e.BytesOut, "packets_received", e.PacketsIn, "bytes_received", e.BytesIn)
	}
	if e.Timed {
		// Rounded up to a millisecond: the kernel's times are no better, and the log
		// would have an exponent.
		attributes = append(attributes, "seconds", (e.Duration + time.Millisecond - 1).Truncate(time.Millisecond).Seconds())
	}
	if e.Outcome != "" {
		attributes = append(attributes, "outcome", string(e.Outcome))
	}
	if e.Lost {
		attributes = append(attributes, "lost", true) // there was no event of its end
	}
	log.Info("connection ends", attributes...)
}
