package cli

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/nflog"
	"github.com/egress-router/egress-router/rules"
)

const (
	// dropLogPause is the least time between two log lines with the same reason.
	dropLogPause = 10 * time.Second
	// dropLogDelay is the time between a packet and its log line, so that a client's
	// first retries count too.
	dropLogDelay = time.Second
)

// A dropLog logs examples of dropped packets, for each reason at most one line in
// dropLogPause.
type dropLog struct {
	log     *slog.Logger
	dropped func(context.Context) map[rules.Reason]uint64 // current counters
	reasons map[rules.Reason]*dropExample
}

// A dropExample is the state of a reason.
type dropExample struct {
	packet nflog.Packet
	read   uint64    // packets read since the last line; 0: none, and no line is due
	logged uint64    // the counter at the last line
	due    time.Time // time of the next line
	last   time.Time // time of the last line
}

// logDrops starts to log dropped packets. The router works without it.
func (w *watch) logDrops(ctx context.Context, p Process, background *sync.WaitGroup) {
	source, err := nflog.Open(rules.LogGroup)
	if err != nil {
		w.log.Warn("drop log unavailable", "error", err, "hint", hint(err))
		return
	}
	// As the audit log it does not depend on the log level.
	l := dropLog{log: logger(p.Stderr, config.Log{JSON: w.config.Log.JSON, Level: slog.LevelInfo}), dropped: w.keeper.ReadDrops}
	packets := make(chan nflog.Packet)
	background.Go(func() { l.run(ctx, packets) })
	background.Go(func() {
		err := source.Run(ctx, func(p nflog.Packet) {
			select {
			case packets <- p:
			case <-ctx.Done():
			}
		})
		if err != nil {
			w.log.Warn("drop log ended", "error", err)
		}
	})
}

// run logs packets until ctx ends.
func (l *dropLog) run(ctx context.Context, packets <-chan nflog.Packet) {
	l.reasons = make(map[rules.Reason]*dropExample)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-packets:
			l.take(p, time.Now())
		case <-timer.C:
		}
		if next := l.write(ctx, time.Now()); !next.IsZero() {
			timer.Reset(time.Until(next))
		}
	}
}

// take keeps a packet as the example of its reason.
func (l *dropLog) take(p nflog.Packet, now time.Time) {
	reason := rules.Reason(p.Prefix)
	e := l.reasons[reason]
	if e == nil {
		e = new(dropExample)
		l.reasons[reason] = e
	}
	if e.read == 0 {
		e.due = now.Add(dropLogDelay)
		if end := e.last.Add(dropLogPause); e.due.Before(end) {
			e.due = end
		}
	}
	e.packet = p
	e.read++
}

// write writes the lines that are due, and returns the time of the next one, zero if
// there is none.
func (l *dropLog) write(ctx context.Context, now time.Time) (next time.Time) {
	var dropped map[rules.Reason]uint64
	for _, reason := range rules.Reasons {
		e := l.reasons[reason]
		switch {
		case e == nil || e.read == 0:
		case e.due.After(now):
			if next.IsZero() || e.due.Before(next) {
				next = e.due
			}
		default:
			if dropped == nil {
				dropped = l.dropped(ctx)
			}
			// The counter lags behind if it could not be read.
			n := max(dropped[reason]-min(e.logged, dropped[reason]), e.read)
			l.line(reason, n, e.packet)
			e.read, e.logged, e.last = 0, dropped[reason], now
		}
	}
	return next
}

// line writes the log line of a number of packets and an example.
func (l *dropLog) line(reason rules.Reason, packets uint64, p nflog.Packet) {
	end := func(a netip.AddrPort) string {
		if a.Port() == 0 {
			return a.Addr().String()
		}
		return a.String()
	}
	attributes := []any{"reason", string(reason), "packets", packets, "protocol", p.Protocol, "source", end(p.Source), "destination", end(p.Destination)}
	if p.In != "" {
		attributes = append(attributes, "in", p.In)
	}
	if p.Out != "" {
		attributes = append(attributes, "out", p.Out)
	}
	l.log.Info("packets dropped", attributes...)
}
