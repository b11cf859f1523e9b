// Package metrics exports the counters of the programs to Prometheus.
//
// A program keeps its counters itself, as plain numbers. This package has a table of
// the metrics of each program, with their names and help, and reads the numbers when
// Prometheus scrapes them.
package metrics

import (
	"errors"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
)

// A Type is the type of a metric.
type Type string

// The types.
const (
	Counter   Type = "counter" // it only grows, and starts at 0 with the process
	Gauge     Type = "gauge"
	Histogram Type = "histogram" // without labels; see Emit.Distribution
)

// A Metric describes one metric. Help is one sentence, which the manual repeats.
type Metric struct {
	Name   string
	Type   Type
	Labels []string
	Help   string
}

// Emit exports the value of a metric, with its labels in the order of the table.
type Emit func(name string, value float64, labels ...string)

// The label of Emit for the parts of a histogram: the sum, or an upper bound.
const sumPart = "sum"

// Distribution exports a histogram: the sum of all values, and the number of those up to each
// upper bound and above the previous one. No value is above the last bound.
func (e Emit) Distribution(name string, sum float64, bounds []float64, counts []uint64) {
	for i, bound := range bounds {
		e(name, float64(counts[i]), strconv.FormatFloat(bound, 'g', -1, 64))
	}
	e(name, sum, sumPart)
}

// Handler serves the metrics of a table, and those of the process, in Prometheus's
// text format 0.0.4. It calls collect for each request, concurrently for concurrent
// requests. A value that is not one of the table is logged and left out. The error is
// that of a table with invalid names or labels.
//
// The page is that of client_golang, which the tests compare it with. client_golang
// itself would add 1.9 MB to the program, most of it for protocol buffers.
func Handler(table []Metric, collect func(Emit), log *slog.Logger) (http.Handler, error) {
	page, err := newLayout(slices.Concat(process, table))
	if err != nil {
		return nil, err
	}
	proc := os.DirFS("/proc")
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s := newScrape(page)
		collect(s.emit)
		collectProcess(s.emit, proc)
		text := s.text()
		if err := errors.Join(s.errs...); err != nil {
			log.Error("metrics collection incomplete", "error", err)
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_, _ = w.Write(text) // the client may be gone
	}), nil
}
