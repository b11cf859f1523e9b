package metrics

import (
	"bytes"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/egress-router/egress-router/internal/manual"
)

// serve returns the page of a table, and what is logged.
func serve(t *testing.T, table []Metric, collect func(Emit)) (*httptest.ResponseRecorder, string) {
	t.Helper()
	var log bytes.Buffer
	h, err := Handler(table, collect, slog.New(slog.NewJSONHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	return w, log.String()
}

// families reads a page as Prometheus does.
func families(t *testing.T, page string) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	all, err := parser.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		t.Fatalf("%v\n%s", err, page)
	}
	return all
}

// Every metric of the tables can be exported, and its name and help follow the conventions
// of Prometheus.
func TestTables(t *testing.T) {
	for program, table := range map[string][]Metric{"egress_router_": Router, "egress_http_proxy_": HTTPProxy, "egress_dns_proxy_": DNSProxy} {
		w, log := serve(t, table, func(emit Emit) {
			for _, m := range table {
				for _, value := range []string{"a", "b"} {
					if m.Type == Histogram {
						emit.Distribution(m.Name, 1, []float64{1, 2}, []uint64{0, 1})
						break
					}
					labels := make([]string, len(m.Labels))
					for i := range labels {
						labels[i] = value
					}
					if value == "a" || len(labels) > 0 {
						emit(m.Name, 1, labels...)
					}
				}
			}
		})
		if log != "" {
			t.Error(log)
		}
		if n := len(families(t, w.Body.String())); n != len(table)+len(process) {
			t.Errorf("%d metrics are exported, %d are in the tables", n, len(table)+len(process))
		}
		problems, err := promlint.New(w.Body).Lint()
		if err != nil {
			t.Error(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
		for _, m := range table {
			if !strings.HasPrefix(m.Name, program) {
				t.Errorf("%s does not begin with %s", m.Name, program)
			}
		}
	}
}

// clientGolang returns the page that client_golang writes of the values of a table.
func clientGolang(t *testing.T, table []Metric, collect func(Emit)) string {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	for _, m := range table {
		switch m.Type {
		case Histogram: // client_golang has its own order of the calls
			h := prometheus.NewDesc(m.Name, m.Help, nil, nil)
			count, sum, buckets := uint64(0), 0.0, make(map[float64]uint64)
			collect(func(name string, value float64, labels ...string) {
				if name != m.Name {
					return
				}
				if bound, err := strconv.ParseFloat(labels[0], 64); err == nil {
					count += uint64(value)
					buckets[bound] = count
					return
				}
				sum = value
			})
			registry.MustRegister(constant{prometheus.MustNewConstHistogram(h, count, sum, buckets)})
		case Counter:
			c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: m.Name, Help: m.Help}, m.Labels)
			collect(func(name string, value float64, labels ...string) {
				if name == m.Name {
					c.WithLabelValues(labels...).Add(value)
				}
			})
			registry.MustRegister(c)
		case Gauge:
			g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: m.Name, Help: m.Help}, m.Labels)
			collect(func(name string, value float64, labels ...string) {
				if name == m.Name {
					g.WithLabelValues(labels...).Set(value)
				}
			})
			registry.MustRegister(g)
		}
	}
	gathered, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, f := range gathered {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	return text.String()
}

// constant is a collector of one metric.
type constant struct{ metric prometheus.Metric }

func (c constant) Describe(descs chan<- *prometheus.Desc)   { descs <- c.metric.Desc() }
func (c constant) Collect(metrics chan<- prometheus.Metric) { metrics <- c.metric }

