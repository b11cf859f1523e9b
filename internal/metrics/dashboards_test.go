package metrics_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/internal/metrics"
)

const dashboards = "../../testdata/dashboards/"

// A dashboard is the part of Grafana's dashboard model that a test can judge.
type dashboard struct {
	UID           string
	Title         string
	SchemaVersion int
	Templating    struct{ List []variable }
	Panels        []panel
}

type variable struct {
	Name, Type string
	Query      any
}

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Datasource               struct{ Type, UID string }
	Targets                  []struct{ RefID, Expr, LegendFormat string }
}

// read decodes a file of the directory.
func read(t *testing.T, name string, to any) {
	t.Helper()
	text, err := os.ReadFile(dashboards + name)
	if err == nil {
		err = yaml.Unmarshal(text, to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// boards returns the dashboards by their file.
func boards(t *testing.T) map[string]dashboard {
	t.Helper()
	files, err := filepath.Glob(dashboards + "*.json")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	all := make(map[string]dashboard)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(file)] = d
	}
	return all
}

type ruleFile struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	} `json:"groups"`
}

type rule struct {
	Record      string            `json:"record,omitempty"`
	Alert       string            `json:"alert,omitempty"`
	Expr        string            `json:"expr"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// alerts returns the alerts.
func alerts(t *testing.T) (all []rule) {
	t.Helper()
	var file ruleFile
	read(t, "rules.yaml", &file)
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// A dashboard has what Grafana needs to show it: a UID of at most 40 characters, panels with
// IDs of their own that do not overlap in the grid of 24 columns, and queries of the variable
// for the data source.
func TestDashboards(t *testing.T) {
	uids := make(map[string]bool)
	for file, d := range boards(t) {
		if d.UID == "" || len(d.UID) > 40 || uids[d.UID] || d.Title == "" || d.SchemaVersion < 36 {
			t.Errorf("%s: UID %q, title %q, schema version %d", file, d.UID, d.Title, d.SchemaVersion)
		}
		uids[d.UID] = true
		if v := d.Templating.List; len(v) == 0 || v[0].Name != "datasource" || v[0].Type != "datasource" || v[0].Query != "prometheus" {
			t.Errorf("%s: the first variable is not the data source: %+v", file, v)
		}
		ids, cells := make(map[int]bool), make(map[[2]int]string)
		for _, p := range d.Panels {
			if p.ID == 0 || ids[p.ID] || p.Title == "" {
				t.Errorf("%s: panel %q has the ID %d, which is 0 or another one's", file, p.Title, p.ID)
			}
			ids[p.ID] = true
			if g := p.GridPos; g.W < 1 || g.H < 1 || g.X+g.W > 24 {
				t.Errorf("%s: panel %q is outside of the grid: %+v", file, p.Title, g)
			}
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					if other := cells[[2]int{x, y}]; other != "" {
						t.Fatalf("%s: panels %q and %q overlap", file, other, p.Title)
					}
					cells[[2]int{x, y}] = p.Title
				}
			}
			if p.Type == "row" {
				continue
			}
			if len(p.Targets) == 0 || p.Datasource.Type != "prometheus" || p.Datasource.UID != "${datasource}" {
				t.Errorf("%s: panel %q: %d queries of the data source %+v", file, p.Title, len(p.Targets), p.Datasource)
			}
			refs := make(map[string]bool)
			for _, target := range p.Targets {
				if target.RefID == "" || refs[target.RefID] || target.Expr == "" {
					t.Errorf("%s: panel %q has the query %q as %q", file, p.Title, target.Expr, target.RefID)
				}
				refs[target.RefID] = true
			}
		}
	}
}

// labels returns the labels of each name that a metric has in the text format; those of the
// process come from the library.
func labels() map[string][]string {
	known := map[string][]string{"process_resident_memory_bytes": nil}
	for _, m := range metrics.All() {
		if m.Type == metrics.Histogram {
			known[m.Name+"_bucket"] = append(slices.Clone(m.Labels), "le")
			known[m.Name+"_sum"], known[m.Name+"_count"] = m.Labels, m.Labels
			continue
		}
		known[m.Name] = m.Labels
	}
	return known
}

var (
	selector = regexp.MustCompile(`\b((?:egress|process)_[a-z0-9_]+)(?:\{([^}]*)\})?`)
	matcher  = regexp.MustCompile(`([a-zA-Z_]+)\s*(?:=~|!~|!=|=)\s*"`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right) *\(([^)]*)\)`)
	template = regexp.MustCompile(`{{ *(?:\$labels\.)?([a-z_]+)[ }]`)
)

