package page

import (
	"crypto/sha256"
	_ "embed" // the style and the script
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

//go:embed page.css
var style string

//go:embed page.js
var script string

// mostSearch is the length limit of a search, in bytes.
const mostSearch = 100

// policy is the Content-Security-Policy: the page loads nothing, runs only its own
// script, which may ask the program for the page again, and is in no frame. A text that
// were taken for markup by mistake could run nothing.
var policy = sync.OnceValue(func() string {
	return "default-src 'none'; style-src " + hash(style) + "; script-src " + hash(script) +
		"; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
})

// hash returns the source of an inline style or script (CSP Level 3, section 2.3.1).
func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// Handler serves the page that state returns for a query. It calls state for each
// request, concurrently for concurrent requests.
func Handler(state func(Query) Page) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := query(r)
		text := render(state(q), q)
		h := w.Header()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", policy())
		h.Set("X-Frame-Options", "DENY") // for browsers without frame-ancestors
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		h.Set("Content-Length", strconv.Itoa(len(text)))
		_, _ = w.Write(text) // the client may be gone
	})
}

// query returns the query of a request. Whatever is invalid is ignored.
func query(r *http.Request) Query {
	values := r.URL.Query()
	q := Query{Search: strings.TrimSpace(values.Get("q")), Number: 1}
	if len(q.Search) > mostSearch || !utf8.ValidString(q.Search) {
		q.Search = ""
	}
	if n, err := strconv.Atoi(values.Get("page")); err == nil && n > 1 {
		q.Number = n
	}
	return q
}
