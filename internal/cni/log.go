package cni

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
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

// maxLogWait is how long a line waits for calls that write to the same file. Many calls at a
// time take milliseconds, and a stopped one would stop all pods of the node.
const maxLogWait = 10 * time.Second

// A nodeLog is the log of the plugin on the node. Calls at the same time share the file. A
// line that cannot be written is lost: no call fails for that reason.
type nodeLog struct {
	file   string // empty: none
	level  level
	stderr *slog.Logger
	now    func() time.Time
	wait   time.Duration // see maxLogWait
	busy   *bool         // a line has waited for so long: the others are lost
}

// line writes one line with one call of the kernel.
func (l nodeLog) line(at level, format string, args ...any) {
	l.lines(at, fmt.Sprintf(format, args...))
}

// lines writes lines, each with one call of the kernel, while no other call writes.
func (l nodeLog) lines(at level, texts ...string) {
	if l.file == "" || at > l.level || *l.busy {
		return
	}
	if err := l.write(at, texts); err != nil {
		*l.busy = errors.Is(err, unix.EWOULDBLOCK)
		l.stderr.Warn("log not written", "file", l.file, "error", err)
	}
}

func (l nodeLog) write(at level, texts []string) error {
	dir, name, err := l.directory()
	if err != nil {
		return err
	}
	defer dir.Close()
	f, size, err := l.open(dir, name)
	if err != nil {
		return err
	}
	for _, text := range texts {
		line := l.format(at, text)
		for size > 0 && size+int64(len(line)) >= maxLog {
			// Another call that waits for the lock finds the file renamed. Others may have filled
			// the next one before this call has it.
			err = unix.Renameat(int(dir.Fd()), name, int(dir.Fd()), name+".old")
			_ = f.Close() // everything is written
			if err != nil {
				return err
			}
			if f, size, err = l.open(dir, name); err != nil {
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

// logDirectories are the directories for logs. Whoever may create an attachment in a
// namespace names the file, and the text of its lines, and the plugin is root on the node.
var logDirectories = []string{"/tmp", "/var/log", os.TempDir()}

// directory opens the directory of the file. No link leads out of the directory for logs.
func (l nodeLog) directory() (dir *os.File, name string, err error) {
	for _, top := range logDirectories {
		path, err := filepath.Rel(top, l.file)
		if err != nil || !filepath.IsAbs(l.file) || !filepath.IsLocal(path) || path == "." {
			continue
		}
		root, err := os.OpenRoot(top)
		if err != nil {
			return nil, "", err
		}
		defer root.Close()
		dir, err = root.OpenFile(filepath.Dir(path), unix.O_DIRECTORY, 0)
		return dir, filepath.Base(path), err
	}
	return nil, "", errors.New("expected a file in /tmp or /var/log")
}

// format returns a line of the log.
func (l nodeLog) format(at level, text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	line := fmt.Sprintf("%s [%s] %s", l.now().UTC().Format(timeFormat), levelNames[at], text)
	const end = " (cut)"
	if len(line) > maxLog-2 {
		line = line[:maxLog-2-len(end)] + end
	}
	return line + "\n"
}

// open opens and locks the file, and returns its size. The directory may be one in which
// every user can create files, such as /tmp: a link, a pipe, a file of another user, or one
// that is no log of the plugin, is an error. Closing the file unlocks it.
func (l nodeLog) open(dir *os.File, name string) (*os.File, int64, error) {
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, 0, err
		}
		f := os.NewFile(uintptr(fd), l.file)
		var s, now unix.Stat_t
		if err = unix.Fstat(fd, &s); err == nil && (s.Mode&unix.S_IFMT != unix.S_IFREG || s.Nlink > 1 || int(s.Uid) != os.Geteuid()) {
			err = fmt.Errorf("expected a file of this user with one name, found mode %#o, %d names, user %d", s.Mode, s.Nlink, s.Uid)
		}
		if err == nil {
			err = l.lock(fd)
		}
		if err == nil {
			err = unix.Fstat(fd, &s)
		}
		if err == nil && s.Size > 0 {
			err = checkLog(f)
		}
		if err != nil {
			_ = f.Close()
			return nil, 0, err
		}
		if unix.Fstatat(int(dir.Fd()), name, &now, unix.AT_SYMLINK_NOFOLLOW) == nil && now.Ino == s.Ino && now.Dev == s.Dev {
			return f, s.Size, nil
		}
		_ = f.Close() // renamed in the meantime
	}
}

// lock waits until no other call has the file.
func (l nodeLog) lock(fd int) error {
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		if time.Since(begin) > l.wait {
			return fmt.Errorf("locked by another call for more than %s: %w", l.wait, unix.EWOULDBLOCK)
		}
	}
}

// checkLog returns an error if a file does not begin with a line of the plugin.
func checkLog(f *os.File) error {
	begin := make([]byte, len(timeFormat)+2)
	n, err := f.ReadAt(begin, 0)
	if err != nil && err != io.EOF {
		return err
	}
	at, level, _ := strings.Cut(string(begin[:n]), " ")
	if _, err := time.Parse(timeFormat, at); err != nil || level != "[" {
		return errors.New("expected a log of the plugin, found another file")
	}
	return nil
}

// timeFormat is the time of a line.
const timeFormat = "2006-01-02T15:04:05Z"

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
