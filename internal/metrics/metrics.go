// Package metrics exports the counters of the programs to Prometheus.
//
// A program keeps its counters itself, as plain numbers. This package has a table of
// the metrics of each program, with their names and help, and a collector that reads
// the numbers when Prometheus scrapes them.
package metrics

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
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

// A collector is the prometheus.Collector of a table.
type collector struct {
	metrics map[string]described
	collect func(Emit)
}

type described struct {
	desc      *prometheus.Desc
	is        prometheus.ValueType
	histogram bool
}

func newCollector(table []Metric, collect func(Emit)) *collector {
	c := &collector{map[string]described{}, collect}
	for _, m := range table {
		is := prometheus.GaugeValue
		if m.Type == Counter {
			is = prometheus.CounterValue
		}
		c.metrics[m.Name] = described{prometheus.NewDesc(m.Name, m.Help, m.Labels, nil), is, m.Type == Histogram}
	}
	return c
}

// Describe sends the descriptions of all metrics of the table.
func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		descs <- m.desc
	}
}

// Collect sends the current values. A metric that is not in the table, or has other
// labels, is sent as an error.
func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	histograms := make(map[string]*histogram)
	c.collect(func(name string, value float64, labels ...string) {
		m, known := c.metrics[name]
		if !known {
			err := fmt.Errorf("collecting metric %q: not in the table", name)
			metrics <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
			return
		}
		if m.histogram && len(labels) == 1 {
			if histograms[name] == nil {
				histograms[name] = &histogram{buckets: make(map[float64]uint64)}
			}
			histograms[name].add(value, labels[0])
			return
		}
		metric, err := prometheus.NewConstMetric(m.desc, m.is, value, labels...)
		if err != nil {
			metric = prometheus.NewInvalidMetric(m.desc, fmt.Errorf("collecting metric %q: %w", name, err))
		}
		metrics <- metric
	})
	for name, h := range histograms {
		metrics <- prometheus.MustNewConstHistogram(c.metrics[name].desc, h.count, h.sum, h.buckets) // it has no labels
	}
}

// A histogram is what Emit.Distribution has exported.
type histogram struct {
	count   uint64
	sum     float64
	buckets map[float64]uint64 // values up to a bound
}

func (h *histogram) add(value float64, part string) {
	if bound, err := strconv.ParseFloat(part, 64); err == nil {
		h.count += uint64(value)
		h.buckets[bound] = h.count
		return
	}
	h.sum = value
}

// Handler serves the metrics of a table, and those of the process, in Prometheus's
// text format 0.0.4. It calls collect for each request, concurrently for concurrent
// requests. Metrics with an error are logged and left out. The error is that of a
// table with invalid names or labels.
//
// promhttp would add 400 KB to the program for compression, negotiation and metrics
// of its own.
func Handler(table []Metric, collect func(Emit), log *slog.Logger) (http.Handler, error) {
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		newCollector(table, collect),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		text, err := write(registry)
		if err != nil {
			log.Error("metrics collection incomplete", "error", err)
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_, _ = w.Write(text) // the client may be gone
	}), nil
}

// write returns the text of all valid metrics, also with an error.
func write(g prometheus.Gatherer) ([]byte, error) {
	families, err := g.Gather()
	var text bytes.Buffer
	for _, f := range families {
		if _, wrong := expfmt.MetricFamilyToText(&text, f); wrong != nil && err == nil {
			err = wrong
		}
	}
	return text.Bytes(), err
}