// check reports what an expression, and the texts beside it, name that no metric has. It adds
// the metrics to used.
func check(t *testing.T, where, expr string, used map[string]bool, texts ...string) {
	t.Helper()
	scraped := []string{"job", "instance"} // labels of each sample, from Prometheus
	known, all := labels(), slices.Clone(scraped)
	selectors := selector.FindAllStringSubmatch(expr, -1)
	if len(selectors) == 0 {
		t.Errorf("%s: no metric in %s", where, expr)
	}
	for _, s := range selectors {
		own, ok := known[s[1]]
		if !ok {
			t.Errorf("%s: there is no metric %s", where, s[1])
		}
		used[s[1]] = true
		all = append(all, own...)
		for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
			if !slices.Contains(own, m[1]) && !slices.Contains(scraped, m[1]) {
				t.Errorf("%s: the metric %s has no label %s", where, s[1], m[1])
			}
		}
	}
	var named []string
	for _, g := range grouping.FindAllStringSubmatch(expr, -1) {
		named = append(named, strings.FieldsFunc(g[1], func(r rune) bool { return r == ',' || r == ' ' })...)
	}
	for _, text := range texts {
		for _, m := range template.FindAllStringSubmatch(text, -1) {
			named = append(named, m[1])
		}
	}
	for _, name := range named {
		if !slices.Contains(all, name) {
			t.Errorf("%s: no metric of the expression has the label %s", where, name)
		}
	}
}

// Every metric and label that a dashboard or an alert names is exported, and every metric has
// its place in one of them.
func TestDashboardsNameMetrics(t *testing.T) {
	used := make(map[string]bool)
	for file, d := range boards(t) {
		for _, p := range d.Panels {
			for _, target := range p.Targets {
				check(t, file+": "+p.Title, target.Expr, used, target.LegendFormat)
			}
		}
	}
	for _, r := range alerts(t) {
		check(t, r.Alert, r.Expr, used, slices.Collect(maps.Values(r.Annotations))...)
	}
	for name := range labels() {
		if !used[name] {
			t.Errorf("no dashboard and no alert has %s", name)
		}
	}
}

// Every alert has a severity, states its cause and what to do, and has a test.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile(dashboards + "rules-test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, r := range alerts(t) {
		if names[r.Alert] || r.Annotations["summary"] == "" || r.Annotations["remedy"] == "" || !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
			t.Errorf("alert %q has labels %v and annotations %v", r.Alert, r.Labels, r.Annotations)
		}
		names[r.Alert] = true
		if !strings.Contains(string(text), fmt.Sprintf("alertname=%q", r.Alert)) {
			t.Errorf("rules-test.yaml has no test of %s", r.Alert)
		}
	}
}

// promtool runs Prometheus's program for rules, of the package prometheus.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v (.ci/install prometheus:promtool installs it)\n%s", strings.Join(args, " "), err, out)
	}
}

// Prometheus takes the rules, and each alert fires for its cause alone.
func TestRules(t *testing.T) {
	promtool(t, "check", "rules", dashboards+"rules.yaml")
	promtool(t, "test", "rules", dashboards+"rules-test.yaml")
}

// Prometheus takes the expressions of the dashboards, with values for Grafana's variables.
func TestDashboardExpressions(t *testing.T) {
	values := strings.NewReplacer("$__rate_interval", "5m", "$__range", "6h", "$job", ".*", "$instance", ".*")
	var group struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	}
	group.Name = "dashboards"
	for file, d := range boards(t) {
		for _, p := range d.Panels {
			for i, target := range p.Targets {
				name := fmt.Sprintf("%s_%d_%d", strings.TrimSuffix(file, ".json"), p.ID, i)
				group.Rules = append(group.Rules, rule{Record: name, Expr: values.Replace(target.Expr)})
			}
		}
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{group}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
