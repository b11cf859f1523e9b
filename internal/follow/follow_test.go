package follow

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// patience is how long a test waits for an event, which a busy machine may delay.
const patience = 10 * time.Minute

// A reader reads a file after every change.
type reader struct {
	*testing.T
	file    string
	log     output
	mu      sync.Mutex
	content string // content at the last read
	reads   int
}

// read follows a file until the test ends.
func read(t *testing.T, file string, every time.Duration) *reader {
	t.Helper()
	r := &reader{T: t, file: file}
	o := Options{Since: At(file), Every: every, Log: slog.New(slog.NewTextHandler(&r.log, nil))}
	if !o.Since.certain { // just written; a test begins with an older file
		o.Since.certain = true
	}
	r.again()
	r.reads = 0
	ctx, stop := context.WithCancel(t.Context())
	changes := Changes(ctx, file, o)
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changes:
				r.again()
			}
		}
	})
	t.Cleanup(func() { stop(); reading.Wait() })
	return r
}

func (r *reader) again() {
	content, err := os.ReadFile(r.file)
	if err != nil {
		content = []byte("missing")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.content = string(content)
	r.reads++
}

func (r *reader) state() (content string, reads int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.content, r.reads
}

// want waits until the last read has returned a content.
func (r *reader) want(content string) {
	r.Helper()
	begin := time.Now()
	for got := ""; got != content; time.Sleep(time.Millisecond) {
		if got, _ = r.state(); got != content && time.Since(begin) > patience {
			r.Fatalf("after %s the content is %q, want %q\n%s", patience, got, content, r.log.String())
		}
	}
}

// awaitRead waits for the first read after a change.
func (r *reader) awaitRead() {
	r.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, reads := r.state(); reads > 0 {
			return
		}
		if time.Since(begin) > patience {
			r.Fatalf("no read after %s\n%s", patience, r.log.String())
		}
	}
}

// wantNoRead checks that the file was not read, after a while in which it would
// have been.
func (r *reader) wantNoRead() {
	r.Helper()
	time.Sleep(3 * settle)
	if _, reads := r.state(); reads > 0 {
		r.Errorf("read %d times, want no read", reads)
	}
}

type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func check(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func write(t testing.TB, name, content string) {
	t.Helper()
	check(t, os.WriteFile(name, []byte(content), 0o600))
}

// A mount is a volume in the layout of the kubelet (AtomicWriter).
type mount struct {
	t        testing.TB
	dir      string
	versions int
}

func newMount(t testing.TB) *mount { return &mount{t: t, dir: t.TempDir()} }

// set sets the content of the volume's key, in the order of the kubelet.
func (m *mount) set(content string) {
	m.t.Helper()
	before := fmt.Sprintf("..2026_01_02_%d", m.versions)
	m.versions++
	data := fmt.Sprintf("..2026_01_02_%d", m.versions)
	check(m.t, os.Mkdir(filepath.Join(m.dir, data), 0o755))
	write(m.t, filepath.Join(m.dir, data, "list"), content)
	check(m.t, os.Symlink(data, filepath.Join(m.dir, "..data_tmp")),
		os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")))
	if m.versions == 1 {
		check(m.t, os.Symlink("..data/list", filepath.Join(m.dir, "list")))
	}
	check(m.t, os.RemoveAll(filepath.Join(m.dir, before)))
}

func TestKubelet(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.set("old")
	r := read(t, filepath.Join(m.dir, "list"), 0)
	m.set("new")
	r.want("new")
	for n := range 200 {
		m.set(fmt.Sprint("version ", n))
	}
	r.want("version 199")
	m.set("again")
	r.want("again")
	// The key is removed and added again, as in a ConfigMap that is edited.
	check(t, os.Remove(filepath.Join(m.dir, "list")))
	r.want("missing")
	check(t, os.Symlink("..data/list", filepath.Join(m.dir, "list")))
	r.want("again")
	// Only the directory of the links' target has an event of this.
	write(t, filepath.Join(m.dir, "list"), "in place")
	r.want("in place")
}

// Ways to write a file.
func TestWrite(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, file string){
		"in place": func(t *testing.T, file string) { write(t, file, "new") },
		"of the same length and time": func(t *testing.T, file string) {
			info, err := os.Stat(file)
			write(t, file, "new")
			check(t, err, os.Chtimes(file, time.Time{}, info.ModTime()))
		},
		"renamed over": func(t *testing.T, file string) {
			write(t, file+"~", "new")
			check(t, os.Rename(file+"~", file))
		},
		"with a backup": func(t *testing.T, file string) {
			check(t, os.Rename(file, file+"~"))
			write(t, file, "new")
		},
		"removed first": func(t *testing.T, file string) {
			check(t, os.Remove(file))
			write(t, file, "new")
		},
		"made a link": func(t *testing.T, file string) {
			elsewhere := filepath.Join(t.TempDir(), "list")
			write(t, elsewhere, "other")
			check(t, os.Remove(file), os.Symlink(elsewhere, file))
			time.Sleep(2 * settle)
			write(t, elsewhere, "new")
		},
		"the directory replaced": func(t *testing.T, file string) {
			dir := filepath.Dir(file)
			check(t, os.RemoveAll(dir), os.Mkdir(dir, 0o755))
			write(t, file, "new")
		},
		"the directory replaced slowly": func(t *testing.T, file string) {
			dir := filepath.Dir(file)
			check(t, os.RemoveAll(dir))
			time.Sleep(3 * settle)
			check(t, os.Mkdir(dir, 0o755))
			time.Sleep(3 * settle)
			write(t, file, "new")
		},
		"the directory renamed": func(t *testing.T, file string) {
			dir := filepath.Dir(file)
			check(t, os.Mkdir(dir+"2", 0o755))
			write(t, filepath.Join(dir+"2", "list"), "new")
			check(t, os.Rename(dir, dir+"1"), os.Rename(dir+"2", dir))
		},
		"unreadable for a while": func(t *testing.T, file string) {
			dir := filepath.Dir(file)
			check(t, os.Chmod(dir, 0))
			time.Sleep(2 * settle)
			check(t, os.Chmod(dir, 0o755))
			write(t, file+"~", "new")
			check(t, os.Rename(file+"~", file))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "a", "b")
			check(t, os.MkdirAll(dir, 0o755))
			file := filepath.Join(dir, "list")
			write(t, file, "old")
			r := read(t, file, 0)
			check(t, os.Chmod(file, 0o640))
			r.awaitRead() // now the file is watched
			change(t, file)
			r.want("new")
		})
	}
}

