package cni

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newLog returns a log in a directory of its own, and what it reports on stderr.
func newLog(t *testing.T) (nodeLog, *bytes.Buffer) {
	t.Helper()
	var stderr bytes.Buffer
	return nodeLog{
		file: filepath.Join(t.TempDir(), "log"), level: levelDebug, stderr: slog.New(slog.NewTextHandler(&stderr, nil)),
		now:  func() time.Time { return time.Date(2021, 4, 26, 14, 27, 20, 7, time.FixedZone("", 2*3600)) },
		wait: maxLogWait, busy: new(bool),
	}, &stderr
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestLogLine(t *testing.T) {
	l, stderr := newLog(t)
	l.line(levelDebug, "Called CNI %s", "ADD")
	l.line(levelError, "a\nb\x1b[0m\tc")
	l.warnings().Warn("no carrier", "interface", "net1")
	want := "2021-04-26T12:27:20Z [debug] Called CNI ADD\n2021-04-26T12:27:20Z [error] a b [0m c\n2021-04-26T12:27:20Z [warning] msg=\"no carrier\" interface=net1\n"
	if got := read(t, l.file); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := stderr.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `msg="no carrier" interface=net1`) {
		t.Errorf("stderr %q", got)
	}
}

func TestLogLevels(t *testing.T) {
	for value, want := range map[string]string{"debug": "debug warning error", "DEBUG": "debug warning error", "verbose": "warning error", "": "warning error", "error": "error", "panic": ""} {
		l, _ := newLog(t)
		l.level = levelOf(value)
		for _, at := range []level{levelDebug, levelWarning, levelError} {
			l.line(at, "%s", levelNames[at])
		}
		text, _ := os.ReadFile(l.file) // without a line there is no file
		var got []string
		for line := range strings.Lines(string(text)) {
			got = append(got, strings.Fields(line)[2])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("level %q: %v, want %s", value, got, want)
		}
	}
}

// A file that another user could have made is not written: nothing is followed, waited for
// or overwritten.
func TestLogRefusesFilesOfOthers(t *testing.T) {
	for name, make := range map[string]func(file, other string) error{
		"link":          func(file, other string) error { return os.Symlink(other, file) },
		"dangling link": func(file, other string) error { return os.Symlink(other+"2", file) },
		"second name":   func(file, other string) error { return os.Link(other, file) },
		"pipe":          func(file, _ string) error { return unix.Mkfifo(file, 0o600) },
		"directory":     func(file, _ string) error { return os.Mkdir(file, 0o700) },
		"another text":  func(file, _ string) error { return os.WriteFile(file, []byte("root:x:0:0:"), 0o600) },
	} {
		l, stderr := newLog(t)
		other := filepath.Join(t.TempDir(), "other")
		if err := os.WriteFile(other, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := make(l.file, other); err != nil {
			t.Fatal(err)
		}
		l.line(levelError, "text")
		if !strings.Contains(stderr.String(), "log not written") {
			t.Errorf("%s: nothing on stderr", name)
		}
		if _, err := os.Stat(other + "2"); read(t, other) != "x" || err == nil {
			t.Errorf("%s: the other file is written", name)
		}
	}
}

// The file stays below its limit, also with one line that exceeds it, and with many writers,
// each of whose lines is whole.
func TestLogIsBounded(t *testing.T) {
	l, stderr := newLog(t)
	l.line(levelDebug, "%s", strings.Repeat("x", 3*maxLog))
	// With few lines in a file, others fill it again while a call opens it after its rename.
	for _, size := range []int{20_000, maxLog / 2} {
		line := strings.Repeat("y", size)
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				for range 20 {
					l.line(levelDebug, "%d %s", i, line)
					for _, file := range []string{l.file, l.file + ".old"} {
						if info, err := os.Stat(file); err == nil && info.Size() >= maxLog { // an error: it is just renamed
							t.Errorf("%s has %d bytes", file, info.Size())
						}
					}
				}
			})
		}
		all.Wait()
		for _, file := range []string{l.file, l.file + ".old"} {
			text := read(t, file)
			if len(text) >= maxLog || len(text) == 0 {
				t.Errorf("%s has %d bytes", file, len(text))
			}
			for line := range strings.Lines(text) {
				if !strings.HasPrefix(line, "2021-04-26T12:27:20Z [debug] ") || !strings.HasSuffix(line, "\n") {
					t.Errorf("%s has a line of %d bytes: %.60q", file, len(line), line)
				}
			}
		}
	}
	if stderr.Len() > 0 {
		t.Error(stderr)
	}
	info, err := os.Stat(l.file)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
}

// A log that cannot be written fails no call, and without a name there is none.
func TestLogWithoutDirectory(t *testing.T) {
	l, stderr := newLog(t)
	l.file = filepath.Join(l.file, "none", "log")
	l.line(levelError, "text")
	if !strings.Contains(stderr.String(), "log not written") {
		t.Error("nothing on stderr")
	}
	stderr.Reset()
	l.file = ""
	l.line(levelError, "text")
	if stderr.Len() > 0 {
		t.Error(stderr)
	}
}

// The user of an attachment names the file of a log, and the plugin is root on the node: it
// writes in directories for logs alone, and no link leads out of these.
func TestLogStaysInDirectoriesForLogs(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := errors.Join(os.Symlink("/etc", link), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"/etc/ld.so.preload":            "expected a file in /tmp or /var/log",
		"/tmp/../etc/egress-router-log": "expected a file in /tmp or /var/log",
		"egress-router-log":             "expected a file in /tmp or /var/log",
		"/tmp":                          "expected a file in /tmp or /var/log",
		"/tmpfile":                      "expected a file in /tmp or /var/log",
		link + "/egress-router-log":     "path escapes",
		pipe + "/egress-router-log":     "not a directory",
	} {
		l, stderr := newLog(t)
		l.file = file
		l.line(levelError, "text")
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: stderr %q, want %q", file, stderr, want)
		}
		if _, err := os.Stat("/etc/egress-router-log"); err == nil {
			t.Errorf("%s is written", file)
		}
	}
}

// A stopped call that has the lock costs the others the lines, and no time for each.
func TestLogOfStoppedCall(t *testing.T) {
	l, stderr := newLog(t)
	l.line(levelError, "text")
	f, err := os.Open(l.file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	l.wait = time.Millisecond
	for range 3 {
		l.line(levelError, "more")
	}
	if got := stderr.String(); strings.Count(got, "locked by another call for more than 1ms") != 1 {
		t.Errorf("stderr %q", got)
	}
}
