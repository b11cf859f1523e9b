package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// A pair is one round: the reference, then the router, one right after the
// other, so that both see the machine in the same mood.
type pair struct {
	reference, router time.Duration
}

// A row is one line of the table of ratios.
type row struct {
	what, flavour string
	pairs         []pair
	goal          float64 // the ratio allowed at most; 0: none is set
}

const rowFormat = "%-28s %-7s %13s %10s %7s %15s %6s %s"

// printHeader prints the line above the rows.
func printHeader(w io.Writer) {
	fmt.Fprintf(w, rowFormat+"\n", "what", "flavour", "reference ms", "router ms", "ratio", "spread", "goal", "ok")
}

// print prints the row: medians, the ratio of the medians, and as spread the
// middle half of the ratios of the single rounds.
func (r row) print(w io.Writer) {
	var references, routers, ratios []float64
	for _, p := range r.pairs {
		references = append(references, milliseconds(p.reference))
		routers = append(routers, milliseconds(p.router))
		ratios = append(ratios, float64(p.router)/float64(p.reference))
	}
	ratio := quantile(routers, 0.5) / quantile(references, 0.5)
	goal, verdict := "", ""
	if r.goal > 0 {
		goal, verdict = fmt.Sprintf("%g", r.goal), judge(ratio, r.goal)
	}
	fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf(rowFormat, r.what, r.flavour,
		fmt.Sprintf("%.2f", quantile(references, 0.5)), fmt.Sprintf("%.2f", quantile(routers, 0.5)), fmt.Sprintf("%.2f", ratio),
		fmt.Sprintf("%.2f to %.2f", quantile(ratios, 0.25), quantile(ratios, 0.75)), goal, verdict), " "))
}

// judge compares a figure with the largest one allowed.
func judge(figure, goal float64) string {
	if figure <= goal {
		return "ok"
	}
	return "MISSED"
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the value below which the fraction q of the values is, with
// the line between two neighbours where it falls between them. The median, 0.5,
// is what a busy machine's odd slow round does not move.
func quantile(values []float64, q float64) float64 {
	values = slices.Sorted(slices.Values(values))
	at := q * float64(len(values)-1)
	below := int(at)
	if below+1 >= len(values) {
		return values[below]
	}
	return values[below] + (at-float64(below))*(values[below+1]-values[below])
}
