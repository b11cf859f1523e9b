// Package follow reports that the content of a file may have changed: the file was
// written in place, replaced, swapped by a symbolic link on its path, removed, or
// created.
//
// The kernel notifies it (inotify(7)), so it uses no time while nothing happens. If
// the kernel cannot notify it of every change, it polls the file.
package follow

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is the time without an event after which a change is sent, since
	// editors write a file piece by piece.
	settle = 100 * time.Millisecond
	// atLatest is the time after which a change is sent even if events continue.
	atLatest = 500 * time.Millisecond
	// lookEvery is the default interval of polling a file of which the kernel does
	// not report every change.
	lookEvery = 10 * time.Second
)

// Options are the options of Changes.
type Options struct {
	// Since is a look taken before the file was read, so that a change in between
	// is sent too. With the zero Look, one change is sent at the start.
	Since Look
	// Every is the interval at which the file is polled in any case, since inotify
	// misses some changes: a mount over a directory, a write by another machine.
	// 0: no polling, unless the kernel does not report every change.
	Every time.Duration
	Log   *slog.Logger
}

// Changes returns a channel that receives a value within a second after the content
// of the named file may have changed, once it has settled if it does by then. The
// channel holds one value, so that a busy reader loses no change, and is never
// closed. Following ends with ctx.
func Changes(ctx context.Context, name string, o Options) <-chan struct{} {
	f := &file{name: name, o: o, sent: o.Since, changes: make(chan struct{}, 1)}
	go f.follow(ctx)
	return f.changes
}

// A file is a file that is followed.
type file struct {
	name    string
	o       Options
	changes chan struct{}

	watcher *fsnotify.Watcher // nil: inotify is unavailable
	way     way
	look    *time.Ticker
	blind   bool // the kernel does not report every change, which is logged

	sent Look // at the last change that was sent

	// A change that is not sent yet.
	pending bool
	certain bool // from an event: it is sent even if the file looks the same
	seen    Look // the last look at the file
	settled *time.Timer
	latest  time.Time
}

// follow watches the file until ctx ends.
func (f *file) follow(ctx context.Context) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		f.run(ctx, nil, nil, err)
		return
	}
	defer watcher.Close()
	f.watcher = watcher
	f.run(ctx, watcher.Events, watcher.Errors, nil)
}

// run handles the events of a watcher until ctx ends. blind is why there is none.
func (f *file) run(ctx context.Context, events <-chan fsnotify.Event, failures <-chan error, blind error) {
	f.settled = time.NewTimer(settle)
	f.settled.Stop()
	defer f.settled.Stop()
	f.look = time.NewTicker(lookEvery)
	defer f.look.Stop()
	if f.o.Every > 0 {
		f.look.Reset(f.o.Every)
	} else {
		f.look.Stop()
	}

	if blind != nil {
		f.goBlind(blind)
	}
	f.check()
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-events:
			f.handle(e)
		case err := <-failures:
			// The queue has overflowed: any of the lost events may have been
			// about the file.
			f.change(true)
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				f.goBlind(err)
				_ = f.watcher.Close()
				f.watcher, events, failures = nil, nil, nil
			}
		case <-f.look.C:
			f.check()
		case <-f.settled.C:
			f.send()
		}
	}
}

// handle evaluates an event. The events of a directory are about all its entries,
// most of which are other files.
func (f *file) handle(e fsnotify.Event) {
	place := filepath.Clean(e.Name) // names in / have two slashes
	switch {
	case !f.way.places[place]:
	case place == f.way.end || e.Op != fsnotify.Chmod:
		f.change(true)
	default:
		f.check() // the mode of a directory: the file may be accessible only now
	}
}

// check polls the file for a change that was not sent.
func (f *file) check() {
	if f.pending {
		return // send looks at the file
	}
	f.walk()
	if !At(f.name).same(f.sent) {
		f.change(false)
	}
}

// change schedules a change to be sent when the file has settled.
func (f *file) change(certain bool) {
	f.certain = f.certain || certain
	if !f.pending {
		f.pending = true
		f.latest = time.Now().Add(atLatest)
		f.walk()
		f.seen = At(f.name)
	}
	f.settled.Reset(min(settle, time.Until(f.latest)))
}

// send sends a change, or waits longer if the file is still being written: there are no
// events for that if a directory on its path is new.
func (f *file) send() {
	f.walk()
	now := At(f.name)
	if wait := min(settle, time.Until(f.latest)); wait > 0 && !now.like(f.seen) {
		f.seen = now
		f.settled.Reset(wait)
		return
	}
	if f.certain || !now.same(f.sent) {
		select {
		case f.changes <- struct{}{}:
		default: // the reader has not received the previous one
		}
	}
	f.pending, f.certain, f.sent = false, false, now
}

// walk watches the current path to the file. It comes before a look at the file, so
// that every change after the look has an event.
func (f *file) walk() {
	if err := unreported(f.name); err != nil {
		f.goBlind(err)
	}
	if f.watcher == nil {
		return
	}
	before := f.way
	var err error
	if f.way, err = walk(f.name, f.watcher.Add); err != nil {
		f.goBlind(err)
	}
	for path := range before.watched {
		if !f.way.watched[path] {
			_ = f.watcher.Remove(path) // fails if the watched file is gone
		}
	}
}

// goBlind starts polling the file, since the kernel does not report every change.
func (f *file) goBlind(reason error) {
	if f.blind {
		return
	}
	f.blind = true
	every := f.o.Every
	if every <= 0 {
		every = lookEvery
		f.look.Reset(every)
	}
	if f.o.Log != nil {
		f.o.Log.Warn("file events unavailable, polling file",
			"file", f.name, "every", every, "error", reason)
	}
}

// missing reports whether an error means that a file does not exist (any more).
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotDirectory)
}
