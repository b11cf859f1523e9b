package page

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// The limits of the events that are kept: some 50 KB.
const (
	mostEvents = 100
	mostDetail = 400 // bytes of the attributes of one
)

// An Event is a line of the program's log.
type Event struct {
	Level  slog.Level
	Label  string
	Detail string    // the attributes
	Times  int       // number of times in a row
	At     time.Time // the last time
}

// Events keep the last lines of a log. The zero value is ready for use, and a nil Events
// keeps nothing. Its methods may be called from any goroutine.
type Events struct {
	mu   sync.Mutex
	list []Event // oldest first
}

// Logger returns a logger that writes to the same log, and keeps lines from level info
// on, whatever the level of the log is.
func (e *Events) Logger(log *slog.Logger) *slog.Logger {
	if e == nil {
		return log
	}
	return slog.New(&handler{Handler: log.Handler(), events: e})
}

// All returns the events, the newest first.
func (e *Events) All() []Event {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	all := slices.Clone(e.list)
	slices.Reverse(all)
	return all
}

func (e *Events) add(n Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if last := len(e.list) - 1; last >= 0 && e.list[last].Label == n.Label && e.list[last].Detail == n.Detail && e.list[last].Level == n.Level {
		e.list[last].Times++
		e.list[last].At = n.At
		return
	}
	if len(e.list) == mostEvents {
		e.list = slices.Delete(e.list, 0, 1)
	}
	e.list = append(e.list, n)
}

// A handler is a slog.Handler that keeps the lines of another one.
type handler struct {
	slog.Handler
	events *Events
	attrs  []slog.Attr // of WithAttrs
}

// Enabled reports whether the line is kept, or the log has it.
func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || h.Handler.Enabled(ctx, level)
}

// Handle keeps a line, and passes it on.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		h.keep(r)
	}
	if !h.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs returns a handler with more attributes.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{h.Handler.WithAttrs(attrs), h.events, slices.Concat(h.attrs, attrs)}
}

// WithGroup returns a handler that keeps attributes without the group's name.
func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{h.Handler.WithGroup(name), h.events, h.attrs}
}

// client is the attribute of all lines about one client. These are no events of the
// program: there is any number of them, and they contain what the client asked for.
const client = "client"

func (h *handler) keep(r slog.Record) {
	var b strings.Builder
	skip := false
	write := func(a slog.Attr) bool {
		skip = skip || a.Key == client
		if b.Len() > 0 {
			b.WriteString(", ")
		}
		if b.Len() < mostDetail { // the keys of all others count as well
			b.WriteString(strings.ReplaceAll(a.Key, "_", " ") + " " + strings.ReplaceAll(a.Value.String(), "\n", "; "))
		}
		return !skip
	}
	for _, a := range h.attrs {
		write(a)
	}
	r.Attrs(write)
	if skip {
		return
	}
	h.events.add(Event{r.Level, r.Message, shorten(b.String()), 1, r.Time})
}

// shorten returns a text of at most mostDetail bytes.
func shorten(text string) string {
	if len(text) <= mostDetail {
		return text
	}
	end := mostDetail
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + " …"
}
