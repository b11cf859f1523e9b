package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// An effort is the extent of a measurement.
type effort struct {
	rounds int // measured rounds, after a first one that is not
	each   time.Duration
	sizes  []int // numbers of destinations
}

var connectionsEffort = effort{rounds: 15, each: 250 * time.Millisecond, sizes: []int{1, 100, 1000, 10000}}

const connectionsHead = `Connections: new TCP connections a second through the router to the last destination of
a list. References: a list with one destination, and a linear chain of as many rules. A
mixed list has ports, ranges, several addresses, and all protocols of both families.

`

const connectionsFoot = `
%d rounds of %s for each list and variant, in turns. One thread opens a connection,
resets it, and opens the next.
`

// linear is the name of the reference of all variants.
const linear = "linear chain"

// benchConnections measures whether the cost of a connection depends on the length of the
// list.
func benchConnections(ctx context.Context, program string, found []variant, stdout io.Writer) error {
	fmt.Fprint(stdout, connectionsHead)
	printHeader(stdout, "1/s")
	rows, err := measureConnections(ctx, program, found, connectionsEffort)
	if err != nil {
		return fmt.Errorf("measuring connections: %w", err)
	}
	for _, r := range rows {
		r.print(stdout)
	}
	fmt.Fprintf(stdout, connectionsFoot, connectionsEffort.rounds, connectionsEffort.each)
	return nil
}

// A series is the result of a variant.
type series struct {
	variant string
	figures [][]float64 // by list and round
	mixed   [][]float64 // by mixedPort and round; nil: not measured
}

// measureConnections measures all variants. All labs exist at the same time, so that
// compared figures are measured within seconds of each other.
func measureConnections(ctx context.Context, program string, found []variant, e effort) ([]row, error) {
	all := make([]series, len(found)+1)
	var turns []turn
	for i := range all {
		s := &all[i]
		s.variant, s.figures = linear, make([][]float64, len(e.sizes))
		if i < len(found) {
			s.variant = found[i].name
		}
		for j, n := range e.sizes {
			l, err := lab.New(lab.Options{})
			if err != nil {
				return nil, err
			}
			defer l.Close()
			if i < len(found) {
				err = runList(ctx, l, program, found[i], n)
			} else {
				err = runChain(ctx, l, program, found[0], n)
			}
			p := pathToLast(l, n)
			if err == nil {
				err = p.check(ctx, "tcp", lab.Source)
			}
			if err != nil {
				return nil, fmt.Errorf("%s, %s destinations: %w", s.variant, thousands(n), err)
			}
			turns = append(turns, turn{path: p, figures: &s.figures[j]})
		}
		if s.variant == linear {
			continue
		}
		mixed, err := runMixed(ctx, program, found[i], e.sizes[len(e.sizes)-1], s)
		for _, t := range mixed {
			defer t.path.lab.Close()
		}
		if err != nil {
			return nil, err
		}
		turns = append(turns, mixed...)
	}
	for round := range e.rounds + 1 {
		// The order is reversed in each round: no position has an advantage.
		slices.Reverse(turns)
		for _, t := range turns {
			figure, err := t.path.connections(e.each)
			if err := errors.Join(ctx.Err(), err); err != nil {
				return nil, err
			}
			if round > 0 {
				*t.figures = append(*t.figures, figure)
			}
		}
	}
	return compare(all, e.sizes), nil
}

// A turn is one measurement of a round.
type turn struct {
	path    path
	figures *[]float64
}

// compare makes the rows of series, of which the last is the linear chain.
func compare(all []series, sizes []int) []row {
	var rows []row
	last := len(sizes) - 1
	chain := all[len(all)-1]
	for _, s := range all {
		for j := 1; j <= last; j++ {
			r := row{what: thousands(sizes[j]) + " destinations, to " + thousands(sizes[0]), variant: s.variant, pairs: pairs(s.figures[0], s.figures[j])}
			if j == last && s.variant != linear {
				r.goal = goalFlat
			}
			rows = append(rows, r)
		}
		for j, figures := range s.mixed {
			rows = append(rows, row{
				what:    fmt.Sprintf("%s mixed, %s, to %s", thousands(sizes[last]), mixedPorts[j].what, thousands(sizes[0])),
				variant: s.variant, pairs: pairs(s.figures[0], figures), goal: goalMixed,
			})
		}
		if s.variant != linear {
			rows = append(rows, row{
				what: thousands(sizes[last]) + " destinations, to " + linear, variant: s.variant,
				pairs: pairs(chain.figures[last], s.figures[last]), goal: goalLinear,
			})
		}
	}
	return rows
}

// mixedPorts are the destinations of a mixed list that are measured.
var mixedPorts = []struct {
	what string
	port uint16
}{{"a port", 50000}, {"a range to the same ports", onePort}, {"a range to one port", 50002}}

