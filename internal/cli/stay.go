package cli

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/events"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// A watch is one run of a router that stays.
type watch struct {
	config  config.Config
	log     *slog.Logger
	keeper  *router.Keeper
	tracker atomic.Pointer[conntrack.Tracker] // nil: nobody asks for connections, or not yet
	set     atomic.Pointer[rules.Set]         // that was read last; nil: that of the start
}

// stay configures, unless an init run has, and watches over what is configured
// until the program is told to stop. The function settle is called when
// it has nothing to do any more but wait.
func stay(ctx context.Context, p Process, c config.Config, env config.Environment, file reloader, settle func()) error {
	log, written := file.log, c // without what is found out here
	keepNameServers(&c, log)
	w := &watch{config: c, log: log}
	r := newRouter(c, log)
	w.keeper = newKeeper(r, c)
	w.keeper.Replaced = w.count

	// That the port is taken is known before anything changes.
	stop, err := w.reporter().start(ctx, log)
	if err != nil {
		return err
	}
	defer stop()
	if c.Mode == config.Legacy {
		err = r.Apply(ctx)
	}
	_, conflict := errors.AsType[*router.ConflictError](err)
	switch {
	case stopped(err):
		return nil
	case conflict && !partly(err): // the address may become free
		log.Error("reserved address not taken", "error", err, "hint", hint(err))
		w.keeper.Failed(err)
	case err != nil:
		return err
	}

	ctx, end := context.WithCancel(ctx)
	var background sync.WaitGroup
	t := w.track(p)
	if t != nil {
		defer t.Close() // when nobody uses it any more
	}
	defer background.Wait()
	defer end()
	if t != nil {
		w.tracker.Store(t)
		background.Go(func() {
			if err := t.Run(ctx); err != nil {
				log.Error("connection tracking ended", "error", err)
			}
		})
	}
	file.reload = func() error { return w.reload(written, env) }
	file.told = func(trouble string) {
		if trouble != "" {
			w.keeper.Rejected(trouble)
		}
	}
	background.Go(func() { file.run(ctx) })
	settle()
	return w.keeper.Run(ctx)
}

// newKeeper returns what watches over the router's namespace.
func newKeeper(r *router.Router, c config.Config) *router.Keeper {
	k := router.NewKeeper(r)
	k.Interval, k.AnnounceInterval = c.Health.Interval, c.Health.AnnounceInterval
	if c.Health.Probe {
		k.ProbeInterval, k.ProbeFailsReady = c.Health.ProbeInterval, c.Health.ProbeFailsReady
	}
	k.Events = func() (router.Events, error) { return events.Subscribe() }
	k.Neighbours = func(o arp.Options) (router.Neighbours, error) { return arp.NewWatch(o) }
	return k
}

// reload reads the destinations again and has the router and the counters go by
// them.
func (w *watch) reload(written config.Config, env config.Environment) error {
	c, fault := written.Reread(env, readFile)
	if fault != nil {
		return fault
	}
	for _, text := range c.Warnings {
		w.log.Warn("configuration warning", "warning", text)
	}
	keepNameServers(&c, w.log)
	w.set.Store(&c.Set)
	w.keeper.Replace(wanted(c), planOf(c))
	return nil
}

// count has connections counted by the destinations that the kernel holds now.
func (w *watch) count() {
	t, set := w.tracker.Load(), w.set.Load()
	if t == nil || set == nil {
		return
	}
	if err := t.Replace(*set); err != nil {
		w.log.Warn("counters keep previous destinations", "error", err)
	}
}

// track begins to count connections, for who reads metrics, and to log them, as
// far as either is asked for. The router works without.
func (w *watch) track(p Process) *conntrack.Tracker {
	c := w.config
	o := conntrack.Options{Source: c.Source.Addr(), Mark: c.ReplyMark, Set: c.Set, Count: c.Health.Listen.Port() != 0, Log: w.log}
	if c.Health.AuditLog {
		// Whoever asks for these lines gets them, whatever else is logged.
		audit := logger(p.Stderr, config.Log{JSON: c.Log.JSON, Level: slog.LevelInfo})
		o.Audit = func(e conntrack.Event) { logConnection(audit, e) }
	}
	if !o.Count && o.Audit == nil {
		return nil
	}
	t, err := conntrack.Open(o)
	if err != nil {
		w.log.Error("connection tracking unavailable", "error", err, "hint", hint(err))
		return nil
	}
	return t
}

// logConnection writes the line of the audit log for an event.
func logConnection(log *slog.Logger, e conntrack.Event) {
	attributes := []any{
		"client", e.Client.String(), "protocol", e.Protocol.String(), "port", e.Port,
		"destination", e.Server.String(), "reserved", e.Reserved.String(),
	}
	if e.Began {
		log.Info("connection begins", attributes...)
		return
	}
	if e.Accounted {
		attributes = append(attributes, "packets_sent", e.PacketsOut, "bytes_sent", e.BytesOut, "packets_received", e.PacketsIn, "bytes_received", e.BytesIn)
	}
	if e.Duration > 0 {
		attributes = append(attributes, "seconds", e.Duration.Seconds())
	}
	if e.Lost {
		attributes = append(attributes, "lost", true) // its end was not seen
	}
	log.Info("connection ends", attributes...)
}
