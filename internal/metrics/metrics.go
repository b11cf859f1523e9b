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

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// A Type is the type of a metric.
type Type string

// The types.
const (
	Counter Type = "counter" // it only grows, and starts at 0 with the process
	Gauge   Type = "gauge"
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

// A collector is the prometheus.Collector of a table.
type collector struct {
	metrics map[string]described
	collect func(Emit)
}

type described struct {
	desc *prometheus.Desc
	is   prometheus.ValueType
}

func newCollector(table []Metric, collect func(Emit)) *collector {
	c := &collector{map[string]described{}, collect}
	for _, m := range table {
		is := prometheus.GaugeValue
		if m.Type == Counter {
			is = prometheus.CounterValue
		}
		c.metrics[m.Name] = described{prometheus.NewDesc(m.Name, m.Help, m.Labels, nil), is}
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
	c.collect(func(name string, value float64, labels ...string) {
		m, known := c.metrics[name]
		if !known {
			err := fmt.Errorf("collecting metric %q: not in the table", name)
			metrics <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
			return
		}
		metric, err := prometheus.NewConstMetric(m.desc, m.is, value, labels...)
		if err != nil {
			metric = prometheus.NewInvalidMetric(m.desc, fmt.Errorf("collecting metric %q: %w", name, err))
		}
		metrics <- metric
	})
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
