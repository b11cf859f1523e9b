// Package metrics shows the counters of a program to Prometheus.
//
// What a program counts it keeps itself, as plain numbers. Here is what they are
// called and what they mean, one table for each program, and a collector that
// asks for the numbers when somebody comes for them.
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

// A Type is how a metric moves.
type Type string

// The types.
const (
	Counter Type = "counter" // it only grows, and begins again at 0 with the process
	Gauge   Type = "gauge"
)

// A Metric describes one metric, in the words of the README.
type Metric struct {
	Name   string
	Type   Type
	Labels []string
	Help   string
}

// Emit tells the value of a metric, with its labels in the order of the table.
type Emit func(name string, value float64, labels ...string)

// A collector is a program's metrics as Prometheus wants them.
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

// Describe sends every metric that there can be.
func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		descs <- m.desc
	}
}

// Collect sends every metric that there is. One that is not in the table, or has
// other labels, is sent as an error.
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

// Handler serves the metrics of a table, and those of the process, in the text
// format 0.0.4, which everything that collects metrics reads. collect tells the
// values; it is called for each request, from several goroutines if several come
// at once. What cannot be told is logged and left out.
//
// It is not promhttp, whose compression, negotiation and metrics of its own would
// add 400 KB to the program.
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
		_, _ = w.Write(text) // a client that is gone needs none
	}), nil
}

// write returns the text of what there is, also with an error.
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
