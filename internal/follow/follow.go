// Package follow tells when the content of a file may have changed: written in
// place, replaced, swapped by a link on the way to it, removed, back again.
//
// It is told so by the kernel (inotify(7)), and costs nothing while nothing
// happens. Where the kernel cannot tell, it looks at the file now and then.
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
	// settle is for how long nothing may happen before a change is told: editors
	// write a file piece by piece.
	settle = 100 * time.Millisecond
	// atLatest is when it is told though it never settles.
	atLatest = 500 * time.Millisecond
	// lookEvery is how often a file is looked at of which the kernel does not
	// tell, unless the options say.
	lookEvery = 10 * time.Second
)

// Options say how a file is followed.
type Options struct {
	// Since is the look that was had before the file was read, so that what
	// changed meanwhile is told too. With none, one change is told at the start.
	Since Look
	// Every is how often the file is looked at whatever the kernel tells, which
	// hears nothing of some changes: a mount over a directory, another machine's
	// writing. 0: never, unless the kernel does not tell at all.
	Every time.Duration
	Log   *slog.Logger
}

// Changes returns a channel that is sent to whenever the content of the named
// file may have become another one, a settled one if possible, within a second.
// It holds one change, so that none is lost on a reader who is busy, and is never
// closed. Following ends with ctx.
func Changes(ctx context.Context, name string, o Options) <-chan struct{} {
	f := &file{name: name, o: o, told: o.Since, changes: make(chan struct{}, 1)}
	go f.follow(ctx)
	return f.changes
}

// A file is one that is followed.
type file struct {
	name    string
	o       Options
	changes chan struct{}

	watcher *fsnotify.Watcher // nil: inotify cannot be had
	way     way
	look    *time.Ticker
	blind   bool // that the kernel does not tell of everything is logged

	told Look // what it was like at the last change that was told

	// A change that is not told yet.
	pending bool
	certain bool // an event said so: it is told however the file looks
	seen    Look // what it was like when looked at last
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
			f.hear(e)
		case err := <-failures:
			// Of events that did not fit in the queue, any may have been about
			// the file.
			f.change(true)
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				f.goBlind(err)
				_ = f.watcher.Close()
				f.watcher, events, failures = nil, nil, nil
			}
		case <-f.look.C:
			f.check()
		case <-f.settled.C:
			f.tell()
		}
	}
}

// hear decides what an event means. Of a directory, they are about all that is in
// it, mostly other files.
func (f *file) hear(e fsnotify.Event) {
	place := filepath.Clean(e.Name) // what is in / has two slashes
	switch {
	case !f.way.places[place]:
	case place == f.way.end || e.Op != fsnotify.Chmod:
		f.change(true)
	default:
		f.check() // the attributes of a directory: it may be open only now
	}
}

// check looks whether there is a change that was not told.
func (f *file) check() {
	if f.pending {
		return // it will be looked at
	}
	f.walk()
	if !At(f.name).same(f.told) {
		f.change(false)
	}
}

// change has a change told as soon as the file has settled.
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

// tell tells a change, or waits on if the file is still being written, of which
// there are no events where a directory on the way is new.
func (f *file) tell() {
	f.walk()
	now := At(f.name)
	if wait := min(settle, time.Until(f.latest)); wait > 0 && !now.like(f.seen) {
		f.seen = now
		f.settled.Reset(wait)
		return
	}
	if f.certain || !now.same(f.told) {
		select {
		case f.changes <- struct{}{}:
		default: // the one before is not taken yet
		}
	}
	f.pending, f.certain, f.told = false, false, now
}

// walk watches the way to the file as it is now, and has to be done before the
// file is looked at: what happens after that look is then told.
func (f *file) walk() {
	if err := unseen(f.name); err != nil {
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
			_ = f.watcher.Remove(path) // mostly gone with what it watched
		}
	}
}

// goBlind has the file looked at regularly, since the kernel does not tell of
// everything.
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

// missing reports whether an error says that something is not there (any more).
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotDirectory)
}
