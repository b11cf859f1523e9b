package page

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/egress-router/egress-router/internal/health"
)

var now = time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)

// example returns a page with a text in every place.
func example(text string) Page {
	return Page{
		Report: health.Report{
			Program: health.Router, Version: text, Mode: text, Started: now.Add(-time.Hour), Reasons: []string{text},
			Checks: []health.Check{{Name: "kernel", Since: now}, {Name: text, State: health.Failed, Detail: text, Since: now}},
		},
		Host: text, Advice: func(health.Check) string { return text },
		Path: []Hop{{Name: text, Lines: []string{text}, State: health.Warning}},
		Tables: []Table{{
			ID: "destinations", Title: text, Note: text, Columns: []Column{{Title: text}, {Title: text, Number: true}},
			Rows: []Row{{Cells: []string{text, text}}}, Searches: true, Matching: 250,
		}, {ID: "none", Title: text, None: text}},
		Events: []Event{{Level: slog.LevelError, Label: text, Detail: text, Times: 3, At: now.AddDate(0, 0, -1)}},
		Now:    now,
	}
}

func get(t *testing.T, p Page, target string) *http.Response {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(func(Query) Page { return p }).ServeHTTP(w, httptest.NewRequest(http.MethodGet, target, nil))
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var quoted = regexp.MustCompile(`"[^"]*"`)

// No text becomes markup, wherever it is on the page, also that of a search. Each place has
// it, so that the example has no place less than the page.
func TestEscapes(t *testing.T) {
	harmless := body(t, get(t, example("harmless"), "/?q=harmless&page=2"))
	for _, hostile := range []string{`<script>x()</script>`, `"><img src=x onerror=x()>`, `'onclick='x()`, `</title></style>`, "&lt;&amp;", "a\x00b\x1b[2J\u202e", "\xff\xfe%s%!"} {
		text := body(t, get(t, example(hostile), "/?page=2&q="+"harmless"))
		if got, want := strings.Count(text, "<"), strings.Count(harmless, "<"); got != want {
			t.Errorf("%q: %d tags, want %d", hostile, got, want)
		}
		if strings.ContainsAny(text, "\x00\x1b\u202e") || !utf8.ValidString(text) || strings.Contains(text, "%!s") {
			t.Errorf("%q: the page has a character of it", hostile)
		}
		for _, tag := range regexp.MustCompile(`<[^>]*>`).FindAllString(text, -1) {
			if bare := quoted.ReplaceAllString(tag, ""); strings.Contains(bare, " on") || strings.Contains(bare, `"`) {
				t.Errorf("%q: %s", hostile, tag)
			}
		}
	}
	if text := body(t, get(t, example("x"), `/?q="><script>`)); strings.Contains(text, `"><script>`) {
		t.Error("the search is not escaped")
	}
}

// Each placeholder of the markup has a value.
func TestRendersWholly(t *testing.T) {
	for _, p := range []Page{example("x"), {}, {Report: health.Report{Ready: true}, Standby: true}} {
		text := string(render(p, Query{}))
		if strings.Contains(text, "%!") || strings.Contains(text, "%s") {
			t.Errorf("a placeholder without a value, or a value without one:\n%s", text)
		}
	}
}

func TestHeaders(t *testing.T) {
	r := get(t, example("x"), "/")
	for name, want := range map[string]string{
		"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
		"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
	} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	csp := r.Header.Get("Content-Security-Policy")
	for _, part := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "connect-src 'self'"} {
		if !strings.Contains(csp, part) {
			t.Errorf("Content-Security-Policy %q lacks %q", csp, part)
		}
	}
	if strings.Contains(csp, "unsafe") {
		t.Errorf("Content-Security-Policy %q", csp)
	}
	if text := body(t, r); regexp.MustCompile(`(?i)(src|href|action)="?(https?:)?//`).MatchString(text) {
		t.Error("the page names another server")
	}
}

func TestHeadline(t *testing.T) {
	check := func(states ...health.State) (all []health.Check) {
		for _, s := range states {
			all = append(all, health.Check{State: s})
		}
		return all
	}
	for _, test := range []struct {
		page Page
		word markup
		text string
	}{
		{Page{Report: health.Report{Ready: true, Checks: check(health.OK)}}, good, "Ready"},
		{Page{Report: health.Report{Ready: true, Checks: check(health.OK, health.Warning)}}, warned, "Ready, with 1 warning"},
		{Page{Report: health.Report{Ready: true, Checks: check(health.Failed, health.Warning)}}, warned, "Ready, with 2 warnings"},
		{Page{Report: health.Report{Checks: check(health.OK)}}, broken, "Not ready"},
		{Page{Standby: true, Report: health.Report{Reasons: []string{"another router holds the addresses"}}}, resting, "Stands by"},
	} {
		if word, text := test.page.headline(); word != test.word || text != test.text {
			t.Errorf("%s, %q; want %s, %q", word, text, test.word, test.text)
		}
	}
}

