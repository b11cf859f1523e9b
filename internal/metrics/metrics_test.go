package metrics

import (
	"bytes"
	"flag"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/egress-router/egress-router/internal/manual"
)

// Every metric of the tables can be exported, and its name follows the conventions of
// Prometheus.
func TestTables(t *testing.T) {
	for program, table := range map[string][]Metric{"egress_router_": Router, "egress_http_proxy_": HTTPProxy, "egress_dns_proxy_": DNSProxy} {
		registry := prometheus.NewPedanticRegistry()
		err := registry.Register(newCollector(table, func(emit Emit) {
			for _, m := range table {
				for _, value := range []string{"a", "b"} {
					if m.Type == Histogram {
						emit.Distribution(m.Name, 1, []float64{1, 2}, []uint64{0, 1})
						continue
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
		}))
		if err != nil {
			t.Fatal(err)
		}
		families, err := registry.Gather()
		if err != nil {
			t.Error(err)
		}
		if len(families) != len(table) {
			t.Errorf("%d metrics are exported, %d are in the table", len(families), len(table))
		}
		problems, err := promlint.NewWithMetricFamilies(families).Lint()
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

// A metric that is not in the table is an error; the others are exported.
func TestCollectErrors(t *testing.T) {
	table := []Metric{{"up", Gauge, nil, "Whether it is up."}, {"seen_total", Counter, []string{"what"}, "what was seen"}}
	for name, test := range map[string]struct {
		emit func(Emit)
		want string
	}{
		"unknown":      {func(e Emit) { e("down", 1) }, `collecting metric "down": not in the table`},
		"few labels":   {func(e Emit) { e("seen_total", 1) }, `collecting metric "seen_total": `},
		"many labels":  {func(e Emit) { e("seen_total", 1, "a", "b") }, `collecting metric "seen_total": `},
		"same twice":   {func(e Emit) { e("seen_total", 1, "a"); e("seen_total", 2, "a") }, "was collected before"},
		"label's text": {func(e Emit) { e("seen_total", 1, "\xff") }, `collecting metric "seen_total": `},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			h, err := Handler(table, func(e Emit) { e("up", 1); test.emit(e) }, slog.New(slog.NewJSONHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
			if w.Code != 200 || !strings.Contains(w.Body.String(), "\nup 1\n") {
				t.Errorf("%d\n%s", w.Code, w.Body)
			}
			if text := strings.ReplaceAll(log.String(), `\"`, `"`); !strings.Contains(text, test.want) {
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
	if _, err := Handler([]Metric{{"a-b", Gauge, []string{"x-y", "x-y"}, ""}}, func(Emit) {}, nil); err == nil {
		t.Error("a table with bad labels is taken")
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