// The page of random values of every table is that of client_golang, byte for byte.
func TestSamePageAsClientGolang(t *testing.T) {
	values := []float64{0, math.Copysign(0, -1), 1, -1, 0.1, 2.5e-9, 1e6, 123456789, 1 << 53, 1e21, 1e300, math.MaxUint64, math.Inf(1), math.NaN()}
	labels := []string{"", "a", "b", "B", "a b", `"`, `\`, `\n`, "\n", "a\nb\\\"", "é", "日本", "{a=\"b\"}", "10.0.0.1:80", "10.0.0.10:80", "\x00", "#"}
	for name, table := range map[string][]Metric{"router": Router, "http": HTTPProxy, "dns": DNSProxy, "help": {
		{"b", Gauge, []string{"z", "_a", "Z", "a"}, "with \\ and \"quotes\"\nand lines"}, {"a:b", Counter, nil, ""},
	}} {
		for seed := range uint64(50) {
			collect := func(emit Emit) {
				random := rand.New(rand.NewPCG(seed, 0)) // the same at each call
				for _, m := range table {
					if m.Type == Histogram {
						if bounds := []float64{0.001, 0.25, 1, 1e6}[:random.IntN(5)]; len(bounds) > 0 {
							emit.Distribution(m.Name, random.ExpFloat64(), bounds, []uint64{random.Uint64N(3), random.Uint64N(1e9), 0, 7}[:len(bounds)])
						}
						continue
					}
					seen := make(map[string]bool)
					for range random.IntN(8) {
						of := make([]string, len(m.Labels))
						for i := range of {
							of[i] = labels[random.IntN(len(labels))]
						}
						value := values[random.IntN(len(values))]
						if m.Type == Counter && !(value >= 0) {
							value = 3 // client_golang refuses others
						}
						if key := strings.Join(of, "\xff"); !seen[key] {
							seen[key] = true
							emit(m.Name, value, of...)
						}
					}
				}
			}
			shown := func(m Metric) bool { // client_golang would also write a histogram without values
				has := false
				collect(func(name string, _ float64, _ ...string) { has = has || name == m.Name })
				return has
			}
			var with []Metric
			for _, m := range table {
				if shown(m) {
					with = append(with, m)
				}
			}
			l, err := newLayout(table)
			if err != nil {
				t.Fatal(err)
			}
			s := newScrape(l)
			collect(s.emit)
			got := string(s.text())
			if len(s.errs) > 0 {
				t.Errorf("%s, %d: %v", name, seed, s.errs)
			}
			if diff := cmp.Diff(clientGolang(t, with, collect), got); diff != "" {
				t.Fatalf("%s, %d (- client_golang, + ours):\n%s", name, seed, diff)
			}
		}
	}
}

// A metric that is not in the table is an error; the others are exported.
func TestCollectErrors(t *testing.T) {
	table := []Metric{
		{"up", Gauge, nil, "Whether it is up."}, {"seen_total", Counter, []string{"what"}, "what was seen"},
		{"took_seconds", Histogram, nil, "How long it took."},
	}
	for name, test := range map[string]struct {
		emit func(Emit)
		want string
	}{
		"unknown":      {func(e Emit) { e("down", 1) }, `collecting metric "down": not in the table`},
		"few labels":   {func(e Emit) { e("seen_total", 1) }, `collecting metric "seen_total": `},
		"many labels":  {func(e Emit) { e("seen_total", 1, "a", "b") }, `collecting metric "seen_total": `},
		"same twice":   {func(e Emit) { e("seen_total", 1, "a"); e("seen_total", 2, "a") }, "was collected before"},
		"label's text": {func(e Emit) { e("seen_total", 1, "\xff") }, `collecting metric "seen_total": `},
		"bound":        {func(e Emit) { e("took_seconds", 1, "long") }, `collecting metric "took_seconds": found the part "long"`},
		"infinite":     {func(e Emit) { e.Distribution("took_seconds", 1, []float64{math.Inf(1)}, []uint64{1}) }, `collecting metric "took_seconds": found the part "+Inf"`},
		"no part":      {func(e Emit) { e("took_seconds", 1) }, `collecting metric "took_seconds": `},
		"two sums":     {func(e Emit) { e.Distribution("took_seconds", 1, nil, nil); e.Distribution("took_seconds", 1, nil, nil) }, "was collected before"},
	} {
		t.Run(name, func(t *testing.T) {
			w, log := serve(t, table, func(e Emit) { e("up", 1); test.emit(e) })
			if w.Code != 200 || !strings.Contains(w.Body.String(), "\nup 1\n") {
				t.Errorf("%d\n%s", w.Code, w.Body)
			}
			if text := strings.ReplaceAll(log, `\"`, `"`); !strings.Contains(text, test.want) {
				t.Errorf("the log lacks %q:\n%s", test.want, text)
			}
		})
	}
}

func TestHandler(t *testing.T) {
	table := []Metric{
		{"up", Gauge, nil, "Whether it is up."}, {"seen_total", Counter, []string{"what", "where"}, `what was "seen"`},
		{"took_seconds", Histogram, nil, "How long it took."},
	}
	var log bytes.Buffer
	n := 0
	h, err := Handler(table, func(e Emit) {
		n++
		e("up", 0.5)
		e("seen_total", float64(n), "a cat", "on\nthe \"roof\"")
		e("seen_total", 1e9, "a dog", "")
		e.Distribution("took_seconds", 2.25, []float64{0.25, 2}, []uint64{1, 3})
	}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if got := w.Header().Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
			t.Errorf("Content-Type: %s", got)
		}
		process, ours := 0, ""
		for line := range strings.Lines(w.Body.String()) {
			if strings.HasPrefix(line, "process_") {
				process++
			} else if !strings.HasPrefix(line, "# HELP process_") && !strings.HasPrefix(line, "# TYPE process_") {
				ours += line
			}
		}
		want := fmt.Sprintf(`# HELP seen_total what was "seen"
# TYPE seen_total counter
seen_total{what="a cat",where="on\nthe \"roof\""} %d
seen_total{what="a dog",where=""} 1e+09
# HELP took_seconds How long it took.
# TYPE took_seconds histogram
took_seconds_bucket{le="0.25"} 1
took_seconds_bucket{le="2"} 4
took_seconds_bucket{le="+Inf"} 4
took_seconds_sum 2.25
took_seconds_count 4
# HELP up Whether it is up.
# TYPE up gauge
up 0.5
`, i+1)
		if diff := cmp.Diff(want, ours); diff != "" || process < 5 {
			t.Errorf("%d metrics of the process, and of the table (- want, + got):\n%s", process, diff)
		}
	}
	if log.Len() > 0 {
		t.Errorf("log: %s", &log)
	}
}

// A table that Prometheus would not accept is an error that names the metric.
func TestInvalidTable(t *testing.T) {
	for want, table := range map[string][]Metric{
		`registering metric "a-b": invalid name`:                         {{"a-b", Gauge, nil, ""}},
		`registering metric "0a": invalid name`:                          {{"0a", Gauge, nil, ""}},
		`registering metric "": invalid name`:                            {{"", Gauge, nil, ""}},
		`registering metric "a": invalid label "x-y"`:                    {{"a", Gauge, []string{"x-y"}, ""}},
		`registering metric "a": invalid label "x:y"`:                    {{"a", Gauge, []string{"x:y"}, ""}},
		`registering metric "a": invalid label "__name__"`:               {{"a", Gauge, []string{"__name__"}, ""}},
		`registering metric "a": label "x" is there twice`:               {{"a", Gauge, []string{"x", "x"}, ""}},
		`registering metric "a": unknown type "sum"`:                     {{"a", "sum", nil, ""}},
		`registering metric "a": a histogram with labels`:                {{"a", Histogram, []string{"x"}, ""}},
		`registering metric "a": help "\xff" is not UTF-8`:               {{"a", Gauge, nil, "\xff"}},
		`registering metric "a": it is in the table twice`:               {{"a", Gauge, nil, ""}, {"b", Gauge, nil, ""}, {"a", Counter, nil, ""}},
		`registering metric "process_max_fds": it is in the table twice`: {{"process_max_fds", Gauge, nil, ""}},
	} {
		if _, err := Handler(table, func(Emit) {}, nil); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("expected the error %q, found %v", want, err)
		}
	}
}

var update = flag.Bool("update", false, "rewrite the table of README.md")

// The README describes the same metrics in the same words.
func TestDocumentation(t *testing.T) {
	table := "| metric | type | labels | meaning |\n|---|---|---|---|\n"
	for _, m := range All() {
		labels := "`" + strings.Join(m.Labels, "`, `") + "`"
		if len(m.Labels) == 0 {
			labels = "none"
		}
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n", m.Name, m.Type, labels, m.Help)
	}
	if err := manual.Generated("README.md", "metrics", table, *update); err != nil {
		t.Error(err)
	}
}
