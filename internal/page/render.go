package page

import (
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/health"
)

// render returns the HTML of a page.
func render(p Page, q Query) []byte {
	w := new(writer)
	word, text := p.headline()
	w.put("<!DOCTYPE html>\n"+`<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">`+
		`<title>%s: %s %s</title><link rel="icon" href="data:image/svg+xml,%s"><style>%s</style></head>`+"\n<body data-state=\"%s\">\n",
		text, p.Host, p.Report.Program, icons[word], markup(style), word)
	w.put(`<a class="skip" href="#main">Skip to the state</a>` + "\n")
	w.header(p)
	w.put(`<main id="main" tabindex="-1">` + "\n")
	w.state(p, word, text)
	w.path(p.Path)
	w.checks(p)
	for _, t := range p.Tables {
		w.table(t, q)
	}
	w.events(p)
	w.put("</main>\n"+`<footer>Read-only. The same as numbers: <a href="metrics">metrics</a>. In the pod: <code>egress-router health</code>, <code>egress-router diagnose</code>.</footer>`+
		"\n<script>%s</script>\n</body></html>\n", markup(script))
	return w.Bytes()
}

// The words for the state of the whole program, as which the style knows it.
const (
	good    markup = "ok"
	warned  markup = "warning"
	broken  markup = "failed"
	resting markup = "standby"
)

// icons are the page's icons, a disc in the colour of the state, a bar if it is not
// ready: a tab of many is found by it.
var icons = map[markup]markup{
	good:    `%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='7' fill='%231a7f37'/%3E%3C/svg%3E`,
	warned:  `%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M8 1 15 15H1z' fill='%23bf8700'/%3E%3C/svg%3E`,
	broken:  `%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 1h14v14H1z' fill='%23cf222e'/%3E%3C/svg%3E`,
	resting: `%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='6' fill='none' stroke='%230969da' stroke-width='3'/%3E%3C/svg%3E`,
}

// headline returns the state in one word and in one line.
func (p Page) headline() (word markup, text string) {
	warnings := 0
	for _, c := range p.Report.Checks {
		if c.State != health.OK {
			warnings++
		}
	}
	switch {
	case p.Standby:
		return resting, "Stands by"
	case !p.Report.Ready:
		return broken, "Not ready"
	case warnings == 1:
		return warned, "Ready, with 1 warning"
	case warnings > 0:
		return warned, fmt.Sprintf("Ready, with %d warnings", warnings)
	}
	return good, "Ready"
}

// titles are the names of the programs for people.
var titles = map[string]string{health.Router: "egress router", health.HTTPProxy: "egress HTTP proxy", health.DNSProxy: "egress DNS proxy"}

func (w *writer) header(p Page) {
	w.put(`<header><p class="name"><strong>%s</strong> %s</p><nav aria-label="Sections"><a href="#path">Path</a> <a href="#checks">Checks</a>`, p.Host, titles[p.Report.Program])
	for _, t := range p.Tables {
		w.put(` <a href="#%s">%s</a>`, t.ID, t.Title)
	}
	w.put(` <a href="#events">Events</a></nav>`)
	// The script shows these two and keeps them.
	w.put(`<p class="refresh"><button id="pause" type="button" hidden>Pause</button> <span id="age" hidden></span></p></header>` + "\n")
	w.put(`<p id="stale" role="alert" hidden></p>` + "\n")
}

// state writes the state in one line, and what is wrong.
func (w *writer) state(p Page, word markup, text string) {
	w.put(`<section class="state"><h1><span id="headline" class="%s" role="status" data-live>%s</span></h1><div id="state" data-live>`, word, text)
	reasons := slices.Clip(p.Report.Reasons)
	if word == warned {
		for _, c := range p.Report.Checks {
			if c.State != health.OK {
				reasons = append(reasons, c.Name+": "+c.Detail)
			}
		}
	}
	if len(reasons) > 0 {
		w.put(`<ul class="reasons">`)
		for _, r := range reasons {
			w.put("<li>%s</li>", r)
		}
		w.put("</ul>")
	}
	w.put("<dl class=\"facts\">")
	for _, fact := range [][2]string{
		{"Running for", health.Age(p.Report.Started, p.Now)}, {"Mode", p.Report.Mode}, {"Version", p.Report.Version},
	} {
		if fact[1] != "" {
			w.put("<div><dt>%s</dt><dd>%s</dd></div>", fact[0], fact[1])
		}
	}
	w.put(`<div><dt>As of</dt><dd>%s</dd></div></dl></div></section>`+"\n", clock(p.Now, p.Now))
}

// clock returns a time of day, and its date unless that is today's.
func clock(at, now time.Time) markup {
	at, now = at.UTC(), now.UTC()
	layout := "15:04:05 UTC"
	if at.Format(time.DateOnly) != now.Format(time.DateOnly) {
		layout = "2006-01-02 15:04:05 UTC"
	}
	return markup(fmt.Sprintf(`<time datetime="%s">%s</time>`, at.Format(time.RFC3339), at.Format(layout)))
}

// mark returns a sign for a state with its name, so that colour is not the only one.
func mark(s health.State) markup {
	return markup(fmt.Sprintf(`<span class="mark %s">%s</span>`, s, s)) // a fixed word
}

