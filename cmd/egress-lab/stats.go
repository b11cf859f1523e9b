package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// A pair is one round: reference and router, measured shortly after each other, under the
// same load of the machine.
type pair struct {
	reference, router float64
}

// pairs makes pairs of the figures of rounds.
func pairs(reference, router []float64) []pair {
	all := make([]pair, len(reference))
	for i := range all {
		all[i] = pair{reference[i], router[i]}
	}
	return all
}

// A row is one line of a table of ratios.
type row struct {
	what, variant string
	pairs         []pair
	goal          goal
}

// A goal is an upper or lower limit of a ratio. The zero value is no goal.
type goal struct {
	ratio float64
	least bool
}

func atMost(ratio float64) goal  { return goal{ratio: ratio} }
func atLeast(ratio float64) goal { return goal{ratio: ratio, least: true} }

// String returns the goal as it is printed in tables.
func (g goal) String() string {
	switch {
	case g.ratio == 0:
		return ""
	case g.least:
		return fmt.Sprintf(">= %g", g.ratio)
	}
	return fmt.Sprintf("<= %g", g.ratio)
}

// judge returns "ok" or "MISSED", or "" without a goal.
func (g goal) judge(figure float64) string {
	switch {
	case g.ratio == 0:
		return ""
	case g.least && figure >= g.ratio, !g.least && figure <= g.ratio:
		return "ok"
	}
	return "MISSED"
}

const rowFormat = "%-40s %-15s %14s %11s %7s %15s %7s %s\n"

// printHeader prints the line above rows whose figures have a unit.
func printHeader(w io.Writer, unit string) {
	fmt.Fprintf(w, rowFormat, "what", "variant", "reference "+unit, "router "+unit, "ratio", "spread", "goal", "ok")
}

// printProxyHeader prints the line above rows of the proxies; the reference is another
// proxy.
func printProxyHeader(w io.Writer) {
	fmt.Fprintf(w, rowFormat, "what", "beside", "theirs", "ours", "ratio", "spread", "goal", "ok")
}

// print prints the row: medians of the figures, the median of the ratios of all rounds, and
// as spread their middle half. A machine that becomes slower from round to round changes
// the figures and not the ratios, since the two figures of a pair are measured shortly
// after each other.
func (r row) print(w io.Writer) {
	var references, routers, ratios []float64
	for _, p := range r.pairs {
		references = append(references, p.reference)
		routers = append(routers, p.router)
		ratios = append(ratios, p.router/p.reference)
	}
	ratio := quantile(ratios, 0.5)
	fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf(rowFormat, r.what, r.variant,
		digits(quantile(references, 0.5)), digits(quantile(routers, 0.5)), fmt.Sprintf("%.2f", ratio),
		fmt.Sprintf("%.2f to %.2f", quantile(ratios, 0.25), quantile(ratios, 0.75)), r.goal, r.goal.judge(ratio)), " \n"))
}

// digits returns a figure with two decimals, or none from 1,000 on.
func digits(figure float64) string {
	if figure < 1000 {
		return fmt.Sprintf("%.2f", figure)
	}
	return fmt.Sprintf("%.0f", figure)
}

// thousands returns a number below a million with a comma.
func thousands(n int) string {
	s := strconv.Itoa(n)
	if len(s) > 3 {
		s = s[:len(s)-3] + "," + s[len(s)-3:]
	}
	return s
}

// quantile returns the value below which the fraction q of the values is, interpolated
// between two values. Single slow rounds do not change the median, 0.5.
func quantile(values []float64, q float64) float64 {
	values = slices.Sorted(slices.Values(values))
	at := q * float64(len(values)-1)
	below := int(at)
	if below+1 >= len(values) {
		return values[below]
	}
	return values[below] + (at-float64(below))*(values[below+1]-values[below])
}