// mixedDestinations returns a list of n lines in the extended grammar, those of mixedPorts
// among them.
func mixedDestinations(n int) string {
	b := new(strings.Builder)
	fmt.Fprintf(b, "440-450 tcp %s\n50000 tcp %s %d\n50001-50009 tcp %s %d\n", server, server, onePort, server, onePort)
	for i := range max(0, n-3) {
		port := firstPort + 3*(i/2) // both protocols of a pair of lines
		switch i % 10 {
		case 0, 2:
			fmt.Fprintf(b, "%d tcp %s %d\n", port, server, onePort)
		case 4:
			fmt.Fprintf(b, "%d-%d tcp 2001:db8::25 %d\n", port, port+1, onePort)
		case 1, 3:
			fmt.Fprintf(b, "%d-%d udp %s\n", port, port+2, server)
		case 5:
			fmt.Fprintf(b, "%d-%d udp,sctp %s %d-%d\n", port, port+2, server, port+100, port+102)
		case 6:
			fmt.Fprintf(b, "%d-%d tcp %s %d-%d\n", port, port+2, server, port+100, port+102)
		case 7:
			fmt.Fprintf(b, "%d-%d udp %s 53\n", port, port+2, server)
		case 8:
			fmt.Fprintf(b, "%d tcp %s,203.0.113.25,203.0.113.27 80\n", port, server)
		case 9:
			fmt.Fprintf(b, "%d-%d udp 203.0.113.25,2001:db8::25\n", port, port+1)
		}
	}
	return b.String()
}

// runMixed runs a router with a mixed list, and returns the turns of its ports.
func runMixed(ctx context.Context, program string, v variant, n int, s *series) ([]turn, error) {
	l, err := lab.New(lab.Options{IPv6: true})
	if err != nil {
		return nil, err
	}
	turns := make([]turn, len(mixedPorts))
	s.mixed = make([][]float64, len(mixedPorts))
	for i, m := range mixedPorts {
		turns[i] = turn{path: pathTo(l, m.port), figures: &s.mixed[i]}
	}
	load, err := writeLoad(fmt.Sprintf("%s mixed lines", thousands(n)), mixedDestinations(n))
	if err != nil {
		return turns, err
	}
	load.env = append(load.env, "EGRESS_GRAMMAR=extended", "EGRESS_SOURCE="+exampleSource+", 2001:db8:12::99/64", "EGRESS_GATEWAY="+exampleGateway+", fe80::1")
	if _, err := runRouter(ctx, l, program, v, "init", load); err != nil {
		return turns, err
	}
	for i, t := range turns {
		if err := t.path.check(ctx, "tcp", lab.Source); err != nil {
			return turns, fmt.Errorf("%s, a mixed list, %s: %w", v.name, mixedPorts[i].what, err)
		}
	}
	return turns, nil
}

// runList runs a router with n destinations.
func runList(ctx context.Context, l *lab.Lab, program string, v variant, n int) error {
	load, err := makeLoad(n)
	if err != nil {
		return err
	}
	_, err = runInit(ctx, l, program, v, load)
	return err
}

// runChain runs a router with one destination, and replaces its rule by a linear chain of n
// rules.
func runChain(ctx context.Context, l *lab.Lab, program string, v variant, n int) error {
	load, err := makeLoad(1)
	if err != nil {
		return err
	}
	rules, err := runInit(ctx, l, program, v, load)
	if err != nil {
		return err
	}
	file, err := writeRules(lengthen(rules, n))
	if err != nil {
		return err
	}
	if _, err := v.tool.load(ctx, l, l.Router, file); err != nil {
		return err
	}
	if rules, err = v.tool.rules(ctx, l, l.Router); err != nil {
		return err
	}
	if got := v.tool.redirects(rules); got != n {
		return fmt.Errorf("making a chain: %d redirects, want %d", got, n)
	}
	return nil
}

// lengthen returns rules for iptables-restore --noflush that replace the rules of all own
// chains, with n redirects instead of the one of firstPort. Built-in chains do not change.
func lengthen(rules string, n int) string {
	const port = " --dport "
	var b strings.Builder
	own := map[string]bool{}
	for line := range strings.Lines(rules) {
		name, _, _ := strings.Cut(line[1:], " ")
		if line[0] == ':' {
			own[name] = true
		}
		if rule, ok := strings.CutPrefix(line, "-A "); ok {
			if name, _, _ = strings.Cut(rule, " "); !own[name] {
				continue
			}
		}
		before, after, found := strings.Cut(line, fmt.Sprint(port, firstPort, " "))
		if !found || !strings.Contains(after, jumpDNAT[1:]) {
			b.WriteString(line)
			continue
		}
		for i := range n {
			fmt.Fprint(&b, before, port, firstPort+i, " ", after)
		}
	}
	return b.String()
}

// pathToLast returns the path of the last destination of a list.
func pathToLast(l *lab.Lab, n int) path { return pathTo(l, uint16(firstPort+n-1)) }

// pathTo returns the path of a destination by its local port.
func pathTo(l *lab.Lab, port uint16) path {
	return path{
		lab:    l,
		to:     netip.AddrPortFrom(lab.RouterAddr, port),
		server: netip.AddrPortFrom(netip.MustParseAddr(server), onePort),
	}
}