// path writes the hops as a picture: a list whose style draws it. After a hop that
// failed, the line is broken.
func (w *writer) path(hops []Hop) {
	w.put(`<section id="path" data-live><h2>Path of a connection</h2><ol class="path">`)
	for _, h := range hops {
		w.put(`<li class="%s"><h3>%s</h3>`, h.State, h.Name)
		for _, line := range h.Lines {
			w.put("<p>%s</p>", line)
		}
		w.put("%s</li>", mark(h.State))
	}
	w.put("</ol></section>\n")
}

// checks writes the checks, those with a fault first, with what to do.
func (w *writer) checks(p Page) {
	var checks []health.Check
	for state := health.Failed; state >= health.OK; state-- {
		for _, c := range p.Report.Checks {
			if c.State == state {
				checks = append(checks, c)
			}
		}
	}
	w.put(`<section id="checks" data-live><h2>Checks</h2><ul class="checks">`)
	shown := checks[:min(len(checks), RowsPerPage)]
	for _, c := range shown {
		w.put(`<li class="%s">%s <strong>%s</strong> <span>%s</span>`, c.State, mark(c.State), c.Name, c.Detail)
		if !c.Since.IsZero() {
			w.put(` <small>for %s</small>`, health.Age(c.Since, p.Now))
		}
		if c.State != health.OK && p.Advice != nil {
			if advice := p.Advice(c); advice != "" {
				w.put(`<p class="advice">%s</p>`, advice)
			}
		}
		w.put("</li>")
	}
	w.put("</ul>")
	if more := len(checks) - len(shown); more > 0 {
		w.put("<p>%s more, all in the same state as the last one or a better one.</p>", more)
	}
	w.put("</section>\n")
}

// table writes a table. Its style makes a card of each row on a narrow screen; the roles
// keep it a table for a screen reader.
func (w *writer) table(t Table, q Query) {
	w.put(`<section id="%s"><h2>%s</h2>`, t.ID, t.Title)
	if t.Searches {
		w.put(`<form role="search" action="#%s"><label>Search: <input type="search" name="q" value="%s" maxlength="%s"></label> <button>Search</button></form>`, t.ID, q.Search, mostSearch)
	}
	w.put(`<div id="%s-rows" data-live>`, t.ID)
	if t.Note != "" {
		w.put("<p>%s</p>", t.Note)
	}
	if len(t.Rows) == 0 {
		w.put(`<p class="none">%s</p></div></section>`+"\n", t.None)
		return
	}
	w.put(`<table role="table" aria-label="%s"><thead role="rowgroup"><tr role="row">`, t.Title)
	for _, c := range t.Columns {
		w.put(`<th role="columnheader" scope="col"%s>%s</th>`, numberClass(c), c.Title)
	}
	w.put(`</tr></thead><tbody role="rowgroup">` + "\n")
	for _, r := range t.Rows {
		w.put(`<tr role="row" class="%s">`, r.State)
		for i, text := range r.Cells {
			w.put(`<td role="cell"%s data-column="%s">%s</td>`, numberClass(t.Columns[i]), t.Columns[i].Title, text)
		}
		w.put("</tr>\n")
	}
	w.put("</tbody></table>")
	if t.Searches {
		w.pager(t, q)
	}
	w.put("</div></section>\n")
}

func numberClass(c Column) markup {
	if c.Number {
		return ` class="number"`
	}
	return ""
}

// pager writes the links to the other pages of a table.
func (w *writer) pager(t Table, q Query) {
	from, to := q.Window(t.Matching)
	w.put(`<nav class="pager" aria-label="Pages of %s"><span>%s to %s of %s</span>`, strings.ToLower(t.Title), Count(from+1), Count(to), Count(t.Matching))
	number := from/RowsPerPage + 1
	link := func(number int, label string) {
		values := url.Values{"page": {fmt.Sprint(number)}}
		if q.Search != "" {
			values.Set("q", q.Search)
		}
		w.put(` <a href="?%s#%s">%s</a>`, values.Encode(), t.ID, label)
	}
	if number > 1 {
		link(number-1, "Previous page")
	}
	if to < t.Matching {
		link(number+1, "Next page")
	}
	w.put("</nav>")
}

// levels are the states as which the levels of the log are shown.
func levelState(l slog.Level) health.State {
	switch {
	case l >= slog.LevelError:
		return health.Failed
	case l >= slog.LevelWarn:
		return health.Warning
	}
	return health.OK
}

// events writes the timeline.
func (w *writer) events(p Page) {
	w.put(`<section id="events" data-live><h2>Events</h2>`)
	if len(p.Events) == 0 {
		w.put(`<p class="none">None since the start.</p></section>` + "\n")
		return
	}
	w.put(`<p>The last %s since the start, the newest first.</p><ol class="events" reversed>`+"\n", len(p.Events))
	for _, e := range p.Events {
		w.put(`<li class="%s">%s `, levelState(e.Level), clock(e.At, p.Now))
		if s := levelState(e.Level); s != health.OK {
			w.put("%s ", mark(s))
		}
		w.put("<strong>%s</strong>", e.Label)
		if e.Times > 1 {
			w.put(" (%s times)", Count(e.Times))
		}
		w.put(" <span>%s</span></li>\n", e.Detail)
	}
	w.put("</ol></section>\n")
}
