package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/egress-router/egress-router/internal/lab/faults"
)

// The established connections of a measurement, and the time between two messages of each. A
// gap is longer than the outage: by one such time, and by the time until TCP repeats what was
// lost. It does that after 200 ms (TCP_RTO_MIN in include/net/tcp.h), 600 ms, 1.4 s and so on, or
// as soon as an answer to a later segment shows that the path is there again.
const (
	heldConnections = 200
	heldPace        = 20 * time.Millisecond
)

// heldLimit is the time without an answer after which a connection counts as lost, if it could
// live.
const heldLimit = 20 * time.Second

// An entry is by which routers connections enter.
type entry string

// The entries.
const (
	byBoth   entry = "both routers"
	byHolder entry = "the holder"
	byOther  entry = "the other router"
)

// count returns how many connections enter by the holder and by the other router.
func (e entry) count(all int) (holder, other int) {
	switch e {
	case byHolder:
		return all, 0
	case byOther:
		return 0, all
	default:
		return all / 2, all - all/2
	}
}

// A heldRow is a row of the table of established connections.
type heldRow struct {
	outage
	entry
	ends bool // the connections cannot live
}

// nothing is the event of the row with which the others compare: what the machine's other work
// costs.
const nothing = "nothing"

// heldRows returns the rows of routers that carry or not. Without it only the holder has
// connections, and they end with any take-over.
func heldRows(carries bool) (rows []heldRow) {
	if carries {
		rows = append(rows, heldRow{outage{name: nothing}, byBoth, false})
	}
	for _, o := range outages {
		switch {
		case !carries:
			rows = append(rows, heldRow{o, byHolder, true})
		case o.name == nodeLost:
			rows = append(rows, heldRow{o, byOther, false}, heldRow{o, byHolder, true})
		default:
			rows = append(rows, heldRow{o, byBoth, false})
		}
	}
	return rows
}

// heldGap is the result of an outage for established connections.
type heldGap struct {
	lost       int
	why        error   // of those that could live
	held, path float64 // longest times without answers, ms: of established connections, of new ones
}

// measureHeld prints what established connections lose, with routers that carry and with
// routers that do not. Connections that end cost the most time, and have no gap: one round of
// each is enough.
func measureHeld(ctx context.Context, program string, e standbyEffort, stdout io.Writer) error {
	fmt.Fprintf(stdout, "\nStandby: %d established connections, a third each of talking, pushed by the server and idle, a message each %s;\nlongest time without answers, ms, at heartbeats of %s\n\n", e.held, heldPace, e.interval)
	const format = "%-16s %-8s %-18s %20s %20s %14s\n"
	fmt.Fprintf(stdout, format, "what", "carry", "entered by", "new (spread)", "held (spread)", "lost")
	for _, carries := range []bool{true, false} {
		if err := measureHeldOf(ctx, program, e, carries, func(cells ...any) {
			if len(cells) == 1 {
				fmt.Fprintf(stdout, "\t%v\n", cells...)
				return
			}
			fmt.Fprintf(stdout, format, cells...)
		}); err != nil {
			return err
		}
	}
	return nil
}

func measureHeldOf(ctx context.Context, program string, e standbyEffort, carries bool, line func(cells ...any)) error {
	carry, more := "off", []string(nil)
	if carries {
		carry, more = "vxlan", []string{"EGRESS_STANDBY_CARRY=vxlan"}
	}
	p, err := buildOurs(ctx, program, e.interval, more...)
	if err != nil {
		return err
	}
	defer p.ring.Close()
	for _, row := range heldRows(carries) {
		var path, held []float64
		var why []error
		rounds, lost := e.rounds, 0
		if row.ends {
			rounds = 1
		}
		for range rounds {
			g, err := p.hold(ctx, row, e)
			if err != nil {
				return fmt.Errorf("measuring established connections, %s: %w", row.name, err)
			}
			path, held, lost = append(path, g.path), append(held, g.held), lost+g.lost
			if g.why != nil {
				why = append(why, g.why)
			}
		}
		gaps := spread(held)
		if lost == rounds*e.held {
			gaps = ""
		}
		line(row.name, carry, row.entry, spread(path), gaps, fmt.Sprintf("%d of %d", lost, rounds*e.held))
		for _, err := range why {
			line(err)
		}
	}
	return nil
}

// hold makes connections, and returns what an outage of the router that holds costs them.
func (p pairing) hold(ctx context.Context, row heldRow, e standbyEffort) (g heldGap, err error) {
	holder, err := p.settled(ctx)
	if err != nil {
		return g, err
	}
	var all []*faults.Connections
	end := func() {
		for _, c := range all {
			c.Close()
		}
		all = nil
	}
	defer end()
	first, second := row.count(e.held)
	for node, n := range map[int]int{holder: first, 1 - holder: second} {
		c, err := faults.Hold(p.ring.Site, node, n, uint16(5000+node), heldPace) //nolint:gosec // 0 or 1
		if err != nil {
			return g, fmt.Errorf("connecting by router %d: %w\n%s", node+1, err, p.ring.Logs())
		}
		all = append(all, c)
		if lost, _, why := c.Await(heldLimit); lost > 0 {
			return g, fmt.Errorf("before the outage: %w", why)
		}
	}
	for _, c := range all { // the gap begins here
		_, _, _ = c.Await(heldLimit) // the next one has any error
	}
	if !p.holds(holder) { // a busy machine has caused a take-over
		end()
		return p.hold(ctx, row, e)
	}
	p.ring.Traffic.Take()
	if row.begin != nil {
		if err := row.begin(p.ring, holder); err != nil {
			return g, err
		}
	}
	for row.begin != nil && p.role(1-holder) != "active" {
		if err := p.ring.AwaitTraffic(ctx); err != nil {
			return g, err
		}
	}
	if err := p.ring.AwaitTraffic(ctx); err != nil {
		return g, err
	}
	limit := heldLimit
	if row.ends {
		limit = e.ends
	}
	for _, c := range all {
		lost, gap, why := c.Await(limit)
		if g.lost += lost; !row.ends {
			g.why = errors.Join(g.why, why)
		}
		g.held = max(g.held, milliseconds(gap))
	}
	g.path = milliseconds(faults.Gap(p.ring.Traffic.Take()))
	end() // a router that ends waits for them
	if row.end != nil {
		if err := row.end(p.ring, holder); err != nil {
			return g, err
		}
	}
	return g, p.ring.Routers[holder].Start()
}
