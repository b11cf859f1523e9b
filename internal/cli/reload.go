package cli

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/wording"
)

// lookEvery is the interval at which a proxy polls its file beside the kernel's
// events, and retries a reload that failed. It equals the router's default of
// EGRESS_HEALTH_INTERVAL.
const lookEvery = 10 * time.Second

// hangups returns a channel of SIGHUP, which requests a reload of the destination
// file. Until stop is called SIGHUP does not end the program.
func hangups() (hangup <-chan os.Signal, stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// A reloader reads a destination file again when it changes.
type reloader struct {
	file   string      // empty: the list is in the environment
	since  follow.Look // taken before the file was first read
	every  time.Duration
	hangup <-chan os.Signal
	log    *slog.Logger

	// reload reads the file and applies it. After a *config.Error, which is about
	// the file's content, the previous list stays in effect; any other error is
	// about applying it.
	reload func() error
	// result is called after a reload: with an empty text after a success, and with
	// the error's text if it differs from the previous one.
	result func(trouble string)

	trouble string // the last error, logged once
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
			again = time.After(r.every) // a port may be free by then
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
			r.trouble = "" // the operator expects an answer
		case <-changes:
		case <-again:
		}
		r.complain(r.reload())
	}
}

// complain logs an error unless it is the same as the last time.
func (r *reloader) complain(err error) {
	if err == nil {
		r.trouble = ""
		r.result("")
		return
	}
	fault, invalid := errors.AsType[*config.Error](err)
	trouble := wording.OneLine(err.Error())
	if invalid {
		trouble = fault.Line()
	}
	if trouble == r.trouble {
		return
	}
	r.trouble = trouble
	r.result(trouble)
	if invalid {
		r.log.Error("invalid destination file, keeping previous destinations", "file", r.file, "error", fault.Sentence, "hint", fault.Advice())
		return
	}
	r.log.Error("destination file partly applied", "file", r.file, "error", err)
}