// Beside the headline stands what the warnings are.
func TestWarningsAreNamed(t *testing.T) {
	p := Page{Report: health.Report{Ready: true, Checks: []health.Check{{Name: "kernel"}, {Name: "address", State: health.Warning, Detail: "another host has it"}}}, Now: now, Advice: func(health.Check) string { return "" }}
	if text := body(t, get(t, p, "/")); !strings.Contains(text, `<ul class="reasons"><li>address: another host has it</li></ul>`) {
		t.Errorf("%s", text)
	}
}

func TestQuery(t *testing.T) {
	for target, want := range map[string]Query{
		"/": {"", 1}, "/?q=+a+&page=3": {"a", 3}, "/?page=0": {"", 1}, "/?page=-1": {"", 1}, "/?page=x": {"", 1}, "/?page=99999999999999999999": {"", 1},
		"/?q=" + strings.Repeat("a", 101): {"", 1}, "/?q=%ff": {"", 1}, "/?q=%zz;": {"", 1},
	} {
		if got := query(httptest.NewRequest(http.MethodGet, target, nil)); got != want {
			t.Errorf("%s: %+v, want %+v", target, got, want)
		}
	}
}

func TestWindow(t *testing.T) {
	for _, test := range []struct{ page, rows, from, to int }{
		{1, 0, 0, 0}, {1, 1, 0, 1}, {1, 50, 0, 50}, {2, 50, 0, 50}, {2, 51, 50, 51}, {1 << 62, 250, 200, 250}, {0, 250, 0, 50},
	} {
		if from, to := (Query{Number: test.page}).Window(test.rows); from != test.from || to != test.to {
			t.Errorf("page %d of %d rows: %d to %d, want %d to %d", test.page, test.rows, from, to, test.from, test.to)
		}
	}
}

func TestNumbers(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000", -100: "-100"} {
		if got := Count(n); got != want {
			t.Errorf("Count(%d) = %q, want %q", n, got, want)
		}
	}
	for n, want := range map[float64]string{0: "0 B", 999: "999 B", 999.6: "1.0 kB", 1500: "1.5 kB", 99949: "99.9 kB", 123456: "123 kB", 2e9: "2.0 GB", 3e21: "3000 EB"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%g) = %q, want %q", n, got, want)
		}
	}
}

func TestEvents(t *testing.T) {
	var written strings.Builder
	var events Events
	log := events.Logger(slog.New(slog.NewTextHandler(&written, &slog.HandlerOptions{Level: slog.LevelWarn})))
	log.Debug("debug")
	log.Info("ready", "took", time.Second)
	log.Info("access", "client", "10.0.0.1:1", "url", "http://secret/")
	log.Info("access", "url", "http://"+strings.Repeat("secret", 100), "client", "10.0.0.1:1")
	log.With("client", "10.0.0.1:1").Info("access", "url", "http://secret/")
	log.Info("failed", "error", errors.Join(io.EOF, io.ErrClosedPipe))
	for range 3 {
		log.With("kind", "rules").WithGroup("g").Warn("repaired", "log_lines", 1)
	}
	all := events.All()
	for i := range all {
		all[i].At = time.Time{}
	}
	if got, want := fmt.Sprint(all), fmt.Sprint([]Event{{slog.LevelWarn, "repaired", "kind rules, log lines 1", 3, time.Time{}},
		{slog.LevelInfo, "failed", "error EOF; io: read/write on closed pipe", 1, time.Time{}}, {slog.LevelInfo, "ready", "took 1s", 1, time.Time{}}}); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	if text := written.String(); strings.Count(text, "\n") != 3 || strings.Contains(text, "ready") {
		t.Errorf("the log has\n%s", text)
	}

	for i := range 3 * mostEvents {
		log.Info("many", "text", strings.Repeat("é", 1000), "number", i)
		log.Info("other")
	}
	if all = events.All(); len(all) != mostEvents || all[0].Label != "other" || len(all[1].Detail) > mostDetail+10 {
		t.Errorf("%d events, %d bytes", len(all), len(all[1].Detail))
	}

	var none *Events
	if none.Logger(log) != log || none.All() != nil {
		t.Error("without events another logger, or an event")
	}
}
