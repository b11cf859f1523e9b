package cni

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// A level is the importance of a line of the log.
type level uint8

const (
	levelNone level = iota
	levelError
	levelWarning
	levelDebug
)

var levelNames = map[level]string{levelError: "error", levelWarning: "warning", levelDebug: "debug"}

// levelOf returns the least important level that a value of log_level shows.
func levelOf(value string) level {
	switch strings.ToLower(value) {
	case "debug":
		return levelDebug
	case "panic":
		return levelNone
	case "error":
		return levelError
	}
	return levelWarning
}

// maxLog is the size of the log from which it begins again, in bytes. The lines until then
// stay in a second file.
const maxLog = 1 << 20

// A nodeLog is the log of the plugin on the node. Calls at the same time share the file. A
// line that cannot be written is lost: no call fails for that reason.
type nodeLog struct {
	file   string // empty: none
	level  level
	stderr *slog.Logger
	now    func() time.Time
}

// line writes one line with one call of the kernel.
func (l nodeLog) line(at level, format string, args ...any) {
	l.lines(at, fmt.Sprintf(format, args...))
}

// lines writes lines, each with one call of the kernel, while no other call writes.
func (l nodeLog) lines(at level, texts ...string) {
	if l.file == "" || at > l.level {
		return
	}
	if err := l.write(at, texts); err != nil {
		l.stderr.Warn("log not written", "file", l.file, "error", err)
	}
}

func (l nodeLog) write(at level, texts []string) error {
	f, size, err := l.open()
	if err != nil {
		return err
	}
	for _, text := range texts {
		line := l.format(at, text)
		if size > 0 && size+int64(len(line)) >= maxLog {
			// Another call that waits for the lock finds the file renamed.
			err = os.Rename(l.file, l.file+".old")
			_ = f.Close() // everything is written
			if err != nil {
				return err
			}
			if f, size, err = l.open(); err != nil {
				return err
			}
		}
		if _, err := f.WriteString(line); err != nil {
			_ = f.Close() // the first error counts
			return err
		}
		size += int64(len(line))
	}
	return f.Close()
}

// format returns a line of the log.
func (l nodeLog) format(at level, text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	line := fmt.Sprintf("%s [%s] %s", l.now().UTC().Format("2006-01-02T15:04:05Z"), levelNames[at], text)
	const end = " (cut)"
	if len(line) > maxLog-2 {
		line = line[:maxLog-2-len(end)] + end
	}
	return line + "\n"
}

// open opens and locks the file, and returns its size. The directory may be one in which
// every user can create files, such as /tmp: a link, a pipe or a file of another user is an
// error. Closing the file unlocks it.
func (l nodeLog) open() (*os.File, int64, error) {
	for {
		f, err := os.OpenFile(l.file, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, 0, err
		}
		var s, now unix.Stat_t
		if err = unix.Fstat(int(f.Fd()), &s); err == nil && (s.Mode&unix.S_IFMT != unix.S_IFREG || s.Nlink > 1 || int(s.Uid) != os.Geteuid()) {
			err = fmt.Errorf("expected a file of this user with one name, found mode %#o, %d names, user %d", s.Mode, s.Nlink, s.Uid)
		}
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err == nil {
			err = unix.Fstat(int(f.Fd()), &s)
		}
		if err != nil {
			_ = f.Close()
			return nil, 0, err
		}
		if unix.Lstat(l.file, &now) == nil && now.Ino == s.Ino && now.Dev == s.Dev {
			return f, s.Size, nil
		}
		_ = f.Close() // renamed in the meantime
	}
}

// warnings returns a logger whose warnings and errors are in the log of the node, and on
// stderr.
func (l nodeLog) warnings() *slog.Logger {
	handler := slog.NewTextHandler(&lineWriter{log: l}, &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}})
	return slog.New(slog.NewMultiHandler(handler, l.stderr.Handler()))
}

// A lineWriter writes each line of a handler as a warning.
type lineWriter struct {
	mu  sync.Mutex
	log nodeLog
}

// Write writes one line.
func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log.line(levelWarning, "%s", strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}