// inBubble follows a file on synctest's clock. write changes the file and sends the
// event; changes is sent to as that of Changes.
func inBubble(t *testing.T, test func(t *testing.T, write func(content string), changes <-chan struct{})) {
	synctest.Test(t, func(t *testing.T) {
		name := filepath.Join(t.TempDir(), "list")
		write(t, name, "old")
		f := &file{
			name: name, sent: At(name), changes: make(chan struct{}, 1),
			way: way{places: map[string]bool{name: true}, end: name},
		}
		ctx, stop := context.WithCancel(t.Context())
		events := make(chan fsnotify.Event)
		go f.run(ctx, events, nil, nil)
		test(t, func(content string) {
			write(t, name, content)
			events <- fsnotify.Event{Name: name, Op: fsnotify.Write}
		}, f.changes)
		stop()
		synctest.Wait()
	})
}

// A file that is written piece by piece is read once, when it has settled.
func TestPieces(t *testing.T) {
	inBubble(t, func(t *testing.T, write func(string), changes <-chan struct{}) {
		var last time.Time
		for n := range 4 {
			time.Sleep(settle - time.Millisecond)
			write(strings.Repeat("piece ", n))
			last = time.Now()
		}
		<-changes
		// At the first look the file differs from that of the first piece.
		if d := time.Since(last); d < settle || d > 2*settle {
			t.Errorf("the change is sent %s after the last write, want %s to %s", d, settle, 2*settle)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(changes) > 0 {
			t.Error("the change is sent twice")
		}
	})
}

// A file that is written all the time is read every atLatest.
func TestPermanentWrites(t *testing.T) {
	inBubble(t, func(t *testing.T, write func(string), changes <-chan struct{}) {
		var sent []time.Duration
		begin := time.Now()
		for n := 0; time.Since(begin) < 4*atLatest; n++ {
			write(fmt.Sprint(n))
			time.Sleep(settle / 10)
			select {
			case <-changes:
				sent = append(sent, time.Since(begin))
			default:
			}
		}
		if len(sent) != 4-1 && len(sent) != 4 || sent[0] < atLatest || sent[0] > atLatest+settle/10 {
			t.Errorf("changes are sent after %s, want one every %s", sent, atLatest)
		}
	})
}

// Any directory on the path may be a link that is swapped, not only the kubelet's.
func TestLinkedDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, release := range []string{"1", "2"} {
		check(t, os.MkdirAll(filepath.Join(dir, release, "etc"), 0o755))
		write(t, filepath.Join(dir, release, "etc", "list"), "release "+release)
	}
	current := filepath.Join(dir, "current")
	check(t, os.Symlink("./1/../1/", current))
	r := read(t, filepath.Join(current, "etc", "list"), 0)
	check(t, os.Symlink(filepath.Join(dir, "2"), current+"~"), os.Rename(current+"~", current))
	r.want("release 2")
	write(t, filepath.Join(dir, "2", "etc", "list"), "in place")
	r.want("in place")
	check(t, os.Remove(current), os.Symlink("current", current)) // a loop
	r.want("missing")
	check(t, os.Remove(current), os.Symlink("1", current))
	r.want("release 1")
}

