package cli

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
)

// lookEvery is how often a proxy looks at its file besides what the kernel tells
// of it, and tries again what did not work. It is what EGRESS_HEALTH_INTERVAL is
// for the router if not set.
const lookEvery = 10 * time.Second

// hangups returns a channel of SIGHUP, which from now on until stop does not end
// the program: it says to read the file again, where there is one.
func hangups() (hangup <-chan os.Signal, stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// A reloader has a destination file read again whenever it has changed.
type reloader struct {
	file   string      // empty: the list is in the environment
	since  follow.Look // had before the file was read for the first time
	every  time.Duration
	hangup <-chan os.Signal
	log    *slog.Logger

	// reload reads the file and has it hold. On an error what held before still
	// does; a *config.Error is about the file, another about what it asks for.
	reload func() error
	// told is called when reloading went well, with nothing, and with what is
	// wrong, once as long as it is the same.
	told func(trouble string)

	trouble string // what was wrong the last time, said once
}

// run reloads until ctx ends.
func (r *reloader) run(ctx context.Context) {
	var changes <-chan struct{}
	if r.file != "" {
		changes = follow.Changes(ctx, r.file, follow.Options{Since: r.since, Every: r.every, Log: r.log})
	}
	for {
		var again <-chan time.Time
		if r.trouble != "" && r.every > 0 {
			again = time.After(r.every) // such as a port that is not free yet
		}
		select {
		case <-ctx.Done():
			return
		case <-r.hangup:
			if r.file == "" {
				r.log.Info("SIGHUP ignored, no destination file")
				continue
			}
			r.log.Info("SIGHUP received, reloading destinations", "file", r.file)
			r.trouble = "" // who asks gets an answer
		case <-changes:
		case <-again:
		}
		r.complain(r.reload())
	}
}

// complain logs an error, once as long as it is the same.
func (r *reloader) complain(err error) {
	if err == nil {
		r.trouble = ""
		r.told("")
		return
	}
	trouble := strings.ReplaceAll(err.Error(), "\n", "; ")
	if trouble == r.trouble {
		return
	}
	r.trouble = trouble
	r.told(trouble)
	if fault, ok := errors.AsType[*config.Error](err); ok {
		r.log.Error("invalid destination file, keeping previous destinations", "file", r.file, "error", fault.Sentence, "hint", fault.Hint)
		return
	}
	r.log.Error("destination file partly applied", "file", r.file, "error", err)
}
