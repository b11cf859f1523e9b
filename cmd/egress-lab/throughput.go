package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	netfilter "github.com/egress-router/egress-router/internal/nft"
)

var throughputEffort = effort{rounds: 25, each: 250 * time.Millisecond}

const throughputHead = `Throughput: the rate of arrived bytes through the router with the rules of the example.
Reference: plain routing through the same namespaces, without rules and connection
tracking.

`

const throughputFoot = `
%d rounds of %s for each variant, in turns. UDP datagrams have %d bytes; one thread sends
them without a pause.
`

// The kinds of traffic.
var traffic = []struct {
	what    string
	measure func(path, time.Duration) (float64, error)
	goal    goal
}{
	{"TCP, one stream, Gbit/s", func(p path, d time.Duration) (float64, error) { return p.streams(1, d) }, goalBulk},
	{"TCP, 4 streams, Gbit/s", func(p path, d time.Duration) (float64, error) { return p.streams(4, d) }, goalBulk},
	{"UDP, thousand datagrams/s", path.datagrams, goal{}}, // of one connection that lasts, and was answered
}

// benchThroughput measures the cost of the rules for packets of existing connections.
func benchThroughput(ctx context.Context, program string, found []variant, stdout io.Writer) error {
	found, err := withFlowtable(found)
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, throughputHead)
	printHeader(stdout, "")
	rows, err := measureThroughput(ctx, program, found, throughputEffort)
	if err != nil {
		return fmt.Errorf("measuring throughput: %w", err)
	}
	for _, r := range rows {
		r.print(stdout)
	}
	fmt.Fprintf(stdout, throughputFoot, throughputEffort.rounds, throughputEffort.each, small)
	return nil
}

// withFlowtable adds a variant with a flowtable, if the kernel has flowtables.
func withFlowtable(found []variant) ([]variant, error) {
	flows, err := netfilter.HasFlowtables()
	if err != nil || !flows {
		return found, err
	}
	last := found[len(found)-1]
	last.name += ", flowtable"
	last.env = append(slices.Clone(last.env), "EGRESS_FLOWTABLE=require")
	return append(slices.Clone(found), last), nil
}

// measureThroughput measures all variants. All labs exist at the same time, so that
// compared figures are measured within seconds of each other.
func measureThroughput(ctx context.Context, program string, found []variant, e effort) ([]row, error) {
	plain, err := lab.New(lab.Options{})
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	p, err := plainPath(ctx, plain)
	if err != nil {
		return nil, fmt.Errorf("plain routing: %w", err)
	}
	paths := []path{p}
	for _, v := range found {
		l, err := lab.New(lab.Options{})
		if err != nil {
			return nil, err
		}
		defer l.Close()
		if p, err = fallbackPath(ctx, l, program, v); err != nil {
			return nil, fmt.Errorf("%s: %w", v.name, err)
		}
		paths = append(paths, p)
	}
	if err := together(len(paths), func(i int) error { return paths[i].settle() }); err != nil {
		return nil, err
	}

	// Plain routing first; for each kind of traffic a figure of each round.
	all := make([]series, len(paths))
	for i := range all {
		all[i].figures = make([][]float64, len(traffic))
	}
	order := make([]int, len(paths))
	for i := range order {
		order[i] = i
	}
	for round := range e.rounds + 1 {
		// The order is reversed in each round: no position has an advantage.
		slices.Reverse(order)
		for k, kind := range traffic {
			for _, i := range order {
				figure, err := kind.measure(paths[i], e.each)
				if err := errors.Join(ctx.Err(), err); err != nil {
					return nil, err
				}
				if round > 0 {
					all[i].figures[k] = append(all[i].figures[k], figure)
				}
			}
		}
	}
	var rows []row
	for i, v := range found {
		for k, kind := range traffic {
			rows = append(rows, row{what: kind.what, variant: v.name, goal: kind.goal, pairs: pairs(all[0].figures[k], all[i+1].figures[k])})
		}
	}
	return rows, nil
}

// asked is the client's destination port. The example does not name it: the kernel compares
// a packet with all rules.
const asked = 9000

// fallback is the destination of that port.
var fallback = netip.AddrPortFrom(netip.MustParseAddr("203.0.113.27"), asked)

// fallbackPath runs a router with the example and returns the path of its last line.
func fallbackPath(ctx context.Context, l *lab.Lab, program string, v variant) (path, error) {
	if _, err := runInit(ctx, l, program, v, example()); err != nil {
		return path{}, err
	}
	p := path{lab: l, to: netip.AddrPortFrom(lab.RouterAddr, asked), server: fallback}
	return p, errors.Join(p.check(ctx, "tcp", lab.Source), p.check(ctx, "udp", lab.Source))
}

// plainPath returns the path to the same server through a plain router.
func plainPath(ctx context.Context, l *lab.Lab) (path, error) {
	if err := l.RoutePlainly(); err != nil {
		return path{}, err
	}
	p := path{lab: l, to: fallback, server: fallback}
	return p, errors.Join(p.check(ctx, "tcp", lab.ClientAddr), p.check(ctx, "udp", lab.ClientAddr))
}