// A file with a relative name is created after following has begun.
func TestCreatedLater(t *testing.T) {
	t.Chdir(t.TempDir())
	r := read(t, "a/b/list", 0)
	check(t, os.MkdirAll("a/b", 0o755))
	time.Sleep(3 * settle) // in which the new directories are found
	write(t, "a/b/list", "late")
	r.want("late")
}

// Changes of other files cause no read.
func TestOtherFiles(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.set("old")
	r := read(t, filepath.Join(m.dir, "list"), 20*time.Millisecond)
	time.Sleep(2 * clockStep) // after which an equal file time means an equal content
	r.wantNoRead()
	for n := range 100 {
		file := filepath.Join(m.dir, "other")
		write(t, file, fmt.Sprint(n))
		write(t, filepath.Join(m.dir, "..data", "other"), fmt.Sprint(n))
		check(t, os.Rename(file, filepath.Join(m.dir, "another")))
	}
	check(t, os.Mkdir(filepath.Join(m.dir, "list~"), 0o755), os.Chmod(m.dir, 0o700))
	_, err := os.ReadFile(r.file)
	check(t, err)
	r.wantNoRead()
}

// Without Since, one change is sent at the start.
func TestWithoutSince(t *testing.T) {
	t.Parallel()
	changes := Changes(t.Context(), filepath.Join(t.TempDir(), "list"), Options{})
	select {
	case <-changes:
	case <-time.After(patience):
		t.Error("no change is sent")
	}
	select {
	case <-changes:
		t.Error("a second change is sent")
	case <-time.After(3 * settle):
	}
}

// A write after the look is sent, even within the same tick of the clock, when the
// file looks the same.
func TestSince(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "list")
	write(t, file, "old")
	since := At(file)
	write(t, file, "new")
	select {
	case <-Changes(t.Context(), file, Options{Since: since}):
	case <-time.After(patience):
		t.Error("no change is sent")
	}
}

// If no inotify instance or file can be opened, the file is polled.
func TestNoInotify(t *testing.T) {
	for _, test := range []struct{ option, every time.Duration }{{time.Minute, time.Minute}, {0, lookEvery}} {
		synctest.Test(t, func(t *testing.T) {
			var limit unix.Rlimit
			check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
			m := newMount(t)
			m.set("old")
			check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}))
			defer func() { check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
			r := read(t, filepath.Join(m.dir, "list"), test.option)
			synctest.Wait()
			check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))

			want := func(content string) {
				t.Helper()
				time.Sleep(test.every + atLatest)
				synctest.Wait()
				if got, _ := r.state(); got != content {
					t.Errorf("the last content is %q, want %q", got, content)
				}
			}
			m.set("new")
			want("new")
			check(t, os.Remove(filepath.Join(m.dir, "..data")))
			want("missing")
			m.set("back")
			want("back")
			write(t, r.file, "in place")
			want("in place")
			time.Sleep(time.Hour)
			synctest.Wait()
			if _, reads := r.state(); reads != 4 {
				t.Errorf("read %d times", reads)
			}
			if log := r.log.String(); strings.Count(log, "\n") != 1 || !strings.Contains(log, fmt.Sprint("every=", test.every)) || !strings.Contains(log, "too many open files") {
				t.Errorf("logged: %s", log)
			}
		})
	}
}

// The end of following ends its goroutines and closes its files.
func TestNothingIsLeft(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	count := func() (goroutines, files int) {
		open, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return runtime.NumGoroutine(), len(open)
	}
	// The runtime opens files of its own for the first file that is polled.
	r, w, err := os.Pipe()
	check(t, err, r.Close(), w.Close())
	goroutines, files := count()
	ctx, stop := context.WithCancel(t.Context())
	for range 5 {
		<-Changes(ctx, file, Options{Every: time.Minute})
	}
	stop()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		g, f := count()
		if g <= goroutines && f <= files {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d goroutines and %d files are open, before it was %d and %d", g, f, goroutines, files)
		}
	}
}
